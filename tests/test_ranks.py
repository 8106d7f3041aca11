"""Two processes of one command, on this machine's CPU: each does its half, the first writes."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from sklearn.metrics import roc_auc_score

QUICK = ['--arch', 'test_resnet', '--nopretrained', '--size', 64, '--epochs', 2, '--lr_max', 5e-3]

# train.py, with a callback that notes which images a process trains on and what comes out
NOTE = """
import json, sys
sys.path.insert(0, {root!r})
import train
from fastai.vision.all import Callback
from lib import cli, learner, ranks

class Note(Callback):
    order = 70  # after the Recorder
    def before_fit(self):
        self.notes = []
    def before_epoch(self):
        self.n = self.steps = 0
    def after_batch(self):
        if self.training:
            self.n, self.steps = self.n + len(self.y), self.steps + 1
    def after_epoch(self):
        weights = sum(float(p.detach().double().sum()) for p in self.model.parameters())
        self.notes.append([self.n, self.steps, weights, float(self.recorder.log[3])])
    def after_fit(self):
        with open({folder!r} + f'/rank{{ranks.RANK}}.json', 'w') as f:
            json.dump(self.notes, f)

for_fold = learner.for_fold
def noted(*args, **kwargs):
    learn, sampler = for_fold(*args, **kwargs)
    learn.add_cb(Note())
    return learn, sampler
learner.for_fold = noted
cli.run(train.main)
"""


def two(command, **env) -> subprocess.CompletedProcess:
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2']
    launcher += ['--master_port', str(20000 + os.getpid() % 20000)]
    done = subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {'CUDA_VISIBLE_DEVICES': ''} | env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope='module')
def home(demo, script, tmp_path_factory):
    """A home with the runs `one` and `two`, trained by as many processes."""
    pytest.importorskip('accelerate')
    home = tmp_path_factory.mktemp('home')
    driver = home / 'driver.py'
    driver.write_text(NOTE.format(root=str(ROOT), folder=str(home)))
    for command in [
        ['folds.py', '--data', demo, '--home', home, '--n_folds', 2],
        ['train.py', '--home', home, *QUICK, '--name', 'one'],
    ]:
        done = script(*command)
        assert done.returncode == 0, done.stderr
    done = two([driver, '--home', home, *QUICK, '--name', 'two'])
    (home / 'two.log').write_text(done.stdout)
    return home


def test_each_process_trains_on_its_half_of_the_draw_and_ends_with_the_same_weights(home):
    first, second = (json.loads((home / f'rank{r}.json').read_text()) for r in (0, 1))
    assert first == second and len(first) == 2  # the weights, and the AUC of all rows watched
    folds = pd.read_csv(home / 'folds.csv')
    positive = int(((folds.fold == 0) & (folds.target == 1)).sum())  # fold 1 was trained last
    for n, steps, _, auc in first:
        assert n == positive and n > 0  # of as many benign ones more: a half each
        assert steps == -(-2 * positive // 8)  # as one process makes, with batches of 8
        assert 0 <= auc <= 1
    about = json.loads((home / 'runs' / 'two' / 'fold0' / 'run.json').read_text())
    assert about['processes'] == 2


def test_it_scores_as_one_process_does_within_its_interval(home):
    def oof(name):
        parts = [pd.read_csv(home / 'runs' / name / f'fold{k}' / 'oof.csv') for k in (0, 1)]
        return pd.concat(parts, ignore_index=True)

    one, other = oof('one'), oof('two')
    assert one.image_name.tolist() == other.image_name.tolist()
    rng, aucs = np.random.default_rng(0), []
    for _ in range(200):  # a bootstrap over images
        drawn = one.sample(len(one), replace=True, random_state=rng)
        aucs.append(roc_auc_score(drawn.target, drawn.pred_plain))
    low, high = np.quantile(aucs, [0.025, 0.975])
    assert low <= roc_auc_score(other.target, other.pred_plain) <= high
    assert (one.pred_plain != other.pred_plain).any()


def test_the_first_process_alone_prints(home):
    log = (home / 'two.log').read_text()
    assert log.count('fold 0 epoch  1/2') == 1 and log.count('is trained') == 1
    assert 'in 2 processes' in log


def test_two_processes_predict_what_one_does(home, script):
    files = ['oof.csv', 'test.csv']
    command = ['infer.py', '--home', home, '--n_tta', 2, '--only', 'two', '--batch_size', 8]
    done = two([ROOT / command[0], *command[1:]])
    assert done.stdout.count('AUC, pooled') == 1
    run = home / 'runs' / 'two'
    shared = [pd.read_csv(run / name) for name in files]
    for path in [*run.glob('fold*/tta_oof.csv'), *(run / name for name in files)]:
        path.unlink()
    alone = script(*command)
    assert alone.returncode == 0, alone.stderr
    for table, name in zip(shared, files, strict=True):
        again = pd.read_csv(run / name)
        assert table.image_name.tolist() == again.image_name.tolist() and len(table) > 8
        np.testing.assert_allclose(table.pred, again.pred, atol=1e-5)
        np.testing.assert_allclose(table.pred_plain, again.pred_plain, atol=1e-5)


def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch):
    from lib import ranks
    from lib.cli import Stop
    from lib.learner import for_fold

    monkeypatch.setattr(ranks, 'WORLD', 3)
    nothing = np.zeros(0)
    with pytest.raises(Stop, match='3 processes cannot share --batch_size 8'):
        for_fold(nothing, nothing, nothing, None, [], batch_size=8, neg_ratio=1, wd=0, seed=0)
