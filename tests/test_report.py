"""The report: one file that needs nothing else, and whose every name is escaped."""

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from conftest import oof
from PIL import Image
from sklearn.metrics import roc_auc_score

from lib import report, score, summary, tables, thresholds

NASTY = '<img src=x onerror=alert(1)>&"$a_b'


@pytest.fixture(scope='module')
def home(ok, tmp_path_factory):
    """A home with folds.csv, images, two runs of others, and the report of their blend."""
    home = tmp_path_factory.mktemp('report')
    rng, table = np.random.default_rng(0), oof(200, 100)
    table = table.assign(
        image_name=[f'<b>{k:03d}&' for k in range(200)],
        path=[f'images/{k % 3}.jpg' for k in range(200)],
        split='train',
        source=np.where(np.arange(200) % 2, 'competition', 'other & <i>'),
        sex=np.where(rng.random(200) < 0.5, 'male', 'female'),
        anatom_site=rng.choice(['torso', '<script>x</script>'], size=200),
    )
    table['pred'] = (table.pred + (table.source != 'competition')) / 2  # higher in the archive
    test = table.head(8).assign(image_name=list('stuvwxyz'), split='test', target=None, fold=None)
    pd.concat([table, test]).drop(columns='pred').to_csv(home / 'folds.csv', index=False)
    (home / 'images').mkdir()
    for k in range(3):
        Image.new('RGB', (200, 160), (200, 40 * k, 90)).save(home / 'images' / f'{k}.jpg')
    for run, pred in (('a', table.pred), (NASTY, (table.pred + rng.random(200)) / 2)):
        folder = home / 'runs' / run.replace('/', '')
        folder.mkdir(parents=True)
        table[['image_name', 'target', 'fold']].assign(pred=pred).to_csv(folder / 'oof.csv')
        test[['image_name']].assign(pred=0.25).to_csv(folder / 'test.csv')
    ok('blend.py', '--home', home, '--how', 'greedy')
    return home


class Page(HTMLParser):
    """Every tag and attribute, the text outside of style, and each table."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open, self.rows = [], '', [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == 'table':
            self.rows.append([])
        elif tag == 'tr':
            self.rows[-1].append([])
        elif tag in ('th', 'td'):
            self.rows[-1][-1].append('')

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if 'style' not in self.open:
            self.text += data
        if self.open[-1:] in (['th'], ['td']):
            self.rows[-1][-1][-1] += data

    def table(self, header: str) -> pd.DataFrame:
        """The only table with a column of this name."""
        (rows,) = [rows for rows in self.rows if header in rows[0]]
        names, *cells = rows
        return pd.DataFrame([line[1:] for line in cells], [line[0] for line in cells], names[1:])


@pytest.fixture(scope='module')
def text(home):
    return (home / 'report' / 'index.html').read_text()


def test_nothing_outside_is_referred_to(text):
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {'link', 'script', 'iframe', 'object', 'base'} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ('src', 'href', 'xlink:href', 'srcset', 'data'):
                assert value.startswith(('data:', '#')), (tag, name, value)
    assert 'url(http' not in text and '@import' not in text


def test_every_picture_decodes_and_none_is_empty(text):
    sources = [attributes['src'] for tag, attributes in Page(text).tags if tag == 'img']
    pictures = [base64.b64decode(source.split('base64,')[1], validate=True) for source in sources]
    pictures = [Image.open(io.BytesIO(data)).convert('RGB') for data in pictures]
    assert [source[:15] for source in sources].count('data:image/png;') == 5  # the figures
    assert 2 * report.N_IMAGES < len(sources) - 5 <= 4 * report.N_IMAGES
    assert all(picture.size == (144, 144) for picture in pictures[5:])
    assert all(np.asarray(picture).std() > 10 for picture in pictures[:5])


def test_every_name_is_escaped(text):
    page = Page(text)
    assert not any('onerror' in attributes for _, attributes in page.tags)
    assert 'script' not in {tag for tag, _ in page.tags}
    assert NASTY in page.text and 'site: <script>x</script>' in page.text
    assert 'other & <i>' in page.text and '<b>' in page.text


@pytest.fixture(scope='module')
def scores(home):
    """The report's scores.json."""
    return json.loads((home / 'report' / 'scores.json').read_text())


def cell(row: dict, names=('value', 'low', 'high'), digits: str = '.4f') -> str:
    """Figures of scores.json as the page shows them."""
    return score.format_estimate(*(row[n] if row[n] is not None else np.nan for n in names), digits)


def test_the_columns_of_the_figures_are_of_the_blend_and_of_the_floor(home, text, scores):
    table, saved = Page(text).table('shortcut floor'), pd.read_csv(home / 'report' / 'oof.csv')
    assert list(table) == ['blend', 'shortcut floor', 'images', 'malignant']
    for column, rows in (('blend', scores['scores']), ('shortcut floor', scores['floor'])):
        shown = {row['label']: cell(row) for row in rows if row['kind'] == 'main'}
        assert table[column].to_dict() == shown
    pooled = table.loc[summary.POOLED]
    assert pooled.blend.startswith(f'{roc_auc_score(saved.target, saved.pred):.4f} [')
    assert pooled.images == '200' and pooled.malignant == str(saved.target.sum())
    rows = saved[saved.source == 'competition']
    within = table.loc['AUC within competition', ['images', 'malignant']].tolist()
    assert within == [str(len(rows)), str(rows.target.sum())]


def test_the_table_of_runs_holds_each_runs_auc_weight_and_difference(home, text, scores):
    table = Page(text).table('minus the blend')
    assert table.index.tolist() == [NASTY, 'a'] == [row['run'] for row in scores['runs']]
    for row, shown in zip(scores['runs'], table.to_dict('records'), strict=True):
        saved = pd.read_csv(home / 'runs' / row['run'].replace('/', '') / 'oof.csv')
        auc = roc_auc_score(saved.target, saved.pred)
        assert shown['AUC'] == cell(row, ('auc', 'auc_low', 'auc_high')) and row['auc'] == auc
        assert shown['weight'] == f'{scores["blend"]["weights"][row["run"]]:.3f}'
        difference = cell(row, ('difference', 'difference_low', 'difference_high'), '+.4f')
        assert shown['minus the blend'].startswith(difference)


def test_probabilities_and_thresholds_are_those_of_the_out_of_fold_predictions(home, text, scores):
    saved, said = pd.read_csv(home / 'report' / 'oof.csv', **tables.EXACT), scores['probability']
    own = saved[saved.source == 'competition']
    quality = Page(text).table('Brier score')['Brier score']
    assert quality['pred'] == f'{((own.pred - own.target) ** 2).mean():.4f}'
    across = said['quality'][1]['brier']  # of each fold by the constant of the others
    assert quality['prob'] == f'{across:.4f}' != f'{((own.prob - own.target) ** 2).mean():.4f}'
    prior, table = own.target.mean(), Page(text).table('true positives')
    assert f'per 1,000 images of which {1000 * prior:.1f} are malignant' in text
    for (label, shown), row in zip(table.iterrows(), said['thresholds'], strict=True):
        called = own.pred >= row['pred']
        tp, fp = called[own.target == 1].mean(), called[own.target == 0].mean()
        assert label == f'{100 * row["wanted"]:.0f} % sensitivity wanted' and tp >= row['wanted']
        assert shown['reached'] == f'{100 * tp:.1f} %'
        assert shown.specificity == f'{100 * (1 - fp):.1f} %'
        assert shown['true positives'] == f'{1000 * prior * tp:.0f}'
        assert shown['false negatives'] == f'{1000 * prior * (1 - tp):.0f}'
        assert shown['false positives'] == f'{1000 * (1 - prior) * fp:.0f}'
        assert called.sum() == (own.prob >= float(shown['prob at least']) * 0.9995).sum()


def test_the_subgroups_hold_the_figures_of_their_own_images(text, scores):
    table = Page(text).table('sensitivity')
    rows = [row for row in scores['scores'] if row['kind'] == 'subgroup']
    assert set(table.index) == {row['label'] for row in rows} and 'sex: male' in table.index
    for row in rows:
        shown = table.loc[row['label']]
        assert shown.images == str(row['images']) and shown.malignant == str(row['malignant'])
        if row['value'] is not None:
            assert shown[summary.OF_SUBGROUPS[row['measure']]] == cell(row)


def test_the_headline_and_the_sheets_say_what_the_files_say(home, text, scores):
    shown, auc = Page(text).text, {row['label']: row for row in scores['scores']}[summary.POOLED]
    assert f'{auc["value"]:.4f}95\xa0% interval {auc["low"]:.4f} to {auc["high"]:.4f}' in shown
    assert f'{scores["in_sample"]:.4f}' in shown and 'optimistic' in shown
    saved = pd.read_csv(home / 'report' / 'oof.csv').set_index('image_name')
    own = saved[saved.source == 'competition']
    at = thresholds.threshold(own.target.to_numpy(), own.pred.to_numpy(), 0.95)
    sheets = text.split('<h2>Images')[1].split('<h3>')[1:5]
    ends = ((1, True), (1, False), (0, False), (0, True))
    for sheet, (target, called) in zip(sheets, ends, strict=True):
        cells = [Page(cell).text for cell in sheet.split('<figcaption>')[1:]]
        names = [cell.split('pred ')[0] for cell in cells]
        preds = saved.pred[names]
        assert names and (saved.target[names] == target).all() and ((preds >= at) == called).all()
        of = saved.pred[(saved.target == target) & ((saved.pred >= at) == called)]
        assert preds.tolist() == of.sort_values(ascending=not called).head(len(names)).tolist()
        for shown, pred in zip(cells, preds, strict=True):
            assert shown.split('pred ')[1].startswith(f'{pred:.3f}')


def test_the_same_files_make_the_same_page(home, text, ok):
    ok('blend.py', '--home', home, '--how', 'greedy')
    assert (home / 'report' / 'index.html').read_text() == text


def test_a_page_that_is_passed_on_has_no_image_and_no_name_of_one(home, text, ok, tmp_path):
    other = shutil.copytree(home, tmp_path / 'other')
    ok('blend.py', '--home', other, '--noimages')
    names = pd.read_csv(home / 'folds.csv').image_name[:200]
    page = (other / 'report' / 'index.html').read_text()
    assert 'image/jpeg' in text and 'image/jpeg' not in page
    assert not [name for name in names if name in Page(page).text]


def test_without_images_or_scores_it_is_shorter_and_whole(home, tmp_path, ok):
    other = tmp_path / 'other'
    shutil.copytree(home, other)
    shutil.rmtree(other / 'images')
    ok('blend.py', '--home', other, '--only', 'a')
    text = (other / 'report' / 'index.html').read_text()
    assert 'image/jpeg' not in text and 'One run: a' in text and 'Rank correlation' not in text
    (other / 'runs' / 'a' / 'oof.csv').unlink()
    ok('blend.py', '--home', other)
    text = (other / 'report' / 'index.html').read_text()
    assert 'no out-of-fold score' in text and 'Rank correlation' in text
    assert not (other / 'report' / 'oof.csv').exists()  # of the blend before


@pytest.mark.parametrize('width', [360, 1280])
def test_a_browser_shows_all_of_it_without_scrolling_sideways(text, width, tmp_path):
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('no Chromium on this machine')
    probe = """<script>addEventListener('load', () => { document.title = JSON.stringify([
      document.documentElement.scrollWidth, document.documentElement.clientWidth,
      [...document.images].filter(i => i.naturalWidth).length
    ]) })</script></body>"""
    page = tmp_path / 'page.html'
    page.write_text(
        f'<!doctype html><iframe style="border:0;width:{width}px;height:900px" srcdoc="'
        + text.replace('</body>', probe).replace('&', '&amp;').replace('"', '&quot;')
        + """"></iframe><script>addEventListener('load', () => setTimeout(() => {
        document.title = frames[0].document.title }, 100))</script>"""
    )
    flags = '--headless --no-sandbox --disable-gpu --hide-scrollbars --dump-dom'
    command = [chromium, *flags.split(), '--virtual-time-budget=5000', f'file://{page}']
    command.insert(-1, f'--user-data-dir={tmp_path / "profile"}')
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = dom.split('<title>')[1].split('</title>')[0]
    scroll, client, n_pictures = json.loads(title)
    assert client == width and scroll <= client
    assert n_pictures == text.count('<img')
