"""fastai callbacks for training: seeds, history, resuming."""

import io
import math
import random
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Callback, CancelEpochException, get_model, set_seed
from tqdm import tqdm

from lib import files, ranks
from lib.cli import Stop

NO_BAR = ranks.RANK > 0 or None  # tqdm's `disable`; None shows a bar in a terminal only


def seed_all(*seed: int) -> None:
    """Seed torch, numpy and Python by several whole numbers, such as (seed, fold, epoch)."""
    set_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


class SeedEpoch(Callback):
    """Seeds each epoch by (seed, fold, epoch), so that its draws do not depend on earlier ones."""

    def __init__(self, seed: int, fold: int):
        self.seed, self.fold = seed, fold

    def before_epoch(self) -> None:
        """Seed all generators, including that of the training loader."""
        # each process of a launcher augments other images, so it needs draws of its own
        seed_all(self.seed, self.fold, self.epoch, *([ranks.RANK] if ranks.RANK else []))
        self.dls.train.rng = random.Random(random.getrandbits(32))


class StopOnNaN(Callback):
    """Stops where the loss is NaN or infinite, since all later weights would be too."""

    order = 55  # after Recorder, which has fetched the loss from the device and waited for it

    def __init__(self, fold: int):
        self.fold = fold

    def after_batch(self) -> None:
        """Check the loss. Raises: Stop that names fold, epoch and batch."""
        known = self.recorder.smooth_loss.val if self.training else self.recorder.loss.total
        if not math.isfinite(known):
            what = 'training' if self.training else 'scoring'
            raise Stop(
                f'the loss is {self.loss.item()} in fold {self.fold}, epoch {self.epoch + 1}, '
                f'{what} batch {self.iter + 1}; if it trains in half precision, run it '
                'again with --precision fp32, else take a smaller --lr_max (--lr_find shows which) '
                'and another --name'
            )


class History(Callback):
    """Prints a line after each epoch, or after every fourth and the last where an epoch takes less
    than a minute; writes the figures of all to a CSV file, and shows a bar.

    The bar, with the time left, is drawn in a terminal only; a log file has lines only.
    """

    order = 60  # after Recorder has the epoch's figures

    def __init__(self, path: Path, fold: int):
        self.path, self.fold = path, fold

    def before_fit(self) -> None:
        """Start the bar over the training batches of all epochs."""
        self.rows: list[dict[str, Any]] = []  # Resume puts the rows of an earlier start here
        total = self.n_epoch * len(self.dls.train)
        self.bar = tqdm(total=total, desc=f'fold {self.fold}', leave=False, disable=NO_BAR)

    def before_epoch(self) -> None:
        """Start the epoch's clock."""
        self.start = time.perf_counter()

    def after_batch(self) -> None:
        """Move the bar."""
        if self.training:
            self.bar.update()

    def after_epoch(self) -> None:
        """Print the epoch's line and write history.csv anew."""
        if self.epoch < len(self.rows):  # it was trained at an earlier start and is skipped now
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
        files.write_csv(self.path, pd.DataFrame(self.rows))
        # a quick training would fill the screen
        if row['seconds'] < 60 and (epoch + 1) % 4 and epoch + 1 < self.n_epoch:
            return
        tqdm.write(
            f'fold {self.fold} epoch {epoch + 1:2d}/{self.n_epoch}  loss {row["train_loss"]:#.4g}  '
            f'valid {row["valid_loss"]:#.4g}  auc {row["auc"]:.4f}  {row["seconds"]:.0f} s'
        )

    def after_fit(self) -> None:
        """Take the bar away, and say where a loss has become worse than that of a coin."""
        self.bar.close()
        for name in ('train_loss', 'valid_loss') if self.rows else ():
            first, last = (self.rows[i][name] for i in (0, -1))
            if last > max(first, math.log(2)):
                print(
                    f'warning: the {name} of fold {self.fold} ends at {last:.4g}, above its start '
                    f'of {first:.4g}; a smaller --lr_max may train (--lr_find shows which)'
                )

    @property
    def seconds(self) -> float:
        """The seconds of all epochs, including those of earlier starts."""
        return round(sum(row['seconds'] for row in self.rows), 1)


class Resume(Callback):
    """Saves at the end of an epoch what the next one needs, and continues after the last one saved.

    Random states are not saved, since SeedEpoch sets them, nor the optimizer's hyperparameters,
    which fit sets. The rows of `history` are saved too. In fp16 the scale of the gradients starts
    anew, so that the result differs slightly.
    """

    order = 65  # after History has added the epoch's row

    def __init__(self, path: Path, fold: int, history: History):
        self.path, self.fold, self.history = path, fold, history
        self.resumed = 0  # epochs

    def before_fit(self) -> None:
        """Restore the saved state. Raises: Stop where it is broken or of another model or fold."""
        if not self.path.exists():
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # about a broken file, which is refused below
                state = torch.load(self.path, map_location='cpu', weights_only=True)
            if (state['fold'], state['epochs']) != (self.fold, self.n_epoch):
                raise ValueError(f'it is of fold {state["fold"]}, {state["epochs"]} epochs')
            rows, (count, value) = list(map(dict, state['rows'])), state['smooth_loss']
            get_model(self.model).load_state_dict(state['model'])
            groups = self.opt.state_dict()['param_groups']
            self.opt.load_state_dict({'state': state['opt'], 'param_groups': groups})
        except OSError:
            raise
        except Exception as e:  # unpickling and the tensors of another model may raise anything
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise Stop(
                f'{self.path} is not a state of this training ({reason}); delete it, and the fold '
                'starts at its first epoch'
            ) from None
        self.resumed, self.history.rows = len(rows), rows
        tqdm.write(f'{self.path}: goes on after epoch {self.resumed} of {self.n_epoch}')
        smooth = self.recorder.smooth_loss
        smooth.count, smooth.val = count, torch.tensor(value)
        self.history.bar.update(self.resumed * len(self.dls.train))

    def before_epoch(self) -> None:
        """Skip the epochs that are done."""
        if self.epoch < self.resumed:
            raise CancelEpochException

    def after_epoch(self) -> None:
        """Save, in the first process of a launcher."""
        if self.epoch < self.resumed or ranks.following:
            return
        smooth = self.recorder.smooth_loss
        state = {  # tensors and Python's own types, which weights_only can read
            'fold': self.fold,
            'epochs': self.n_epoch,
            'model': get_model(self.model).state_dict(),
            'opt': self.opt.state_dict()['state'],
            'rows': self.history.rows,
            'smooth_loss': (smooth.count, float(smooth.val)),
        }
        buffer = io.BytesIO()  # torch's own writer raises a RuntimeError where the disk is full
        torch.save(state, buffer)
        with files.atomic(self.path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
