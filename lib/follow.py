"""--log: what a run tells, passed on to TensorBoard or to Weights & Biases (wandb).

tensorboard --logdir HOME/runs                   # one curve per fold, under its run's name
wandb sync HOME/runs/NAME/wandb/offline-run-*    # after a training with WANDB_MODE=offline
python -m torch.distributed.run --nproc_per_node 2 -- train.py --log wandb    # -- is needed

Both get config.json, less the command, which holds the way to HOME; each row of history.csv; the
scores; and batch.png, which is up to sixteen training images, and history.png.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastai.vision.all import Callback
from PIL import Image
from tqdm import tqdm

from lib import files, ranks, score
from lib.callbacks import History, Resume
from lib.runs import Run


class TensorBoard:
    """Events in the folder of a fold or of a run, which the page calls by the folder's name.

    They are written here, since torch's SummaryWriter does it in a thread of its own, which prints
    a traceback where the disk is full.
    """

    def __init__(self, run: Run, folder: Path, config: dict[str, Any]):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import text

        self.event, self.writer = Event, RecordWriter
        for path in folder.glob('events.out.tfevents.*'):  # of an earlier start: all comes again
            path.unlink()
        self.path = folder / f'events.out.tfevents.{time.time_ns()}'
        self._write(0, file_version='brain.Event:2')
        self._write(0, session_log={'status': 'START'})  # an open page forgets what it has read
        self._write(0, summary=text('config', f'```\n{json.dumps(config, indent=1)}\n```'))

    def _write(self, step: int, **content: Any) -> None:
        event = self.event(step=step, wall_time=time.time(), **content)
        with open(self.path, 'ab') as f:
            self.writer(f).write(event.SerializeToString())

    def log(self, step: int, figures: dict[str, float], pictures: Sequence[Path] = ()) -> None:
        """Write `figures` and PNGs, to be seen at once."""
        values = [{'tag': name, 'simple_value': value} for name, value in figures.items()]
        for path in pictures:
            width, height = Image.open(path).size
            png = {'width': width, 'height': height, 'encoded_image_string': path.read_bytes()}
            values.append({'tag': f'pictures/{path.stem}', 'image': png})
        self._write(step, summary={'value': values})

    end = log


class WandB:
    """A run of wandb for a fold, in a group for its run; its files lie in the run's folder.

    By itself it adds times, the kind of system, its own and Python's version, and which libraries
    are in use (wandb 0.31, read back from its file); no host, command line, code or packages.
    """

    def __init__(self, run: Run, folder: Path, config: dict[str, Any]):
        os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')  # of wandb's own faults
        import wandb

        off = ('disable_git', 'disable_code', 'x_disable_machine_info', 'silent')
        quiet = dict.fromkeys(off, True) | {'console': 'off', 'x_save_requirements': False}
        wait = {'init_timeout': 60, 'finish_timeout': 60, 'finish_timeout_raises': True}  # seconds
        settings, self.image = wandb.Settings(host='', **quiet, **wait), wandb.Image
        # init by itself would print, and in a terminal ask for a key
        is_online = wandb.setup(settings).settings.mode == 'online'
        if is_online and not wandb.login(prompt=False):
            raise RuntimeError('there is no key; type `wandb login`, or set WANDB_MODE=offline')
        if not (path := folder / 'wandb_id').exists():  # else it is a fold that goes on
            files.write_text(path, secrets.token_hex(8))
        for old in run.folder.glob(f'wandb/offline-run-*-{path.read_text()}'):  # all comes again
            shutil.rmtree(old)
        name = 'scores' if folder == run.folder else folder.name
        about = {'group': run.name, 'name': name, 'config': config, 'dir': run.folder}
        about |= {'id': path.read_text(), 'resume': 'allow', 'reinit': 'create_new'}
        project = os.environ.get('WANDB_PROJECT', 'melanoma')
        self.run = wandb.init(project=project, settings=settings, **about)

    def log(self, step: int, figures: dict[str, float], pictures: Sequence[Path] = ()) -> None:
        """Send `figures` and PNGs; a step that wandb has already is passed over."""
        images = {f'pictures/{path.stem}': self.image(str(path)) for path in pictures}
        self.run.log(figures | images, step=step, commit=True)

    def end(self, step: int, figures: dict[str, float], pictures: Sequence[Path]) -> None:
        """Send the last of it, and wait until all has arrived."""
        self.log(step, figures, pictures)
        self.run.finish()


class Follow(Callback):
    """Passes on to what `log` names, if any, the rows of `history`, and at the end the scores.

    Each start passes on all rows, those that Resume has put back too, so that a fold that goes on
    is one whole curve. A logger that fails is reported in one line and gets nothing more.
    """

    order = (History.order + Resume.order) / 2

    def __init__(self, log: str | None, run: Run, k: int | None = None, history=None):
        self.of_run, self.k, self.history, self.step, self.sink = run, k, history, 0, None
        self.folder = run.folder if k is None else run.fold(k)
        if log and not ranks.following:
            config = files.read_json(run.folder / 'config.json')
            del config['command']
            logger = {'tensorboard': TensorBoard, 'wandb': WandB}[log]
            self.sink = self._try(logger, run, self.folder, config)

    def _try(self, work: Callable, *args: Any) -> Any:
        try:
            return work(*args)
        except Exception as e:  # whatever a network, a disk or a library may raise
            self.sink = None
            reason = f'{type(e).__name__}: {e}'.splitlines()[0]
            tqdm.write(f'{self.folder}: --log has failed and is left out from here on ({reason})')

    def after_epoch(self) -> None:
        """Pass on the rows that have not been."""
        for row in self.history.rows[self.step :]:
            self.step = row['epoch']
            figures = {f'history/{name}': row[name] for name in row if name != 'epoch'}
            if self.sink:
                self._try(self.sink.log, self.step, figures)

    def end(self) -> None:
        """Pass on the scores, of the fold or of the whole run, and the fold's pictures."""
        if self.sink:
            paths = (self.folder / name for name in ('batch.png', 'history.png'))
            pictures = [path for path in paths if path.exists()]
            # a step of its own: what wandb has as the last epoch's is closed
            self._try(self.sink.end, self.step + 1, self._scores(), pictures)

    def _scores(self) -> dict[str, float]:
        """The measures, and the ends of their intervals as `auc_low` and `auc_high`."""
        if self.k is None:
            scores = files.read_json(self.folder / 'scores.json')
            scores = {pred: of['pooled'] for pred, of in scores.items() if 'pooled' in of}
        else:
            oof = self.of_run.read_oof([self.k])
            scores = {'pred_plain': score.measure(oof, 'pred_plain', self.k)}
        return {
            f'{pred}/{name}{end}': number
            for pred, measures in scores.items()
            for name in score.MEASURES
            for end, number in zip(('', '_low', '_high'), measures.get(name, ()), strict=False)
            if number is not None
        }
