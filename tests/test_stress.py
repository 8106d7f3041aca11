"""Real kills, and two real processes: nothing is lost and nothing is done twice."""

import random
import re
import signal
import subprocess
import sys
import time

from conftest import QUICK, ROOT, contents, start

from lib import images

SMALL = [*QUICK, '--batch_size', 4]


def trained(run) -> dict[str, str]:
    """The hashes of what a training must always end with."""
    names = ('oof.csv', 'model.safetensors')
    return {k: v for k, v in contents(run).items() if k.endswith(names) and '/' in k}


def leftovers(folder) -> list[str]:
    """Half-written files under a folder, and states of trainings that are finished."""
    return [p.name for p in folder.rglob('*') if '.part' in p.suffixes or p.name == 'state.pt']


def kill(process) -> None:
    process.kill()
    process.communicate()


def test_two_processes_share_a_run_and_one_that_is_killed_costs_an_epoch_at_most(copy, ok):
    train = ['train.py', '--home', copy, *SMALL, '--epochs', 6, '--name']
    victim = start(*train, 'shared', '--workers', 2)
    assert any('epoch  4/6' in line for line in victim.stdout)
    time.sleep(random.Random(0).uniform(0, 0.2))  # in an epoch, or while it is saved
    victim.send_signal(signal.SIGSTOP)  # a slow process is not a dead one
    other = ok(*train, 'shared')
    assert other.count('images an epoch') == 1 and 'not trained yet: fold 0.' in other
    kill(victim)
    assert re.search(r'fold0/state\.pt: goes on after epoch [1-6] of 6', ok(*train, 'shared'))
    ok(*train, 'whole')
    whole, shared = (trained(copy / 'runs' / name) for name in ('whole', 'shared'))
    assert whole == shared and len(whole) == 4 and leftovers(copy) == []


def test_infer_goes_on_where_it_was_killed_and_leaves_to_others_what_they_do(copy, ok):
    run = copy / 'runs' / 'twin'
    infer = ['infer.py', '--home', copy, '--only', 'twin', '--n_tta', 5]
    ok(*infer)
    whole = contents(run)
    for path in [*run.glob('fold*/tta_*'), *run.glob('*.csv')]:
        path.unlink()
    victim = start(*infer)
    assert any('fold 1, ' in line for line in victim.stdout)  # its second part
    victim.send_signal(signal.SIGSTOP)
    other = ok(*infer)  # leaves that part to the victim and does the rest
    assert other.count('5 augmented passes') == 2 and 'type this again' in other
    assert not (run / 'test.csv').exists()
    kill(victim)
    assert ok(*infer).count('5 augmented passes') == 1
    assert contents(run) == whole and leftovers(copy) == []


CACHE = """
import sys, time
from pathlib import Path
from lib import images
make = images._make
images._make = lambda *job: time.sleep(0.05) or make(*job)
images.cache(images.list_images(Path(sys.argv[1])), Path(sys.argv[2]), 128)
"""


def test_a_cache_whose_making_is_killed_is_whole_after_the_next_try(demo, tmp_path):
    table, killed = images.list_images(demo / 'jpeg'), tmp_path / 'killed'
    images.cache(table, tmp_path / 'whole', 128)
    for least in (5, 30):
        command = [sys.executable, '-c', CACHE, str(demo / 'jpeg'), str(killed)]
        victim = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while (n := len(list(killed.rglob('[!.]*.jpg')))) < least:
            assert victim.poll() is None
            time.sleep(0.005)
        kill(victim)
        assert n < len(table)
    paths = images.cache(table, killed, 128)
    assert all(path.exists() for path in paths) and leftovers(killed) == []
    assert contents(killed) == contents(tmp_path / 'whole')
