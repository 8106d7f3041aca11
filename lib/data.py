"""fastai DataLoaders from a table: of a fold to train, and of any rows to predict."""

from collections.abc import Sequence
from multiprocessing import get_start_method
from pathlib import Path

import pandas as pd
import torch
from fastai.vision.all import DataLoaders, Datasets, PILImage, TfmdDL, ToTensor, Transform

from lib import ranks
from lib.cli import Stop
from lib.devices import choose_device
from lib.images import n_cores


def training_dls(
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    batch_tfms: list[Transform],
    batch_size: int,
    workers: int | None = None,
) -> DataLoaders:
    """The DataLoaders of a fold: the rows to `train` on, and the monitored ones of `held_out`.

    Both tables have the columns cached and target. `batch_size` counts the images of a batch in all
    processes of a launcher together, so that a learning rate means the same however many there are.
    Raises: Stop where the processes cannot share a batch equally.
    """
    of_one, rest = divmod(batch_size, ranks.WORLD)
    if rest or of_one < 2:  # one image has no batch statistics
        raise Stop(
            f'--batch_size {batch_size} must be two or more for each of {ranks.WORLD} processes, '
            'and as many for each'
        )
    monitored = choose_monitored(held_out)
    return DataLoaders(
        loader(train.cached, train.target, batch_tfms, of_one, True, workers),
        loader(monitored.cached, monitored.target, batch_tfms, 4 * of_one, False, workers),
    )


def choose_monitored(held_out: pd.DataFrame) -> pd.DataFrame:
    """The rows that are scored after each epoch, the same in each: all malignant images of the
    fold and four benign ones for each. All of a fold of the competition would be seven times the
    images of an epoch."""
    malignant, benign = held_out[held_out.target == 1], held_out[held_out.target == 0]
    n = min(len(benign), max(4 * len(malignant), 1))
    return pd.concat([malignant, benign.sample(n, random_state=0)]).sort_index()


def prediction_dls(
    rows: pd.DataFrame, batch_tfms: list[Transform], batch_size: int, workers: int | None = None
) -> DataLoaders:
    """DataLoaders of the images `rows.cached`, in their order; fastai's tta turns augmentation on.

    The batches have no target: with one, fastai would wait for the device twice more in each batch,
    to fetch the target back and to compute its loss.
    """
    dl = loader(rows.cached, None, batch_tfms, batch_size, False, workers)
    return DataLoaders(dl, dl)


def loader(
    paths: Sequence[Path],
    targets: Sequence[float] | None,
    batch_tfms: list[Transform],
    batch_size: int,
    train: bool = False,
    workers: int | None = None,
) -> TfmdDL:
    """Batches of ((B, 3, H, W) float, (B,) float 0/1), in order, or shuffled for training.

    Without `targets` a batch holds images alone. With `train` the transforms of split_idx 0 are on.
    No batch is dropped, so the last one may be small.
    `workers`: processes that read images. None means one for each core beside a GPU, up to 16, and
    the processes of a launcher divide the cores; on the CPU it means none, since they would compete
    with the model. Raises: Stop where the system cannot start any.
    """
    forks = get_start_method() == 'fork'  # fastai's transforms cannot be sent to other processes
    paths, device = list(map(str, paths)), choose_device()
    if workers is None:
        of_one = min(max(n_cores() // ranks.LOCAL_WORLD, 1), 16)
        workers = of_one if forks and device.type != 'cpu' else 0
    if workers and not forks:
        raise Stop('--workers needs a system that forks processes; leave it out here')

    def image(row: int) -> PILImage:
        try:
            return PILImage.create(paths[row])
        except Exception as e:  # whatever a decoder raises
            reason = getattr(e, 'strerror', None) or e
            raise Stop(
                f'the cached image {paths[row]} cannot be read ({reason}). Delete it, if it is '
                'there, and run this again: the image will be made again'
            ) from None

    parts = [image]
    if targets is not None:
        parts.append(torch.tensor(list(map(float, targets))).__getitem__)
    return TfmdDL(
        Datasets(range(len(paths)), parts, split_idx=0 if train else 1),
        bs=batch_size,
        shuffle=train,
        num_workers=workers,
        pin_memory=device.type == 'cuda',
        device=device,
        after_item=ToTensor(),
        after_batch=batch_tfms,
    )
