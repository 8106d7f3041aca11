"""What several test files need: a small home with two runs, and the scripts as commands."""

import contextlib
import gc
import hashlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch

N_DRAWS = 100  # of an interval in a script that a test runs; test_score.py holds the real number
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `python -m pytest` from anywhere
SHARED = ROOT.parent / 'shared'
QUICK = ['--arch', 'test_resnet', '--nopretrained', '--size', 64]  # of train.py; --epochs beside it
CONFIG = {  # a run's config.json
    'arch': 'test_resnet', 'pretrained': False, 'size': 64, 'cutout': False, 'seed': 0,
    'mean': [0.5] * 3, 'std': [0.5] * 3, 'folds_sha256': 'x', 'command': 'python train.py',
}  # fmt: skip

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing here may ask a hub
# Most tests compare bits, which a card does not keep. So neither they nor the processes that they
# start see one; the fixture `card` shows it. pytest's own processes inherit the first variable.
os.environ['CUDA_VISIBLE_DEVICES'] = os.environ.setdefault(
    'CARDS_OF_TESTS', os.environ.get('CUDA_VISIBLE_DEVICES', '0')
)
if HAS_CARD := torch.cuda.is_available():
    torch.cuda.init()
    torch.cuda.device_count()  # torch keeps what it counts first
os.environ['CUDA_VISIBLE_DEVICES'] = ''
mock.patch.object(torch.cuda, 'is_available', lambda: False).start()
os.environ.setdefault('OMP_NUM_THREADS', '1')  # networks as small as these only wait for threads


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file under a folder, less the locks, which name their last holder."""
    paths = [p for p in sorted(folder.rglob('*')) if p.is_file() and not p.name.endswith('.lock')]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def oof(n: int = 400, groups: int = 80, seed: int = 0, rate: float = 0.3):
    """Out-of-fold predictions of n images in groups: higher where malignant, in five folds."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    target = (rng.random(n) < rate).astype(int)
    group = rng.integers(groups, size=n)
    pred = 1 / (1 + np.exp(-rng.normal(1.5 * target - 1, 1)))
    names = [f'I{i:05d}' for i in range(n)]
    known = {'image_name': names, 'target': target, 'group': [f'G{g:04d}' for g in group]}
    known |= {'patient_id': known['group'], 'source': 'competition', 'fold': group % 5}
    return pd.DataFrame(known | {'pred': pred})


def start(name: str, *args: object, **options: object) -> subprocess.Popen:
    """A script as a process of its own, to be killed or stopped; its output is to be read."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


class Malicious:
    """What makes the folder `path` when it is unpickled."""

    def __init__(self, path: object):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def heed_ctrl_c() -> None:
    """Of a process that is to get a SIGINT: a shell's & has its children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope='session')
def script():
    """`script('train.py', '--size', 64, cwd=...)`: the finished command, its output as text.

    It runs in this process: the seconds that a new one needs to import torch are most of a test.
    Intervals come from N_DRAWS draws. Without `pictures` those of a training are empty files.
    """

    def run(name, *args, cwd: Path = ROOT, pictures: bool = False) -> subprocess.CompletedProcess:
        from lib.pictures import _save

        save = _save if pictures else lambda figure, path: path.touch()
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8') for _ in range(2))
        command, status, before = [str(ROOT / name), *map(str, args)], 0, os.getcwd()
        pressed = []  # Ctrl-C, which must stop pytest and not the script alone

        def interrupt(number: int, _frame: object) -> None:
            pressed.append(number)
            raise KeyboardInterrupt

        own = signal.signal(signal.SIGINT, interrupt)
        os.chdir(cwd)
        if 'fastai.vision.all' in sys.modules and not gc.get_freeze_count():
            gc.freeze()  # lib collects garbage often, and the modules hold a million objects
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                mock.patch.object(sys, 'argv', command),
                mock.patch('lib.cli.signal', mock.Mock()),  # so that it sets no handlers
                mock.patch('lib.score.N_DRAWS', N_DRAWS),
                mock.patch('lib.pictures._save', save),
            ):
                try:
                    runpy.run_path(command[0], run_name='__main__')
                except SystemExit as end:
                    status = end.code if isinstance(end.code, int) else int(end.code is not None)
                    if isinstance(end.code, str):
                        print(end.code, file=sys.stderr)
                except Exception:
                    status = 1
                    traceback.print_exc()
        finally:
            os.chdir(before)
            signal.signal(signal.SIGINT, own)
        if pressed:
            raise KeyboardInterrupt
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())
        return subprocess.CompletedProcess(command, status, *texts)

    return run


@pytest.fixture(scope='session')
def ok(script):
    """Like `script`, but a status other than 0 fails the test with what was printed."""

    def run(name: str, *args: object, cwd: Path = ROOT) -> str:
        done = script(name, *args, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope='session')
def refusal(script):
    """Like `script`, but the command must end with one sentence, without a traceback: that one."""

    def run(name: str, *args: object, cwd: Path = ROOT) -> str:
        done = script(name, *args, cwd=cwd)
        assert done.returncode in (1, 2), done.stdout + done.stderr
        assert done.stderr.startswith('error: ') and 'Traceback' not in done.stderr, done.stderr
        return done.stderr

    return run


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    if not ((SHARED / 'data').is_dir() and (SHARED / 'weights').is_dir()):
        pytest.skip(f'no real data at {SHARED}')
    return SHARED


@pytest.fixture
def card(monkeypatch) -> torch.device:
    """The CUDA card, on which the test's scripts compute; it is skipped where there is none."""
    if not HAS_CARD:
        pytest.skip('there is no CUDA card here')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', os.environ['CARDS_OF_TESTS'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    return torch.device('cuda', 0)


@pytest.fixture(scope='session')
def demo(tmp_path_factory) -> Path:
    """A demo data set of 60 training and 12 test images, without folds. Read only."""
    from lib.demo import make

    return make(tmp_path_factory.mktemp('demo'), n_train=60, n_test=12)


@pytest.fixture(scope='session')
def home(demo, script, tmp_path_factory) -> Path:
    """A home in which folds.py, train.py (two runs) and infer.py have run. Read only.

    Beside the files of the scripts lies what each has printed, as 0.log to 3.log.
    """
    home = tmp_path_factory.mktemp('home')
    train = ['train.py', '--home', home, *QUICK, '--epochs', 1]
    for i, command in enumerate(
        [
            ['folds.py', '--data', demo, '--home', home, '--n_folds', 2],
            train,
            [*train, '--seed', 1, '--cutout', '--name', 'twin'],
            ['infer.py', '--home', home, '--n_tta', 2],
        ]
    ):
        done = script(*command, pictures=command is train)
        assert done.returncode == 0, done.stderr
        assert '\r' not in done.stdout and '█' not in done.stderr  # a log file without bars
        (home / f'{i}.log').write_text(done.stdout)
    return home


@pytest.fixture
def copy(home, tmp_path) -> Path:
    """`home` again, to be changed; beside it, since folds.csv's paths are relative."""
    return shutil.copytree(home, home.with_name(f'copy_{tmp_path.name}'))


@pytest.fixture(scope='session')
def noise(tmp_path_factory):
    """40 images of noise, 64 x 64, the 16 melanomas a little darker: 25 in fold 1, 15 in fold 0.

    A table as train.py has it once the images are cached: `cached` is the path of each.
    """
    import numpy as np
    import pandas as pd
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp('noise'), np.random.default_rng(0)
    rows = pd.DataFrame({'target': [0, 1, 0, 1, 0] * 8, 'fold': [1] * 25 + [0] * 15})
    rows['image_name'] = [f'N{i}' for i in rows.index]
    rows = rows.assign(patient_id='', group=rows.image_name, source='noise')
    rows['cached'] = [folder / f'{name}.png' for name in rows.image_name]
    for path, target in zip(rows.cached, rows.target, strict=True):
        pixels = rng.integers(0, 256 - 3 * target, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return rows


@pytest.fixture(scope='session')
def noise_home(noise, tmp_path_factory) -> Path:
    """A home with `noise` as its folds.csv, and no run; each test is to name its own."""
    from lib import tables

    home = tmp_path_factory.mktemp('noise_home')
    table = noise.assign(split='train', path=noise.cached).reindex(columns=tables.COLUMNS)
    (home / 'folds.csv').write_text(tables.format_folds(table))
    return home


@pytest.fixture
def fitted(script, noise_home, monkeypatch):
    """`fitted('--wd', .03, cbs=[...])`: the Learner of fold 0 that train.py itself has fitted, with
    more callbacks and batches of 4. `learn.said` is what was printed, and `learn.figures` what was
    drawn, by the names of the files, which are not made since that takes longer than the rest.

    The run is a new one unless it `goes_on`. `status`: what the command must end with.
    """
    from fastai.vision.all import Learner

    fit = Learner.fit_one_cycle

    def run(*flags, name='r', epochs=2, cbs=(), goes_on=False, status=0):
        learners, figures = [], {}

        def noted(self, *args, **options):
            learners.append(self)
            return fit(self, *args, **options | {'cbs': [*options['cbs'], *cbs]})

        if not goes_on:
            shutil.rmtree(noise_home / 'runs' / name, ignore_errors=True)
        command = ['train.py', '--home', noise_home, '--name', name, '--fold', 0]
        command += ['--batch_size', 4, '--epochs', epochs, *flags]
        with monkeypatch.context() as patch:
            patch.setattr(Learner, 'fit_one_cycle', noted)
            patch.setattr('lib.pictures._save', lambda f, path: figures.update({path.name: f}))
            done = script(*command, *([] if '--weights' in flags else QUICK), pictures=True)
        assert done.returncode == status, done.stdout + done.stderr
        (learn,) = learners
        learn.said, learn.figures = done.stdout + done.stderr, figures
        return learn

    return run
