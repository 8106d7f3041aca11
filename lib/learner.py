"""The fastai Learner of the recipe: loss, optimizer, precision, callbacks, the range test."""

import ctypes
import io
import json
import random
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.vision.all import (
    AccumMetric,
    BCEWithLogitsLossFlat,
    Callback,
    CancelEpochException,
    DataLoaders,
    Learner,
    OptimWrapper,
    ProgressCallback,
    Transform,
    get_model,
    noop,
    rank_distrib,
)
from torch import nn
from tqdm import tqdm

from lib import files, score
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
) -> tuple[Learner, Downsample]:
    """A Learner that trains on the rows not `held_out`, and the callback that chooses each epoch's.

    `paths`, `targets` (0/1), `held_out` (bool): (n,). Each epoch it scores all melanomas held out
    and a fixed sample of the benign images, half as many rows as an epoch trains on: a sixth of
    its cost. Hand the callback to `fit`; one that a Learner holds runs in predictions too.
    """
    train, valid = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    train_dl = loader(paths[train], targets[train], batch_tfms, batch_size, True, workers)
    sampler = Downsample(train_dl, targets[train], neg_ratio, seed)
    valid = valid[monitored(targets[valid], train_dl.n // 2, seed)]
    valid_dl = loader(paths[valid], targets[valid], batch_tfms, batch_size, False, workers)
    return learner(DataLoaders(train_dl, valid_dl), net, wd), sampler


def learner(dls: DataLoaders, model: nn.Module, wd: float = 0.0) -> Learner:
    """A Learner for one logit: binary cross-entropy, AdamW on all parameters, AUC each epoch.

    On CUDA in half precision, elsewhere in single.
    """
    if dls.device.type == 'cpu':
        keep_memory()
    half = {
        'bf16': [MixedPrecision(amp_mode=AMPMode.BF16)],
        'fp16': [MixedPrecision(amp_mode=AMPMode.FP16)],
        'fp32': [],
    }
    learn = Learner(
        dls,
        model.to(memory_format=torch.channels_last),
        loss_func=BCEWithLogitsLossFlat(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        wd=wd,
        wd_bn_bias=True,  # fastai's own exemption does not reach a torch optimizer
        # fastai's RocAucBinary would softmax the single logit; ranks need no sigmoid
        metrics=AccumMetric(score.auc, invert_arg=True, to_np=True, name='auc'),
        cbs=half[precision(dls.device)],
    )
    learn.remove_cb(ProgressCallback)  # thousands of characters in a log file: History and tqdm
    learn.logger = noop
    return learn


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


def precision(device: torch.device) -> str:
    """What is computed in: 'fp32' on the CPU; on CUDA 'bf16', else 'fp16' on older devices."""
    if device.type != 'cuda':
        return 'fp32'
    return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'


def seed_all(*seed: int) -> None:
    """Seed torch, numpy and Python from a row of whole numbers, such as (seed, fold, epoch)."""
    state = np.random.SeedSequence(seed).generate_state(1)[0]
    torch.manual_seed(int(state))
    np.random.seed(state)
    random.seed(int(state))


class SeedEpoch(Callback):
    """All that an epoch draws at random depends on (seed, fold, epoch), and on nothing before."""

    def __init__(self, seed: int, fold: int):
        self.seed, self.fold = seed, fold

    def before_epoch(self) -> None:
        """Seed the generators, the training loader's own too."""
        seed_all(self.seed, self.fold, self.epoch)
        self.dls.train.rng = random.Random(random.getrandbits(32))


class StopOnNaN(Callback):
    """Stop where the loss is NaN or infinite: every later weight would be."""

    def __init__(self, fold: int):
        self.fold = fold

    def after_loss(self) -> None:
        """Raises: Stop with fold, epoch and step."""
        if not torch.isfinite(self.loss):
            what = 'training' if self.training else 'scoring'
            raise Stop(
                f'the loss is {self.loss.item()} in fold {self.fold}, epoch {self.epoch + 1}, '
                f'{what} step {self.iter + 1}; try a smaller --lr_max (--lr_find shows which)'
            )


class History(Callback):
    """One printed line an epoch, the same to a CSV file, and a bar with the time left.

    The bar is drawn in a terminal only; in a log file there are only lines.
    """

    order = 60  # after Recorder has the epoch's figures

    def __init__(self, path: Path, fold: int):
        self.path, self.fold = path, fold

    def before_fit(self) -> None:
        """Start the bar: a tick a training batch, of all epochs."""
        self.rows: list[dict[str, Any]] = []  # Resume puts those of an earlier start here
        total = self.n_epoch * len(self.dls.train)
        self.bar = tqdm(total=total, desc=f'fold {self.fold}', leave=False, disable=None)

    def before_epoch(self) -> None:
        """Start the epoch's clock."""
        self.start = time.perf_counter()

    def after_batch(self) -> None:
        """Move the bar."""
        if self.training:
            self.bar.update()

    def after_epoch(self) -> None:
        """Print the epoch's line and write history.csv anew."""
        if self.epoch < len(self.rows):  # skipped: it was trained at an earlier start
            return
        epoch, train_loss, valid_loss, auc = list(self.recorder.log)[:4]
        row = {
            'epoch': epoch + 1,
            'train_loss': float(train_loss),
            'valid_loss': float(valid_loss),
            'auc': float(auc),
            'lr': float(self.opt.hypers[-1]['lr']),
            'seconds': time.perf_counter() - self.start,
        }
        self.rows.append(row)
        header, lines = ','.join(row), [','.join(map(str, r.values())) for r in self.rows]
        files.write_text(self.path, '\n'.join([header, *lines]) + '\n')
        tqdm.write(
            f'fold {self.fold} epoch {epoch + 1:2d}/{self.n_epoch}  loss {row["train_loss"]:.4f}  '
            f'valid {row["valid_loss"]:.4f}  auc {row["auc"]:.4f}  {row["seconds"]:.0f} s'
        )

    def after_fit(self) -> None:
        """Take the bar away."""
        self.bar.close()


class Resume(Callback):
    """Save all that the next epoch needs at each epoch's end, and go on after the last one saved.

    No random state is among it: SeedEpoch sets all that from (seed, fold, epoch). Nor are the
    optimizer's hyperparameters: fit sets them. Needs History beside it, whose rows it keeps too.
    """

    order = 65  # after History has the epoch's row, before any Callback that need not be skipped

    def __init__(self, path: Path, fold: int):
        self.path, self.fold, self.found, self.done = path, fold, 0, 0  # epochs

    def before_fit(self) -> None:
        """Put back what is saved. Raises: Stop where it is broken, or of another model or fold."""
        if not self.path.exists():
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of odd files, which are refused by a sentence
                state = torch.load(self.path, map_location='cpu', weights_only=True)
            if (state['fold'], state['epochs']) != (self.fold, self.n_epoch):
                raise ValueError(f'it is of fold {state["fold"]}, {state["epochs"]} epochs')
            rows = list(map(dict, json.loads(state['rows'])))
            if len(rows) > self.n_epoch:
                raise ValueError(f'it has {len(rows)} epochs')
            count, value = int(state['smooth_loss'][0]), float(state['smooth_loss'][1])
            get_model(self.model).load_state_dict(state['model'])
            groups = self.opt.state_dict()['param_groups']
            self.opt.load_state_dict({'state': state['opt'], 'param_groups': groups})
        except OSError:
            raise
        except Exception as e:  # whatever unpickling and a foreign model's tensors may raise
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise Stop(
                f'{self.path} is no state of this training ({reason}); delete it, and the fold '
                'starts at its first epoch'
            ) from None
        self.found = self.done = len(rows)
        tqdm.write(f'{self.path}: goes on after epoch {self.done} of {self.n_epoch}')
        self.learn.history.rows = rows
        smooth = self.recorder.smooth_loss
        smooth.count, smooth.val = count, torch.tensor(value)
        self.learn.history.bar.update(self.done * len(self.dls.train))

    def before_epoch(self) -> None:
        """Skip what is done."""
        if self.epoch < self.found:
            raise CancelEpochException

    def after_epoch(self) -> None:
        """Save, in the first process where there are several."""
        if self.epoch < self.found:
            return
        smooth = self.recorder.smooth_loss
        state = {  # tensors and Python's own types alone: all that weights_only reads
            'fold': self.fold,
            'epochs': self.n_epoch,
            'model': get_model(self.model).state_dict(),
            'opt': self.opt.state_dict()['state'],
            'rows': json.dumps(self.learn.history.rows),
            'smooth_loss': (smooth.count, float(smooth.val)),
        }
        if not rank_distrib():
            buffer = io.BytesIO()  # torch's own writer turns a full disk into a RuntimeError
            torch.save(state, buffer)
            with files.atomic(self.path) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        self.done = self.epoch + 1


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
