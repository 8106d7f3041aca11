"""The command line ends before any work, with a sentence, whatever is misspelt."""

import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, heed_ctrl_c
from fastcore.docments import docments

from lib import cli

calls = []


def target(
    *,
    size: int = 512,  # pixels
    rate: float = 0.5,  # a share
    cutout: bool = False,  # erase
    # a name, which takes
    # more than a line
    name: str | None = None,
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
        (['--n', '3'], 'no flag --n'),
        (['-s', '3'], 'no flag -s'),
        (['384'], 'belongs to no flag'),
        (['--size', '384', '512'], 'belongs to no flag'),
        (['--size', '38.4'], 'whole number'),
        (['--size'], 'whole number'),
        (['--size', 'big'], 'whole number'),
        (['--rate', 'x'], 'a number'),
        (['--cutout', '3'], 'no value'),
        (['--cutout=false'], 'no value'),
        (['--name'], 'needs a value'),
        (['--norate'], 'no flag --norate'),
        (['--nocutout=3'], 'takes no value'),
        (['--size', '1', '--size', '2'], 'given twice'),
        (['--', '--interactive'], 'no flag'),
    ],
)
def test_a_wrong_flag_ends_the_program_before_main_is_called(args, says, capsys):
    calls.clear()
    with pytest.raises(SystemExit) as ended:
        cli.run(target, args)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert not calls


def test_a_command_says_the_flags_that_differ_from_their_defaults():
    defaults = {'size': 512, 'cutout': False, 'pretrained': True, 'name': None}
    flags = {'size': 384, 'cutout': True, 'pretrained': False, 'name': 'a b'}
    words = "python train.py --size 384 --cutout --nopretrained --name 'a b'"
    assert cli.command('train.py', flags, defaults) == words
    assert cli.command('train.py', defaults, defaults) == 'python train.py'


def test_help_is_the_comment_beside_each_flag_and_lists_no_flag_that_is_refused(capsys):
    cli.run(target, ['--size', '3', '--help'])
    text = capsys.readouterr().out
    meanings = {'size': 'pixels', 'rate': 'a share', 'cutout': 'erase', 'home': 'a folder'}
    meanings['name'] = 'a name, which takes more than a line'
    for flag, meaning in meanings.items():
        block = text.split(f'    --{flag}=')[1].split('\n    --')[0]
        assert ' '.join(block.split()).endswith(meaning), block
    assert '-s,' not in text and 'Do a thing.' in text


def test_a_stop_is_one_sentence_and_a_bug_is_a_traceback():
    def stops():
        raise cli.Stop('do this')

    with pytest.raises(SystemExit, match='error: do this'):
        cli.run(stops, [])

    def breaks():
        raise KeyError('bug')

    with pytest.raises(KeyError):
        cli.run(breaks, [])

    def no_file():
        Path('/nowhere/at/all').read_text()

    with pytest.raises(SystemExit, match='No such file or directory: /nowhere'):
        cli.run(no_file, [])


@pytest.mark.parametrize('name', ['folds.py', 'train.py', 'infer.py', 'blend.py'])
def test_every_script_explains_each_of_its_flags_and_needs_no_torch_for_it(name):
    main = importlib.import_module(name.removesuffix('.py')).main
    listing = 'import sys, runpy; sys.argv = sys.argv[1:]\n'
    listing += "runpy.run_path(sys.argv[0], run_name='__main__'); print('torch' in sys.modules)"
    command = [sys.executable, '-c', listing, str(ROOT / name), '--help']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith('False\n'), done.stderr
    for flag, meaning in docments(main, returns=False).items():
        assert meaning, f'--{flag} has no comment'
        block = done.stdout.split(f'    --{flag}=')[1].split('\n    --')[0]
        assert ' '.join(meaning.split()) in ' '.join(block.split())


@pytest.mark.parametrize(
    ('number', 'says'),
    [
        (errno.ENOSPC, 'No space left on device: a/b.csv; make room'),
        (errno.EROFS, 'Read-only file system: a/b.csv; change its permissions, or take another'),
    ],
)
def test_an_error_of_the_system_says_what_to_do(number, says):
    def fails():
        raise OSError(number, os.strerror(number), 'a/b.csv')

    with pytest.raises(SystemExit, match=says):
        cli.run(fails, [])


def test_a_sentence_from_a_process_that_reads_images_comes_without_its_traceback():
    text = (
        'Caught Stop in DataLoader worker process 0.\nOriginal Traceback\nlib.cli.Stop: do this\n'
    )

    def stops():
        raise cli.Stop(text)

    def whispers():
        raise cli.Stop('a name with \x1b[2J in it\nand a second line')

    with pytest.raises(SystemExit, match=r'^error: do this$'):
        cli.run(stops, [])
    with pytest.raises(SystemExit, match=r'error: a name with .\[2J in it\nand') as ended:
        cli.run(whispers, [])  # nothing that a terminal would obey
    assert '\x1b' not in ended.value.code


def fail(error: Exception):
    raise error


@pytest.mark.parametrize(
    ('error', 'says'),
    [
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), 'a smaller --batch_size'),
        (
            type('OutOfMemoryError', (RuntimeError,), {})('CUDA'),
            '--accumulate 2 --batch_size 4',
        ),
        (RuntimeError('DataLoader worker (pid 3) is killed by signal: Killed.'), 'fewer --workers'),
        (
            cli.Stop('Exception occured in `X` when calling event `after_loss`:\n\tdo this'),
            'do this',
        ),
    ],
)
def test_what_a_user_can_do_something_about_is_a_sentence(error, says):
    with pytest.raises(SystemExit, match=rf'^error: [^\n]*{says}[^\n]*$'):
        cli.run(lambda: fail(error), [])
    with pytest.raises(RuntimeError, match='a bug'):
        cli.run(lambda: fail(RuntimeError('a bug')), [])


SLEEPER = """
import os, time
from lib import cli
def main(*, fork: bool = False) -> None:
    if fork:
        up, here = os.pipe()
        if os.fork() == 0:
            os.write(here, b'x')
            [time.sleep(0.1) for _ in range(600)]  # a signal may come just before a sleep
        os.read(up, 1)  # a signal to a child that is not up yet is lost
    cli.note_kept('half of it')
    print('ready', flush=True)
    [time.sleep(0.1) for _ in range(600)]
cli.run(main)
"""


@pytest.mark.parametrize(
    ('number', 'flags'),
    [(signal.SIGINT, ['--fork']), (signal.SIGTERM, ['--fork']), (signal.SIGTERM, [])],
)
def test_a_signal_ends_the_work_with_one_line_that_says_how_to_go_on(number, flags):
    process = subprocess.Popen(
        [sys.executable, '-c', SLEEPER, *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert process.stdout.readline() == 'ready\n'
    os.killpg(process.pid, number)
    error = process.communicate(timeout=50)[1]
    assert process.returncode == 130
    again = ' '.join(['python -c', *flags])
    assert error == f'stopped; kept: half of it. The same command goes on: {again}\n'
