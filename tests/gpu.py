"""Whether everything holds on this machine's card, and how fast it is. Run by hand:

python tests/gpu.py                         # ten minutes at most; a table, and data/gpu.json
python tests/gpu.py --only speed,waits      # some of its parts
python tests/gpu.py --cpu                   # the same parts without a card, in two minutes

Each part is a process of its own, and the others go on where one fails. Speed is that of B5 at 512
pixels with random weights; with --cpu, which shows that this script itself is well, that of timm's
smallest model at 64. `moved` needs what `demo` and `resumed` have left, `compiled` what `demo` has.
No limit here has been measured on a card yet.
"""
# ruff: noqa: E402

import contextlib
import faulthandler
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings('ignore')  # of libraries: they would hide the table

import numpy as np
import pandas as pd
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import Callback, Learner, noop
from PIL import Image

import folds
import infer
import lib
import train
from lib import cli

QUICK = {'arch': 'test_resnet', 'pretrained': False, 'size': 64, 'epochs': 3, 'lr_max': 5e-3}
HALF = ((0.5,) * 3, (0.5,) * 3)  # mean and std
CUDA = torch.cuda.is_available()


def main(
    *,
    cpu: bool = False,  # without a card, with the smallest model at 64 pixels
    only: str | None = None,  # names of parts, with commas between, instead of all
    out: str = 'data/gpu.json',  # where the figures go
    home: str | None = None,  # where all parts work: for a part's own process
) -> None:
    """Run the parts, print a table of what they found, and write the figures."""
    names = list(PARTS) if only is None else only.split(',')
    for name in names:
        cli.check_one_of(list(PARTS), only=name)
    if home is not None:
        return print(json.dumps(findings(PARTS[only], Path(home))))
    if not cpu and lib.devices.choose_device().type != 'cuda':
        raise cli.Stop('there is no CUDA card here; --cpu runs the same parts without one')
    report: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as home:
        data = lib.demo.make(Path(home, 'data'), n_train=80, n_test=12)
        output(folds.main, data=str(data), home=home, n_folds=2)
        for name in names:
            command = [sys.executable, __file__, '--only', name, '--home', home]
            hidden = {'CUDA_VISIBLE_DEVICES': ''} if cpu or name == 'moved' else {}
            start, env = time.perf_counter(), os.environ | hidden
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
            last = done.stdout.strip().split('\n')[-1]
            figures = json.loads(last) if last[:1] == '{' else {'FAILED': f'rc {done.returncode}'}
            report[name] = {'seconds': round(time.perf_counter() - start, 1)} | figures
            print(f'{name}: {"FAILED" if "FAILED" in figures else "ok"}', flush=True)
    for name, figures in report.items():
        for key, value in figures.items():
            print(f'{name:13s}{key:46s}{f"{value:.4g}" if isinstance(value, float) else value}')
    lib.files.write_json(Path(out), report)
    failed = [name for name in names if 'FAILED' in report[name]]
    print(f'{out}: ' + (f'{", ".join(failed)} FAILED' if failed else 'all parts are well'))
    raise SystemExit(bool(failed))


def findings(part: Callable[[Path], dict], home: Path) -> dict[str, Any]:
    """What a part finds, or why it failed; one that hangs is ended."""
    faulthandler.dump_traceback_later(400, exit=True)
    try:
        return part(home)
    except BaseException as e:
        traceback.print_exc()
        return {'FAILED': (str(e) or type(e).__name__).splitlines()[0]}


def half() -> str:
    """The half precision that this machine trains in; a CPU has bf16 alone."""
    return lib.speed.training_precision('auto', lib.devices.choose_device()) if CUDA else 'bf16'


def output(call: Callable[..., None], **flags: Any) -> str:
    """What a script prints, called from here: its imports would take longer than the rest."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        call(**flags)
    return text.getvalue()


def predict(home: Path, name: str, out: str, **flags: Any) -> np.ndarray:
    """The plain predictions of a run for the demo's test images, by `infer.py --images`."""
    flags |= {'home': str(home), 'only': name, 'n_tta': 0, 'images': f'{home}/data/jpeg/test'}
    output(infer.main, out=str(home / out), **flags)
    return pd.read_csv(home / out).pred.to_numpy()


def images(home: Path, size: int, n: int) -> pd.DataFrame:
    """A table of `n` rows of fold 1 and 8 of fold 0: 64 JPEGs of noise on a slope, in turn."""
    folder, rng = home / f'noise{size}', np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i in range(64):
        pixels = np.linspace(60, 200, size)[:, None] + rng.normal(0, 12, (size, size, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.jpg', quality=95)
    rows = np.arange(n + 8)
    paths = [folder / f'{i % 64}.jpg' for i in rows]
    return pd.DataFrame({'cached': paths, 'target': rows % 2, 'fold': (rows < n).astype(int)})


# --- the parts: each asserts what has to hold, and returns figures


def environment(home: Path) -> dict[str, Any]:
    """The versions, and the card."""
    device, figures = lib.devices.choose_device(), lib.config.describe_environment('')
    figures |= {
        'device': lib.devices.describe(device),
        'cores': lib.images.n_cores(),
        'half': half(),
    }
    if CUDA:
        about = torch.cuda.get_device_properties(device)
        figures |= {'capability': f'{about.major}.{about.minor}', 'GB': about.total_memory / 2**30}
        figures |= {'cards': torch.cuda.device_count(), 'cudnn': torch.backends.cudnn.version()}
    return figures


def demo(home: Path) -> dict[str, Any]:
    """A training and a prediction in each precision, and a refusal of what the device lacks."""
    figures = {}
    for precision in ('fp32', 'bf16', 'fp16'):
        try:
            text = output(train.main, home=str(home), name=precision, precision=precision, **QUICK)
        except cli.Stop as refusal:
            assert precision == ('bf16' if CUDA else 'fp16'), refusal
            figures[precision] = 'refused'
            continue
        assert lib.devices.describe(lib.devices.choose_device()) in text, 'the card is not named'
        about = lib.files.read_json(home / 'runs' / precision / 'fold0' / 'run.json')
        assert about['precision'] == precision, about
        predict(home, precision, f'{precision}.csv', precision=precision)
        figures[f'{precision}: seconds a fold'] = about['seconds']
    return figures


def resumed(home: Path) -> dict[str, Any]:
    """A training that is stopped after two epochs goes on, and ends as if it had not been."""
    flags = {'home': str(home), 'fold': 0, 'precision': half(), **QUICK}
    save = lib.callbacks.Resume.after_epoch

    def stop_after_two(self: Callback) -> None:
        save(self)
        if self.epoch == 1:
            raise KeyboardInterrupt

    patched = mock.patch.multiple(lib.callbacks.Resume, rest=0, after_epoch=stop_after_two)
    with patched, contextlib.suppress(KeyboardInterrupt):
        output(train.main, name='stopped', **flags)
    shutil.copytree(home / 'runs' / 'stopped', home / 'runs' / 'moved')  # for the part `moved`
    text = output(train.main, name='stopped', **flags) + output(train.main, name='whole', **flags)
    assert 'goes on after epoch 2 of 3' in text, text
    paths = [home / 'runs' / name / 'fold0' / 'history.csv' for name in ('stopped', 'whole')]
    losses = [pd.read_csv(path).train_loss for path in paths]
    difference = float(np.abs(losses[0] - losses[1]).max())
    assert difference < (0.02 if CUDA else 1e-9), losses
    return {'losses apart': difference}


def moved(home: Path) -> dict[str, Any]:
    """What a card began or trained in half precision goes on, or predicts, on a CPU in fp32."""
    text, figures = output(train.main, home=str(home), name='moved', fold=0, **QUICK), {}
    about = lib.files.read_json(home / 'runs' / 'moved' / 'fold0' / 'run.json')
    assert 'goes on after epoch 2 of 3' in text, text
    assert (about['device'], about['precision']) == ('cpu', 'fp32'), about
    for path in home.glob('fp*.csv'):  # of the part `demo`
        difference = np.abs(predict(home, path.stem, 'cpu.csv') - pd.read_csv(path).pred).max()
        figures[f'{path.stem} apart'] = float(difference)
        assert difference < 0.01, figures
    return figures


class Scaled(MixedPrecision):
    """fp16 with a first scale of 1,024; on a CPU the scaler alone."""

    def before_fit(self) -> None:
        super().before_fit()
        device = 'cuda' if CUDA else 'cpu'
        self.learn.scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        if device == 'cpu':
            self.autocast = torch.autocast('cpu', enabled=False)


class Probe(Callback):
    """Keep the first step's gradient, and all scales; put an infinity into batch `spoil`."""

    order = Scaled.order + 1  # when gradients are unscaled again

    def __init__(self, spoil: int | None):
        self.spoil, self.grad, self.scales = spoil, None, []

    def before_batch(self) -> None:
        self.model.eval()  # a batch's own statistics would depend on its size

    def after_backward(self) -> None:
        if self.iter == self.spoil:
            next(self.model.parameters()).grad[:] = float('inf')

    def before_step(self) -> None:
        if self.grad is None:
            self.grad = torch.cat([p.grad.flatten().cpu() for p in self.model.parameters()])

    def after_batch(self) -> None:
        self.scales.append(self.scaler.get_scale())


def accumulation(home: Path) -> dict[str, Any]:
    """Four batches of 2 give the gradient of one of 8, and an infinity costs a step alone."""

    def fit(batch_size: int, accumulate: int, spoil: int | None = None) -> tuple[Learner, Probe]:
        lib.callbacks.seed_all(0)
        tfms = [t for t in lib.augment.batch_tfms(*HALF) if not isinstance(t, lib.augment.Augment)]
        dls, draw = lib.data.training_dls(images(home, 64, 16), 0, tfms, batch_size, 0, 0, 0)
        net = lib.model.create('test_resnet', 64)
        learn, probe = lib.learner.create_learner(dls, net, 0.1, 'fp32', accumulate), Probe(spoil)
        learn._do_epoch_validate = noop
        learn.fit(1, 1e-3, cbs=[draw, Scaled(), probe])
        return learn, probe

    (_, one), (_, four), (learn, spoiled) = fit(8, 1), fit(2, 4), fit(2, 4, spoil=1)
    relative = float((one.grad - four.grad).norm() / one.grad.norm())
    assert relative < (0.02 if CUDA else 1e-4), f'the gradients are {relative} apart'
    assert spoiled.scales[3:5] == [512.0, 512.0], spoiled.scales
    assert all(p.isfinite().all() for p in learn.model.parameters()), 'weights are not finite'
    return {'gradients apart, of 1': relative}


def waits(home: Path) -> dict[str, Any]:
    """How often the CPU waits for the card in a step of training and in a batch of prediction."""

    def count(work: Callable[[], Any], most: float) -> float | str:
        torch.cuda.set_sync_debug_mode('warn') if CUDA else None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            work()
        torch.cuda.set_sync_debug_mode('default') if CUDA else None
        n = sum('synchronizing' in str(w.message) for w in said) / 40
        assert n < most + 0.5, f'{n} instead of {most}: {said[-1].message}'
        return n if CUDA else 'not counted'

    table, figures = images(home, 64, 320), {}
    for precision, most in {'fp32': 4, 'bf16': 4, 'fp16': 6}.items():  # two are the transfers
        if precision in lib.speed._precisions(lib.devices.choose_device()):
            tfms = lib.augment.batch_tfms(*HALF, cutout=True)
            dls, draw = lib.data.training_dls(table, 0, tfms, 8, 0, 0)
            net = lib.model.create('test_resnet', 64)
            learn = lib.learner.create_learner(dls, net, 0.1, precision)
            learn._do_epoch_validate = noop
            work = partial(learn.fit, 1, 1e-3, cbs=[draw, lib.callbacks.StopOnNaN(0)])
            figures[f'{precision}: a step'] = count(work, most)
    dls = lib.data.prediction_dls(table[table.fold == 1], lib.augment.batch_tfms(*HALF), 8)
    learn = lib.tta.predictor(dls, lib.model.create('test_resnet', 64))
    learn.get_preds()
    figures['prediction: a batch'] = count(learn.get_preds, 2)  # images there, predictions back
    return figures


class Clock(Callback):
    """Times the first pass, less its first quarter: of the loader's batches, or of one `batch`."""

    order = 90

    def __init__(self, layout: torch.memory_format, batch: tuple | None):
        self.layout, self.batch, self.times = layout, batch, []

    def before_train(self) -> None:
        if self.batch is not None:
            self.learn.dl = [self.batch] * len(self.dl)

    before_validate = before_train

    def before_batch(self) -> None:
        self.learn.xb = (self.x.contiguous(memory_format=self.layout),)

    def after_batch(self) -> None:
        if self.iter + 1 in (self.n_iter // 4, self.n_iter):
            torch.cuda.synchronize() if CUDA else None
            self.times.append(time.perf_counter())
            self.n = (self.n_iter - self.n_iter // 4) * len(self.x)


def speed(home: Path) -> dict[str, Any]:
    """Images a second in both layouts: at least .85 of what one batch on the card gives."""
    arch, size, n = ('efficientnet_b5', 512, 640) if CUDA else ('test_efficientnet', 64, 160)
    table, figures, device = images(home, size, n), {}, lib.devices.choose_device()
    precision = lib.speed.inference_precision('auto', device)

    def training(layout: torch.memory_format) -> tuple[Learner, Callable[[], Any]]:
        dls, draw = lib.data.training_dls(table, 0, lib.augment.batch_tfms(*HALF), 8, 0, 0)
        learn = lib.learner.create_learner(dls, lib.model.create(arch, size), 0.1, half())
        learn.model.to(memory_format=layout)
        learn._do_epoch_validate = noop
        return learn, partial(learn.fit, 1, 1e-5, cbs=draw)

    def prediction(layout: torch.memory_format) -> tuple[Learner, Callable[[], Any]]:
        dls = lib.data.prediction_dls(table, lib.augment.batch_tfms(*HALF), 32)
        learn = lib.tta.predictor(dls, lib.model.create(arch, size), precision, n_tta=1)
        learn.model.layout = layout
        learn.model.to(memory_format=layout)
        return learn, partial(learn.tta, n=1)

    used = {training: torch.channels_last, prediction: lib.speed.layout(device)}
    for make in used:
        for layout in (torch.channels_last, torch.contiguous_format):
            rates, label = [], f'{make.__name__}, {str(layout)[6:]}'
            torch.cuda.reset_peak_memory_stats() if CUDA else None
            for one in (False, True):
                learn, work = make(layout)
                clock = Clock(layout, learn.dls.train.one_batch() if one else None)
                with learn.added_cbs(clock):
                    work()
                rates.append(clock.n / (clock.times[1] - clock.times[0]))
            figures[label], figures[f'{label}, one batch'] = rates
            figures[f'{label}, peak GB'] = torch.cuda.max_memory_allocated() / 2**30
            assert not CUDA or layout != used[make] or rates[0] > 0.85 * rates[1], figures
    return figures


def together(home: Path) -> dict[str, Any]:
    """A launcher's two processes share a fold, and two that are started by hand share two."""
    if CUDA and torch.cuda.device_count() < 2:
        return {'left out': 'there is one card'}
    flags = [f'--{flag}={value}' for flag, value in QUICK.items() if flag != 'pretrained']
    words = ['train.py', f'--home={home}', '--nopretrained', *flags]
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    commands = [[*launcher, *words, '--fold=0', '--name=launched'], [*words, '--name=by_hand']]
    start = time.perf_counter()
    subprocess.run([sys.executable, *commands[0]], cwd=ROOT, check=True, stdout=sys.stderr)
    figures = {'launcher, seconds': time.perf_counter() - start}
    about = lib.files.read_json(home / 'runs' / 'launched' / 'fold0' / 'run.json')
    assert about['processes'] == 2, about
    popen = partial(subprocess.Popen, [sys.executable, *commands[1]], cwd=ROOT, text=True)
    cards = [{'CUDA_VISIBLE_DEVICES': card} for card in ('01' if CUDA else ('', ''))]
    hands = [popen(env=os.environ | card, stdout=subprocess.PIPE) for card in cards]
    texts = [hand.communicate()[0] for hand in hands]
    assert [hand.returncode for hand in hands] == [0, 0], texts
    assert ''.join(texts).count('images an epoch') == 2, texts  # no fold twice
    return figures


def compiled(home: Path) -> dict[str, Any]:
    """`infer.py --compile` predicts the same."""
    start, eager = time.perf_counter(), pd.read_csv(home / 'fp32.csv').pred
    difference = np.abs(predict(home, 'fp32', 'compiled.csv', compile=True) - eager).max()
    assert difference < 0.01, difference
    return {'apart': float(difference), 'seconds in all': time.perf_counter() - start}


def lr_find(home: Path) -> dict[str, Any]:
    """The range test in half precision suggests rates, and leaves its picture alone."""
    text = output(train.main, home=str(home), name='rates', lr_find=True, precision=half(), **QUICK)
    left = [path.name for path in (home / 'runs' / 'rates').rglob('*') if path.is_file()]
    assert left == ['lr_find.png'], left
    return {'suggested': text.split('suggested: ')[1].split(';')[0]}


PARTS = {part.__name__: part for part in (environment, demo, resumed, moved, accumulation, waits)}
PARTS |= {part.__name__: part for part in (speed, together, compiled, lr_find)}

if __name__ == '__main__':
    cli.run(main)
