"""Heat maps: what they are of a net, and whose model draws them."""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from lib import heat, model, pictures


def random_net(arch: str) -> nn.Module:
    torch.manual_seed(0)
    net = model.create(arch, 64).eval()
    nn.init.normal_(net.get_classifier().bias)
    return net


@pytest.mark.parametrize('arch', ['tf_efficientnet_lite0', 'resnet18'])
def test_the_map_of_a_pooled_net_is_exact(arch):
    net, x = random_net(arch), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    maps = heat.activation_map(net, x)
    head = net.get_classifier()
    with torch.no_grad():
        exact = torch.einsum('bchw,c->bhw', net.forward_features(x), head.weight[0])
        logits = net(x)[:, 0]
    torch.testing.assert_close(maps, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps.mean((1, 2)) + head.bias, logits, rtol=0, atol=1e-5)
    assert maps.shape == (2, 2, 2) and maps.std() > 0


def test_the_map_of_a_net_that_normalizes_after_pooling_is_weighted_by_the_gradient():
    net, x = random_net('convnext_atto'), torch.randn(1, 3, 64, 64)
    (actual,) = heat.activation_map(net, x)
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
    said = refusal('infer.py', '--home', copy, '--heat', 2, '--only', 'twin')
    assert f'{arch} has tokens or several scales' in said and '--only' in said
    assert not (copy / 'cache').exists()


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


def test_red_is_where_a_detector_of_red_sees_melanoma_and_blue_where_it_sees_none(
    monkeypatch, tmp_path
):
    rng, places, paths, loaded = np.random.default_rng(0), [], [], []
    for i in range(10):
        pixels = rng.integers(90, 110, (64, 64, 3), dtype=np.uint8)
        y, x = rng.integers(0, 8, 2)
        places.append((y, x))
        pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = (220, 30, 30)
        paths.append(tmp_path / f'{i}.png')
        Image.fromarray(pixels).save(paths[-1])
    monkeypatch.setattr(model, 'load', lambda *args: loaded.append(args[2]) or ColourDetector())
    config = {'arch': '', 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    run = SimpleNamespace(config=config, weights=lambda k: f'fold{k}')
    names = list('0123456789')
    rows = pd.DataFrame(
        {'image_name': names, 'cached': paths, 'path': '', 'target': 1, 'pred': 0.5}
    )

    def redness(maps):
        """Of each picture, how much redder than blue the map is at the square."""
        pictures.draw_heat_maps(tmp_path / 'heat', rows, maps)
        table = pd.read_csv(tmp_path / 'heat' / 'heat.csv').sort_values('image_name')
        for name, (y, x) in zip(table.picture, places, strict=True):
            with Image.open(tmp_path / 'heat' / name) as picture:
                red, _, blue = picture.getpixel((400 + 50 * x + 25, 50 * y + 25))
                yield red - blue

    maps = heat.compute_maps(run, 3, rows)
    assert maps.shape == (10, 8, 8) and loaded == ['fold3']
    peaks = [np.unravel_index(cells.argmax(), cells.shape) for cells in maps]
    np.testing.assert_array_equal(peaks, places)
    assert min(redness(maps)) > 100
    for path in paths:  # a blue square speaks against it
        Image.merge('RGB', Image.open(path).split()[::-1]).save(path)
    maps = heat.compute_maps(run, 3, rows)
    lowest = [np.unravel_index(cells.argmin(), cells.shape) for cells in maps]
    np.testing.assert_array_equal(lowest, places)
    assert (maps.min((1, 2)) < 0).all() and max(redness(maps)) < -100


@pytest.fixture(scope='module')
def drawn(home, ok):
    """`home` after infer.py --heat 2, in half precision, and whose fold drew which image."""
    compute_maps, draw_heat_maps = heat.compute_maps, pictures.draw_heat_maps
    drawn = shutil.copytree(home, home.with_name('drawn'))
    infer = ['infer.py', '--home', drawn, '--n_tta', 2, '--precision', 'bf16', '--only', 'twin']
    ok(*infer, '--heat', 5, '--prior', 0.3)
    probs = pd.read_csv(drawn / 'runs' / 'twin' / 'test.csv').prob
    used, made = {}, {}

    def noted(run, k, rows):
        maps = compute_maps(run, k, rows)
        used.update(dict.fromkeys(rows.image_name, k))
        made.update(zip(rows.image_name, maps, strict=True))
        return maps

    def shown(folder, rows, maps):
        np.testing.assert_array_equal(maps, [made[name] for name in rows.image_name])
        return draw_heat_maps(folder, rows, maps)

    with (
        mock.patch.object(heat, 'compute_maps', noted),
        mock.patch.object(pictures, 'draw_heat_maps', shown),
    ):
        # the pictures of before are gone; its predictions, of other flags, are kept
        said = ok('infer.py', '--home', drawn, '--only', 'twin', '--heat', 2)
    assert 'is finished' in said and 'augmented passes,' not in said
    assert (pd.read_csv(drawn / 'runs' / 'twin' / 'test.csv').prob == probs).all()  # of --prior .3
    assert '8 images' in said and '2 x 2 cells' in said and 'where, not why' in said
    return drawn, used


def test_the_highest_and_lowest_of_each_class_are_drawn_by_the_model_that_has_not_seen_them(drawn):
    drawn, used = drawn
    run = drawn / 'runs' / 'twin'
    table = pd.read_csv(run / 'heat' / 'heat.csv').set_index('image_name')
    oof = pd.read_csv(run / 'oof.csv').sort_values('pred')
    for target in (0, 1):
        names = oof[oof.target == target].image_name
        assert set(table[table.target == target].index) == {*names.head(2), *names.tail(2)}
    folds = pd.read_csv(drawn / 'folds.csv').set_index('image_name')
    for name, row in table.iterrows():
        assert row.fold == folds.fold[name] == used[name]
        with Image.open(run / 'heat' / row.picture) as picture:
            pixels = np.asarray(picture.convert('RGB'), dtype=int)[:400, 400:]
            assert picture.size[0] == 800 and np.ptp(pixels[..., 0] - pixels[..., 2]) > 10
    assert len(table) == len(list((run / 'heat').glob('*.jpg'))) == 8
    assert {'pred', 'age_approx', 'sex', 'anatom_site', 'source'} <= set(table)
