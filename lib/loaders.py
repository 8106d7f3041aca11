"""Image files and targets to fastai DataLoaders."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from fastai.vision.all import Datasets, PILImage, TfmdDL, ToTensor, Transform, default_device


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
    where they would only compete with the model.
    """
    device = default_device()
    if workers is None:
        workers = 0 if device.type == 'cpu' else os.cpu_count()
    paths, targets = list(map(str, paths)), torch.tensor(list(map(float, targets)))

    def image(row: int) -> PILImage:
        return PILImage.create(paths[row])

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
