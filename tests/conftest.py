"""What several test files need: a small home with folds, made once, and the scripts as commands."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `python -m pytest` from anywhere
SHARED = ROOT.parent / 'shared'

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing here may ask a hub


@pytest.fixture(scope='session')
def script():
    """`script('train.py', '--size', 64, cwd=...)`: the finished command, its output as text.

    It runs in this process: the seconds that a new one needs to import torch are most of a test.
    """

    def run(name: str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8') for _ in range(2))
        command, status, before = [str(ROOT / name), *map(str, args)], 0, os.getcwd()
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
        os.chdir(cwd)
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                mock.patch.object(sys, 'argv', command),
                mock.patch.object(sys, 'unraisablehook', sys.unraisablehook),
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
            for number, handler in handlers.items():
                signal.signal(number, handler)
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())
        return subprocess.CompletedProcess(command, status, *texts)

    return run


@pytest.fixture
def ok(script):
    """Like `script`, but a status other than 0 fails the test with what was printed."""

    def run(name: str, *args: object, cwd: Path = ROOT) -> str:
        done = script(name, *args, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    if not ((SHARED / 'data').is_dir() and (SHARED / 'weights').is_dir()):
        pytest.skip(f'no real data at {SHARED}')
    return SHARED


@pytest.fixture(scope='session')
def demo(tmp_path_factory) -> Path:
    """A demo data set of 60 training and 12 test images, without folds. Read only."""
    from lib.demo import make

    return make(tmp_path_factory.mktemp('demo'), n_train=60, n_test=12)
