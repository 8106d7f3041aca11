"""A piece of work is done by one process at a time, and a dead process holds nothing back."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from conftest import ROOT

from lib import locks

HOLDER = """
import os, sys, time
from pathlib import Path
from lib.locks import held
with held(Path(sys.argv[1]), wait=False) as is_mine:
    print(is_mine, flush=True)
    if len(sys.argv) > 2 and os.fork() == 0:
        print('forked', flush=True)
        os.close(1)
    time.sleep(600)
"""


@contextmanager
def held_by_another(path, *forks: str):
    """A block during which another process has the lock `path`, unless it is killed in it."""
    command = [sys.executable, '-c', HOLDER, str(path), *forks]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == 'True\n'
        if forks:
            assert process.stdout.readline() == 'forked\n'
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has forked


def claimed(paths, is_done=lambda piece: False) -> list:
    return list(locks.claim({path: path.parent.name for path in paths}, is_done))


def test_work_that_another_process_does_is_left_to_it_until_it_is_killed(tmp_path):
    paths = [tmp_path / f'fold{k}' / '.lock' for k in range(3)]
    with held_by_another(paths[0]) as process:
        assert claimed(paths) == ['fold1', 'fold2']
        process.kill()
        process.wait()
        assert claimed(paths) == ['fold0', 'fold1', 'fold2']  # the kernel drops a dead one's lock


def test_the_processes_that_read_images_do_not_keep_the_lock_of_one_that_was_killed(tmp_path):
    path = tmp_path / 'fold0' / '.lock'
    with held_by_another(path, 'fork') as process:
        assert claimed([path]) == []
        process.kill()
        process.wait()
        assert claimed([path]) == ['fold0']  # its child is still there


def test_a_piece_is_locked_while_it_is_worked_on_and_what_is_done_is_not_claimed(tmp_path):
    paths, done = [tmp_path / f'fold{k}' / '.lock' for k in range(3)], {'fold1'}
    probe = 'import sys, pathlib; from lib import locks\n'
    probe += 'with locks.held(pathlib.Path(sys.argv[1]), wait=False) as mine: print(mine)'
    pieces = locks.claim({path: path.parent.name for path in paths}, done.__contains__)
    assert next(pieces) == 'fold0'
    ask = [sys.executable, '-c', probe, str(paths[0])]
    note = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    assert note.stdout == 'False\n', note.stderr
    done |= {'fold0', 'fold2'}
    assert list(pieces) == []


def test_what_another_process_did_before_the_lock_was_free_is_not_done_again(tmp_path):
    asked = []

    def is_done(piece) -> bool:  # not yet when the work is listed, but when the lock is had
        asked.append(piece)
        return len(asked) > 1

    assert claimed([tmp_path / 'fold0' / '.lock'], is_done) == [] and len(asked) > 1


def test_what_others_had_is_asked_for_again_after_each_piece(tmp_path):
    paths = [tmp_path / f'fold{k}' / '.lock' for k in range(2)]
    with held_by_another(paths[0]) as process:
        pieces = locks.claim({path: path.parent.name for path in paths}, lambda piece: False)
        assert next(pieces) == 'fold1'
        process.kill()
        process.wait()
        assert list(pieces) == ['fold0']


def test_a_block_that_one_process_at_a_time_enters_is_waited_for(tmp_path):
    with held_by_another(tmp_path / '.lock') as process:
        before = time.monotonic()
        threading.Timer(0.3, process.kill).start()
        with locks.held(tmp_path / '.lock'):
            assert time.monotonic() - before >= 0.3


def test_a_file_system_without_locks_is_told_and_does_not_stop_the_work(
    tmp_path, monkeypatch, capsys
):
    def refuse(fd, kind):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(locks.fcntl, 'lockf', refuse)
    monkeypatch.setattr(locks, 'told', False)
    assert claimed([tmp_path / 'a' / '.lock', tmp_path / 'b' / '.lock']) == ['a', 'b']
    with locks.held(tmp_path / '.lock'):
        assert capsys.readouterr().out.count('start no second process') == 1

    def fail(fd, kind):
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr(locks.fcntl, 'lockf', fail)
    with pytest.raises(OSError, match='Input/output error'):
        claimed([tmp_path / 'a' / '.lock'])


def test_what_becomes_undone_by_another_piece_is_done_in_the_same_go(tmp_path):
    """As parts that counted by a file that the first new part deletes."""
    of_lock, undone = {tmp_path / name: name for name in 'abc'}, {'b'}
    order = []
    for piece in locks.claim(of_lock, lambda piece: piece not in undone):
        order.append(piece)
        undone.update('ac')
        undone.difference_update(order)
    assert order == ['b', 'a', 'c']
