"""A run as a folder for others: what timm loads, what its card says, what is refused."""

import contextlib
import io
import re
import shutil

import pandas as pd
import pytest
import timm
import torch
from conftest import CONFIG, N_DRAWS
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image

from lib import (
    calibration,
    export,
    files,
    images,
    model,
    shortcuts,
    summary,
    tables,
    thresholds,
)
from lib.parts import Part, join_table
from lib.runs import Run

reads_safetensors = pytest.mark.skipif(
    Version(timm.__version__) < Version('1.0.27'),
    reason='before version 1.0.27 timm reads no safetensors from a folder',
)


@pytest.fixture(scope='module')
def out(home, ok, tmp_path_factory):
    """The folder that infer.py --export has written the two runs of `home` to. Read only."""
    out = tmp_path_factory.mktemp('export')
    printed = ok('infer.py', '--home', home, '--export', out)
    assert f'hf upload YOUR_NAME/twin {out}/twin' in printed
    return out


def lines_of(out) -> list[str]:
    """The lines of Python in the card of the run `twin`."""
    card = (out / 'twin' / 'README.md').read_text()
    return re.search(r'```python\n(.*?)```', card, re.DOTALL)[1].splitlines()


def read(lines: list[str], photo, out, monkeypatch) -> tuple[float, torch.Tensor]:
    """What the lines of a card print for the file `photo`, and the tensor they make of it."""
    shutil.copy(photo, out / 'lesion.jpg')
    monkeypatch.chdir(out)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec('\n'.join(lines), names)
    return float(printed.getvalue()), names['x']


@reads_safetensors
@pytest.mark.parametrize('arch', ['test_resnet', 'test_efficientnet', 'test_vit', 'test_byobnet'])
def test_timm_loads_each_fold_with_equal_logits_and_its_preprocessing(arch, tmp_path):
    run, size = Run(tmp_path / 'home' / 'runs' / 'a'), 96
    stats = {'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6]}
    files.write_json(run.folder / 'config.json', CONFIG | stats | {'arch': arch, 'size': size})
    net = model.create(arch, size).eval()
    model.save(net, run.fold(0) / 'model.safetensors')
    export.save_fold(Part(run, 0, 'oof', pd.DataFrame()), tmp_path / 'fold0')
    loaded = timm.create_model(f'local-dir:{tmp_path}/fold0', pretrained=True).eval()
    x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = loaded(x)
        assert torch.equal(logits, net.to(memory_format=torch.contiguous_format)(x))
    assert logits.shape == (3, 1) and logits.std() > 1e-5
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data['input_size']) == (3, size, size) and data['interpolation'] == 'lanczos'
    assert data['crop_pct'] == 1
    assert [*data['mean'], *data['std']] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    weights = tmp_path / 'fold0' / 'model.safetensors'  # readable to whom config.json is
    assert weights.stat().st_mode == weights.with_name('config.json').stat().st_mode


def grid(out, header: str) -> pd.DataFrame:
    """The table with this column in the card of the run `twin`."""
    blocks = (out / 'twin' / 'README.md').read_text().split('\n\n')
    tables = [block.strip().split('\n') for block in blocks]
    (lines,) = [lines for lines in tables if f'| {header} |' in lines[0]]
    names, _, *rows = [[cell.strip() for cell in line[1:-1].split('|')] for line in lines]
    return pd.DataFrame([row[1:] for row in rows], [row[0] for row in rows], names[1:])


@pytest.fixture
def oof(home, monkeypatch):
    """The rows of folds.csv with the predictions of the run `twin`."""
    monkeypatch.setattr('lib.score.N_DRAWS', N_DRAWS)
    table = tables.read_labelled(home / 'folds.csv')
    return join_table(table, pd.read_csv(home / 'runs' / 'twin' / 'oof.csv'))


def test_the_card_holds_the_figures_of_scores_json_and_the_floor(home, out, oof):
    scores = files.read_json(home / 'runs' / 'twin' / 'scores.json')
    scores['floor'] = shortcuts.measure(oof)[0].to_dict('records')
    shown = grid(out, 'plain pass')
    passes = ['plain pass', 'mean of 2 augmented passes', 'shortcut floor']
    assert list(shown) == [*passes, 'images', 'malignant']
    for column, rows in zip(passes, ('pred_plain', 'pred', 'floor'), strict=True):
        rows = pd.DataFrame(scores[rows]).query("kind == 'main'")
        assert shown[column].tolist() == summary.format_rows(rows)
        assert shown.index.tolist() == rows.label.str.strip().tolist()
    card = ModelCard.load(out / 'twin' / 'README.md')
    assert f'The AUC out of fold is **{shown["plain pass"]["AUC, pooled"]}**' in card.text
    subgroups = grid(out, 'sensitivity')
    for sex, rows in oof.groupby('sex'):
        counts = subgroups.loc[f'sex: {sex}', ['images', 'malignant']].tolist()
        assert counts == [str(len(rows)), str(rows.target.sum())]
    assert card.data.library_name == 'timm' and 'not a medical device' in card.text


def test_calibration_and_thresholds_are_of_the_plain_pass(out, oof):
    target, pred = oof.target.to_numpy(), oof.pred_plain.to_numpy()
    fitted = calibration.calibrate(oof.assign(pred=pred))
    rows = thresholds.count_at_thresholds(target, pred, fitted.curve, target.mean())
    expected = thresholds.tabulate_thresholds(rows).rename_axis(None)
    pd.testing.assert_frame_equal(grid(out, 'true positives'), expected)
    brier = [f'{x:.4f}' for x in (((pred - target) ** 2).mean(), fitted.quality.brier.prob)]
    assert grid(out, 'Brier score')['Brier score'].tolist() == brier
    assert brier[0] != f'{((oof.pred - target) ** 2).mean():.4f}'  # of the augmented passes
    text = ModelCard.load(out / 'twin' / 'README.md').text
    odds = float(re.search(r'f = r / \(1 - r\) / ([\d.e+-]+)`', text)[1])
    factor = fitted.prior / (1 - fitted.prior) / odds  # as the card says
    assert pred * factor / (pred * factor + 1 - pred) == pytest.approx(fitted.prob, rel=1e-3)
    assert f'of which {1000 * target.mean():.1f} are malignant' in text


def test_sources_are_counted_and_scored_apart_and_decide_the_licence(copy, ok):
    """Half of the images become those of an archive, and all get names of photographs."""
    table = pd.read_csv(copy / 'folds.csv', dtype=str, na_filter=False)
    table['image_name'] = table.image_name.str.replace('DEMO', 'ISIC')
    other = (table.split == 'train') & (table.index % 2 == 0)
    table.loc[other, 'source'] = 'isic2019'
    table.to_csv(copy / 'folds.csv', index=False)
    run = Run(copy / 'runs' / 'twin')
    now = tables.fingerprint(tables.read_labelled(copy / 'folds.csv'))
    files.write_json(run.folder / 'config.json', run.config | {'folds_sha256': now})
    for path in [*run.folder.glob('*.csv'), *run.folder.glob('fold*/tta_oof.csv')]:
        path.write_text(path.read_text().replace('DEMO', 'ISIC'))
    ok('infer.py', '--home', copy, '--only', 'twin', '--export', copy / 'out')
    card = ModelCard.load(copy / 'out' / 'twin' / 'README.md')
    assert card.data.license == 'cc-by-nc-4.0'
    counts = other.sum(), (table.target[other] == '1').sum(), table.group[other].nunique()
    counts = r' \| '.join(map(str, counts))
    assert re.search(rf'\| isic2019 \| \[ISIC 2019\].* \| {counts} \|', card.text)
    assert '| AUC within isic2019 |' in card.text and 'The source alone' in card.text


def test_the_licence_is_the_strictest_of_the_sources(out):
    rows = pd.DataFrame({'source': ['isic2017', 'mine', 'competition', 'archive'] * 2})
    rows = rows.assign(image_name='I', target=0, group='g')
    credits = pd.DataFrame({'source': 'archive', 'licence': ['CC-0', 'CC-BY']})
    licences = export.describe_sources(rows, credits).licence
    assert licences.to_dict() == {
        'archive': 'cc-by-4.0', 'competition': 'cc-by-nc-4.0', 'isic2017': 'cc0-1.0',
        'mine': 'unknown',
    }  # fmt: skip
    assert export.choose_licence(licences.tolist()) == 'cc-by-nc-4.0'
    assert export.choose_licence(['cc0-1.0', 'unknown', 'cc-by-4.0']) == 'unknown'
    assert export.choose_licence(['cc0-1.0', 'cc-by-4.0']) == 'cc-by-4.0'
    assert export.choose_licence(['cc0-1.0', 'mit']) == 'mit'
    assert ModelCard.load(out / 'twin' / 'README.md').data.license == 'mit'  # of the demo


@reads_safetensors
def test_the_cards_lines_predict_what_infer_predicts(home, out, demo, monkeypatch):
    lines = lines_of(out)
    assert len(lines) <= 10
    preds = pd.read_csv(home / 'runs' / 'twin' / 'test.csv').set_index('image_name').pred_plain
    assert preds.std() > 1e-3  # else any image would do
    for name in (preds.idxmin(), preds.idxmax()):
        pred, _ = read(lines, demo / 'jpeg' / 'test' / f'{name}.jpg', out, monkeypatch)
        assert pred == pytest.approx(preds[name], abs=1e-4)


@reads_safetensors
@pytest.mark.parametrize('shape', [(301, 200), (200, 303), (1200, 1601)])
def test_they_read_a_photograph_as_the_cache_does(shape, out, tmp_path, monkeypatch):
    photo, turned, lines = tmp_path / 'photo.jpg', Image.Exif(), lines_of(out)
    turned[0x0112] = 6  # by 90 degrees
    Image.effect_noise(shape, 60).convert('RGB').save(photo, exif=turned)
    table = pd.DataFrame({'source': ['s'], 'image_name': ['photo'], 'path': [str(photo)]})
    cached = images.cache(table, tmp_path, 64)[0]
    # for an image of the right size the card has one line in place of five
    ready = [*lines[:3], "jpeg = 'lesion.jpg'", *lines[8:]]
    of_photo, of_cached = (
        read(code, path, out, monkeypatch)[1] for code, path in ((lines, photo), (ready, cached))
    )
    assert torch.equal(of_photo, of_cached)


def test_a_run_without_test_images_and_augmented_passes_has_a_card(copy, ok):
    table = pd.read_csv(copy / 'folds.csv', dtype=str).query("split == 'train'")
    table.to_csv(copy / 'folds.csv', index=False)
    run = Run(copy / 'runs' / 'twin')
    now = tables.fingerprint(tables.read_labelled(copy / 'folds.csv'))
    files.write_json(run.folder / 'config.json', run.config | {'folds_sha256': now})
    ok('infer.py', '--home', copy, '--only', 'twin', '--n_tta', 0)
    ok('infer.py', '--home', copy, '--only', 'twin', '--export', copy / 'out')
    card = ModelCard.load(copy / 'out' / 'twin' / 'README.md')
    assert 'plain pass' in card.text and 'augmented passes' not in card.text


def test_a_run_that_is_not_predicted_is_refused_with_what_to_type(copy, refusal):
    (copy / 'runs' / 'twin' / 'oof.csv').unlink()
    sentence = refusal('infer.py', '--home', copy, '--export', copy / 'out')
    assert 'has no oof.csv: python infer.py' in sentence and '--only twin --n_tta 2' in sentence
    assert not (copy / 'out').exists()  # nor is the other run written


def test_an_export_overwrites_nothing(home, out, copy, refusal):
    command = ['infer.py', '--home', copy, '--only', 'twin', '--export']
    assert 'twin exists; move it away' in refusal(*command, copy / 'runs')
    images = ['--images', home, '--out', copy / 'x.csv']
    assert 'exclude each other' in refusal(*command, copy / 'o', *images)
