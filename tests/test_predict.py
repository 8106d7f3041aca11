"""TTA means what fastai's does, on its own path: the same mean of passes over the same draws."""

import numpy as np
import pytest
import torch
from fastai.vision.all import DataLoaders, TensorImage, Transform
from PIL import Image

from lib import model, ranks
from lib.augment import recipe
from lib.callbacks import seed_all
from lib.cli import Stop
from lib.learner import learner
from lib.loaders import loader
from lib.predict import lowest, predict

STATS = ((0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    paths = [folder / f'{i}.png' for i in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return paths


def make(seed=0):
    torch.manual_seed(seed)
    net = model.create('test_resnet', 64)
    torch.nn.init.normal_(net.fc.weight, std=1.0)  # so that predictions differ
    return net.eval()


@pytest.fixture(scope='module')
def nets():
    return [make(0), make(1)]


def run(nets, paths, n_tta, seed=0, cutout=True, batch_size=3, precision='fp32'):
    nets = [model.for_inference(net, 64, precision) for net in nets]
    return predict(nets, paths, recipe(*STATS, cutout), batch_size, n_tta, seed)


class Seed(Transform):
    """Seeds fastai's batches one after the other as ours: by (seed, pass, batch number)."""

    order = 1  # before all others

    def __init__(self, n_batches):
        self.n_batches, self.count = n_batches, -1  # fastai tries one image before all

    def encodes(self, x: TensorImage) -> TensorImage:
        seed_all(0, *divmod(max(self.count, 0), self.n_batches))
        self.count += 1
        return x


def fastais(net, paths, n_tta, cutout=True, batch_size=3):
    """(mean of the passes, plain pass) by Learner.tta, unfused and in fp32."""
    tfms = [Seed(-(-len(paths) // batch_size)), *recipe(*STATS, cutout)]
    dl = loader(paths, [0] * len(paths), tfms, batch_size)
    (mean, plain), _ = learner(DataLoaders(dl), net).tta(dl=dl, n=n_tta, beta=None)
    return mean.double().numpy()[:, 0], plain.double().numpy()[:, 0]


@pytest.mark.parametrize('cutout', [False, True])
@pytest.mark.parametrize('n_tta', [1, 4])
def test_it_equals_fastais_tta_on_the_same_draws(nets, paths, n_tta, cutout):
    ours = run(nets[:1], paths, n_tta, cutout=cutout)
    witness = fastais(nets[0], paths, n_tta, cutout)
    np.testing.assert_allclose(ours, witness, atol=1e-5)
    assert ours[0].shape == ours[1].shape == (7,)
    assert ours[1].std() > 0.01  # the images are told apart at all
    assert np.abs(ours[0] - ours[1]).max() > 1e-3


def test_several_nets_share_one_batch_and_give_the_mean_of_each_alone(nets, paths):
    together, first, second = run(nets, paths, 2), run(nets[:1], paths, 2), run(nets[1:], paths, 2)
    np.testing.assert_allclose(together, np.mean([first, second], 0), atol=1e-6)
    assert np.abs(first[0] - second[0]).max() > 1e-3


def test_half_precision_keeps_the_predictions_and_their_order(nets, paths):
    half, single = run(nets, paths, 2, precision='bf16'), run(nets, paths, 2)
    assert 0 < np.abs(half[0] - single[0]).max() < 0.02
    assert len(set(half[1])) == 7  # logits of 8 bits would make ties
    assert (np.argsort(half[0]) == np.argsort(single[0])).all()


def test_the_lowest_precision_that_keeps_the_predictions_is_chosen(paths, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True)
    tfms = recipe(*STATS)
    assert lowest(make(), 64, paths, tfms, 3) == 'bf16'
    sharp = make()
    ((x, _),) = loader(paths, [0] * len(paths), tfms, len(paths))
    with torch.no_grad():  # differences of features decide that half precision does not see
        sharp.fc.weight *= 50
        sharp.fc.bias -= sharp(torch.Tensor(x)).mean()
    assert lowest(sharp, 64, paths, tfms, 3) == 'fp32'
    assert sharp.fc.weight.dtype == torch.float32  # and the model itself is left alone
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    assert lowest(make(), 64, paths, tfms, 3) == 'fp32'


def test_the_seed_and_the_batch_number_decide_the_draw(nets, paths):
    (first, plain), (again, _), (other, plain2) = (run(nets, paths, 2, s) for s in (0, 0, 1))
    assert (first == again).all() and (plain == plain2).all()
    assert np.abs(first - other).max() > 1e-4
    same = run(nets, [paths[0]] * 6, 1)[0]  # one image in both batches, drawn anew in each
    assert np.abs(same[:3] - same[3:]).max() > 1e-4


def test_without_tta_both_are_the_plain_pass_and_no_image_is_no_error(nets, paths):
    pred, plain = run(nets, paths, 0)
    assert (pred == plain).all()
    assert [len(p) for p in run(nets, [], 2)] == [0, 0]


def test_processes_share_out_whole_batches(nets, paths, monkeypatch):
    """Each rank's part alone, put together by hand: what one process predicts, bit for bit."""
    parts = []
    monkeypatch.setattr(ranks, 'WORLD', 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, 'RANK', rank)
        monkeypatch.setattr(ranks, 'gather', lambda part: parts.append(part) or [part])
        with pytest.raises(KeyError):  # the other's batches are not there
            run(nets, paths, 2)
    assert [sorted(part) for part in parts] == [[0, 2], [1]]
    monkeypatch.undo()
    whole = run(nets, paths, 2)
    for number, batch in (parts[0] | parts[1]).items():
        assert (batch.double().numpy() == np.array(whole)[:, 3 * number : 3 * number + 3]).all()


def test_a_prediction_that_is_not_finite_stops(paths):
    net = make()
    torch.nn.init.constant_(net.fc.bias, float('nan'))
    with pytest.raises(Stop, match='NaN or infinity'):
        run([net], paths, 1)
