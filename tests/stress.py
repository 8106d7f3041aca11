"""Kills, two processes at once and random damage: what is lost, what is let in?

python tests/stress.py                           # everything; half an hour on two cores
python tests/stress.py --only infer,two          # parts of it
python tests/stress.py --n_kills 100 --seed 1    # more of it, at other moments

Each part prints a table and how many of its rows are good; the status is 1 where one is not. The
suite runs a short version (test_stress.py).
"""

import csv
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from conftest import QUICK, ROOT, contents
from PIL import Image

from lib import archives, cli, demo, files, images, model, runs, tables

SMALL = [*QUICK, '--batch_size', 4]
TIMEOUT = 600  # seconds: longer is a hang


def command(script: str, *args: object) -> list[str]:
    """What to start a script by, as a process of its own."""
    return [sys.executable, str(ROOT / script), *map(str, args)]


def start(script: str, *args: object) -> subprocess.Popen:
    """A script that runs, its output to be read."""
    return subprocess.Popen(command(script, *args), stdout=subprocess.PIPE, text=True)


def done(args: list[str]) -> None:
    """Run a command that must succeed."""
    ended = subprocess.run(args, capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == 0, ended.stderr


def make_home(folder: Path, n_train: int = 60, n_folds: int = 2) -> Path:
    """A demo data set under `folder`/data, and a home with its folds beside it."""
    demo.make(folder / 'data', n_train=n_train, n_test=12)
    home = folder / 'home'
    done(command('folds.py', '--data', folder / 'data', '--home', home, '--n_folds', n_folds))
    return home


def leftovers(folder: Path) -> list[str]:
    """Half-written files under a folder, and states of trainings that are finished."""
    return [p.name for p in folder.rglob('*') if '.part' in p.suffixes or p.name == 'state.pt']


def unpredict(run: Path) -> None:
    """Delete what infer.py has made of a run."""
    for path in [*run.glob('fold*/tta_*'), *run.glob('*.csv')]:
        path.unlink()


# Kills


def killed(args: list[str], is_ready: Callable[[int], bool], delay: float) -> bool:
    """Start a command and kill it, `-9`, `delay` seconds after `is_ready(lines printed)` is true.

    Lines and files, not the clock, since the machine may be busy. False where it ended before.
    """
    with tempfile.TemporaryFile('w+') as log, tempfile.TemporaryFile('w+') as errors:
        process = subprocess.Popen(args, stdout=log, stderr=errors)
        ends = time.monotonic() + TIMEOUT

        def n_lines() -> int:
            return os.pread(log.fileno(), 1 << 20, 0).count(b'\n')

        while process.poll() is None and not is_ready(n_lines()):
            assert time.monotonic() < ends, f'{args} hangs'
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        status = process.wait()
        errors.seek(0)
        assert status in (0, -signal.SIGKILL), errors.read()
        return status != 0


def kill(
    n: int,
    args: Callable[[int], list[str]],
    moment: Callable[[], tuple[Callable[[int], bool], float]],
    note: Callable[[], object],
) -> list[str]:
    """Start `args(i)` for the i-th time and kill it at a `moment()`, until a start ends by itself,
    or `n` are killed: then it is left to end. Returns: a note of what was there at each kill.
    """
    notes: list[str] = []
    while len(notes) < n:
        if not killed(args(len(notes)), *moment()):
            return notes
        notes.append(str(note()))
    done(args(len(notes)))
    return notes


def row(home: Path, moments: list[str], same: bool) -> dict:
    """A row of a table of kills, which is good where all is as if there had been none."""
    left = leftovers(home)
    return {
        'kills': len(moments),
        'same bytes': same,
        'left over': left or 'nothing',
        'there at each kill': '; '.join(moments),
        'good': same and not left,
    }


def kill_training(folder: Path, n_kills: int, rng: random.Random, epochs: int = 40) -> Iterator:
    """Kill trainings of two folds; the number of workers changes from one start to the next."""
    home, names = make_home(folder), ('oof.csv', runs.WEIGHTS)
    train = ['train.py', '--home', home, *SMALL, '--epochs', epochs, '--name']
    done(command(*train, 'whole'))
    whole, left, number = home / 'runs' / 'whole', n_kills, 0
    while left:
        number += 1
        run = home / 'runs' / f'run{number}'

        def epochs_done(run: Path = run) -> str:
            histories = [run / f'fold{k}' / 'history.csv' for k in (0, 1)]
            lines = [p.read_text().count('\n') - 1 if p.exists() else 0 for p in histories]
            return '+'.join(map(str, lines))

        def moment() -> tuple[Callable[[int], bool], float]:
            n = rng.randint(0, epochs)
            return lambda lines: lines >= n, rng.uniform(0, 0.5)

        args = lambda i, run=run: command(*train, run.name, '--workers', i % 2 * 2)  # noqa: E731
        moments = kill(left, args, moment, epochs_done)
        left -= len(moments)
        pairs = [(whole / fold / n, run / fold / n) for fold in ('fold0', 'fold1') for n in names]
        yield row(home, moments, all(a.read_bytes() == b.read_bytes() for a, b in pairs))


def kill_inference(folder: Path, n_kills: int, rng: random.Random, n_tta: int = 60) -> Iterator:
    """Kill infer.py in one of its four parts."""
    home = make_home(folder)
    run, left = home / 'runs' / 'a', n_kills
    done(command('train.py', '--home', home, *SMALL, '--epochs', 1, '--name', 'a'))
    args = command('infer.py', '--home', home, '--n_tta', n_tta)  # so that a part takes seconds
    done(args)
    whole = contents(home)

    def parts_done() -> str:
        return f'{len(list(run.glob("fold*/tta_*.csv")))} of 4'

    def moment() -> tuple[Callable[[int], bool], float]:
        n = rng.randint(1, 2)  # in the first or the second part that a start makes
        longest = 6 if parts_done() == '4 of 4' else 1.5  # most starts are to end, which pool them
        return lambda lines: lines >= n, rng.uniform(0, longest)

    while left:
        unpredict(run)
        moments = kill(left, lambda i: args, moment, parts_done)
        left -= len(moments)
        yield row(home, moments, contents(home) == whole)


def kill_blend(folder: Path, n_kills: int, rng: random.Random) -> Iterator:
    """Kill blend.py, which begins anew at each start."""
    home = make_home(folder)
    for script, *args in (
        ['train.py', *SMALL, '--epochs', 1],
        ['infer.py', '--n_tta', 1],
        ['blend.py'],
    ):
        done(command(script, '--home', home, *args))
    whole, args = contents(home), command('blend.py', '--home', home)
    n = sum(killed(args, lambda lines: True, rng.uniform(1, 6)) for _ in range(n_kills))
    done(args)
    yield row(home, ['blend.py'] * n, contents(home) == whole)


def kill_cache(folder: Path, n_kills: int, rng: random.Random) -> Iterator:
    """Kill what makes the cache, while its threads are at work."""
    home, left = make_home(folder, n_train=900), n_kills
    code = (
        f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
        f'from pathlib import Path; home = Path({str(home)!r})\n'
        "from lib import images, tables; table = tables.read_folds(home / 'folds.csv')\n"
        'images.cache(table, home, 224)'
    )
    args = [sys.executable, '-c', code]
    done(args)
    whole = contents(home)

    def n_made() -> int:
        return len(list(home.glob('cache/*/*/[!.]*.jpg')))

    def moment() -> tuple[Callable[[int], bool], float]:
        n = n_made() + rng.randint(0, 400)
        return lambda lines: n_made() >= n, rng.uniform(0, 0.2)

    while left:
        shutil.rmtree(home / 'cache')
        moments = kill(left, lambda i: args, moment, n_made)
        left -= len(moments)
        yield row(home, moments, contents(home) == whole)


# Two processes


def two_processes(folder: Path, n_folds: int = 4, epochs: int = 3) -> Iterator:
    """Train and predict one run by two processes at once: each part by one of them, and equal."""
    home = make_home(folder, n_folds=n_folds)
    both = [home / 'runs' / name for name in ('alone', 'shared')]
    for script, args, flag, mark, names in (
        ('train.py', [*SMALL, '--epochs', epochs], '--name', 'images an epoch', ['oof.csv']),
        ('infer.py', ['--n_tta', 4], '--only', 'passes', ['tta_oof.csv', 'tta_test.csv']),
    ):
        alone, shared = ([script, '--home', home, *args, flag, run.name] for run in both)
        done(command(*alone))
        processes = [start(*shared) for _ in range(2)]
        outs = [process.communicate(timeout=TIMEOUT)[0].count(mark) for process in processes]
        done(command(*shared))  # who ended first could not see the end of the other
        paths = [f'fold{k}/{name}' for k in range(n_folds) for name in names]
        same = all((both[0] / p).read_bytes() == (both[1] / p).read_bytes() for p in paths)
        status, left = [process.returncode for process in processes], leftovers(home)
        yield {
            'script': script,
            'status': status,
            'parts by each': outs,
            'same bytes': same,
            'left over': left or 'nothing',
            'good': same and not left and status == [0, 0] and sum(outs) == len(paths),
        }


# Random damage

ODD = [b'\0', b'\xff', b'"', b',', b'\n', b'\r\n', b'../', b'nan', b'-1', b'1e999', b'\xef\xbb\xbf']


def damaged(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to eight pieces deleted, put in or replaced, and now and then cut off."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
        at, other = (rng.randrange(len(data) + 1) for _ in range(2))
        n = rng.randint(1, 40)
        new = [b'', rng.choice(ODD), rng.randbytes(rng.randint(1, 4)), data[other : other + 5 * n]]
        data[at : at + rng.choice([0, 1, n])] = rng.choice(new)
        if rng.random() < 0.03:
            del data[at:]
    return bytes(data)


def fuzz(folder: Path, n: int, seed: int) -> Iterator:
    """Damage tables, images, weights and config.json at random, `n` times in all.

    Each must be refused by a sentence or read right, as an independent reader has it.
    """
    home, data = make_home(folder), folder / 'data'
    model.save(model.create('test_resnet', 64), folder / 'w.safetensors')
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'a.png')
    config = {'arch': 'test_resnet', 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    files.write_json(folder / 'config.json', config | {'folds_sha256': 'x', 'command': 'y'})
    jpeg, whole = next((data / 'jpeg' / 'train').glob('*.jpg')), (data / 'train.csv').read_bytes()

    def train_table(path: Path) -> None:
        (data / 'train.csv').write_bytes(path.read_bytes())
        try:
            table, _ = archives.read_all(data, [])
        finally:
            (data / 'train.csv').write_bytes(whole)
        check_rows(table[table.split == 'train'], path)
        assert {Path(p).parent.resolve() for p in table.path} <= {
            (data / 'jpeg' / split).resolve() for split in ('train', 'test')
        }

    def folds_table(path: Path) -> None:
        table = tables.read_folds(path)
        labelled = table[table.split == 'train']
        assert labelled.target.isin([0, 1]).all() and labelled.fold.between(0, 999).all()
        names = table.image_name + table.source
        assert not names.str.contains(r'[/\\:\x00-\x1f]').any()
        check_rows(table, path)

    def picture(path: Path) -> None:
        made = folder / 'made' / path.name
        made.unlink(missing_ok=True)
        if error := images._make(path, made, 64):
            assert '\n' not in error and not made.exists()
            raise cli.Stop(error)
        with Image.open(made) as image:
            image.load()
            assert (image.size, image.mode) == ((64, 64), 'RGB')

    def run_config(path: Path) -> None:
        size = runs.Run(path.parent).config['size']
        assert type(size) is int and 0 < size <= runs.MAX_SIZE

    for path, read, share in (
        (data / 'train.csv', train_table, 0.2),
        (home / 'folds.csv', folds_table, 0.2),
        (jpeg, picture, 0.3),
        (folder / 'a.png', picture, 0.1),
        (folder / 'w.safetensors', lambda path: model.load('test_resnet', 64, path), 0.1),
        (folder / 'config.json', run_config, 0.1),
    ):
        rng, content, wrong = random.Random(f'{seed} {path.name}'), path.read_bytes(), []
        refused, cases, target = 0, max(1, round(n * share)), folder / 'fuzz' / path.name
        target.parent.mkdir(exist_ok=True)
        for case in range(cases):
            target.write_bytes(damaged(content, rng))
            signal.alarm(60)  # a hang ends all
            try:
                read(target)
            except cli.Stop:
                refused += 1
            except Exception as e:
                wrong.append(f'case {case}: {type(e).__name__}: {e}'[:200])
        signal.alarm(0)
        yield {
            'what': path.name,
            'cases': cases,
            'refused': refused,
            'read right': cases - refused - len(wrong),
            'wrong': wrong or 'none',
            'good': not wrong,
        }


def check_rows(table, path: Path) -> None:
    """Compare what was read with what Python's own csv module reads."""
    text = path.read_bytes().decode('utf-8-sig')
    rows = list(csv.reader(io.StringIO(text, newline=''), skipinitialspace=True))
    header, rows = next((row, rows[i + 1 :]) for i, row in enumerate(rows) if row)
    rows = [row + [''] * (len(header) - len(row)) for row in rows if row]
    assert len(rows) == len(table), f'{len(rows)} rows are {len(table)}'
    labels = {row[header.index('image_name')]: row[header.index('target')] for row in rows}
    for image, label in zip(table.image_name, table.target, strict=True):
        assert image in labels, f'{image!r} is not in the file'
        assert label != label or float(labels[image]) == label, f'{image} is {labels[image]}'


def show(title: str, rows: Iterator[dict]) -> bool:
    """Print rows as a Markdown table, as they come; whether all of them are good."""
    print(f'\n## {title}\n', flush=True)
    n = n_good = 0
    for row in rows:
        if not n:
            print('| ' + ' | '.join(row) + ' |\n|' + ' --- |' * len(row))
        cells = [str(cell).replace('|', '/').replace('\n', ' ') for cell in row.values()]
        print('| ' + ' | '.join(cells) + ' |', flush=True)
        n, n_good = n + 1, n_good + row['good']
    print(f'\n{n_good} of {n} good', flush=True)
    return n == n_good


def main(
    *,
    only: str | None = None,  # parts, with commas between: train, infer, cache, blend, two, fuzz
    n_kills: int = 20,  # kills of train.py and of infer.py; of the cache and blend.py half as many
    n_fuzz: int = 1000,  # cases of random damage
    seed: int = 0,  # of the moments and of the damage
) -> None:
    """Print a table of what was done to each part and what became of it."""
    rng, half = random.Random(seed), -(-n_kills // 2)
    parts = {
        'train': ('train.py killed', lambda d: kill_training(d, n_kills, rng)),
        'infer': ('infer.py killed', lambda d: kill_inference(d, n_kills, rng)),
        'cache': ('the cache killed', lambda d: kill_cache(d, half, rng)),
        'blend': ('blend.py killed', lambda d: kill_blend(d, half, rng)),
        'two': ('two processes', two_processes),
        'fuzz': ('random damage', lambda d: fuzz(d, n_fuzz, seed)),
    }
    names = only.split(',') if only else list(parts)
    if unknown := set(names) - set(parts):
        raise cli.Stop(f'--only knows {", ".join(parts)}, not {", ".join(unknown)}')
    with tempfile.TemporaryDirectory() as folder:
        good = [show(parts[name][0], parts[name][1](Path(folder, name))) for name in names]
    if not all(good):
        raise cli.Stop('something was lost or let in; see the tables')


if __name__ == '__main__':
    cli.run(main)
