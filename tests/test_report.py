"""The report: one file that needs nothing else, and whose every name is escaped."""

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_curve

from lib import figures, pictures, report

NASTY = '<img src=x onerror=alert(1)>&"$a_b'
N = 200


@pytest.fixture(scope='module')
def home(script, tmp_path_factory):
    """A home with folds.csv, images, two runs of others, and the report of their blend."""
    home = tmp_path_factory.mktemp('report')
    rng = np.random.default_rng(0)
    target = np.r_[np.ones(60), np.zeros(N - 60)].astype(int)
    names = [f'<b>{k:03d}&' for k in range(N)]
    table = pd.DataFrame(
        {
            'image_name': names,
            'path': [f'images/{k % 3}.jpg' for k in range(N)],
            'split': 'train',
            'source': np.where(np.arange(N) % 2, 'competition', 'other & <i>'),
            'patient_id': [f'p{k // 2}' for k in range(N)],
            'group': [f'p{k // 2}' for k in range(N)],
            'target': target,
            'sex': np.where(rng.random(N) < 0.5, 'male', 'female'),
            'age_approx': rng.choice([25, 50, 70], size=N),
            'anatom_site': rng.choice(['torso', '<script>x</script>'], size=N),
            'fold': np.arange(N) // 2 % 5,
        }
    )
    test = table.head(8).assign(
        image_name=[f't{k}' for k in range(8)], split='test', target=np.nan, fold=np.nan
    )
    pd.concat([table, test]).to_csv(home / 'folds.csv', index=False)
    (home / 'images').mkdir()
    for k in range(3):
        Image.new('RGB', (200, 160), (200, 40 * k, 90)).save(home / 'images' / f'{k}.jpg')
    for run in ('a', NASTY):
        folder = home / 'runs' / run.replace('/', '')
        folder.mkdir(parents=True)
        pred = 1 / (1 + np.exp(-(rng.normal(size=N) + 1.5 * target)))
        table[['image_name', 'target', 'fold']].assign(pred=pred).to_csv(folder / 'oof.csv')
        test[['image_name']].assign(pred=0.25).to_csv(folder / 'test.csv')
    history = {'epoch': [1, 2], 'train_loss': [1, 0.5], 'valid_loss': [1, 0.6], 'auc': [0.6, 0.7]}
    (home / 'runs' / 'a' / 'fold0').mkdir()
    history = pd.DataFrame(history).assign(lr=1e-3, seconds=1.0)
    history.to_csv(home / 'runs' / 'a' / 'fold0' / 'history.csv', index=False)
    done = script('blend.py', '--home', home, '--how', 'greedy')
    assert done.returncode == 0, done.stderr
    return home


class Page(HTMLParser):
    """Every tag and attribute, and the text outside of style."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], '', []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if 'style' not in self.open:
            self.text += data


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
    assert 2 * report.N_IMAGES < len(sources) <= 4 * report.N_IMAGES
    for source in sources:
        picture = base64.b64decode(source.removeprefix('data:image/jpeg;base64,'), validate=True)
        assert Image.open(io.BytesIO(picture)).convert('RGB').size == (144, 144)
    svgs = [svg.split('</svg>')[0] for svg in text.split('<svg')[1:]]
    assert len(svgs) == 8  # ROC, PR, forest, reliability, scores, correlation, two of learning
    for svg in svgs:
        tree = ElementTree.fromstring(f'<svg{svg}</svg>')
        assert len(tree.findall('.//{*}path')) > 5
        assert 'currentColor' in svg and figures.INK not in svg


def test_every_name_is_escaped(text):
    page = Page(text)
    assert not any('onerror' in attributes for _, attributes in page.tags)
    assert 'script' not in {tag for tag, _ in page.tags}
    assert NASTY in page.text and 'site: <script>x</script>' in page.text
    assert 'other & <i>' in page.text and '<b>' in page.text


def test_it_says_what_the_files_say(home, text):
    scores, shown = json.loads((home / 'report' / 'scores.json').read_text()), Page(text).text
    auc = scores['summary']['pooled']['auc']
    assert f'{auc[0]:.4f}' in shown and f'{auc[1]:.4f} to {auc[2]:.4f}' in shown
    assert f'{scores["floor"]["pooled"]["auc"][0]:.4f}' in shown
    assert f'{scores["best_run"]["difference"][0]:+.4f}' in shown
    assert f'{scores["in_sample"]:.4f}' in shown and 'optimistic' in shown
    assert f'{scores["probability"]["after"]["brier"]:.4f}' in shown
    oof = pd.read_csv(home / 'report' / 'oof.csv')
    surest = oof[oof.target == 0].sort_values('pred').image_name.iloc[-1]
    assert shown.index(surest) > shown.index('Benign images with the highest predictions')
    sheets = [sheet.split('<h')[0] for sheet in text.split(' predictions (')[1:]]
    at = next(t for t in scores['probability']['thresholds'] if t['wanted'] == 0.95)['pred']
    for sheet, called in zip(sheets, (True, False, False, True), strict=True):
        preds = [float(cell.split('<')[0]) for cell in sheet.split('<br>pred ')[1:]]
        assert preds and all((pred >= round(at, 3)) == called for pred in preds)


def test_the_same_files_make_the_same_page(home, text, monkeypatch):
    monkeypatch.setattr('lib.score.N_DRAWS', 200)  # as `script` has it
    report.write(home)
    assert (home / 'report' / 'index.html').read_text() == text


def test_without_images_or_scores_it_is_shorter_and_whole(home, tmp_path, ok):
    other = tmp_path / 'other'
    shutil.copytree(home, other)
    shutil.rmtree(other / 'images')
    ok('blend.py', '--home', other, '--only', 'a')
    text = (other / 'report' / 'index.html').read_text()
    assert '<img' not in text and 'One run: a' in text and 'Rank correlation' not in text
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
      [...document.images].filter(i => i.naturalWidth).length,
      [...document.querySelectorAll('svg')].filter(s => s.clientHeight > 50).length
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
    scroll, client, n_pictures, n_svgs = json.loads(title)
    assert client == width and scroll <= client
    assert (n_pictures, n_svgs) == (text.count('<img'), 8)


def test_the_curves_go_through_scikit_learns_points():
    rng = np.random.default_rng(0)
    target, group = rng.integers(2, size=400), rng.integers(80, size=400)
    pred = (rng.normal(size=400) + target).round(1)  # with ties
    curves = figures.curves_with_bands(target, pred, group)
    fpr, tpr, _ = roc_curve(target, pred, drop_intermediate=False)
    at = np.interp(curves['grid'], fpr, tpr)
    # at a step of the curve interp may take either end of it
    assert np.mean(np.abs(curves['roc'][:, 0] - at) < 1e-9) > 0.9
    assert np.all(curves['roc'][:, 1] <= curves['roc'][:, 2])
    assert curves['precision'][-1, 0] == pytest.approx(target.mean(), abs=0.1)


def test_training_leaves_pictures_of_history_and_of_a_batch(tmp_path):
    history = pd.DataFrame(
        {'epoch': [1], 'train_loss': [1.0], 'valid_loss': [1.0], 'auc': [0.5], 'lr': [1e-3]}
    )
    pictures.draw_history(tmp_path / 'history.png', history.to_dict('records'))
    x = np.zeros((5, 3, 8, 8), np.float32)
    x[0, 0] = 1 / 0.25  # red, far from the mean
    y = torch.tensor([1, 0, 0, 0, 0])
    pictures.draw_batch(tmp_path / 'batch.png', torch.tensor(x), y, [0.5] * 3, [0.25] * 3)
    for name in ('history.png', 'batch.png'):
        assert np.asarray(Image.open(tmp_path / name).convert('L')).std() > 5
    batch = np.asarray(Image.open(tmp_path / 'batch.png').convert('RGB')).reshape(-1, 3)
    reddest = batch[np.argmax(batch[:, 0].astype(int) - batch[:, 1])]
    assert reddest[0] > 200 and reddest[1] < 150  # normalization undone
