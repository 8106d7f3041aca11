"""Two processes of one launcher, on this machine's CPU: train.py's train a fold together and the
first alone writes; infer.py's each work as one process does."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pandas as pd
import pytest
from conftest import QUICK, ROOT
from test_follow import FAILED, check_rows

import train
from lib import config, ranks
from lib.cli import Stop

TRAIN = [*QUICK, '--epochs', 2, '--lr_max', 5e-3]

# a script, with notes of which images each process trains on, what comes out, and what it writes
NOTE = """
import json, os, sys
sys.path.insert(0, {root!r})
import train
from fastai.vision.all import Callback, Learner
from lib import cli, ranks

notes, written = [], []

class Note(Callback):
    order = 70  # after the Recorder
    def before_epoch(self):
        self.n = self.steps = 0
    def after_batch(self):
        if self.training:
            self.n, self.steps = self.n + len(self.y), self.steps + 1
    def after_epoch(self):
        weights = sum(float(p.detach().double().sum()) for p in self.model.parameters())
        notes.append([self.n, self.steps, weights, float(self.recorder.log[3])])

fit, replace, place = Learner.fit_one_cycle, os.replace, ranks.RANK

def noted(self, *args, cbs, **options):
    fit(self, *args, cbs=[*cbs, Note()], **options)

def listed(source, target):
    written.append(os.path.relpath(target, {folder!r}))
    replace(source, target)

Learner.fit_one_cycle, os.replace = noted, listed
try:
    cli.run(train.main)
finally:
    with open({folder!r} + f'/rank{{place}}.json', 'w') as f:
        json.dump([notes, written], f)
"""


def two(*command) -> str:
    """What two processes of a launcher print."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2']
    launcher += ['--master_port', str(20000 + os.getpid() % 20000)]
    options = {'cwd': ROOT, 'capture_output': True, 'text': True, 'timeout': 240}
    env = os.environ | {'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([*launcher, *map(str, command)], env=env, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def home(demo, ok, tmp_path_factory):
    """A home with a run `r`, trained by two processes, which noted what they did."""
    pytest.importorskip('accelerate')
    home = tmp_path_factory.mktemp('two')
    ok('folds.py', '--data', demo, '--home', home, '--n_folds', 2)
    driver = home / 'driver.py'
    driver.write_text(NOTE.format(root=str(ROOT), folder=str(home)))
    log = ['--log', 'tensorboard'] if find_spec('tensorboard') else []
    # without -- the launcher would take --log for its own
    (home / 'log').write_text(two('--', driver, '--home', home, *TRAIN, '--name', 'r', *log))
    return home


def noted(home) -> list:
    """What each of the two processes noted: of each epoch, and the files that it wrote."""
    return [json.loads((home / f'rank{place}.json').read_text()) for place in (0, 1)]


def test_each_process_trains_on_its_half_of_the_draw_and_ends_with_the_same_weights(home):
    (first, _), (second, _) = noted(home)
    assert first == second and len(first) == 4  # the weights, and the AUC of all rows watched
    folds = pd.read_csv(home / 'folds.csv')
    for i, (n, steps, _, auc) in enumerate(first):  # two epochs of fold 0, two of fold 1
        positive = int(((folds.fold != i // 2) & (folds.target == 1)).sum())
        assert n == positive and n > 0  # of as many benign ones more: a half each
        assert steps == -(-2 * positive // 8)  # as one process makes, with batches of 8
        assert 0 <= auc <= 1
    about = json.loads((home / 'runs' / 'r' / 'fold0' / 'run.json').read_text())
    assert about['processes'] == 2


def test_nothing_is_printed_twice(home):
    lines = (home / 'log').read_text().splitlines()
    assert len(lines) == len(set(lines)), lines
    text = '\n'.join(lines)
    assert text.count('fold 0 epoch  2/2') == 1 and text.count('2 processes train each fold') == 1
    assert text.count('images an epoch') == 1 and text.count('out of fold [95 %') == 1


def test_the_process_that_follows_writes_nothing_of_a_fold(home):
    (_, first), (_, second) = noted(home)
    folds = [path for path in first if '/fold' in path]
    assert {'runs/r/fold0/oof.csv', 'runs/r/fold1/model.safetensors'} <= set(folds)
    assert 'runs/r/scores.json' in first
    # before the training begins both may write, each under a lock: the cache and config.json
    assert all(path.startswith('cache/') or path.endswith('config.json') for path in second)
    assert not list((home / 'runs').rglob('*.part*'))


def test_the_first_process_alone_passes_figures_on(home):
    pytest.importorskip('tensorboard')
    assert FAILED not in (home / 'log').read_text()
    for fold in ('fold0', 'fold1'):
        check_rows('tensorboard', home / 'runs' / 'r', fold)  # reads the only file


def test_infer_py_works_alone_in_each_process_and_makes_what_one_makes(home, ok, monkeypatch):
    infer = ['infer.py', '--home', home, '--n_tta', 2, '--batch_size', 8]
    run, made = home / 'runs' / 'r', []
    for place in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(ranks, 'RANK', place)
            patch.setattr(ranks, 'WORLD', 1 + place)
            assert ok(*infer).count('2 augmented passes') == 4
        paths = [*run.glob('fold*/tta_*.csv'), run / 'oof.csv', run / 'test.csv']
        made.append({path: path.read_bytes() for path in paths})
        for path in paths:
            path.unlink()
    assert made[0] == made[1] and len(made[0]) == 6


def test_rates_and_other_images_are_no_work_for_a_launcher(monkeypatch, refusal, tmp_path):
    flags = train.main.__kwdefaults__ | {'lr_find': True}
    config.check(flags)
    monkeypatch.setattr(ranks, 'WORLD', 2)
    with pytest.raises(Stop, match='--lr_find runs in one process'):
        config.check(flags)
    images = ['--images', 'x', '--out', 'y.csv']
    assert '--images runs in one process' in refusal('infer.py', *images, cwd=tmp_path)


def test_a_launchers_place_is_seen_by_its_libraries_only_where_they_work_together(monkeypatch):
    monkeypatch.setattr(ranks, 'RANK', 1)
    monkeypatch.setattr(ranks, 'WORLD', 2)
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'fp16')  # as `accelerate config` saves it
    for end in (None, ValueError):
        assert not {'RANK', 'WORLD_SIZE'} & set(os.environ)
        try:
            with ranks.visible():
                assert (os.environ['RANK'], os.environ['WORLD_SIZE']) == ('1', '2')
                assert os.environ['ACCELERATE_MIXED_PRECISION'] == 'no'
                if end:
                    raise end
        except ValueError:
            pass
