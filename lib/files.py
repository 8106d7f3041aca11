"""Files between the scripts: whole or not there, and a run that explains itself."""

import hashlib
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import ranks
from lib.cli import Stop
from lib.locks import Lock, at_work

# What a config.json holds beside the flags, for the reader's sake: never compared
INFORMATIVE = ('command',)
BLEND = 'blend.json'  # in the folder of a blend, where a trained run has config.json
BLEND_FLAGS = ('how', 'mix', 'runs', 'calibrate', 'prior')
MAX_SIZE = 4096  # pixels a side


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` if the block ends well.

    Whoever reads `path` sees the old file or the new one, whole, even after a power cut. What a
    killed process leaves behind is `sweep`'s. Of several processes of one command only the first
    writes: what the others make is dropped.
    """
    if ranks.RANK:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # the host too: processes on two machines may bear one number. No longer than a name may be
    writer = f'{socket.gethostname()[:60]}-{os.getpid()}'
    temporary = path.with_name(f'.{path.stem[:30]}.{writer}.part{path.suffix}')
    try:
        yield temporary
        with open(temporary, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        # a full disk is noticed in a write, which does not know the file's name
        if str(e.filename) in ('None', str(temporary)):
            e.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, alone: bool = False) -> None:
    """Delete what killed processes left half written in `folder`.

    `alone`: nobody else can be writing there, so that all of it is left over. Otherwise that of
    this host's living processes stays, and that of other hosts for a day.
    """
    here, alone = socket.gethostname()[:60], alone and not Lock.unsupported
    for path in folder.glob('.*.part*'):
        name = re.fullmatch(r'(\..+)-(\d+)\.part(\.\w+)?', path.name)
        if name is None:
            continue
        try:
            old = time.time() - path.stat().st_mtime > 24 * 60 * 60
        except FileNotFoundError:  # it was finished, or swept by another process
            continue
        if alone or old or (name[1].endswith(f'.{here}') and not _lives(int(name[2]))):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether a process of this host is there."""
    if sys.platform == 'win32':  # where os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, all or nothing."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='\n')


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` to `path` as JSON, all or nothing; NaN, which JSON does not have, as null."""
    write_text(path, json.dumps(_plain(data), indent=1, allow_nan=False) + '\n')


def _plain(value: Any) -> Any:
    """`value` in what JSON knows: numpy's arrays and numbers as lists and Python's."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` to `path` as CSV, all or nothing, the same bytes on every system."""
    write_text(path, table.to_csv(index=False, lineterminator='\n'))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises: Stop where it is none."""
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, FileNotFoundError, RecursionError) as e:
        raise Stop(f'{path} cannot be read as JSON ({e}); delete it and make it anew') from None
    if not isinstance(data, dict):
        raise Stop(f'{path} holds no JSON object; delete it and make it anew')
    return data


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def run_name(flags: dict[str, Any], defaults: dict[str, Any]) -> str:
    """A folder's name from the flags that differ from their defaults, else the architecture's.

    It is for people: nothing ever reads a flag out of it.
    """
    words = []
    for flag, value in flags.items():
        if value != defaults[flag]:
            word = flag if value is True else f'no{flag}' if value is False else f'{flag}-{value}'
            words.append(re.sub(r'[^\w.+-]', '', word.removeprefix('arch-')))
    return '_'.join(words).lstrip('.') or flags['arch']


def run_folder(home: Path, name: str) -> Path:
    """HOME/runs/NAME. Raises: Stop where `name` would lead elsewhere, or into hidden files."""
    if not re.fullmatch(r'[\w+-][\w.+-]*', name):
        raise Stop(f'--name {name!r} is no folder name: letters, digits, and . _ + - inside it')
    return home / 'runs' / name


def claim_run(run: Path, config: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Make the run's folder and config.json, or check that this is the same run going on.

    A flag that is absent means its default, so that old runs stay good.

    Raises: Stop with the flags that differ, or where folds.csv is another one, or config.json gone.
    """
    path = run / 'config.json'
    if not path.exists():
        with Lock(run / '.lock') as lock:
            lock.take(wait=True)  # for another process that begins this run
            if not path.exists():
                results = ('state.pt', 'model.safetensors', 'oof.csv')
                if made := [p for p in sorted(run.glob('fold*/*')) if p.name in results]:
                    raise Stop(
                        f'{made[0]} is there and no config.json says what it was made with; bring '
                        f'{path} back, or train under another --name'
                    )
                if any((run / name).exists() for name in (BLEND, 'oof.csv', 'test.csv')):
                    raise Stop(
                        f'{run} holds a blend or the predictions of others; choose another --name'
                    )
                write_json(path, config)
                return
    check_same(run, config, defaults)


def check_same(run: Path, config: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises: Stop where a run that has begun has other flags than `config`, or another table."""
    path = run / 'config.json'
    if not path.exists():
        return
    saved = {**defaults, **read_json(path)}
    differing = [k for k in {**saved, **config} if saved.get(k) != config.get(k)]
    differing = [k for k in differing if k not in INFORMATIVE]
    if 'folds_sha256' in differing:
        raise Stop(
            f'folds.csv has changed since {run} began, so its folds mean something else now; '
            'bring the old folds.csv back, or train under another --name'
        )
    if differing:
        pairs = ', '.join(f'{k} {saved.get(k)!r} (now {config.get(k)!r})' for k in differing)
        raise Stop(f'{run} was made with other flags: {pairs}; give this run another --name')


def runs(home: Path, only: str | None = None) -> list[Path]:
    """The folders of the trained runs under `home`, by name; `only`: names with commas between.

    A folder without config.json is no run. Raises: Stop where there is none of these.
    """
    return _chosen(home, sorted(home.glob('runs/*/config.json')), only)


def predicted(home: Path, only: str | None = None) -> list[Path]:
    """The folders under HOME/runs that take part in a blend, by name, or those named in `only`.

    A trained run has a config.json, a blend kept by --name a blend.json, anybody else's
    predictions just oof.csv or test.csv. Blends take part only where they are named.

    Raises: Stop where there is none of these.
    """
    names = ('config.json', 'oof.csv', 'test.csv')
    made = sorted(path for name in names for path in home.glob(f'runs/[!.]*/{name}'))
    if only is None:
        made = [path for path in made if not (path.parent / BLEND).exists()]
    return _chosen(home, made, only)


def _chosen(home: Path, made: Iterable[Path], only: str | None) -> list[Path]:
    """The folders of the files `made`, or those of them that `only` names, each once."""
    found = {path.parent.name: path.parent for path in made}
    if only is not None:
        names = [name.strip() for name in only.split(',')]
        if missing := [name for name in names if name not in found]:
            have = ', '.join(found) or 'none'
            raise Stop(f'no run named {", ".join(missing)} under {home / "runs"}; there: {have}')
        return [found[name] for name in dict.fromkeys(names)]
    if not found:
        raise Stop(f'no run under {home / "runs"}; train one first: python train.py')
    return list(found.values())


def check_blend(run: Path, config: dict[str, Any]) -> None:
    """Raises: Stop where a blend cannot be kept in `run`: another run's or blend's folder."""
    path = run / BLEND
    if path.exists():
        saved = read_json(path)
        if differing := [k for k in BLEND_FLAGS if saved.get(k) != config.get(k)]:
            pairs = ', '.join(f'{k} {saved.get(k)!r} (now {config.get(k)!r})' for k in differing)
            raise Stop(f'{run} was blended in another way: {pairs}; choose another --name')
    elif run.exists() and any(run.iterdir()):
        raise Stop(f'{run} is there already and no blend; choose another --name')


def check_kept(run: Path, folds_sha256: str | None) -> None:
    """Raises: Stop where a kept blend was fitted across the folds of another folds.csv."""
    kept = read_json(run / BLEND).get('folds_sha256') if (run / BLEND).exists() else None
    if kept and folds_sha256 and kept != folds_sha256:
        raise Stop(f'{run} was blended on another folds.csv; blend it again under another --name')


def environment(device: str) -> dict[str, Any]:
    """What a result may depend on beside the flags: device, versions, and the code's commit."""
    packages = ('fastai', 'torch', 'torchvision', 'timm', 'kornia', 'numpy', 'pillow')
    versions = {package: version(package) for package in packages}
    return {'device': device, 'python': platform.python_version(), **versions, 'commit': commit()}


def read_config(run: Path) -> dict[str, Any]:
    """What a run was trained with. Raises: Stop where what rebuilds its model is not there.

    It may be a stranger's: all that infer.py uses of it is checked here, less the architecture's
    name, which timm knows.
    """
    config = read_json(run / 'config.json')

    def are_numbers(values: Any, low: float) -> bool:
        good = isinstance(values, list) and len(values) == 3
        return good and all(type(v) in (int, float) and low < v < 1e3 for v in values)

    size = config.get('size')
    good = {
        'arch': isinstance(config.get('arch'), str),
        'size': type(size) is int and 0 < size <= MAX_SIZE,
        'mean': are_numbers(config.get('mean'), -1e3),
        'std': are_numbers(config.get('std'), 0),
        'cutout': isinstance(config.get('cutout', False), bool),
        'folds_sha256': isinstance(config.get('folds_sha256'), str),
        'command': isinstance(config.get('command', ''), str),
    }
    if wrong := [key for key, is_good in good.items() if not is_good]:
        raise Stop(
            f'{run / "config.json"}: {", ".join(wrong)} is missing or holds what train.py never '
            'writes there; mend it, or name the other runs with --only'
        )
    return config


def skipped(run: Path) -> list[str]:
    """The images that a run goes without since they could not be read when it began."""
    if not (run / 'config.json').exists():
        return []
    names = read_json(run / 'config.json').get('skipped', [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Stop(f'{run / "config.json"}: expected a list of image names as skipped; mend it')
    return names


def fold_lock(run: Path, fold: int) -> Path:
    """The lock of all that is written into a fold's folder."""
    return run / f'fold{fold}' / '.lock'


def unfinished(run: Path, folds: list[int]) -> list[int]:
    """The folds that train.py has not finished."""
    return [k for k in folds if not (run / f'fold{k}' / 'oof.csv').exists()]


def to_train(run: Path, folds: list[int]) -> str:
    """A sentence that names the unfinished folds, who is at them, and what trains the others."""
    missing = ', '.join(f'{k}{at_work(fold_lock(run, k))}' for k in unfinished(run, folds))
    command = read_config(run).get('command', '')
    if not (command.startswith('python train.py') and command.isprintable()):  # a stranger's
        command = 'python train.py with its flags'
    return f'{run}: fold {missing} still to be trained: {command}'


def weight_hashes(run: Path, folds: list[int]) -> list[str]:
    """The SHA-256 of each fold's weights."""
    return [sha256(run / f'fold{k}' / 'model.safetensors') for k in folds]


def inferred(run: Path, folds: list[int]) -> int:
    """How many TTA passes infer.py made with the weights that a run has now.

    Raises: Stop with the command to type where it has made none.
    """
    if unfinished(run, folds):
        raise Stop(to_train(run, folds))
    made = [run / 'infer.json', run / 'oof.csv', run / 'test.csv']
    missing = [path.name for path in made if not path.exists()]
    if not missing:
        plan = read_json(run / 'infer.json')
        if plan.get('weights_sha256') == weight_hashes(run, folds):
            return plan['n_tta']
    why = f'has no {", ".join(missing)}' if missing else 'was trained again since infer.py ran'
    home = run.parent.parent
    raise Stop(f'{run} {why}: python infer.py --home {home} --only {run.name}')


def commit() -> str | None:
    """The git commit of this code, with '-dirty' where files have changed; None without git."""
    describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--match=']
    try:
        out = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
