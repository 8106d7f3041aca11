"""Heat maps: what they are of a net, whose model draws them, and the page with and without them."""

import base64
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import expit
from torch import nn

from lib import heat, model, report, score


def random_net(arch: str) -> nn.Module:
    torch.manual_seed(0)
    net = model.create(arch, 64).eval()
    nn.init.normal_(net.get_classifier().bias)
    return net


@pytest.mark.parametrize('arch', ['tf_efficientnet_lite0', 'resnet18'])
def test_the_map_of_a_pooled_net_is_exact(arch):
    net, x = random_net(arch), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    maps, logits = heat.activation_map(net, x)
    head = net.get_classifier()
    with torch.no_grad():
        exact = torch.einsum('bchw,c->bhw', net.forward_features(x), head.weight[0])
        torch.testing.assert_close(logits, net(x)[:, 0])
    torch.testing.assert_close(maps, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps.mean((1, 2)) + head.bias, logits, rtol=0, atol=1e-5)
    assert maps.shape == (2, 2, 2) and maps.std() > 0


def test_the_map_of_a_net_that_normalizes_after_pooling_is_weighted_by_the_gradient():
    net, x = random_net('convnext_atto'), torch.randn(1, 3, 64, 64)
    (actual,), _ = heat.activation_map(net, x)
    with torch.no_grad():
        features, step = net.forward_features(x), 1e-3
        # what each channel is worth: its slope of the logit, by a small step of the whole channel
        steps = torch.eye(features.shape[1])[:, :, None, None] * step
        up, down = (net.forward_head(features + sign * steps)[:, 0] for sign in (1, -1))
        expected = torch.einsum('chw,c->hw', features[0], (up - down) / (2 * step))
        head = torch.einsum('chw,c->hw', features[0], net.get_classifier().weight[0])
    assert np.corrcoef(actual.flatten(), expected.flatten())[0, 1] > 0.999
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert not torch.allclose(actual, head, rtol=0.05)


@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_tokens_are_refused_before_any_work(arch, copy, refusal):
    path = copy / 'runs' / 'twin' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'arch': arch, 'size': 224}))
    shutil.rmtree(copy / 'cache')
    for more in ([], ['--images', copy / 'data', '--out', copy / 'out.csv']):
        said = refusal('infer.py', '--home', copy, '--heat', 2, '--only', 'twin', *more)
        assert arch in said and 'tokens' in said and '--only' in said
    assert not (copy / 'cache').exists() and not (copy / 'out.csv').exists()


class ColourDetector(nn.Module):
    """Tells how much red and no blue there is in patches of 8 x 8 pixels."""

    num_features = 2

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 2, 8, stride=8), nn.Linear(2, 1)
        with torch.no_grad():
            self.body.weight[:] = torch.tensor([[1.0, 0, -1], [-1, 0, 1]])[:, :, None, None] / 64
            self.body.bias[:], self.head.bias[:] = 0, 0.5
            self.head.weight[:] = torch.tensor([[3.0, -1]])

    def forward_features(self, x):
        return self.body(x).relu()

    def forward_head(self, features):
        return self.head(features.mean((2, 3)))


def test_the_map_of_a_colour_detector_is_highest_where_the_colour_is(monkeypatch, tmp_path):
    rng, places, paths = np.random.default_rng(0), [], []
    for i in range(10):
        pixels = rng.integers(90, 110, (64, 64, 3), dtype=np.uint8)
        y, x = rng.integers(0, 8, 2)
        places.append((y, x))
        pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = (220, 30, 30)
        paths.append(tmp_path / f'{i}.png')
        Image.fromarray(pixels).save(paths[-1])
    monkeypatch.setattr(model, 'load', lambda *_: ColourDetector())

    config = {'arch': '', 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    run = SimpleNamespace(config=config, fold=lambda k: tmp_path)
    maps, logits = heat.compute_maps(run, [0], pd.DataFrame({'cached': paths}))
    assert maps.shape == (10, 8, 8)
    peaks = [np.unravel_index(cells.argmax(), cells.shape) for cells in maps]
    np.testing.assert_array_equal(peaks, places)
    np.testing.assert_allclose(maps.mean((1, 2)) + 0.5, logits, atol=1e-5)
    for path in paths:  # a blue square speaks against it
        Image.merge('RGB', Image.open(path).split()[::-1]).save(path)
    maps, _ = heat.compute_maps(run, [0], pd.DataFrame({'cached': paths}))
    lowest = [np.unravel_index(cells.argmin(), cells.shape) for cells in maps]
    np.testing.assert_array_equal(lowest, places)
    assert (maps.min((1, 2)) < 0).all()


def test_the_central_quarter_is_that_of_the_enlarged_map():
    rng = np.random.default_rng(0)
    for shape in ((2, 2), (5, 5), (7, 7), (16, 16)):
        maps = rng.normal(size=(100, *shape))
        side = 31 * shape[0]  # an odd factor, so that a pixel is just at the centre of each cell
        large = nn.functional.interpolate(torch.tensor(maps)[None], (side, side), mode='bilinear')
        y, x = np.divmod(large[0].flatten(1).argmax(1).numpy(), side)
        central = (abs((y + 0.5) / side - 0.5) < 0.25) & (abs((x + 0.5) / side - 0.5) < 0.25)
        np.testing.assert_array_equal(heat.is_central(maps), central)
        assert central.any() == (shape != (2, 2)) and not central.all()
    cells = np.eye(25).reshape(25, 5, 5)
    facts = heat.measure(pd.Series([1] * 10 + [0] * 15), cells, cells[::-1])
    assert facts['central_cells'] == 9 / 25
    assert facts['central']['melanomas']['model'][0] == 3 / 10  # cells 6, 7 and 8 of the first ten
    assert facts['central']['benign images']['random_weights'][0] == 6 / 15
    assert '0.3000 [' in facts['measured'] and 'of 10 melanomas' in facts['measured']


def test_a_share_has_wilsons_interval():
    value, low, high = score.estimate_share(np.arange(100) < 10)
    z, n, p = 1.959964, 100, 0.1
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [p, *((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))]
    np.testing.assert_allclose([value, low, high], expected, rtol=1e-5)


@pytest.fixture(scope='module')
def drawn(home, ok):
    """`home` after infer.py --heat 2, in half precision, and blend.py. What they print is *.log."""
    drawn = shutil.copytree(home, home.with_name('drawn'))
    infer = ['infer.py', '--home', drawn, '--n_tta', 2, '--precision', 'bf16', '--only', 'twin']
    (drawn / 'heat.log').write_text(ok(*infer, '--heat', 2))
    (drawn / 'again.log').write_text(ok(*infer, '--heat', 2))
    ok('blend.py', '--home', drawn)
    return drawn


def test_the_highest_and_lowest_of_each_class_are_drawn_by_the_model_that_has_not_seen_them(drawn):
    run = drawn / 'runs' / 'twin'
    table = pd.read_csv(run / 'heat' / 'heat.csv').set_index('image_name')
    oof = pd.read_csv(run / 'oof.csv').sort_values('pred')
    for target in (0, 1):
        names = oof[oof.target == target].image_name
        assert set(table[table.target == target].index) == {*names.head(2), *names.tail(2)}
    folds = pd.read_csv(drawn / 'folds.csv').set_index('image_name')
    for name, row in table.iterrows():
        assert row.fold == folds.fold[name]
        with Image.open(run / 'heat' / row.picture) as picture:
            pixels = np.asarray(picture.convert('RGB'), dtype=int)[:400, 400:]
            assert picture.size[0] == 800 and np.ptp(pixels[..., 0] - pixels[..., 2]) > 30
    # train.py's plain pass was in fp32, by the model of the fold
    plain = pd.concat([pd.read_csv(run / f'fold{k}' / 'oof.csv') for k in (0, 1)])
    plain = plain.set_index('image_name').pred_plain[table.index]
    np.testing.assert_allclose(expit(table.logit), plain, atol=1e-6)
    assert {'pred', 'age_approx', 'sex', 'anatom_site', 'source'} <= set(table)


def test_what_is_drawn_is_measured_and_not_drawn_again(drawn):
    facts = json.loads((drawn / 'runs' / 'twin' / 'heat' / 'heat.json').read_text())
    oof = pd.read_csv(drawn / 'runs' / 'twin' / 'oof.csv').drop_duplicates(['group', 'target'])
    for name, target in (('melanomas', 1), ('benign images', 0)):
        assert facts['central'][name]['images'] == (oof.target == target).sum()
    printed = (drawn / 'heat.log').read_text()
    assert facts['legend'] in printed and facts['measured'] in printed
    assert '2 x 2 cells' in printed and 'where, not why' in printed
    assert 'too few cells to say' in printed  # none of four lies in the middle
    assert facts['measured'] in (drawn / 'again.log').read_text()


def test_other_predictions_or_another_number_draw_anew(drawn, ok):
    copy = shutil.copytree(drawn, drawn.with_name('redrawn'))
    folder = copy / 'runs' / 'twin' / 'heat'
    infer = ['infer.py', '--home', copy, '--only', 'twin']
    ok(*infer, '--n_tta', 2, '--heat', 1)
    assert len(pd.read_csv(folder / 'heat.csv')) == len(list(folder.glob('*.jpg'))) == 4
    assert json.loads((folder / 'heat.json').read_text())['n'] == 1
    stamp = (folder / 'heat.csv').stat().st_mtime_ns
    ok(*infer, '--n_tta', 2, '--heat', 1)
    assert (folder / 'heat.csv').stat().st_mtime_ns == stamp
    ok(*infer, '--n_tta', 0)
    assert not (folder / 'heat.json').exists()  # it belonged to predictions that are no more
    report.write(copy)
    assert 'map by' not in (copy / 'report' / 'index.html').read_text()


def pictures_of(page: str) -> list[bytes]:
    """Its images of patients; the figure of correlations is a PNG inside an SVG."""
    return [base64.b64decode(data) for data in re.findall(r'image/jpeg;base64,([^"]+)', page)]


def test_the_page_shows_the_map_beside_the_image_and_names_the_run(drawn):
    page = (drawn / 'report' / 'index.html').read_text()
    figures = re.findall(r'<figure[^>]*>.*?</figure>', page.split('<h2>Images')[1])
    table = pd.read_csv(drawn / 'runs' / 'twin' / 'heat' / 'heat.csv')
    n_maps = 0
    for figure in figures:
        name, has_map = re.search('alt="([^",]+)"', figure)[1], 'map by twin' in figure
        assert has_map == (name in set(table.image_name))
        assert figure.count('<img') == 1 + has_map and len(set(pictures_of(figure))) == 1 + has_map
        n_maps += has_map
        if has_map:
            picture = table.picture[table.image_name == name].item()
            with Image.open(drawn / 'runs' / 'twin' / 'heat' / picture) as both:
                expected = both.crop((400, 0, 800, 400)).resize((144, 144))
            actual = np.asarray(Image.open(io.BytesIO(pictures_of(figure)[1])), dtype=int)
            assert abs(actual - np.asarray(expected)).mean() < 3
    assert 0 < n_maps < len(figures)
    facts = json.loads((drawn / 'runs' / 'twin' / 'heat' / 'heat.json').read_text())
    assert facts['legend'] in page and facts['measured'] in page and 'where, not why' in page


def test_a_page_that_is_passed_on_has_no_image_of_a_patient(drawn, ok):
    copy = shutil.copytree(drawn, drawn.with_name('passed_on'))
    names = pd.read_csv(copy / 'folds.csv').image_name
    assert pictures_of((copy / 'report' / 'index.html').read_text())
    ok('blend.py', '--home', copy, '--noimages')
    page = (copy / 'report' / 'index.html').read_text()
    assert not pictures_of(page) and '<img' not in page
    assert not [name for name in names if name in page]
    assert 'too few cells' in page  # the figures are of no single patient
    for path in (copy / 'runs' / 'twin' / 'heat').glob('*.jpg'):
        path.unlink()
    report.write(copy)  # the sheets survive pictures that are gone
    assert 'map by' not in (copy / 'report' / 'index.html').read_text()
    shutil.rmtree(copy / 'runs' / 'twin' / 'heat')
    report.write(copy)
    page = (copy / 'report' / 'index.html').read_text()
    assert pictures_of(page) and 'too few cells' not in page


def test_a_folder_of_images_has_maps_by_each_run(drawn, demo, ok, tmp_path):
    (tmp_path / 'in' / 'deep').mkdir(parents=True)
    images = sorted((demo / 'jpeg' / 'test').glob('*.jpg'))[:6]
    for i, path in enumerate(images):
        shutil.copy(path, tmp_path / 'in' / ('deep' if i % 2 else '.') / f'{i}.jpg')
    out = tmp_path / 'out.csv'
    ask = ['infer.py', '--home', drawn, '--images', tmp_path / 'in', '--out', out, '--n_tta', 0]
    assert 'twin: 4 images, red: for' in ok(*ask, '--heat', 2)
    preds = pd.read_csv(out).set_index('image_name').pred.sort_values()
    runs = sorted(path.name for path in (tmp_path / 'out_heat').iterdir())
    assert runs == sorted(path.name for path in (drawn / 'runs').iterdir())
    tables = {run: pd.read_csv(tmp_path / 'out_heat' / run / 'heat.csv') for run in runs}
    for run, table in tables.items():
        assert set(table.image_name) == {*preds.index[:2], *preds.index[-2:]}
        assert all((tmp_path / 'out_heat' / run / name).exists() for name in table.picture)
    assert not np.allclose(*(table.set_index('image_name').logit for table in tables.values()))
