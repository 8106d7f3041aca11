"""--log: TensorBoard and wandb get what the run's files say, once each, and decide nothing."""

import json
import re
import shutil
import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pandas as pd
import pytest
from conftest import QUICK, contents
from test_ranks import two

from lib import config, follow, runs
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


def events(folder: Path) -> list[tuple[int, dict, dict]]:
    """Of TensorBoard's only file in a folder the step, the figures and the PNGs of each event."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = folder.glob('*tfevents*')
    read = []
    for event in map(Event.FromString, RawEventFileLoader(str(path)).Load()):
        values = [value for value in event.summary.value if value.tag != 'config/text_summary']
        images = {v.tag: v.image.encoded_image_string for v in values if v.HasField('image')}
        figures = {v.tag: v.simple_value for v in values if not v.HasField('image')}
        read += [(event.step, figures, images)] if values else []
    return read


def wandb_records(path: Path) -> list:
    """The records of a .wandb file: blocks of 32 kB, each part with its checksum, length, kind."""
    from wandb.proto.wandb_internal_pb2 import Record

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
    return records


def wandb_file(run: Path, fold: str) -> Path:
    """The only file of a fold in wandb's folder."""
    (path,) = run.glob(f'wandb/offline-run-*/run-{(run / fold / "wandb_id").read_text()}.wandb')
    return path


def passed_on(log: str, run: Path, fold: str) -> list[tuple[int, dict, dict]]:
    """What either has of a fold, as `events` returns it; fold '.' is the run."""
    if log == 'tensorboard':
        return events(run / fold)
    path, read = wandb_file(run, fold), []
    for record in wandb_records(path):
        items = {'/'.join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        items = {name: json.loads(value) for name, value in items.items() if name[0] != '_'}
        images = {n[:-5]: v for n, v in items.items() if n.endswith('/path')}
        images = {n: (path.parent / 'files' / v).read_bytes() for n, v in images.items()}
        figures = {n: v for n, v in items.items() if not any(n.startswith(i) for i in images)}
        read += [(record.history.step.num, figures, images)] if items else []
    return read


def check_rows(log: str, run: Path, fold: str) -> list:
    """The rows of history.csv are there, each once and in order; what came after them."""
    table, read = pd.read_csv(run / fold / 'history.csv'), passed_on(log, run, fold)
    assert [step for step, *_ in read] == [*table.epoch, len(table) + 1]
    for (_, figures, images), row in zip(read, table.drop(columns='epoch').iloc, strict=False):
        assert figures == pytest.approx({f'history/{k}': v for k, v in row.items()}) and not images
    return read[-1]


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
    assert theirs == ours | {'command': ours['command'].replace('plain', run.name)}


def test_what_is_passed_on_is_what_the_files_say(log, followed):
    run, _ = followed
    scores = json.loads((run / 'scores.json').read_text())['pred_plain']
    for fold in ('fold0', 'fold1'):
        _, figures, images = check_rows(log, run, fold)
        names = ('auc', 'auc_low', 'auc_high')
        expected = scores['folds'][fold[-1]]['auc']
        assert [figures[f'pred_plain/{name}'] for name in names] == pytest.approx(expected)
        pngs = {
            f'pictures/{n}': (run / fold / f'{n}.png').read_bytes() for n in ('batch', 'history')
        }
        assert images == pngs
    ((_, figures, images),) = passed_on(log, run, '.')
    assert figures['pred_plain/auc'] == pytest.approx(scores['pooled']['auc'][0]) and not images
    low = 'sens_at_spec_90'
    assert figures[f'pred_plain/{low}_low'] == pytest.approx(scores['pooled'][low][1])
    assert runs.Run(run).trained_folds == [0, 1]


def test_wandb_has_the_run_as_group_and_records_nothing_of_the_machine(log, followed):
    if log != 'wandb':
        pytest.skip('of wandb alone')
    run, _ = followed
    saved = json.loads((run / 'config.json').read_text())
    for fold, name in (('fold0', 'fold0'), ('fold1', 'fold1'), ('.', 'scores')):
        path = wandb_file(run, fold)
        (about,) = (r.run for r in wandb_records(path) if r.HasField('run'))
        assert (about.run_group, about.display_name, about.project) == ('wandb', name, 'melanoma')
        values = {item.key: json.loads(item.value_json) for item in about.config.update}
        assert {k: v for k, v in values.items() if k[0] != '_'} | {'command': ''} == saved | {
            'command': ''
        }
        assert (about.host, about.git.commit) == ('', '')
        data = path.read_bytes()
        assert str(run.parent).encode() not in data and b'train.py' not in data
        assert len(name := socket.gethostname()) < 6 or name.encode() not in data
        files = [p.name for p in (path.parent / 'files').rglob('*') if p.is_file()]
        assert all(re.match('(batch|history)_4_', name) for name in files)


@pytest.mark.parametrize('last', [2, 3])  # epochs that ended before; of them one is saved, or all
def test_a_fold_that_goes_on_is_one_curve(last, log, plain, script, ok, monkeypatch):
    home, name = plain[0].parent.parent, f'{log}{last}'
    this = ['train.py', '--home', home, *TRAIN, '--name', name, '--log', log, '--fold', 1]
    run = home / 'runs' / name

    def interrupt(at, *args):
        if getattr(at, 'epoch', last) == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StopOnNaN, 'before_batch', interrupt, raising=False)
        patch.setattr('lib.model.save', interrupt)
        assert script(*this).returncode == 130
    if log == 'wandb':
        __import__('wandb').teardown()  # as the end of the process does
    before = passed_on(log, run, 'fold1')
    assert [step for step, *_ in before] == [1, 2, 3][:last]
    said = ok(*this)
    assert f'goes on after epoch {1 if last < 3 else 3} of 3' in said and FAILED not in said
    check_rows(log, run, 'fold1')  # reads the only file, of the same id
    weights = [r / 'fold1' / runs.WEIGHTS for r in (run, plain[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize('where', ['__init__', 'log', 'end'])
def test_a_logger_that_fails_is_told_once_and_ends_no_training(where, plain, ok, monkeypatch):
    pytest.importorskip('tensorboard')
    home, calls = plain[0].parent.parent, []

    def fail(*args):
        calls.append(where)
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(follow.TensorBoard, where, fail)
    name = f'fails_{where}'
    this = ['train.py', '--home', home, *TRAIN, '--name', name, '--fold', 0]
    said = ok(*this, '--log', 'tensorboard')
    assert said.count(FAILED) == len(calls) == 1 and 'No space left on device' in said
    weights = [home / 'runs' / n / 'fold0' / runs.WEIGHTS for n in (name, 'plain')]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_without_a_key_wandb_asks_nothing_and_the_training_goes_on(plain, ok, monkeypatch):
    wandb = pytest.importorskip('wandb', reason='--log wandb: pip install wandb')
    wandb.teardown()  # it reads the environment once
    for name, value in (('WANDB_MODE', 'online'), ('NETRC', '/dev/null'), ('WANDB_API_KEY', '')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('wandb.login', lambda prompt: prompt)
    this = ['--name', 'no_key', '--log', 'wandb', '--fold', 0]
    said = ok('train.py', '--home', plain[0].parent.parent, *TRAIN, *this)
    assert said.count(FAILED) == 1 and 'WANDB_MODE=offline' in said
    wandb.teardown()


def test_a_logger_that_is_not_there_or_not_known_is_refused_before_any_work(
    home, refusal, monkeypatch
):
    before = contents(home)
    this = ['train.py', '--home', home, *TRAIN, '--name', 'new', '--log']
    assert '--log is one of tensorboard, wandb, not mlflow' in refusal(*this, 'mlflow')

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(config, 'version', absent)
    for log in ('tensorboard', 'wandb'):
        assert f'pip install {log}' in refusal(*this, log)
    assert contents(home) == before


def test_of_a_launchers_processes_the_first_alone_passes_on(plain):
    log = 'tensorboard'  # what decides is the same for both
    pytest.importorskip(log)
    home, name = plain[0].parent.parent, f'{log}_two'
    this = ['--home', home, *TRAIN, '--name', name, '--log', log, '--fold', 0]
    said = two('--', 'train.py', *this)  # without -- the launcher takes --log for its own
    assert FAILED not in said and '2 processes train each fold' in said
    check_rows(log, home / 'runs' / name, 'fold0')  # reads the only file
