"""--log: TensorBoard and wandb get what the run's files say, once each, and decide nothing."""

import json
import re
import shutil
import socket
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pandas as pd
import pytest
from conftest import QUICK, contents

from lib import config, runs
from lib.callbacks import StopOnNaN

TRAIN = [*QUICK, '--epochs', 3]
FAILED = '--log has failed'


@pytest.fixture(scope='module', params=['tensorboard', 'wandb'])
def log(request):
    """What --log names; wandb's files stay on this machine."""
    pytest.importorskip(request.param, reason=f'--log {request.param}: pip install {request.param}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WANDB_MODE', 'offline')
        yield request.param


@pytest.fixture(scope='module')
def plain(home, ok):
    """`home` with a run `plain` of three epochs; its folder, and what was printed."""
    home = shutil.copytree(home, home.with_name('follow'))
    return home / 'runs' / 'plain', ok('train.py', '--home', home, *TRAIN, '--name', 'plain')


@pytest.fixture(scope='module')
def followed(plain, log, script, tmp_path_factory):
    """The same run with --log, in a folder of its own; the finished command."""
    home, here = plain[0].parent.parent, tmp_path_factory.mktemp('here')
    done = script('train.py', '--home', home, *TRAIN, '--name', log, '--log', log, cwd=here)
    assert done.returncode == 0, done.stderr
    assert not list(here.iterdir())
    return plain[0].with_name(log), done


def wandb_records(path: Path) -> list:
    """The records of a .wandb file, which a process of wandb's own writes: up to the run's end.

    It has blocks of 32 kB; each part of a record begins with its checksum, length and kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(300):
        data, at, record, records = path.read_bytes(), 7, b'', []
        while at + 7 <= len(data):
            if (room := 2**15 - at % 2**15) < 7:
                at += room
                continue
            n, kind = int.from_bytes(data[at + 4 : at + 6], 'little'), data[at + 6]
            record, at = record + data[at + 7 : at + 7 + n], at + 7 + n
            if kind in (1, 4):  # whole, or its last part
                records.append(Record.FromString(record))
                record = b''
        if records and records[-1].HasField('exit'):
            return records
        time.sleep(0.1)
    raise TimeoutError(path)


def wandb_file(run: Path, fold: str) -> Path:
    """The only file of a fold in wandb's folder."""
    (path,) = run.glob(f'wandb/offline-run-*/run-{run.name}-{fold[-1]}-*.wandb')
    return path


def passed_on(log: str, run: Path, fold: str) -> list[tuple[int, dict[str, float]]]:
    """What either has of a fold, in its only file: the figures of each step."""
    figures: dict[int, dict[str, float]] = {}
    if log == 'tensorboard':
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (path,) = (run / fold).glob('*tfevents*')
        read = EventAccumulator(str(path)).Reload()
        for name in read.Tags()['scalars']:
            for event in read.Scalars(name):
                figures.setdefault(event.step, {})[name] = event.value
        return sorted(figures.items())
    for record in wandb_records(wandb_file(run, fold)):
        items = {'/'.join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        values = {name: json.loads(value) for name, value in items.items() if name[0] != '_'}
        figures |= {record.history.step.num: values} if values else {}
    return sorted(figures.items())


def check_rows(log: str, run: Path, fold: str) -> dict[str, float]:
    """The rows of history.csv are there, each once and in order; the figures after them."""
    table, read = pd.read_csv(run / fold / 'history.csv'), passed_on(log, run, fold)
    assert [step for step, _ in read] == [*table.epoch, len(table) + 1]
    for (_, figures), row in zip(read, table.drop(columns='epoch').iloc, strict=False):
        expected = {f'history/{k}': v for k, v in row.items()}
        assert figures == pytest.approx(expected, rel=1e-5)
    return read[-1][1]


def test_the_weights_the_lines_and_the_config_are_the_same(plain, followed):
    run, done = followed
    for k in (0, 1):
        weights = [folder / f'fold{k}' / runs.WEIGHTS for folder in (plain[0], run)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    first, second = (re.sub(r'\d+ s$', '', text, flags=re.M) for text in (plain[1], done.stdout))
    lines = [line for line in first.splitlines() if 'to resize' not in line]
    assert second.replace(str(run), str(plain[0])).splitlines() == lines
    assert done.stderr == ''
    ours, theirs = (json.loads((r / 'config.json').read_text()) for r in (plain[0], run))
    assert theirs == ours


def test_what_is_passed_on_is_what_the_files_say(log, followed):
    run, _ = followed
    scores = json.loads((run / 'scores.json').read_text())['pred_plain']
    for fold in ('fold0', 'fold1'):
        figures = check_rows(log, run, fold)
        (row,) = (row for row in scores if row['label'] == f'fold {fold[-1]}')
        assert figures['auc'] == pytest.approx(row['value'])
    assert runs.Run(run).trained_folds == [0, 1]


def test_wandb_has_the_run_as_group_and_records_nothing_of_the_machine(log, followed):
    if log != 'wandb':
        pytest.skip('of wandb alone')
    run, _ = followed
    config = json.loads((run / 'config.json').read_text())
    del config['command']
    for fold in ('fold0', 'fold1'):
        path = wandb_file(run, fold)
        (about,) = (r.run for r in wandb_records(path) if r.HasField('run'))
        assert (about.run_group, about.display_name, about.project) == ('wandb', fold, 'melanoma')
        values = {item.key: json.loads(item.value_json) for item in about.config.update}
        assert {k: v for k, v in values.items() if k[0] != '_'} == config
        assert (about.host, about.git.commit) == ('', '')
        data = path.read_bytes()
        assert b'train.py' not in data and str(run.parent).encode() not in data
        assert len(name := socket.gethostname()) < 6 or name.encode() not in data


def test_a_fold_that_goes_on_is_one_curve(log, plain, script, ok, monkeypatch):
    last = {'tensorboard': 2, 'wandb': 3}[log]  # epochs that ended before
    home, name = plain[0].parent.parent, f'{log}{last}'
    this = ['train.py', '--home', home, *TRAIN, '--name', name, '--log', log, '--fold', 1]
    run = home / 'runs' / name

    def interrupt(at, *args):
        if getattr(at, 'epoch', last) == last:
            raise KeyboardInterrupt

    opened = []
    with monkeypatch.context() as patch:
        if log == 'wandb':
            import wandb

            init = wandb.init
            patch.setattr(wandb, 'init', lambda **o: opened.append(init(**o)) or opened[-1])
        patch.setattr(StopOnNaN, 'before_batch', interrupt, raising=False)
        patch.setattr('lib.model.save', interrupt)
        done = script(*this)
    assert done.returncode == 130 and FAILED not in done.stdout, done.stdout
    for wandb_run in opened:
        wandb_run.finish()  # as the end of the process does
    before = passed_on(log, run, 'fold1')
    assert [step for step, _ in before] == [1, 2, 3][:last]
    said = ok(*this)
    assert f'goes on after epoch {last} of 3' in said and FAILED not in said
    check_rows(log, run, 'fold1')  # reads the only file, of the same id
    weights = [r / 'fold1' / runs.WEIGHTS for r in (run, plain[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize('where', ['__init__', 'add_scalar', 'close'])
def test_a_logger_that_fails_is_told_once_and_ends_no_training(where, plain, ok, monkeypatch):
    pytest.importorskip('tensorboard')
    from torch.utils.tensorboard import SummaryWriter

    home, calls = plain[0].parent.parent, []

    def fail(*args, **options):
        calls.append(where)
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(SummaryWriter, where, fail)
    name = f'fails_{where}'
    this = ['train.py', '--home', home, *TRAIN, '--name', name, '--fold', 0]
    said = ok(*this, '--log', 'tensorboard')
    assert said.count(FAILED) == len(calls) == 1 and 'No space left on device' in said
    weights = [home / 'runs' / n / 'fold0' / runs.WEIGHTS for n in (name, 'plain')]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_logger_that_is_not_there_or_not_known_is_refused(home, refusal, monkeypatch):
    before = contents(home)
    this = ['train.py', '--home', home, *TRAIN, '--name', 'new', '--log']
    assert '--log is one of tensorboard, wandb, not mlflow' in refusal(*this, 'mlflow')

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(config, 'version', absent)
    for log in ('tensorboard', 'wandb'):
        assert f'pip install {log}' in refusal(*this, log)
    assert contents(home) == before
