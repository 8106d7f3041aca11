"""Rows of a table as DataLoaders: which rows, in which order, augmented or not, read by whom."""

import gc

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lib import data, ranks
from lib.augment import batch_tfms
from lib.cli import Stop

STATS = ((0.5,) * 3, (0.5,) * 3)


def training_dls(noise, batch_size=4):
    train, held_out = noise[noise.fold != 0], noise[noise.fold == 0]
    return data.training_dls(train, held_out, batch_tfms(*STATS), batch_size, workers=0)


def plain(rows) -> torch.Tensor:
    """The images of rows as the model is to see them without augmentation: (n, 3, 64, 64)."""
    pixels = np.stack([np.array(Image.open(path)) for path in rows.cached])
    return (torch.tensor(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def test_a_loader_gives_the_rows_of_its_table_with_their_own_targets(noise):
    dls = training_dls(noise)
    dls.train.get_idxs = lambda: range(25)  # not shuffled
    for dl, rows in ((dls.train, noise[noise.fold != 0]), (dls.valid, noise[noise.fold == 0])):
        with dl.dataset.set_split_idx(1):  # without augmentation
            x, y = (torch.cat(parts) for parts in zip(*dl, strict=True))
        assert torch.allclose(x, plain(rows), atol=1e-6) and y.tolist() == rows.target.tolist()
    dl = data.prediction_dls(noise, batch_tfms(*STATS), 16, 0).valid
    x = torch.cat([x for (x,) in dl])
    assert torch.allclose(x, plain(noise), atol=1e-6)  # all of them, in order, and no target


def test_the_monitored_rows_are_all_melanomas_and_four_benign_images_for_each():
    held_out = pd.DataFrame({'target': [0, 1, *[0] * 50, 1]}, index=range(100, 153))
    rows = data.choose_monitored(held_out)
    assert rows.target.tolist().count(1) == 2 and len(rows) == 10 == rows.index.nunique()
    assert rows.index.is_monotonic_increasing and rows.index[:2].tolist() != [100, 101]
    pd.testing.assert_frame_equal(rows, data.choose_monitored(held_out))  # in each epoch
    assert len(data.choose_monitored(held_out[:5])) == 5  # there are no more
    assert len(data.choose_monitored(held_out[held_out.target == 0])) == 1


def test_training_batches_are_augmented_and_scored_ones_are_not(noise):
    dls = training_dls(noise)
    images = plain(noise)  # normalized: pretrained or not, training too begins there
    for dl, augmented in ((dls.train, True), (dls.valid, False)):
        batch = dl.one_batch()[0]
        as_it_is = [any(torch.allclose(x, image, atol=1e-6) for image in images) for x in batch]
        assert as_it_is == [not augmented] * len(batch)
        assert len(batch) == (4 if augmented else 15)


def test_processes_of_a_launcher_share_a_batch_equally_or_are_refused(noise, monkeypatch):
    monkeypatch.setattr(ranks, 'WORLD', 2)
    dls = training_dls(noise, batch_size=8)
    assert (dls.train.bs, dls.valid.bs) == (4, 16)
    monkeypatch.setattr(ranks, 'WORLD', 3)
    for size in (8, 3):
        with pytest.raises(Stop, match=f'--batch_size {size} must be two or more for each of 3'):
            training_dls(noise, batch_size=size)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_cached_image_that_cannot_be_read_is_named(noise, workers, tmp_path, monkeypatch):
    # torch would wait 5 s for its process at the next garbage collection
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.1)
    good, bad = noise.cached[0], tmp_path / 'bad.jpg'
    bad.write_bytes(b'\xff\xd8 no JPEG')
    for path in (bad, tmp_path / 'gone.jpg'):
        rows, said = noise[:2].assign(cached=[good, path]), ''
        try:
            list(data.prediction_dls(rows, batch_tfms(*STATS), 1, workers).valid)
        except Exception as e:  # of torch's, which holds the other's text
            assert isinstance(e, Stop) or 'lib.cli.Stop' in str(e)
            said = str(e)
        assert str(path) in said and 'Delete it, if it is there, and run this again' in said
    gc.collect()


@pytest.mark.parametrize(
    'cores, local, workers', [(64, 1, 16), (4, 1, 4), (4, 2, 2), (64, 16, 4), (1, 2, 1)]
)
def test_images_are_read_beside_a_gpu_by_a_process_a_core_and_on_the_cpu_by_none(
    noise, monkeypatch, cores, local, workers
):
    def n_workers(asked=None):
        return data.loader(noise.cached[:1], None, [], 1, False, asked).fake_l.num_workers

    monkeypatch.setattr(data, 'n_cores', lambda: cores)
    monkeypatch.setattr(ranks, 'LOCAL_WORLD', local)  # processes of a launcher share the cores
    assert n_workers() == 0 and n_workers(1) == 1
    monkeypatch.setattr(data, 'choose_device', lambda: torch.device('cuda', 0))
    assert n_workers() == workers
    monkeypatch.setattr(data, 'get_start_method', lambda: 'spawn')
    assert n_workers() == 0
    with pytest.raises(Stop, match='--workers needs a system that forks'):
        n_workers(2)
