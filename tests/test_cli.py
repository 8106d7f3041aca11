"""The command line ends before any work, with a sentence, whatever is misspelt."""

import errno
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import ROOT, heed_ctrl_c
from fastcore.docments import docments

from lib import cli

calls = []


def target(
    *,
    size: int = 512,  # pixels
    rate: float = 0.5,  # a share
    cutout: bool = False,  # erase
    name: str | None = None,  # a name
    home: str = '.',  # a folder
) -> None:
    """Do a thing."""
    calls.append((size, rate, cutout, name, home))


@pytest.mark.parametrize(
    ('args', 'flags'),
    [
        ([], {}),
        (['--size', '384', '--cutout'], {'size': 384, 'cutout': True}),
        (['--size=384', '--nocutout'], {'size': 384, 'cutout': False}),
        (['--rate', '1'], {'rate': 1.0}),
        (['--rate', '-1e-3'], {'rate': -0.001}),
        (['--name', '512'], {'name': '512'}),
        (['--name', 'a,b'], {'name': 'a,b'}),
        (['--name', 'x#y'], {'name': 'x#y'}),
        (['--name=--x', '--home', '(1, 2)'], {'name': '--x', 'home': '(1, 2)'}),
    ],
)
def test_flags_arrive_with_their_types_and_strings_as_they_are(args, flags):
    parsed = cli.parse(target, args)
    assert parsed == flags
    assert {k: type(v) for k, v in parsed.items()} == {k: type(v) for k, v in flags.items()}


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (['--sise', '384'], 'did you mean --size'),
        (['384'], 'Could not consume arg: 384'),
        (['--size', '384', '512'], 'Could not consume arg: 512'),
        (['--size', '38.4'], 'whole number'),
        (['--size'], 'whole number'),
        (['--rate', 'x'], 'a number'),
        (['--cutout=false'], 'no value'),
        (['--name'], 'needs a value'),
        (['--norate'], 'a number'),
        (['--size', '1', '--size', '2'], '--size is given twice'),
    ],
)
def test_a_wrong_flag_ends_the_program_before_main_is_called(args, says, capsys):
    calls.clear()
    with pytest.raises(SystemExit) as ended:
        cli.run(target, args)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert not calls


SCRIPTS = ['folds.py', 'train.py', 'infer.py', 'blend.py']


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_script_explains_each_of_its_flags(name, ok):
    main = importlib.import_module(name.removesuffix('.py')).main
    said = ok(name, '--help')
    assert not re.search(r'^ *-\w,', said, re.M)  # no one-letter flag
    for flag, meaning in docments(main, returns=False).items():
        assert meaning, f'--{flag} has no comment'
        block = said.split(f'    --{flag}=')[1].split('\n    --')[0]
        assert ' '.join(meaning.split()) in ' '.join(block.split())


@pytest.mark.parametrize('name', ['folds.py', 'blend.py'])
def test_tables_and_blends_need_no_torch(name):
    """Seconds to wait, and gigabytes to install."""
    listing = 'import sys, runpy; sys.argv = sys.argv[1:]\n'
    listing += "runpy.run_path(sys.argv[0], run_name='__main__'); print('torch' in sys.modules)"
    command = [sys.executable, '-c', listing, str(ROOT / name), '--help']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith('False\n'), done.stderr


def test_the_command_lines_of_the_readme_and_of_the_scripts_are_understood():
    text, n = '\n'.join((ROOT / name).read_text() for name in ['README.md', *SCRIPTS]), 0
    for name, flags in re.findall(r'python (\w+\.py)([^`\n&#|;)"\']*)', text):
        if name in SCRIPTS:
            cli.parse(importlib.import_module(name.removesuffix('.py')).main, shlex.split(flags))
            n += '--' in flags
    assert n > 15


def of_system(number: int) -> OSError:
    return OSError(number, os.strerror(number), 'a/b.csv')


FULL = 'CUDA out of memory. Tried to allocate 20.00 MiB'
WORKER = 'Caught Stop in DataLoader worker process 0.\nOriginal Traceback\nlib.cli.Stop: do this\n'
CALLBACK = 'Exception occured in `X` when calling event `after_loss`:\n\tdo this'
ENDS = [
    (cli.Stop('do this'), 'do this'),
    (cli.Stop(CALLBACK), 'do this'),  # fastai's words around it
    (cli.Stop(WORKER), 'do this'),
    (cli.Stop('two\nlines'), 'two\nlines'),
    (cli.Stop('a name with \x1b[2J in it'), 'a name with \ufffd\\[2J in it'),
    (of_system(errno.ENOENT), 'No such file or directory: a/b.csv'),
    (of_system(errno.ENOSPC), 'No space left on device: a/b.csv; make room, .*'),
    (of_system(errno.EROFS), 'Read-only file system: a/b.csv; .* or name another folder'),
    (RuntimeError("[enforce fail] can't allocate memory: you"), 'out of memory; .*--accumulate .*'),
    (torch.OutOfMemoryError(FULL), 'the GPU is out of memory; .*--accumulate 2 --batch_size 4.'),
    (RuntimeError('DataLoader worker (pid 3) is killed'), '.*fewer --workers, .*--shm-size'),
]


@pytest.mark.parametrize(('error', 'says'), ENDS)
def test_what_a_user_can_do_something_about_is_one_sentence_and_a_bug_a_traceback(error, says):
    def fail():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(fail, [])
    assert re.fullmatch(f'error: {says}', ended.value.code)  # without a line end
    with pytest.raises(KeyError, match='bug'):
        cli.run(lambda: {}['bug'], [])


SLEEPER = """
import os, time
from lib import cli
def main(*, size: int = 0) -> None:
    up, here = os.pipe()
    if os.fork() == 0:
        os.write(here, b'x')
        [time.sleep(0.1) for _ in range(600)]  # a signal may come just before a sleep
    os.read(up, 1)  # a signal to a child that is not up yet is lost
    print('ready', flush=True)
    [time.sleep(0.1) for _ in range(600)]
cli.run(main)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_with_one_line_that_says_how_to_go_on(number):
    process = subprocess.Popen(
        [sys.executable, '-c', SLEEPER, '--size', '3'],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert process.stdout.readline() == 'ready\n'
    os.killpg(process.pid, number)
    error = process.communicate(timeout=50)[1]
    assert process.returncode == 130
    assert error == 'stopped; what is finished is kept. To go on: python -c --size 3\n'


def test_ctrl_c_in_a_script_that_a_test_runs_stops_pytest(script, monkeypatch):
    """Else it would count as a script that ends with status 130, and the next test would begin."""
    press = partial(os.kill, os.getpid(), signal.SIGINT)
    monkeypatch.setattr('lib.archives.read_duplicates', lambda data: press())
    with pytest.raises(KeyboardInterrupt):
        script('folds.py', '--check', 'x')
    monkeypatch.setattr('lib.archives.read_duplicates', mock.Mock(side_effect=KeyboardInterrupt))
    assert script('folds.py', '--check', 'x').returncode == 130
