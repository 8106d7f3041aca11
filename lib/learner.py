"""The fastai Learner of the recipe, its processes, and the reading of a range test."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.vision.all import (
    AccumMetric,
    BCEWithLogitsLossFlat,
    DataLoaders,
    Learner,
    OptimWrapper,
    ProgressCallback,
    Recorder,
    noop,
)
from timm.layers import convert_sync_batchnorm
from torch import nn

from lib import ranks, score, speed
from lib.callbacks import Accumulate, CPUMixed
from lib.cli import Stop


def learner(
    dls: DataLoaders,
    model: nn.Module,
    wd: float = 0.0,
    precision: str = 'fp32',
    accumulate: int = 1,
) -> Learner:
    """A Learner for one logit: binary cross-entropy, AdamW on all parameters, AUC each epoch.

    `precision`: fp32, bf16 or fp16. `accumulate`: batches that share a step.
    """
    speed.ready_memory(dls.device)
    device = dls.device.type
    bf16 = MixedPrecision(amp_mode=AMPMode.BF16) if device == 'cuda' else CPUMixed()
    half = {'bf16': [bf16], 'fp16': [MixedPrecision(amp_mode=AMPMode.FP16)], 'fp32': []}
    learn = Learner(
        dls,
        model.to(memory_format=torch.channels_last),
        loss_func=BCEWithLogitsLossFlat(),
        # fused: one pass over all weights, not one for each of a step's dozen operations
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=device in ('cpu', 'cuda')),
        wd=wd,
        wd_bn_bias=True,  # fastai's own exemption does not reach a torch optimizer
        # fastai's RocAucBinary would softmax the single logit; ranks need no sigmoid
        metrics=AccumMetric(score.auc, invert_arg=True, to_np=True, name='auc'),
        cbs=half[precision] + ([Accumulate(accumulate)] if accumulate > 1 else []),
        path=tempfile.gettempdir(),  # where lr_find keeps the weights meanwhile
        model_dir='.',
    )
    learn.remove_cb(ProgressCallback)  # thousands of characters in a log file: History and tqdm
    learn.logger = noop
    return learn


@contextmanager
def distributed(learn: Learner) -> Iterator[None]:
    """A block in which `learn` trains in all processes of a launcher; nothing without one.

    Each process takes its part of every epoch's rows, and a step the mean of their gradients.
    """
    if ranks.WORLD == 1:
        yield
        return
    from fastai.distributed import DistributedDL

    # every process draws the same rows by itself, and fastai's broadcast works on CUDA alone
    DistributedDL._broadcast = lambda self, rows, rank: rows
    cuda = learn.dls.device.type == 'cuda'
    if cuda:  # torch's own conversion, which fastai takes, would lose timm's activations
        learn.model = convert_sync_batchnorm(learn.model)
    with ranks.visible(), learn.distrib_ctx(sync_bn=False, cpu=not cuda):
        yield


def read_range_test(recorder: Recorder, num_it: int) -> tuple[np.ndarray, np.ndarray]:
    """The rates and fastai's smoothed losses of a range test, (n,) each, while they are finite.

    A loader of another length than fastai counted with would have ended the test early.
    """
    lrs, losses = np.array(recorder.lrs), np.array(recorder.losses, dtype=float)
    if len(lrs) != num_it:
        raise RuntimeError(f'the range test made {len(lrs)} of {num_it} steps')
    finite = np.isfinite(losses)
    n = len(losses) if finite.all() else int(np.argmin(finite))
    return lrs[:n], losses[:n]


def suggest(lrs: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """The rates to start from and to peak at, read off a range test.

    The maximum is a tenth of the rate at the lowest loss. The minimum is where the loss first
    falls: below its level over the first tenth of the test by a tenth of all that it falls. It is
    rough, and varies by decades from test to test. The first tenth, in which the smoothed loss
    settles, is not read otherwise.

    Raises: Stop where the loss falls by no more than two standard deviations of that first tenth,
    as noise alone may do.
    """
    settled = len(losses) // 10
    first, rates, rest = losses[:settled], lrs[settled:], losses[settled:]
    fall = first.mean() - rest.min() if settled > 1 else 0
    if settled < 2 or fall <= 2 * first.std(ddof=1):
        raise Stop(
            'the loss falls no further in this range test than noise would make it; look at the '
            'images, at --weights and at --batch_size'
        )
    lr_max = rates[np.argmin(rest)] / 10
    has_fallen = rest < first.mean() - 0.1 * fall
    return float(min(rates[np.argmax(has_fallen)], lr_max)), float(lr_max)
