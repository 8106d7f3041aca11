"""The stress script in short: kills, two processes, bad inputs, random damage."""

import contextlib
import importlib
import io
import signal
import subprocess
import sys

import pytest
import stress

from lib import cli


def in_process(script: str, *args: object) -> subprocess.CompletedProcess:
    """A script called from here, which saves it the seconds that its imports take."""
    main = importlib.import_module(script.removesuffix('.py')).main
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(main, list(map(str, args)))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code, file=err)
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(args, code, out, err)


@pytest.fixture(scope='module', autouse=True)
def quick():
    """What need not be killed runs in this process; its signals are as before afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    call, hook, handlers = stress.call, sys.unraisablehook, list(map(signal.getsignal, numbers))
    stress.call = in_process
    yield
    stress.call, sys.unraisablehook = call, hook
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def home(quick, tmp_path_factory):
    """A home with run a, trained without a stop: one epoch in two folds."""
    return stress.trained_home(tmp_path_factory.mktemp('stress'))


def test_two_processes_share_a_run_and_one_that_is_killed_costs_nothing(home):
    train = ['train.py', '--home', home, *stress.QUICK, '--epochs', 6]
    victim = stress.start(*train, '--name', 'shared', '--workers', 2)
    assert any('epoch  2/6' in line for line in victim.stdout)  # the first is saved then
    victim.send_signal(signal.SIGSTOP)  # a slow process is not a dead one
    other = in_process(*train, '--name', 'shared')
    assert other.returncode == 0 and other.stdout.count('images an epoch') == 1
    assert f'fold 0 (process {victim.pid} on' in other.stdout
    victim.kill()
    victim.communicate()
    assert 'fold0/state.pt: goes on after epoch' in stress.done(*train, '--name', 'shared')
    stress.done(*train, '--name', 'whole')
    whole, shared = (stress.contents(home / 'runs' / name) for name in ('whole', 'shared'))
    for name in ('fold0/oof.csv', 'fold1/oof.csv', 'fold0/model.safetensors'):
        assert whole[name] == shared[name]
    assert stress.leftovers(home) == []


def test_infer_goes_on_where_it_was_killed(home):
    run = home / 'runs' / 'a'
    infer = ['infer.py', '--home', home, '--only', 'a', '--n_tta', 20]
    stress.done(*infer)
    whole = stress.contents(run)
    for path in [*run.glob('fold*/tta_oof.csv'), *run.glob('*.csv'), run / 'infer.json']:
        path.unlink()
    victim = stress.start(*infer)
    assert any('fold 1' in line for line in victim.stdout)
    victim.send_signal(signal.SIGSTOP)
    other = in_process(*infer)  # leaves fold 1 to the victim, does the rest
    assert 'not all is predicted yet' in other.stdout and (run / 'test.csv').exists()
    refused = in_process(*infer[:-1], 3)
    assert refused.returncode == 1 and 'is being predicted with other flags' in refused.stderr
    victim.kill()
    victim.communicate()
    stress.done(*infer)
    assert stress.contents(run) == whole and stress.leftovers(home) == []


def test_bad_images_are_listed_and_left_out_but_for_the_tests(home):
    rows = list(stress.bad_images(home))
    assert len(rows) > 16 and all(row['good'] for row in rows), rows


def test_bad_tables_are_refused_or_read_right(home):
    rows = list(stress.bad_tables(home))
    assert len(rows) > 25 and all(row['good'] for row in rows), rows


def test_random_damage_is_refused_or_read_right(tmp_path):
    rows = list(stress.fuzz(tmp_path, 200, seed=1))
    assert all(row['wrong'] == 'none' for row in rows), rows
    assert all(row['refused'] for row in rows) and sum(row['read right'] for row in rows) > 10
