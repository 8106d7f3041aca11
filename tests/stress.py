"""Kills, strangers' files, random damage and two processes at once: what is lost, what is let in?

python tests/stress.py                         # everything; half an hour on two cores
python tests/stress.py --only inputs,fuzz      # parts of it
python tests/stress.py --n_kills 100 --seed 1  # more of it, other moments

Every table that is printed ends in a line of figures; the status is 1 where any of them is bad.
The suite runs a short version (test_stress.py).
"""

import csv
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lib import cli, demo, files, images, tables  # noqa: E402

QUICK = ['--arch', 'test_resnet', '--nopretrained', '--size', 64, '--batch_size', 4]
TIMEOUT = 600  # seconds: longer is a hang


def command(script: str, *args: object) -> list[str]:
    """What to call a script by."""
    return [sys.executable, str(ROOT / script), *map(str, args)]


def call(script: str, *args: object, **options: object) -> subprocess.CompletedProcess:
    """A script that has ended, its output as text."""
    options = {'capture_output': True, 'text': True, 'timeout': TIMEOUT, **options}
    return subprocess.run(command(script, *args), **options)


def start(script: str, *args: object) -> subprocess.Popen:
    """A script that runs, its output to be read."""
    return subprocess.Popen(command(script, *args), stdout=subprocess.PIPE, text=True)


def done(script: str, *args: object) -> str:
    """The output of a script that must succeed."""
    ended = call(script, *args)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def make_home(folder: Path, n_train: int = 60, n_test: int = 12, n_folds: int = 2) -> Path:
    """A demo data set under `folder`/data and a home with its folds beside it."""
    demo.make(folder / 'data', n_train=n_train, n_test=n_test)
    home = folder / 'home'
    done('folds.py', '--data', folder / 'data', '--home', home, '--n_folds', n_folds)
    return home


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file under a folder, less the locks, which name their last holder."""
    paths = [p for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix != '.lock']
    paths = [p for p in paths if p.name not in ('.lock', '.test.lock')]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def leftovers(folder: Path) -> list[str]:
    """Half-written files under a folder, and states of trainings that are finished."""
    return [p.name for p in folder.rglob('*') if '.part' in p.suffixes or p.name == 'state.pt']


def killed(args: list[str], ready: Callable[[int], bool], delay: float) -> bool:
    """Start a command and kill it, `-9`, `delay` seconds after `ready(lines printed)` is true.

    Lines and files, not the clock, since the machine may be busy. False where it ended before.
    """
    with tempfile.TemporaryFile('w+') as log, tempfile.TemporaryFile('w+') as errors:
        process = subprocess.Popen(args, stdout=log, stderr=errors)
        ended = time.monotonic() + TIMEOUT

        def n_lines() -> int:
            return os.pread(log.fileno(), 1 << 20, 0).count(b'\n')

        while process.poll() is None and not ready(n_lines()):
            assert time.monotonic() < ended, f'{args} hangs'
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        status = process.wait()
        errors.seek(0)
        assert status in (0, -signal.SIGKILL), errors.read()
        return status != 0


# ---- kills


def kill_training(folder: Path, n_kills: int, epochs: int, rng: random.Random) -> Iterator[dict]:
    """Kill a training `n_kills` times, each time going on; a row for each run that came to an end.

    The number of workers changes from one start to the next: it must not matter.
    """
    home = make_home(folder)
    train = ['train.py', '--home', home, *QUICK, '--epochs', epochs]
    done(*train, '--name', 'whole')
    left, run = n_kills, 0
    while left:
        run, moments, workers = run + 1, [], 0
        this = [*train, '--name', f'run{run}']
        folds = [home / 'runs' / f'run{run}' / f'fold{k}' for k in (0, 1)]
        while left:
            n, delay = rng.randint(0, epochs), rng.uniform(0, 0.5)
            args = command(*this, '--workers', workers)
            if not killed(args, lambda lines, n=n: lines >= n, delay):
                break
            left, workers = left - 1, 2 - workers
            moments.append('+'.join(str(_epochs(fold)) for fold in folds))
        done(*this, '--workers', workers)
        whole = home / 'runs' / 'whole'
        pairs = [(whole / f.name / n, f / n) for f in folds for n in ('oof.csv', FILE)]
        yield {
            'run': run,
            'kills': len(moments),
            'same bytes': all(a.read_bytes() == b.read_bytes() for a, b in pairs),
            'left over': leftovers(home) or 'nothing',
            'epochs of each fold at each kill': '; '.join(moments),
        }


FILE = 'model.safetensors'


def _epochs(fold: Path) -> int | str:
    """The epochs that a fold's folder holds, 'all' where it is finished."""
    if (fold / 'oof.csv').exists():
        return 'all'
    history = fold / 'history.csv'
    return len(history.read_text().splitlines()) - 1 if history.exists() else 0


def trained_home(folder: Path) -> Path:
    """A home with a run named a, of one epoch in two folds."""
    home = make_home(folder)
    done('train.py', '--home', home, *QUICK, '--epochs', 1, '--name', 'a')
    return home


def kill_inference(home: Path, n_kills: int, rng: random.Random) -> Iterator[dict]:
    """Kill infer.py `n_kills` times on a home with run a; a row for each that came to an end."""
    infer = ['infer.py', '--home', home, '--n_tta', 240]  # so that a part takes seconds
    done(*infer)
    run, left = home / 'runs' / 'a', n_kills
    whole = contents(home)
    while left:
        for path in [*run.glob('fold*/tta_oof.csv'), *run.glob('*.csv'), run / 'infer.json']:
            path.unlink()
        moments = []
        while left:
            delay = rng.uniform(0, 10)  # after the first part of this start has begun
            if not killed(command(*infer), lambda lines: lines >= 1, delay):
                break
            left -= 1
            there = [p for p in run.rglob('*.csv') if p.name in ('tta_oof.csv', 'test.csv')]
            moments.append(f'{len(there)} of 3')
        done(*infer)
        yield {
            'kills': len(moments),
            'same bytes': contents(home) == whole,
            'left over': leftovers(home) or 'nothing',
            'parts done at each kill': '; '.join(moments),
        }


def kill_blend(home: Path, n_kills: int, rng: random.Random) -> Iterator[dict]:
    """Kill blend.py `n_kills` times on a home that is predicted."""
    done('blend.py', '--home', home)
    whole = contents(home)
    args = command('blend.py', '--home', home)
    n = sum(killed(args, lambda lines: True, rng.uniform(1, 6)) for _ in range(n_kills))
    done('blend.py', '--home', home)
    same = contents(home) == whole
    yield {'kills': n, 'same bytes': same, 'left over': leftovers(home) or 'nothing'}


def kill_cache(folder: Path, n_kills: int, rng: random.Random) -> Iterator[dict]:
    """Kill what makes the cache `n_kills` times, while its pool of processes is at work."""
    home = make_home(folder, n_train=900)
    code = (
        f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
        'from pathlib import Path\nfrom lib import images, tables\n'
        "if __name__ == '__main__':\n"
        f'    home = Path({str(home)!r})\n'
        "    images.cache(tables.read_folds(home / 'folds.csv'), home, 224)\n"
    )

    def made() -> int:
        return len(list(home.glob('cache/*/*/[!.]*.jpg')))

    script = folder / 'cache.py'  # a file, which the processes of the pool can import
    script.write_text(code)
    make = [sys.executable, str(script)]
    subprocess.run(make, check=True, timeout=TIMEOUT, stdout=subprocess.DEVNULL)
    whole = contents(home)
    left = n_kills
    while left:
        shutil.rmtree(home / 'cache')
        moments = []
        while left:
            n = made() + rng.randint(0, 400)
            if not killed(make, lambda _, n=n: made() >= n, rng.uniform(0, 0.2)):
                break
            left -= 1
            moments.append(str(made()))
        subprocess.run(make, check=True, timeout=TIMEOUT, stdout=subprocess.DEVNULL)
        yield {
            'kills': len(moments),
            'same bytes': contents(home) == whole,
            'left over': leftovers(home) or 'nothing',
            'images made at each kill': '; '.join(moments),
        }


# ---- two processes


def two_processes(folder: Path, n_folds: int = 4, epochs: int = 3) -> Iterator[dict]:
    """Train and predict one run by two processes at once: each part by one of them, and equal."""
    home = make_home(folder, n_folds=n_folds)
    for script, *args in (
        ['train.py', '--home', home, *QUICK, '--epochs', epochs],
        ['infer.py', '--home', home, '--n_tta', 4],
    ):
        alone, shared = (
            [script, *args, flag, name]
            for flag, name in (
                ('--name', 'alone') if script == 'train.py' else ('--only', 'alone'),
                ('--name', 'shared') if script == 'train.py' else ('--only', 'shared'),
            )
        )
        done(*alone)
        both = [start(*shared) for _ in range(2)]
        outs = [process.communicate(timeout=TIMEOUT)[0] for process in both]
        mark = 'images an epoch' if script == 'train.py' else 'passes, '
        parts = n_folds + (script == 'infer.py')
        name = 'oof.csv' if script == 'train.py' else 'tta_oof.csv'
        runs = [home / 'runs' / r for r in ('alone', 'shared')]
        done(*shared)  # who ended first could not see the end of the other
        same = all(
            (runs[0] / f'fold{k}' / name).read_bytes() == (runs[1] / f'fold{k}' / name).read_bytes()
            for k in range(n_folds)
        )
        yield {
            'script': script,
            'status': [process.returncode for process in both],
            'parts done by each': [out.count(mark) for out in outs],
            'each once': sum(out.count(mark) for out in outs) == parts,
            'same bytes': same,
            'left over': leftovers(home) or 'nothing',
        }


# ---- bad input


def pictures(folder: Path) -> dict[str, tuple[Path, bool]]:
    """A file of each kind that the issue names: its path, and whether it can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    whole = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sixteen = Image.fromarray(rng.integers(0, 2**16, (90, 120), dtype=np.uint16))
    kinds: dict[str, tuple[Callable[[Path], object], bool]] = {
        'missing': (lambda p: None, False),
        'empty': (lambda p: p.write_bytes(b''), False),
        'truncated': (lambda p: p.write_bytes(_jpeg(whole)[:3000]), False),
        'text': (lambda p: p.write_text('no picture'), False),
        'eps': (lambda p: whole.save(p, 'EPS'), False),
        'png': (lambda p: whole.save(p, 'PNG'), True),
        'cmyk': (lambda p: whole.convert('CMYK').save(p), True),
        'grey': (lambda p: whole.convert('L').save(p), True),
        '16-bit': (lambda p: sixteen.save(p, 'PNG'), True),
        'palette': (lambda p: whole.convert('P').save(p, 'PNG'), True),
        'rotated': (lambda p: whole.save(p, exif=exif), True),
        '1x1': (lambda p: whole.resize((1, 1)).save(p), True),
        '30000x1': (lambda p: whole.resize((30000, 1)).save(p), True),
        'bomb': (lambda p: Image.new('1', (30000, 30000)).save(p, 'PNG'), False),
        'folder': (lambda p: p.mkdir(), False),
        'pipe': (os.mkfifo, False),
    }
    made = {}
    for name, (write, readable) in kinds.items():
        path = folder / f'{name}.jpg'
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        write(path)
        made[name] = path, readable
    return made


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=95)
    return buffer.getvalue()


class Malicious:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _edit(old: str, new: str) -> Callable[[Path], None]:
    """Replace `old`, which must be there, once."""

    def edit(path: Path) -> None:
        text = path.read_bytes()
        assert old.encode() in text, f'{path} does not hold {old}'
        path.write_bytes(text.replace(old.encode(), new.encode(), 1))

    return edit


def _recode(change: Callable[[str], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_text()))


def _column(position: int, value: str) -> Callable[[Path], None]:
    """Set a cell of the first row below the header."""

    def edit(path: Path) -> None:
        rows = list(csv.reader(io.StringIO(path.read_text())))
        rows[1][position] = value
        _write(path, rows)

    return edit


def _rows(change: Callable[[list], list]) -> Callable[[Path], None]:
    """Change the rows below the header."""

    def edit(path: Path) -> None:
        head, *rows = csv.reader(io.StringIO(path.read_text()))
        _write(path, [head, *change(rows)])

    return edit


def _write(path: Path, rows: list[list[str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows(rows)
    path.write_text(buffer.getvalue())


def table_cases(data: Path) -> list[tuple[str, str, Callable[[Path], None], str | None]]:
    """Changes of a competition's tables: what, file, change, the sentence (None: reads right)."""
    first = (data / 'train.csv').read_text().splitlines()[1]
    name = first.split(',')[0]
    label = _column(7, '2'), 'expected 0 or 1'
    return [
        ('no file', 'train.csv', lambda p: p.unlink(), 'there is no train.csv'),
        ('a folder', 'test.csv', lambda p: (p.unlink(), p.mkdir()), 'is missing'),
        ('no bytes', 'train.csv', lambda p: p.write_text(''), 'cannot be read as CSV'),
        ('a header alone', 'train.csv', _rows(lambda rows: []), 'no rows'),
        ('a column less', 'train.csv', _edit('patient_id', 'patient'), 'lacks the column'),
        ('a column more', 'train.csv', _recode(lambda t: _wider(t).encode()), None),
        ('a column twice', 'train.csv', _edit('diagnosis', 'sex'), 'has the column sex twice'),
        ('a name twice', 'train.csv', _rows(lambda rows: [rows[0], *rows]), 'stands twice'),
        ('a label of 2', 'train.csv', *label),
        ('a label missing', 'train.csv', _column(7, ''), 'expected 0 or 1'),
        ('a label in words', 'train.csv', _column(7, 'malignant'), 'expected 0 or 1'),
        ('Latin-1', 'train.csv', _recode(lambda t: t.replace('nevus', 'né').encode('latin-1')), ''),
        ('UTF-16', 'train.csv', _recode(lambda t: t.encode('utf-16')), 'UTF-8'),
        ('a byte-order mark', 'train.csv', _recode(lambda t: t.encode('utf-8-sig')), None),
        ('Windows line ends', 'train.csv', _recode(lambda t: t.replace('\n', '\r\n').encode()),
         None),
        ('old Mac line ends', 'train.csv', _recode(lambda t: t.replace('\n', '\r').encode()),
         None),
        ('a quoted comma', 'train.csv', _column(5, 'nevus, of a kind'), ''),
        ('a quote without end', 'train.csv', _column(5, '"'), ''),
        ('a row too long', 'train.csv', _rows(lambda r: [[*r[0], 'x'], *r[1:]]), 'cannot be read'),
        ('a row cut off', 'train.csv', _rows(lambda r: [*r[:-1], r[-1][:3]]), 'expected 0 or 1'),
        ('ages in words', 'train.csv', _column(3, 'sixty'), ''),
        ('an endless age', 'train.csv', _column(3, 'inf'), ''),
        ('no patient ids', 'train.csv', _rows(lambda r: [[x[0], '', *x[2:]] for x in r]), ''),
        ('../ in a name', 'train.csv', _column(0, f'../train/{name}'), 'not in'),
        ('an absolute name', 'train.csv', _column(0, '/etc/passwd'), 'not in'),
        ('a drive letter', 'train.csv', _column(0, 'C:\\x'), 'not in'),
        ('NUL in a name', 'train.csv', _column(0, f'{name}\0'), 'not in'),
        ('a name of nothing', 'train.csv', _column(0, ''), 'not in'),
        ('an image not there', 'train.csv', _column(0, 'ISIC_0'), 'not in'),
        ('other test names', 'test.csv', _column(0, 'ISIC_0'), 'different images'),
        ('a test name twice', 'sample_submission.csv', _rows(lambda r: [r[0], *r]), 'different'),
    ]  # fmt: skip


def _wider(text: str) -> str:
    return ''.join(f'{line},{i}\n' for i, line in enumerate(text.splitlines()))


class Trials:
    """Rows of the table of bad inputs, tried on one home."""

    def __init__(self, home: Path):
        self.home, self.marker = home, home.parent / 'code ran'

    def row(
        self, name: str, ended: subprocess.CompletedProcess, says: str | None, intact: bool = True
    ) -> dict:
        """A row: refused by a sentence that holds `says`, or read right where that is None."""
        sentence = ' / '.join(ended.stderr.strip().splitlines())
        good = (ended.returncode == 0) if says is None else (ended.returncode in (1, 2))
        good = good and (says or '') in ended.stderr and 'Traceback' not in ended.stderr and intact
        return {
            'input': name,
            'status': ended.returncode,
            'sentence': 'read right' if says is None else sentence[:150],
            'files': 'intact' if intact else 'CHANGED',
            'good': good and not self.marker.exists(),
        }

    def refused(self, name: str, says: str, *args: object, **options: object) -> dict:
        """A command that must be refused, and change nothing under the home."""
        before = contents(self.home)
        ended = call(*args, **options)
        return self.row(name, ended, says, contents(self.home) == before)

    def with_change(
        self, name: str, path: Path, change: Callable[[Path], object], says: str, *args: object
    ) -> dict:
        """The same, while a file is changed."""
        with changed(path, change):
            return self.refused(name, says, *args)


@contextmanager
def changed(path: Path, change: Callable[[Path], object]) -> Iterator[None]:
    """Change a file for a while, or make one."""
    kept = path.read_bytes() if path.exists() else None
    change(path)
    try:
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if kept is not None:
            path.write_bytes(kept)


def bad_tables(home: Path, only: str = '') -> Iterator[dict]:
    """Tables of a competition, read by folds.py; `only`: those whose name holds it."""
    trials, data, new = Trials(home), home.parent / 'data', home.parent / 'new'
    reference = (home / 'folds.csv').read_bytes()
    for name, file, change, says in table_cases(data):
        if only not in name:
            continue
        with changed(data / file, change):
            ended = call('folds.py', '--data', data, '--home', new, '--n_folds', 2)
        made = (new / 'folds.csv').read_bytes() if new.exists() else b''
        if says is None:
            good = made == reference
        elif says:
            good = not made
        else:  # either way, but every row or none
            good, says = made.count(b'\n') in (0, 73), None if made else ''
        yield trials.row(f'table: {name}', ended, says, good)
        shutil.rmtree(new, ignore_errors=True)


def bad_flags(home: Path, only: str = '') -> Iterator[dict]:
    """Flags out of range, and names that nothing bears."""
    trials, data = Trials(home), home.parent / 'data'
    train = ['train.py', '--home', home, '--nopretrained', '--arch']
    quick = [*train, 'test_resnet']
    for says, *args in (
        ['2 or more', 'folds.py', '--n_folds', 1],
        ['melanoma groups', 'folds.py', '--data', data, '--home', home, '--n_folds', 50],
        ['64 or more', *quick, '--size', 0],
        ['4096 or less', *quick, '--size', 99999],
        ['1 or more', *quick, '--epochs', 0],
        ['1 or more', *quick, '--batch_size', 0],
        ['0 or more', *quick, '--lr_max', -1],
        ['0 or more', *quick, '--wd', -1],
        ['0 or more', *quick, '--neg_ratio', -1],
        ['a number', *quick, '--neg_ratio', 'nan'],
        ['0 to 256', *quick, '--workers', -1],
        ['0 to 1', *quick, '--fold', 9],
        ['no folder name', *quick, '--name', '../x'],
        ['0 or more', 'infer.py', '--home', home, '--n_tta', -1],
        ['did you mean --size', *quick, '--sise', 64],
        ['near it: efficientnet_b5', *train, 'eficientnet_b5'],
        ['no architecture', *train, '../x'],
    ):
        name = f'flag: {args[-2]} {args[-1]}'
        if only in name:
            yield trials.refused(name, says, *args)


def bad_files(home: Path) -> Iterator[dict]:
    """Tables by hand, weights, states, configs and predictions, on a home with run a."""
    trials, run, scratch = Trials(home), home / 'runs' / 'a', home.parent / 'scratch'
    train = ['train.py', '--home', home, *QUICK, '--epochs', 1, '--name']
    infer = ['infer.py', '--home', home, '--n_tta']
    done(*infer, 1)
    done('blend.py', '--home', home)
    weights, pickled = run / 'fold0' / FILE, pickle.dumps(Malicious(trials.marker))

    column = tables.COLUMNS.index
    for name, change, says in (
        ('a source that is a path', _column(column('source'), '../../x'), 'is no source'),
        ('NUL in a path', _column(column('path'), 'a\0b'), 'is no path'),
        ('a fold of -1', _column(column('fold'), '-1'), 'no fold from 0 up'),
        ('a fold of 1e300', _column(column('fold'), '1e300'), 'no fold from 0 up'),
        ('a group in two folds', _rows(lambda r: _leak(r, column('fold'))), 'more than one fold'),
        ('changed since the run', _column(column('sex'), ''), 'folds.csv has changed'),
        ('gone', lambda path: path.unlink(), 'is missing'),
    ):
        path = home / 'folds.csv'
        yield trials.with_change(f'folds.csv: {name}', path, change, says, *train, 'a')

    for name, content, says in (
        ('of another architecture', weights.read_bytes(), 'another architecture'),
        ('pickled code', pickled, 'no safetensors'),
        ('cut off', weights.read_bytes()[:5000], 'no safetensors'),
        ('text', b'{}', 'no safetensors'),
    ):
        args = ['train.py', '--home', home, '--arch', 'resnet18', '--size', 64, '--weights']
        change = _bytes(content)
        yield trials.with_change(f'weights: {name}', scratch, change, says, *args, scratch)

    begun = shutil.copytree(run, home / 'runs' / 'begun')
    for path in begun.glob('fold*/*oof.csv'):
        path.unlink()
    for name, content in (
        ('pickled code', pickled),
        ('random bytes', bytes(range(256)) * 40),
        ('no bytes', b''),
    ):
        path, change = begun / 'fold0' / 'state.pt', _bytes(content)
        yield trials.with_change(f'state: {name}', path, change, 'is no state', *train, 'begun')
    shutil.rmtree(begun)

    for name, change, says in (
        ('no JSON', _bytes(b'{'), 'cannot be read as JSON'),
        ('too deep', _bytes(b'[' * 100_000), 'cannot be read as JSON'),
        ('a list', _bytes(b'[1]'), 'no JSON object'),
        ('a size of 1e9', _json(size=10**9), 'size is missing or holds'),
        ('an unknown architecture', _json(arch='../../x'), 'no architecture'),
        ('a std of 0', _json(std=[0, 0, 0]), 'std is missing or holds'),
        ('skipped by number', _json(skipped=[1]), 'expected a list of image names'),
    ):
        path = run / 'config.json'
        yield trials.with_change(f'config: {name}', path, change, says, *infer, 0)
    gone = 'no config.json'
    yield trials.with_change('config: gone', path, lambda p: p.unlink(), gone, *train, 'a')
    other = 'seed 0 (now 1)'
    yield trials.refused('config: other flags, the same name', other, *train, 'a', '--seed', 1)

    for file, position in (('oof.csv', 6), ('test.csv', 1)):
        for name, change in (
            ('1.5', _column(position, '1.5')),
            ('-0.1', _column(position, '-0.1')),
            ('NaN', _column(position, '')),
            ('infinity', _column(position, 'inf')),
            ('in words', _column(position, 'high')),
            ('a row less', _rows(lambda rows: rows[1:])),
            ('a row twice', _rows(lambda rows: [rows[0], *rows])),
        ):
            what, args = f'predictions: {file}, {name}', ['blend.py', '--home', home]
            yield trials.with_change(what, run / file, change, 'error', *args)
    before, backwards = contents(home), _rows(lambda rows: rows[::-1])
    with changed(run / 'oof.csv', backwards), changed(run / 'test.csv', backwards):
        ended = call('blend.py', '--home', home)
    yield trials.row('predictions: shuffled', ended, None, contents(home) == before)


def bad_machine(home: Path) -> Iterator[dict]:
    """A full disk, a folder that cannot be written to, a cache that goes, NaN."""
    trials = Trials(home)
    train = ['train.py', '--home', home, *QUICK]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    this = [*train, '--epochs', 1, '--name', 'full']
    done(*this, '--fold', 1)
    before = contents(home)
    ended = call(*this, preexec_fn=small_files)
    kept = before.items() <= contents(home).items() and not leftovers(home)
    yield trials.row('machine: no room on the disk', ended, 'make room', kept)
    done(*this)

    (home / 'runs' / 'denied').symlink_to('/proc/1/denied')
    this = [*train, '--epochs', 1, '--name', 'denied']
    yield trials.refused('machine: a folder not to be written to', 'error', *this)
    (home / 'runs' / 'denied').unlink()

    for workers in (0, 2):
        name = f'gone{workers}'
        args = command(*train, '--epochs', 300, '--name', name, '--workers', workers)
        process = subprocess.Popen(
            args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        state = home / 'runs' / name / 'fold0' / 'state.pt'
        while not state.exists() and process.poll() is None:
            time.sleep(0.1)
        shutil.rmtree(home / 'cache')
        stderr = process.communicate(timeout=TIMEOUT)[1]
        ended = subprocess.CompletedProcess(args, process.returncode, '', stderr)
        what, says = f'machine: the cache removed, {workers} workers', 'makes the cache again'
        yield trials.row(what, ended, says, state.exists())
        shutil.rmtree(home / 'runs' / name)

    rates = ['--lr_min', 9, '--lr_max', 9, '--wd', 1e38]
    ended = call(*train, '--epochs', 3, '--name', 'nan', *rates)
    yield trials.row('machine: NaN', ended, 'try a smaller --lr_max')


def bad_images(home: Path) -> Iterator[dict]:
    """Every kind of image by itself, then all of them in a run: listed, left out, no test image."""
    trials, folder = Trials(home), home.parent
    kinds = pictures(folder / 'pictures')
    for name, (path, readable) in kinds.items():
        error = images._make((path, folder / 'made' / f'{name}.jpg'), 64)
        yield {
            'input': f'image: {name}',
            'status': '-',
            'sentence': (error or 'read right').replace(str(folder), ''),
            'files': 'intact',
            'good': (error is None) == readable,
        }
    bad = [path for path, readable in kinds.values() if not readable]
    header, *lines = csv.reader(io.StringIO((home / 'folds.csv').read_text()))
    place, target = header.index('path'), header.index('target')
    benign = [i for i, line in enumerate(lines) if line[target] == '0']
    for path, i in zip(bad, benign, strict=False):
        lines[i][place] = str(path)
    other = folder / 'other'
    other.mkdir()
    for line in lines:
        line[place] = os.path.relpath(home / line[place], other)
    _write(other / 'folds.csv', [header, *lines])
    train = ['train.py', '--home', other, *QUICK, '--epochs', 1, '--name', 'a']
    ended = call(*train)
    listed = all(path.name in ended.stderr for path in bad) and not (other / 'runs').exists()
    says = f'{len(bad)} images cannot be read'
    yield trials.row('images: all kinds in train.py', ended, says, listed)
    ended = call(*train, '--skip_bad')
    config = files.read_json(other / 'runs' / 'a' / 'config.json')
    left_out = len(config['skipped']) == len(bad)
    yield trials.row('images: with --skip_bad', ended, None, left_out)
    ended = call('infer.py', '--home', other, '--n_tta', 0)
    rows = (other / 'runs' / 'a' / 'oof.csv').read_text().splitlines()
    yield trials.row('images: then infer.py', ended, None, len(rows) == 1 + 60 - len(bad))

    lines[-1][place] = os.path.relpath(bad[1], other)  # a test image
    _write(other / 'folds.csv', [header, *lines])
    config['folds_sha256'] = files.sha256(other / 'folds.csv')
    files.write_json(other / 'runs' / 'a' / 'config.json', config)
    for path in other.glob(f'cache/*/*/{lines[-1][header.index("image_name")]}.jpg'):
        path.unlink()
    before = contents(other)
    ended = call('infer.py', '--home', other, '--n_tta', 1)
    intact = contents(other) == before
    yield trials.row('images: a test image', ended, bad[1].name, intact)


def bad_inputs(folder: Path) -> Iterator[dict]:
    """All of them, each kind on a home of its own."""
    for kind in (bad_tables, bad_flags):
        yield from kind(make_home(folder / kind.__name__))
    yield from bad_files(trained_home(folder / 'bad_files'))
    for kind in (bad_machine, bad_images):
        yield from kind(make_home(folder / kind.__name__))


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _leak(rows: list[list[str]], fold: int) -> list[list[str]]:
    """Put the first row into another fold than its group."""
    rows[0][fold] = str(1 - int(rows[0][fold]))
    return rows


def _json(**values: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- random damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to eight pieces of random damage."""
    data = bytearray(content)
    odd = [
        b'\0',
        b'\xff',
        b'"',
        b',',
        b'\n',
        b'\r\n',
        b'../',
        b'nan',
        b'-1',
        b'1e999',
        b'\xef\xbb\xbf',
    ]
    for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.choice(odd)
        elif kind == 2:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 3:
            data[at : at + rng.randint(1, 4)] = rng.randbytes(rng.randint(1, 4))
        elif kind == 4:
            piece = data[at : at + rng.randint(1, 200)]
            to = rng.randrange(len(data) + 1)
            data[to:to] = piece
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise where the block hangs."""

    def hang(*_: object) -> None:
        raise TimeoutError('hang')

    old = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def fuzz(folder: Path, n: int, seed: int) -> Iterator[dict]:
    """Damage tables, JPEGs, PNGs, weights, config.json and state at random, `n` times in all.

    Each must be refused by a sentence or read right, as an independent reader has it.
    """
    import torch

    from lib import model

    home = make_home(folder)
    data, net = folder / 'data', model.create('test_resnet', 64)
    model.save(net, folder / 'w.safetensors')
    tensors = model.read_weights(folder / 'w.safetensors')
    small = {k: tensors[k] for k in list(tensors)[:4]}
    torch.save({'model': small, 'fold': 0}, folder / 'state.pt')
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'a.png')
    config = {'arch': 'test_resnet', 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    run = folder / 'run'
    files.write_json(run / 'config.json', {**config, 'folds_sha256': 'x', 'command': 'y'})
    jpeg = next((data / 'jpeg' / 'train').glob('*.jpg'))
    made = folder / 'made.jpg'

    def train_table(path: Path) -> None:
        kept = (data / 'train.csv').read_bytes()
        (data / 'train.csv').write_bytes(path.read_bytes())
        try:
            table, _ = tables.read_all(data, [])
        finally:
            (data / 'train.csv').write_bytes(kept)
        _check_rows(table[table.split == 'train'], path, data / 'jpeg' / 'train')

    def folds_table(path: Path) -> None:
        table = tables.read_folds(path)
        assert table.target[table.split == 'train'].isin([0, 1]).all()
        assert table.fold[table.split == 'train'].between(0, 999).all()
        assert not table.image_name.str.contains(r'[/\\:\x00-\x1f]').any()
        assert not table.source.str.contains(r'[/\\:\x00-\x1f]').any()
        _check_rows(table, path, None)

    def picture(path: Path) -> None:
        made.unlink(missing_ok=True)
        if error := images._make((path, made), 64):
            assert '\n' not in error and not made.exists()
            raise cli.Stop(error)
        with Image.open(made) as image:
            image.load()
            assert (image.size, image.mode) == ((64, 64), 'RGB')

    def weights(path: Path) -> None:
        model.load('test_resnet', 64, path)

    def run_config(path: Path) -> None:
        found = files.read_config(path.parent)
        assert type(found['size']) is int and 0 < found['size'] <= files.MAX_SIZE

    def state(path: Path) -> None:
        try:
            torch.load(path, weights_only=True)
        except Exception as e:  # as Resume does
            raise cli.Stop(str(e)) from None

    targets: dict[str, tuple[Path, Callable[[Path], None], float]] = {
        'train.csv': (data / 'train.csv', train_table, 0.2),
        'folds.csv': (home / 'folds.csv', folds_table, 0.2),
        'JPEG': (jpeg, picture, 0.3),
        'PNG': (folder / 'a.png', picture, 0.1),
        'weights': (folder / 'w.safetensors', weights, 0.05),
        'config.json': (run / 'config.json', run_config, 0.1),
        'state.pt': (folder / 'state.pt', state, 0.05),
    }
    for name, (path, read, share) in targets.items():
        rng, content = random.Random(f'{seed} {name}'), path.read_bytes()
        target = folder / 'fuzz' / path.name
        target.parent.mkdir(exist_ok=True)
        counts = {'refused': 0, 'read right': 0}
        wrong: list[str] = []
        cases = max(1, round(n * share))
        for case in range(cases):
            target.write_bytes(damaged(content, rng))
            try:
                with time_limit(60):
                    read(target)
                counts['read right'] += 1
            except cli.Stop:
                counts['refused'] += 1
            except Exception as e:
                wrong.append(f'case {case}: {type(e).__name__}: {e}'[:200])
                shutil.copy(target, folder / f'wrong-{name}-{case}')
        yield {'what': name, 'cases': cases, **counts, 'wrong': wrong or 'none'}


def _check_rows(table, path: Path, folder: Path | None) -> None:
    """Compare what was read with what Python's own csv module reads."""
    text = path.read_bytes().decode('utf-8-sig')
    rows = list(csv.reader(io.StringIO(text, newline=''), skipinitialspace=True))
    header, rows = next((row, rows[i + 1 :]) for i, row in enumerate(rows) if row)
    rows = [row + [''] * (len(header) - len(row)) for row in rows if row]
    assert len(rows) == len(table), f'{len(rows)} rows are {len(table)}'
    name, target = header.index('image_name'), header.index('target')
    labels = {row[name]: row[target] for row in rows}
    for image, label in zip(table.image_name, table.target, strict=True):
        assert image in labels, f'{image!r} is not in the file'
        if label == label:
            assert float(labels[image]) == label, f'{image} is {labels[image]}'
    if folder is not None:
        inside = folder.resolve()
        assert all(Path(p).resolve().parent == inside for p in table.path)


# ---- the tables


def show(title: str, rows: Iterator[dict], good: Callable[[dict], bool]) -> bool:
    """Print rows as a Markdown table, as they come; whether all of them are good."""
    print(f'\n## {title}\n', flush=True)
    n = n_good = 0
    for row in rows:
        if not n:
            print('| ' + ' | '.join(row) + ' |\n|' + ' --- |' * len(row))
        cells = [str(cell).replace('|', '/').replace('\n', ' ') for cell in row.values()]
        print('| ' + ' | '.join(cells) + ' |', flush=True)
        n, n_good = n + 1, n_good + good(row)
    print(f'\n{n_good} of {n} good', flush=True)
    return n == n_good


def main(*, only: str | None = None, n_kills: int = 20, n_fuzz: int = 4000, seed: int = 0) -> None:
    """Print the tables of what was tried and what became of it.

    Args:
        only: parts, with commas between: kills, infer, cache, two, inputs, fuzz.
        n_kills: kills of the training; of infer.py and of the cache half as many each.
        n_fuzz: cases of random damage.
        seed: of the moments and of the damage.
    """
    rng = random.Random(seed)

    def unharmed(row: dict) -> bool:
        return row['same bytes'] and row['left over'] == 'nothing' and row.get('each once', True)

    def inference(folder: Path, n: int) -> Iterator[dict]:
        home = trained_home(folder)
        yield from kill_inference(home, n, rng)
        yield from kill_blend(home, n, rng)

    with tempfile.TemporaryDirectory() as folder:
        parts = {
            'kills': ('train.py killed', lambda d: kill_training(d, n_kills, 40, rng), unharmed),
            'infer': ('infer.py killed', lambda d: inference(d, n_kills // 2), unharmed),
            'cache': ('the cache killed', lambda d: kill_cache(d, n_kills // 2, rng), unharmed),
            'two': ('two processes', two_processes, unharmed),
            'inputs': ('bad inputs', bad_inputs, lambda row: row['good']),
            'fuzz': (
                'random damage',
                lambda d: fuzz(d, n_fuzz, seed),
                lambda row: row['wrong'] == 'none',
            ),
        }
        names = only.split(',') if only else list(parts)
        if unknown := set(names) - set(parts):
            raise cli.Stop(f'--only knows {", ".join(parts)}, not {", ".join(unknown)}')
        good = [
            show(title, rows(Path(folder, name)), is_good)
            for name, (title, rows, is_good) in parts.items()
            if name in names
        ]
    if not all(good):
        raise cli.Stop('something was lost or let in; see the tables')


if __name__ == '__main__':
    cli.run(main)
