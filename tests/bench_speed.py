"""How fast training and test-time augmentation are, and where their time goes. Run by hand:

python tests/bench_speed.py                     # B5 at 512 px on a card, lite0 at 160 px on the CPU
OMP_NUM_THREADS=1 python tests/bench_speed.py   # on one thread, as beside another process
python tests/bench_speed.py --out FILE.json     # the figures in a file, too, as they come

train.py and infer.py run as they are, on synthetic JPEGs and random weights, but where they call
`fit_one_cycle` and `tta` three ways take turns: the script's own loader through the Learner, one
batch of it again and again through the Learner, and the same batch through the network in a bare
loop. A figure is the median over the rounds, less the first quarter of each; a ratio is the median
of the rounds' own ratios. `--seconds` limits each part. Without workers, as on the CPU, the figures
of reading and augmentation are a part of each batch; beside a card they run ahead of it.

Measured on one thread of two shared cores (lite0, 160 px), as shares of the bare loop, medians of 4
and of 20 rounds: training .95 (.80 to .99), TTA .78 (.71 to .87), through the Learner alone .94 and
.97. What TTA lacks is augmentation (90 ms of 605 a batch) and reading (23 ms). On a card: not yet.
"""
# ruff: noqa: E402

import contextlib
import io
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings('ignore')  # of libraries, which would hide the table

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Callback, Learner, noop, to_device
from PIL import Image

import infer
import train
from lib import cli, config, devices, files, images, tables
from lib.callbacks import StopOnNaN

NATIVE = (2000, 1500)  # pixels, of the images before they are cached
N_FILES = 32  # of them; rows take them in turn
CARD = {'arch': 'efficientnet_b5', 'size': 512, 'batch_size': 8, 'n': 640}
CPU = {'arch': 'tf_efficientnet_lite0', 'size': 160, 'batch_size': 32, 'n': 128}


def main(
    *,
    arch: str | None = None,  # any timm classifier; default: B5 on a card, else lite0
    size: int | None = None,  # pixels a side; default: 512 on a card, else 160
    batch_size: int | None = None,  # of training; default: 8 on a card, else 32
    n: int | None = None,  # images of an epoch and of a pass; default: 640 on a card, else 128
    n_tta_batch: int = 32,  # images in a batch of prediction
    seconds: float = 120.0,  # after which a part begins no further round
    out: str | None = None,  # a JSON file for the figures
) -> None:
    """Measure the cache, training, and test-time augmentation on this machine's device."""
    device = devices.choose_device()
    chosen = {'arch': arch, 'size': size, 'batch_size': batch_size, 'n': n}
    about = CPU if device.type == 'cpu' else CARD
    about = about | {flag: value for flag, value in chosen.items() if value is not None}
    if about['n'] < 2 * max(about['batch_size'], n_tta_batch):
        raise cli.Stop('--n must hold two batches of training and of prediction')
    figures = Figures(Path(out) if out else None)
    half = devices.choose_precision('auto', device, training=True)
    scoring = devices.choose_precision('auto', device, training=False)
    described = config.describe_environment(device, half, scoring) | about
    described |= {'cores': images.n_cores(), 'threads': torch.get_num_threads()}
    for key, value in described.items():
        figures.note('about', key, value)
    with tempfile.TemporaryDirectory() as folder:
        table = make_images(Path(folder), about['n'])
        measure_cache(figures, Path(folder), table, about['size'], seconds)
        flags = {'home': folder, 'name': 'speed', 'epochs': 1, 'pretrained': False}
        flags |= {key: about[key] for key in ('arch', 'size', 'batch_size')}
        with quiet('fit_one_cycle', measure_training, figures, half, seconds):
            train.main(**flags)
        flags = {'home': folder, 'only': 'speed', 'n_tta': 1, 'batch_size': n_tta_batch}
        with quiet('tta', measure_prediction, figures, seconds):
            infer.main(**flags)


class Figures:
    """What was measured: printed, and written to a JSON file, as soon as it is known."""

    def __init__(self, path: Path | None):
        self.path, self.values = path, {}

    def note(self, part: str, label: str, value: Any) -> None:
        """Add a figure of a part."""
        self.values.setdefault(part, {})[label] = value
        text = f'{value:.4g}' if isinstance(value, float) else value
        print(f'{part:12s}{label:44s}{text}', flush=True, file=sys.__stdout__)
        if self.path:
            files.write_json(self.path, self.values)


def make_images(home: Path, n: int) -> pd.DataFrame:
    """HOME/folds.csv, `n` images in each of two folds, half of them malignant; and the table."""
    rng, rows = np.random.default_rng(0), np.arange(2 * n)
    (home / 'native').mkdir()
    slope = np.linspace(60, 200, NATIVE[1])[:, None, None]
    for i in range(N_FILES):
        pixels = slope + rng.normal(0, 12, (NATIVE[1], NATIVE[0], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(home / 'native' / f'{i}.jpg', quality=90)
    names = [f'I{i}' for i in rows]
    table = pd.DataFrame({'image_name': names, 'group': names, 'split': 'train', 'source': 'own'})
    table['path'] = [f'native/{i % N_FILES}.jpg' for i in rows]
    table = table.assign(target=rows % 2, fold=rows // n).reindex(columns=tables.COLUMNS)
    (home / 'folds.csv').write_text(tables.format_folds(table))
    return tables.read_labelled(home / 'folds.csv')


@contextlib.contextmanager
def quiet(method: str, measure: Callable[..., None], *args: Any) -> Iterator[None]:
    """A block in which nothing is printed but figures, and in which the first call of a `method` of
    a Learner is measured before it is made."""
    its_own, called = getattr(Learner, method), []

    def wrapper(learn: Learner, *values: Any, **options: Any) -> Any:
        if not called:
            called.append(measure(learn, *args))
        return its_own(learn, *values, **options)

    with mock.patch.object(Learner, method, wrapper), contextlib.redirect_stdout(io.StringIO()):
        yield


def take_turns(ways: dict[str, Callable[[], float]], seconds: float) -> pd.DataFrame:
    """What each of `ways` returns, a row a round. The first round, which compiles and allocates, is
    left out unless the `seconds` have passed with it."""
    end, rounds = time.perf_counter() + seconds, []
    while not rounds or time.perf_counter() < end:
        rounds.append({name: way() for name, way in ways.items()})
    return pd.DataFrame(rounds[1:] or rounds)


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(Callback):
    """The seconds a batch of one pass, less its first quarter. A `batch` replaces the loader."""

    order = 90  # after all that belongs to a batch

    def __init__(self, batch: tuple | None):
        self.batch, self.marks = batch, []

    def before_train(self) -> None:
        """Put the batch where the loader is."""
        if self.batch is not None:
            self.learn.dl = [self.batch] * len(self.dl)

    before_validate = before_train

    def after_batch(self) -> None:
        """Look at the clock after a quarter of the batches and after all."""
        quarter = -(-self.n_iter // 4)
        if self.iter + 1 in (quarter, self.n_iter):
            self.marks.append(now())
            self.n_timed = self.n_iter - quarter

    @property
    def seconds(self) -> float:
        """Of a batch of the first pass."""
        return (self.marks[1] - self.marks[0]) / self.n_timed


def compare(figures: Figures, part: str, learn: Learner, run: Callable[[Callback], Any],
            step: Callable[..., Any], seconds: float) -> None:  # fmt: skip
    """Note the speed of a Learner that `run` runs with a Clock, beside that of a bare `step`."""
    dl = learn.dls.train
    batch, size = dl.one_batch(), dl.bs
    plain = tuple(tensor.as_subclass(torch.Tensor) for tensor in batch)
    n, on_card = max(len(dl) * 3 // 4, 1), torch.cuda.is_available()

    def through_learner(one: tuple | None) -> float:
        run(clock := Clock(one))
        return clock.seconds

    def bare() -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_card else []
        start = now()
        if on_card:
            events[0].record()
        for _ in range(n):
            step(*plain)
        queued.append((time.perf_counter() - start) / n)
        if not on_card:
            return queued[-1]
        events[1].record()
        now()
        return events[0].elapsed_time(events[1]) / 1e3 / n

    queued: list[float] = []
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    ways = {'loader': lambda: through_learner(None), 'one batch': lambda: through_learner(batch)}
    rounds = take_turns(ways | {'bare loop': bare}, seconds)
    figures.note(part, 'rounds', len(rounds))
    for name, of_way in rounds.items():
        figures.note(part, f'{name}: images a second', float((size / of_way).median()))
    for name in ways:
        ratio = (rounds['bare loop'] / rounds[name]).quantile([0, 0.5, 1]).round(3)
        figures.note(part, f'{name}, of the bare loop', float(ratio[0.5]))
        span = f'{ratio[0.0]} to {ratio[1.0]}'
        figures.note(part, f'{name}, of the bare loop, all rounds', span)
    ms = 1e3 * rounds.median()
    figures.note(part, 'ms a batch: the network', float(ms['bare loop']))
    figures.note(part, 'ms a batch: fastai', float(ms['one batch'] - ms['bare loop']))
    figures.note(part, 'ms a batch: reading and augmentation', float(ms.loader - ms['one batch']))
    if on_card:
        figures.note(
            part, 'ms a batch until the CPU has queued it', 1e3 * np.median(queued[1:] or queued)
        )
        figures.note(part, 'peak GB of tensors', torch.cuda.max_memory_allocated() / 2**30)
        figures.note(part, 'peak GB from the card', torch.cuda.max_memory_reserved() / 2**30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures.note(part, 'peak GB of the process so far', peak)
    time_loader(figures, part, dl, seconds / 4)


def time_loader(figures: Figures, part: str, dl: Any, seconds: float) -> None:
    """Note how fast one process reads images for `dl`, and how long a batch is augmented."""
    device, rows = devices.choose_device(), list(dl.get_idxs())[: dl.bs]
    dl.after_batch.split_idx = 0  # as in training and in TTA's passes

    def read() -> float:
        start = now()
        items.append([dl.do_item(row) for row in rows])
        return now() - start

    def augment() -> float:
        batch, start = to_device(dl.create_batch(items.pop()), device), now()
        dl.after_batch(batch)
        return now() - start

    items: list[Any] = []
    ms = 1e3 * take_turns({'read': read, 'augment': augment}, seconds).median()
    figures.note(part, 'images a second that a process reads', float(1e3 * len(rows) / ms['read']))
    figures.note(part, 'ms a batch: reading, in one process', float(ms['read']))
    figures.note(part, 'ms a batch: augmentation', float(ms['augment']))


def measure_training(learn: Learner, figures: Figures, half: str, seconds: float) -> None:
    """Training as train.py does it, less the score of an epoch."""
    fit, device = Learner.fit, devices.choose_device()  # fit_one_cycle is this with a schedule
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(half)
    scaler = torch.amp.GradScaler(device.type, enabled=half == 'fp16')

    def run(clock: Callback) -> None:
        with mock.patch.object(learn, '_do_epoch_validate', noop):
            fit(learn, 1, 1e-5, cbs=[StopOnNaN(0), clock])

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            loss = learn.loss_func(learn.model(x), y)
        scaler.scale(loss).backward()
        scaler.step(learn.opt.opt)
        scaler.update()
        learn.opt.opt.zero_grad()

    compare(figures, 'training', learn, run, step, seconds)
    learn.opt = None  # the training that follows begins anew


def measure_prediction(learn: Learner, figures: Figures, seconds: float) -> None:
    """A pass of test-time augmentation as infer.py makes it."""
    its_own, net = Learner.get_preds, learn.model.to(devices.choose_device()).eval()
    dl = learn.dls.train

    def run(clock: Callback) -> None:
        with learn.added_cbs(clock), learn.no_bar(), dl.dataset.set_split_idx(0):
            its_own(learn, dl=dl)

    def step(x: torch.Tensor) -> None:
        with torch.inference_mode():
            net(x)

    compare(figures, 'TTA', learn, run, step, seconds)


def measure_cache(
    figures: Figures, home: Path, table: pd.DataFrame, size: int, seconds: float
) -> None:
    """The cache that train.py makes on all cores, beside a plain loop that crops and resizes."""
    rows = table[: 2 * N_FILES]

    def cached() -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            images.cache(rows, Path(folder), size)
            return (time.perf_counter() - start) / len(rows)

    def plain() -> float:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for path in rows.path:
                image = Image.open(path).convert('RGB')
                left, top = ((side - min(image.size)) // 2 for side in image.size)
                square = image.crop((left, top, left + min(image.size), top + min(image.size)))
                square.resize((size, size)).save(Path(folder, 'square.jpg'), quality=95)
        return (time.perf_counter() - start) / len(rows)

    with contextlib.redirect_stdout(io.StringIO()):
        rounds = take_turns({'cache': cached, 'a PIL loop': plain}, seconds / 4)
    for name, of_way in rounds.items():
        label = f'{name}: images a second of {NATIVE[0]} x {NATIVE[1]}'
        figures.note('cache', label, float((1 / of_way).median()))
    ratio = float((rounds['a PIL loop'] / rounds.cache).median())
    figures.note('cache', 'cache, of the PIL loop', ratio)


if __name__ == '__main__':
    cli.run(main)
