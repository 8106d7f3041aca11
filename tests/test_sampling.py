"""Every melanoma each epoch, and no benign image twice before all have come."""

import numpy as np
import pytest
from fastai.vision.all import Datasets, TfmdDL

from lib.cli import Stop
from lib.sampling import Downsample, draw

TARGETS = np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0])  # 2 melanomas, 10 benign


def loader(workers=0) -> TfmdDL:
    return TfmdDL(
        Datasets(range(len(TARGETS)), [[lambda i: i]]), bs=5, shuffle=True, num_workers=workers
    )


def rows(dl: TfmdDL) -> list[int]:
    return [int(i) for (batch,) in dl for i in batch]


@pytest.mark.parametrize(('n', 'k'), [(10, 3), (10, 7), (10, 10), (7, 5), (1000, 30), (5, 1)])
def test_no_benign_image_comes_twice_before_all_have_come_once(n, k):
    epochs = [draw(n, k, seed=3, epoch=e) for e in range(3 * n // k + 2)]
    assert all(len(set(e)) == k for e in epochs)
    row = np.concatenate(epochs)
    for cycle in range(len(row) // n):
        assert set(row[cycle * n : (cycle + 1) * n]) == set(range(n))


def test_the_draw_depends_on_seed_and_epoch_alone():
    first = [draw(50, 20, 0, e).tolist() for e in range(6)]
    assert draw(50, 20, 0, 5).tolist() == first[5]  # after a restart: nothing before is needed
    assert first[0] != first[1] and first != [draw(50, 20, 1, e).tolist() for e in range(6)]
    zero, one = (Downsample(loader(), TARGETS, 2, seed, 2).indexes(0) for seed in (0, 1))
    assert {*zero} != {*one}


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_is_all_melanomas_and_as_many_benign_with_workers_and_without(workers):
    dl = loader(workers)
    sampler = Downsample(dl, TARGETS, neg_ratio=1, seed=0, batch_size=4)
    seen = []
    for epoch in range(5):
        sampler.set_epoch(dl, epoch)
        got = rows(dl)
        assert got == sampler.indexes(epoch)
        assert sorted(i for i in got if TARGETS[i]) == [0, 10] and len(got) == len(dl.items) // 3
        seen += [i for i in got if not TARGETS[i]]
    assert sorted(seen) == np.flatnonzero(TARGETS == 0).tolist()


@pytest.mark.parametrize('ratio', [0, 0.5, 1, 2, 3, 99])
@pytest.mark.parametrize('batch_size', [2, 3, 4, 5, 8, 11])
def test_an_epoch_fills_whole_batches_with_more_benign_images(ratio, batch_size):
    dl = loader()
    sampler = Downsample(dl, TARGETS, ratio, seed=0, batch_size=batch_size)
    got = sampler.indexes(0)
    assert len(got) % batch_size == 0 and len(set(got)) == len(got) == dl.n
    assert TARGETS[got].sum() == 2
    wanted = 2 + (round(ratio * 2) if ratio else 10)
    assert len(got) >= min(wanted, 12 // batch_size * batch_size)
    assert len(got) < wanted + batch_size


def test_with_all_images_the_rest_of_an_epoch_comes_in_the_next():
    sampler = Downsample(loader(), TARGETS, neg_ratio=0, seed=0, batch_size=5)
    first, second = (set(sampler.indexes(epoch)) for epoch in (0, 1))
    assert len(first) == len(second) == 10  # of 12
    assert set(range(12)) - first < second


@pytest.mark.parametrize(('n_positive', 'n_negative'), [(9, 2), (8, 1), (3, 2), (1, 1)])
def test_no_last_batch_is_of_one_image_however_few_there_are(n_positive, n_negative):
    targets = np.array([1] * n_positive + [0] * n_negative)
    got = Downsample(loader(), targets, neg_ratio=1, seed=0, batch_size=8).indexes(0)
    assert len(got) == min(8, len(targets)) and len(set(got)) == len(got)


@pytest.mark.parametrize(('batch_size', 'accumulate', 'n'), [(2, 2, 8), (2, 3, 6), (2, 1, 6)])
def test_an_epoch_makes_whole_steps_of_several_batches(batch_size, accumulate, n):
    sampler = Downsample(loader(), TARGETS, 2, 0, batch_size, accumulate)  # six are asked for
    assert len(sampler.indexes(0)) == n


def test_a_step_of_several_batches_that_no_epoch_fills_is_refused():
    with pytest.raises(
        Stop, match='--accumulate 2 makes steps of 16 images, and an epoch has 4; take a smaller'
    ):
        Downsample(loader(), TARGETS, 1, 0, batch_size=8, accumulate=2)
    assert len(Downsample(loader(), TARGETS, 1, 0, batch_size=16).indexes(0)) == 4  # one batch
    with pytest.raises(Stop, match=r'an epoch has 6; take --accumulate 3 at most$'):
        Downsample(loader(), TARGETS, 2, 0, batch_size=2, accumulate=4)
    Downsample(loader(), TARGETS, 2, 0, batch_size=2, accumulate=3)
