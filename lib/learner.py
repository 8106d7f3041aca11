"""The fastai Learner of the recipe, alone or in several processes, and the LR range test."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.vision.all import (
    AccumMetric,
    Callback,
    GradientAccumulation,
    Learner,
    OptimWrapper,
    minimum,
)
from matplotlib import pyplot as plt
from timm.layers import convert_sync_batchnorm

from lib import ranks, score
from lib.cli import Stop
from lib.files import atomic

# All parameters decay, since fastai's exemption of biases and norms does not reach a torch
# optimizer. `fused` makes one pass over all weights; else each operation of a step makes its own
adamw = partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)


def auc() -> AccumMetric:
    """The AUC over the monitored images; fastai's own takes the softmax of the single logit."""
    return AccumMetric(score.auc, invert_arg=True, to_np=True, name='auc')


def half_precision(precision: str) -> list[Callback]:
    """The callback that trains in bf16 or fp16; none for fp32."""
    return [] if precision == 'fp32' else [MixedPrecision(amp_mode=AMPMode(precision))]


def accumulation(batch_size: int, accumulate: int) -> list[Callback]:
    """The callback that makes a step of `accumulate` batches of this process; none for 1."""
    return [] if accumulate == 1 else [GradientAccumulation(batch_size * accumulate)]


@contextmanager
def distributed(learn: Learner) -> Iterator[None]:
    """A block in which `learn` trains in all processes of a launcher; it does nothing without one.

    Each process trains on its part of an epoch's rows. A step takes the mean of their gradients.
    """
    if ranks.WORLD == 1:
        yield
        return
    from fastai.distributed import DistributedDL

    # every process draws the same rows itself, and fastai's broadcast works on CUDA only
    DistributedDL._broadcast = lambda self, rows, rank: rows
    cuda = learn.dls.device.type == 'cuda'
    if cuda:  # fastai would take torch's conversion, which loses the activations of timm's layers
        learn.model = convert_sync_batchnorm(learn.model)
    with ranks.visible(), learn.distrib_ctx(sync_bn=False, cpu=not cuda):
        yield


def suggest_rates(learn: Learner, n_batches: int, path: Path) -> None:
    """Print the rates that fastai's range test of `n_batches` suggests, and save its plot to
    `path`. The peak is a tenth of the rate at the lowest loss, and the start a fortieth of the
    peak, as in the recipe. The model is thrown away.
    """
    with tempfile.TemporaryDirectory() as folder:  # lr_find keeps the weights there meanwhile
        learn.path = Path(folder)
        with learn.no_bar(), learn.no_logging():
            lr_max = learn.lr_find(num_it=n_batches, suggest_funcs=minimum).minimum
    if np.isnan(np.array(learn.recorder.losses, dtype=float)).any():  # argmin calls NaN the lowest
        raise Stop('the loss is NaN in this range test; look at the images and at --weights')
    with atomic(path) as temporary:
        plt.savefig(temporary, dpi=120)
    plt.close()
    print(f'suggested: --lr_min {lr_max / 40:.1e} --lr_max {lr_max:.1e}; first look at {path}')
