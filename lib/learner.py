"""The fastai Learner of the recipe: loss, optimizer, precision, processes, the range test."""

import copy
import ctypes
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.vision.all import (
    AccumMetric,
    BCEWithLogitsLossFlat,
    Callback,
    DataLoaders,
    Learner,
    OptimWrapper,
    ProgressCallback,
    Transform,
    noop,
)
from timm.layers import convert_sync_batchnorm
from torch import nn

from lib import ranks, score
from lib.callbacks import Accumulate, CPUMixed
from lib.cli import Stop
from lib.loaders import loader
from lib.sampling import Downsample, monitored


def for_fold(
    paths: np.ndarray,
    targets: np.ndarray,
    held_out: np.ndarray,
    net: nn.Module,
    batch_tfms: list[Transform],
    *,
    batch_size: int,
    neg_ratio: float,
    wd: float,
    seed: int,
    workers: int | None = None,
    precision: str = 'fp32',
    accumulate: int = 1,
) -> tuple[Learner, Downsample]:
    """A Learner that trains on the rows not `held_out`, and the callback that chooses each epoch's.

    `paths`, `targets` (0/1), `held_out` (bool): (n,). Each epoch it scores all melanomas held out
    and a fixed sample of the benign images, half as many rows as an epoch trains on: a sixth of
    its cost. Hand the callback to `fit`; one that a Learner holds runs in predictions too.
    `batch_size`: images a step of all processes together, so that a rate means the same with more.

    Raises: Stop where the processes cannot share a batch equally.
    """
    if batch_size % ranks.WORLD:
        raise Stop(f'{ranks.WORLD} processes cannot share --batch_size {batch_size} equally')
    batch_size //= ranks.WORLD
    train, valid = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    train_dl = loader(paths[train], targets[train], batch_tfms, batch_size, True, workers)
    sampler = Downsample(train_dl, targets[train], neg_ratio, seed)
    valid = valid[monitored(targets[valid], train_dl.n // 2, seed)]
    valid_dl = loader(paths[valid], targets[valid], batch_tfms, batch_size, False, workers)
    return learner(DataLoaders(train_dl, valid_dl), net, wd, precision, accumulate), sampler


def learner(
    dls: DataLoaders,
    model: nn.Module,
    wd: float = 0.0,
    precision: str = 'fp32',
    accumulate: int = 1,
) -> Learner:
    """A Learner for one logit: binary cross-entropy, AdamW on all parameters, AUC each epoch.

    `precision`: as `resolve` returns it. `accumulate`: batches that share a step.
    """
    if dls.device.type == 'cpu':
        keep_memory()
    bf16 = MixedPrecision(amp_mode=AMPMode.BF16) if dls.device.type == 'cuda' else CPUMixed()
    half = {'bf16': [bf16], 'fp16': [MixedPrecision(amp_mode=AMPMode.FP16)], 'fp32': []}
    learn = Learner(
        dls,
        model.to(memory_format=torch.channels_last),
        loss_func=BCEWithLogitsLossFlat(),
        # fused: one pass over all weights, not one for each of a step's dozen operations
        opt_func=partial(
            OptimWrapper, opt=torch.optim.AdamW, fused=dls.device.type in ('cpu', 'cuda')
        ),
        wd=wd,
        wd_bn_bias=True,  # fastai's own exemption does not reach a torch optimizer
        # fastai's RocAucBinary would softmax the single logit; ranks need no sigmoid
        metrics=AccumMetric(score.auc, invert_arg=True, to_np=True, name='auc'),
        cbs=half[precision] + ([Accumulate(accumulate)] if accumulate > 1 else []),
    )
    learn.remove_cb(ProgressCallback)  # thousands of characters in a log file: History and tqdm
    learn.logger = noop
    return learn


def distributed(learn: Learner) -> AbstractContextManager:
    """A context in which `learn` trains in all processes of a launcher; nothing without one.

    Each process takes its part of every epoch's rows, and a step the mean of their gradients.
    """
    if ranks.WORLD == 1:
        return nullcontext()
    from fastai.distributed import DistributedDL

    # every process draws the same rows by itself, and fastai's broadcast works on CUDA alone
    DistributedDL._broadcast = lambda self, rows, rank: rows
    cuda = learn.dls.device.type == 'cuda'
    if cuda:  # torch's own conversion, which fastai takes, would lose timm's activations
        learn.model = convert_sync_batchnorm(learn.model)
    return learn.distrib_ctx(sync_bn=False, cpu=not cuda)


def keep_memory() -> None:
    """Have glibc keep what is freed, up to 2 GB, for the next step.

    By default it hands large tensors back to the system after each use, and the page faults of
    having them again take a third of a training step on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
        mallopt(m_trim_threshold, (2 << 30) - 1)
        mallopt(m_top_pad, 256 << 20)


def resolve(precision: str, device: torch.device) -> str:
    """'fp32', 'bf16' or 'fp16', which `precision` may also leave to the `device` as 'auto'.

    On CUDA that is bf16, on older devices fp16; on a CPU with instructions for it bf16.
    Raises: Stop where it is none of these, or the device cannot compute in it.
    """
    cuda = device.type == 'cuda'
    if cuda:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        instructions = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
        has_bf16 = device.type == 'cpu' and instructions()
    if precision == 'auto':
        return 'bf16' if has_bf16 else 'fp16' if cuda else 'fp32'
    can = {'cuda': ['fp32', 'fp16', *(['bf16'] if has_bf16 else [])], 'cpu': ['fp32', 'bf16']}
    if precision not in (can := can.get(device.type, ['fp32'])):
        raise Stop(
            f'--precision here ({device.type}) may be auto, {", ".join(can)}, not {precision}'
        )
    return precision


def fastest(model: nn.Module, size: int, batch_size: int, device: torch.device) -> str:
    """The precision to train `model` in: as `resolve` has it, and on the CPU 'bf16' only if faster.

    Large convolutions gain by half precision there, depthwise ones of a small model lose. So a
    training step of both is timed, twice after one that does not count. A model whose step takes
    less than a tenth of a second is left in 'fp32': little to gain, and a choice by chance.
    """
    best = resolve('auto', device)
    if device.type != 'cpu' or best == 'fp32':
        return best
    keep_memory()
    model = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
    x = torch.rand(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)

    def seconds(bf16: bool) -> float:
        start = time.perf_counter()
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            loss = model(x).float().sigmoid().mean()
        loss.backward()
        return time.perf_counter() - start

    single = min([seconds(False) for _ in range(3)][1:])
    if single < 0.1:
        return 'fp32'
    half = min([seconds(True) for _ in range(3)][1:])
    return 'bf16' if half < 0.85 * single else 'fp32'


def range_test(
    learn: Learner, cbs: list[Callback], num_it: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Losses over learning rates from 1e-7 to 10, `num_it` steps; the weights are put back.

    Returns: rates and losses smoothed by fastai, (n,) each, up to the first that is not finite.
    """
    with tempfile.TemporaryDirectory() as folder:  # fastai keeps the weights in a file meanwhile
        learn.path = Path(folder)
        with learn.added_cbs(cbs):
            learn.lr_find(num_it=num_it, stop_div=False, show_plot=False, suggest_funcs=None)
    lrs, losses = np.array(learn.recorder.lrs), np.array(learn.recorder.losses, dtype=float)
    if len(lrs) != num_it:
        raise RuntimeError(f'the range test made {len(lrs)} of {num_it} steps')
    finite = np.isfinite(losses)
    n = len(losses) if finite.all() else int(np.argmin(finite))
    return lrs[:n], losses[:n]


def suggest(lrs: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """The rates to start from and to peak at, read off a range test.

    The maximum is a tenth of the rate at the lowest loss; the minimum is where the loss first
    falls: below its level over the first tenth of the test by a tenth of all that it falls. That
    first tenth, in which the smoothed loss settles, is not read.

    Raises: Stop where the loss never falls.
    """
    settled = len(losses) // 10
    rates, rest = lrs[settled:], losses[settled:]
    before = np.mean(losses[:settled]) if settled else 0
    if not len(rest) or rest.min() >= before:
        raise Stop('the loss never falls in this range test; look at the images and at --weights')
    lr_max = rates[np.argmin(rest)] / 10
    fallen = rest < before - 0.1 * (before - rest.min())
    return float(min(rates[np.argmax(fallen)], lr_max)), float(lr_max)
