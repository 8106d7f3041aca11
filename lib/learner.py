"""The fastai Learner of the recipe, alone or in several processes, and the LR range test."""

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


def create_learner(
    dls: DataLoaders,
    model: nn.Module,
    wd: float = 0.0,
    precision: str = 'fp32',
    accumulate: int = 1,
) -> Learner:
    """A Learner for one logit: binary cross-entropy, AdamW on all parameters, AUC each epoch.

    Weight decay is on all of them, since fastai's exemption of biases and norms does not reach a
    torch optimizer. `precision`: fp32, bf16 or fp16. `accumulate`: batches per optimizer step.
    """
    speed.ready_memory(dls.device)
    device = dls.device.type
    bf16 = MixedPrecision(amp_mode=AMPMode.BF16) if device == 'cuda' else CPUMixed()
    half = {'bf16': [bf16], 'fp16': [MixedPrecision(amp_mode=AMPMode.FP16)], 'fp32': []}
    learn = Learner(
        dls,
        model.to(memory_format=torch.channels_last),
        loss_func=BCEWithLogitsLossFlat(),
        # fused makes one pass over all weights; else each operation of a step makes its own
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=device in ('cpu', 'cuda')),
        wd=wd,
        # fastai's RocAucBinary would take the softmax of the single logit, which is always 1
        metrics=AccumMetric(score.auc, invert_arg=True, to_np=True, name='auc'),
        cbs=half[precision] + ([Accumulate(accumulate)] if accumulate > 1 else []),
        path=tempfile.gettempdir(),  # where lr_find keeps the weights meanwhile
        model_dir='.',
    )
    learn.remove_cb(ProgressCallback)  # it prints thousands of characters into a log file
    learn.logger = noop
    return learn


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


def read_range_test(recorder: Recorder, num_it: int) -> tuple[np.ndarray, np.ndarray]:
    """The rates and fastai's smoothed losses of a range test, (n,) each, while they are finite.

    Raises: RuntimeError where the test made fewer than `num_it` steps, as it would if the loader's
    length changed after fastai had counted it.
    """
    lrs, losses = np.array(recorder.lrs), np.array(recorder.losses, dtype=float)
    if len(lrs) != num_it:
        raise RuntimeError(f'the range test made {len(lrs)} of {num_it} steps')
    finite = np.isfinite(losses)
    n = len(losses) if finite.all() else int(np.argmin(finite))
    return lrs[:n], losses[:n]


def suggest_rates(lrs: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """The rates to start from and to peak at, from the rates and losses of a range test.

    The peak is a tenth of the rate at the lowest loss. The start is the rate at which the loss has
    made a tenth of its whole fall, measured from its mean over the first tenth of the test, in
    which the smoothed loss settles. It is rough and varies by decades from test to test.

    Raises: Stop where the whole fall is no more than two standard deviations of the losses in that
    first tenth, which noise alone may cause.
    """
    settled = len(losses) // 10
    first, rates, rest = losses[:settled], lrs[settled:], losses[settled:]
    if settled < 2 or (fall := first.mean() - rest.min()) <= 2 * first.std(ddof=1):
        raise Stop(
            'the loss falls no further in this range test than noise would make it; look at the '
            'images, at --weights and at --batch_size'
        )
    lr_max = rates[np.argmin(rest)] / 10
    has_fallen = rest < first.mean() - 0.1 * fall
    return float(min(rates[np.argmax(has_fallen)], lr_max)), float(lr_max)
