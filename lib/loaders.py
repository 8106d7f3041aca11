"""Image files and targets to fastai DataLoaders."""

from collections.abc import Sequence
from multiprocessing import get_start_method
from pathlib import Path

import torch
from fastai.vision.all import Datasets, PILImage, TfmdDL, ToTensor, Transform, default_device

from lib.cli import Stop
from lib.images import n_cores


def loader(
    paths: Sequence[Path],
    targets: Sequence[float],
    batch_tfms: list[Transform],
    batch_size: int,
    train: bool = False,
    workers: int | None = None,
) -> TfmdDL:
    """Batches of ((B, 3, H, W) float, (B,) float 0/1), in order, or shuffled for training.

    With `train` the transforms of split_idx 0 are on. No batch is dropped: an epoch's last may be
    small. `workers`: processes that read; None is one a core beside a GPU, and none on the CPU,
    where they would only compete with the model. Raises: Stop where it cannot have any.
    """
    device = default_device()
    forks = get_start_method() == 'fork'  # fastai's transforms cannot be sent to other processes
    if workers is None:
        workers = n_cores() if forks and device.type != 'cpu' else 0
    if workers and not forks:
        raise Stop('--workers needs a system that forks processes; leave it out here')
    paths, targets = list(map(str, paths)), torch.tensor(list(map(float, targets)))

    def image(row: int) -> PILImage:
        try:
            return PILImage.create(paths[row])
        except Exception as e:  # whatever a decoder raises
            reason = getattr(e, 'strerror', None) or e
            raise Stop(
                f'{paths[row]} could be read and now cannot ({reason}); delete it, if it '
                'is there, and the same command makes the cache again and goes on'
            ) from None

    def target(row: int) -> torch.Tensor:
        return targets[row]

    split_idx = 0 if train else 1
    return TfmdDL(
        Datasets(range(len(paths)), [image, target], split_idx=split_idx),
        bs=batch_size,
        shuffle=train,
        num_workers=workers,
        pin_memory=device.type == 'cuda',
        device=device,
        after_item=ToTensor(),
        after_batch=batch_tfms,
    )
