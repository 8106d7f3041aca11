"""A file is whole or not there; a run knows its flags and refuses others."""

import json
import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from lib import files, locks
from lib.cli import Stop

DEFAULTS = {'arch': 'efficientnet_b5', 'pretrained': True, 'size': 512, 'cutout': False}
CONFIG = {**DEFAULTS, 'size': 384, 'folds_sha256': 'x'}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / 'a.csv'
    files.write_text(path, 'old')
    with pytest.raises(ZeroDivisionError), files.atomic(path) as temporary:
        temporary.write_text('half')
        1 / 0  # noqa: B018
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.csv']


@pytest.mark.parametrize(
    ('flags', 'name'),
    [
        ({}, 'efficientnet_b5'),
        ({'size': 384, 'cutout': True}, 'size-384_cutout'),
        ({'arch': 'resnet18', 'pretrained': False}, 'resnet18_nopretrained'),
        ({'arch': '../x y', 'size': 64}, 'xy_size-64'),
    ],
)
def test_a_runs_name_is_the_flags_that_differ_from_their_defaults(flags, name):
    assert files.run_name(DEFAULTS | flags, DEFAULTS) == name


@pytest.mark.parametrize('name', ['', '.', '..', '../x', 'a/b', '/x', '.hidden', 'a\x00'])
def test_a_runs_folder_is_never_outside_of_runs(name, tmp_path):
    with pytest.raises(Stop, match='no folder name'):
        files.run_folder(tmp_path, name)
    assert files.run_folder(tmp_path, 'size-384_b5.v1') == tmp_path / 'runs' / 'size-384_b5.v1'


def test_the_same_flags_go_on_and_an_absent_flag_means_its_default(tmp_path):
    files.claim_run(tmp_path / 'r', {**CONFIG, 'command': 'one'}, DEFAULTS)
    path = tmp_path / 'r' / 'config.json'
    saved = json.loads(path.read_text())
    del saved['cutout']
    path.write_text(json.dumps(saved))
    files.claim_run(tmp_path / 'r', {**CONFIG, 'command': 'another'}, DEFAULTS)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'cutout': True}, 'cutout False .now True.; give this run another --name'),
        ({'folds_sha256': 'y'}, 'folds.csv has changed'),
    ],
)
def test_other_flags_under_the_same_name_are_refused(change, says, tmp_path):
    files.claim_run(tmp_path / 'r', CONFIG, DEFAULTS)
    with pytest.raises(Stop, match=says):
        files.claim_run(tmp_path / 'r', CONFIG | change, DEFAULTS)


def test_runs_are_found_by_their_config_and_a_wrong_name_lists_those_there(tmp_path):
    with pytest.raises(Stop, match=r'python train\.py'):
        files.runs(tmp_path)
    for name in ('b', 'a'):
        files.claim_run(tmp_path / 'runs' / name, CONFIG, DEFAULTS)
    (tmp_path / 'runs' / 'no_run').mkdir()
    assert [p.name for p in files.runs(tmp_path)] == ['a', 'b']
    assert [p.name for p in files.runs(tmp_path, 'b, a')] == ['b', 'a']
    with pytest.raises(Stop, match=r'no run named c .*; there: a, b'):
        files.runs(tmp_path, 'c')


def test_json_that_is_broken_is_named(tmp_path):
    for text in ('{', '[1]', '[' * 100_000, ''):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(Stop, match=r'config\.json'):
            files.read_json(tmp_path / 'config.json')


def test_a_run_whose_config_is_gone_is_not_claimed_by_other_flags(tmp_path):
    (tmp_path / 'fold1').mkdir()
    (tmp_path / 'fold1' / 'oof.csv').write_text('of who knows what')
    with pytest.raises(Stop, match=r'fold1/oof\.csv is there and no config\.json'):
        files.claim_run(tmp_path, CONFIG, DEFAULTS)
    assert not (tmp_path / 'config.json').exists()


def test_leftovers_of_dead_processes_are_swept_and_the_livings_are_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    host = socket.gethostname()[:60]
    names = {
        'living': f'.a.{host}-{os.getppid()}.part.csv',
        'dead': f'.a.{host}-{dead.pid}.part.csv',
        'elsewhere': f'.a.another-host-{dead.pid}.part',
        'aged': '.a.another-host-1.part',
        'not ours': '.a.part.csv',
    }
    for name in names.values():
        (tmp_path / name).write_text('half')
    os.utime(tmp_path / names['aged'], (0, 0))

    def left() -> set[str]:
        return {k for k, name in names.items() if (tmp_path / name).exists()}

    files.sweep(tmp_path)
    assert left() == {'living', 'elsewhere', 'not ours'}
    files.sweep(tmp_path, alone=True)
    assert left() == {'not ours'}


@pytest.mark.parametrize('host', ['vm', 'node-1.cluster.org', 'h' * 64])
def test_a_temporary_file_bears_the_name_that_sweep_knows(host, tmp_path, monkeypatch):
    monkeypatch.setattr(files.socket, 'gethostname', lambda: host)
    with files.atomic(tmp_path / ('x' * 240 + '.csv')) as temporary:  # near the longest name
        temporary.write_text('whole')
        files.sweep(tmp_path)
        assert temporary.exists()  # this process is alive
        copy = temporary.with_name(temporary.name.replace(f'-{os.getpid()}.', '-999999999.'))
        copy.write_text('half')
        files.sweep(tmp_path)
        assert not copy.exists()
    assert [p.suffix for p in tmp_path.iterdir()] == ['.csv']


HOLDER = """
import sys, time
from pathlib import Path
from lib.locks import Lock
with Lock(Path(sys.argv[1])) as lock:
    print(lock.take(shared=len(sys.argv) > 2), flush=True)
    time.sleep(600)
"""


def hold(path, *shared: str) -> subprocess.Popen:
    """A process that has the lock `path` until it is killed."""
    command = [sys.executable, '-c', HOLDER, str(path), *shared]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'True\n'
    return process


def test_work_that_another_process_does_is_left_to_it_until_it_is_killed(tmp_path):
    paths = [tmp_path / f'fold{k}' / '.lock' for k in range(3)]
    process = hold(paths[0])
    try:
        assert list(locks.share(paths)) == paths[1:]
        holder = f'process {process.pid} on {socket.gethostname()}'
        assert locks.at_work(paths[0]) == f' ({holder} is at it)'
        assert [locks.at_work(p) for p in (paths[1], tmp_path / 'absent')] == ['', '']
    finally:
        process.kill()
        process.wait()
    assert list(locks.share(paths)) == paths  # the kernel drops a dead process's lock


def test_a_lock_is_shared_by_many_or_had_alone(tmp_path):
    process = hold(tmp_path / '.lock', 'shared')
    try:
        with locks.Lock(tmp_path / '.lock') as lock:
            assert not lock.take() and lock.take(shared=True)
    finally:
        process.kill()
        process.wait()
    with locks.Lock(tmp_path / '.lock') as lock:
        assert lock.take(shared=True) and lock.take()  # it changes from one to the other


def test_a_file_system_without_locks_is_told_and_does_not_stop_the_work(
    tmp_path, monkeypatch, capsys
):
    def refuse(fd, kind):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(locks.fcntl, 'lockf', refuse)
    monkeypatch.setattr(locks.Lock, 'unsupported', False)
    paths = [tmp_path / 'a', tmp_path / 'b']
    assert list(locks.share(paths)) == paths
    assert capsys.readouterr().out.count('start no second process') == 1
    half = tmp_path / '.a.other-1.part'
    half.write_text('perhaps still being written')
    files.sweep(tmp_path, alone=True)  # nothing says that this process is alone
    assert half.exists()


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('arch', 3),
        ('size', True),
        ('size', 10**9),
        ('mean', [0.5, 0.5]),
        ('std', [0.5, 0.5, 0]),
        ('std', [0.5, 0.5, float('nan')]),
        ('cutout', 'yes'),
        ('folds_sha256', None),
        ('command', ['rm']),
    ],
)
def test_a_strangers_config_is_checked(key, value, tmp_path):
    config = {**CONFIG, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    files.write_json(tmp_path / 'config.json', config)
    assert files.read_config(tmp_path) == config
    files.write_json(tmp_path / 'config.json', config | {key: value})
    with pytest.raises(Stop, match=f'{key} is missing or holds'):
        files.read_config(tmp_path)


def test_a_strangers_command_is_not_recommended(tmp_path):
    config = {**CONFIG, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    for command in ('rm -rf /', 'python train.py\x1b[2J'):
        files.write_json(tmp_path / 'config.json', config | {'command': command})
        assert files.to_train(tmp_path, [0]).endswith('trained: python train.py with its flags')
