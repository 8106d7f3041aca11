"""--log: a run's figures, passed on to TensorBoard or to Weights & Biases (wandb).

tensorboard --logdir HOME/runs                   # one curve per fold, under its run's name
wandb sync HOME/runs/NAME/wandb/offline-run-*    # after a training with WANDB_MODE=offline
python -m torch.distributed.run --nproc_per_node 2 -- train.py --log wandb

Without -- the launcher would take --log for its own flag. Each row of history.csv is passed on, and
the scores of the held-out fold. No image is.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from typing import Any

from fastai.vision.all import Callback
from tqdm import tqdm

from lib import ranks, score
from lib.callbacks import History, Resume
from lib.runs import Run

Logger = tuple[Callable[[int, dict[str, float]], Any], Callable[[], Any]]  # logs an epoch; ends


def open_tensorboard(run: Run, k: int) -> Logger:
    """What logs an epoch of fold `k` into the folder of the fold, and what ends it."""
    from torch.utils.tensorboard import SummaryWriter

    for path in run.fold(k).glob('events.out.tfevents.*'):  # of an earlier start: all comes again
        path.unlink()
    writer = SummaryWriter(str(run.fold(k)))

    def log(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def open_wandb(run: Run, k: int) -> Logger:
    """What logs an epoch of fold `k` as a run of wandb, in a group for its run, and what ends it.

    An earlier start of the fold is overwritten. Neither code nor the machine's name is recorded.
    """
    import wandb

    config = {key: value for key, value in run.config.items() if key != 'command'}
    off = dict.fromkeys(('disable_git', 'disable_code', 'x_disable_machine_info', 'silent'), True)
    of_flags = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    name, identity = f'fold{k}', f'{run.name}-{k}-{of_flags:08x}'
    for old in run.folder.glob(f'wandb/offline-run-*-{identity}'):
        shutil.rmtree(old)
    wandb_run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', 'melanoma'), group=run.name, name=name,
        id=identity, config=config, dir=run.folder,
        resume='allow', reinit='create_new', settings=wandb.Settings(host='', console='off', **off),
    )  # fmt: skip
    return lambda step, figures: wandb_run.log(figures, step=step), wandb_run.finish


class Follow(Callback):
    """Passes the rows of `history` on to what `log` names, and at the end the fold's scores.

    Each start passes on all rows, those that Resume has put back too, so that a fold that goes on
    is one whole curve. A logger that fails is reported in one line and gets nothing more.
    """

    order = (History.order + Resume.order) / 2  # after the row is there; saved only when passed on

    def __init__(self, log: str | None, run: Run, k: int, history: History):
        # `run` would be fastai's own name for whether a callback runs
        self.of_run, self.k, self.history, self.step = run, k, history, 0
        self.opened = (
            log
            and not ranks.following
            and self._try({'tensorboard': open_tensorboard, 'wandb': open_wandb}[log], run, k)
        )

    def _try(self, work: Callable, *args: Any) -> Any:
        try:
            return work(*args)
        except Exception as e:  # whatever a network, a disk or a library may raise
            self.opened = None
            reason = f'{type(e).__name__}: {e}'.splitlines()[0]
            tqdm.write(f'{self.of_run.fold(self.k)}: --log has failed and is left out ({reason})')

    def after_epoch(self) -> None:
        """Pass on the rows that have not been."""
        for row in self.history.rows[self.step :]:
            self.step = row['epoch']
            if self.opened:
                figures = {f'history/{name}': row[name] for name in row if name != 'epoch'}
                self._try(self.opened[0], self.step, figures)

    def end(self) -> None:
        """Pass on the measures of the held-out fold, and close the logger."""
        if self.opened:
            measured = score.measure(self.of_run.read_oof([self.k]), 'pred_plain')
            self._try(self.opened[0], self.step + 1, measured.value.dropna().to_dict())
        if self.opened:
            self._try(self.opened[1])
