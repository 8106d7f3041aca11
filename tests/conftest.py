"""What several test files need: a small home with folds, made once, and the scripts as commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `python -m pytest` from anywhere
SHARED = ROOT.parent / 'shared'

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing here may ask a hub


@pytest.fixture(scope='session')
def script():
    """`script('train.py', '--size', 64, cwd=...)`: the finished process, its output as text."""

    def run(name: str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / name), *map(str, args)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)

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
