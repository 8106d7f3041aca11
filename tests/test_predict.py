"""TTA is the plain mean of n augmented passes, as a loop by hand makes it."""

import numpy as np
import pytest
import torch
from fastai.vision.all import DataLoaders, Pipeline, TensorImage
from PIL import Image

from lib import model
from lib.augment import recipe
from lib.learner import learner, seed_all
from lib.loaders import loader
from lib.predict import predict

STATS = ((0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    paths = [folder / f'{i}.png' for i in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = model.create('test_resnet', 64)
    torch.nn.init.normal_(net.fc.weight, std=1.0)  # so that predictions differ
    return net


def run(net, paths, n_tta, seed=(0,), cutout=True, batch_size=3):
    dl = loader(paths, [0] * len(paths), recipe(*STATS, cutout), batch_size)
    return predict(learner(DataLoaders(dl), net), dl, n_tta, seed)


def by_hand(net, paths, n_tta, cutout=True, batch_size=3):
    """The same without fastai's Learner and DataLoader: read, augment, forward, sigmoid, mean."""
    images = torch.stack([torch.tensor(np.array(Image.open(p))).permute(2, 0, 1) for p in paths])
    net.eval()
    passes = []
    seed_all(0)
    for split_idx in [0] * n_tta + [1]:
        tfms = Pipeline(recipe(*STATS, cutout), split_idx=split_idx)
        torch.empty((), dtype=torch.int64).random_()  # torch's DataLoader draws a number a pass
        with torch.no_grad():
            logits = [net(torch.Tensor(tfms(TensorImage(b)))) for b in images.split(batch_size)]
        passes.append(torch.cat(logits).sigmoid()[:, 0].double().numpy())
    return np.mean(passes[:n_tta], axis=0) if n_tta else passes[-1], passes[-1]


@pytest.mark.parametrize('cutout', [False, True])
@pytest.mark.parametrize('n_tta', [0, 1, 4])
def test_it_equals_a_plain_loop_over_the_same_draws(net, paths, n_tta, cutout):
    ours, witness = run(net, paths, n_tta, cutout=cutout), by_hand(net, paths, n_tta, cutout)
    np.testing.assert_allclose(ours, witness, atol=1e-6)
    assert ours[0].shape == ours[1].shape == (7,)
    assert ours[1].std() > 0.01  # the images are told apart at all


def test_augmented_and_plain_differ_and_the_seed_decides_the_draw(net, paths):
    (first, plain), (again, _), (other, plain2) = (run(net, paths, 2, (s,)) for s in (0, 0, 1))
    assert (first == again).all() and (plain == plain2).all()
    assert np.abs(first - other).max() > 1e-4 and np.abs(first - plain).max() > 1e-4


def test_without_tta_both_are_the_plain_pass(net, paths):
    pred, plain = run(net, paths, 0)
    assert (pred == plain).all()
