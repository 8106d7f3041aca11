"""Files between the scripts: whole or not there, and a run that explains itself."""

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import ranks
from lib.cli import Stop

# What a config.json holds beside the flags, for the reader's sake: never compared
INFORMATIVE = ('command',)
BLEND = 'blend.json'  # in the folder of a blend, where a trained run has config.json
BLEND_FLAGS = ('how', 'mix', 'runs', 'calibrate', 'prior')


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` if the block ends well.

    Whoever reads `path` sees the old file or the new one, whole, even after a power cut. Of
    several processes of one command only the first writes: what the others make is dropped.
    """
    if ranks.RANK:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        yield temporary
        with open(temporary, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    except (ValueError, FileNotFoundError) as e:
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

    Raises: Stop with the flags that differ, or where folds.csv is another one.
    """
    path = run / 'config.json'
    if not path.exists():
        if (run / BLEND).exists() or (run / 'oof.csv').exists():
            raise Stop(f'{run} holds a blend or the predictions of others; choose another --name')
        write_json(path, config)
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
    found = {p.parent.name: p.parent for p in sorted(home.glob('runs/*/config.json'))}
    if only is not None:
        names = [name.strip() for name in only.split(',')]
        if missing := [name for name in names if name not in found]:
            have = ', '.join(found) or 'none'
            raise Stop(f'no run named {", ".join(missing)} under {home / "runs"}; there: {have}')
        return [found[name] for name in names]
    if not found:
        raise Stop(f'no run under {home / "runs"}; train one first: python train.py')
    return list(found.values())


def predicted(home: Path, only: Sequence[str] | None = None) -> list[Path]:
    """The folders under HOME/runs that take part in a blend, by name, or those named in `only`.

    A trained run has a config.json, a blend kept by --name a blend.json, anybody else's
    predictions just oof.csv or test.csv. Blends take part only where they are named.

    Raises: Stop where there is none of these.
    """
    found = {}
    for folder in sorted((home / 'runs').glob('[!.]*')):
        if any((folder / name).exists() for name in ('config.json', 'oof.csv', 'test.csv')):
            found[folder.name] = folder
    if only is not None:
        if missing := [name for name in only if name not in found]:
            have = ', '.join(found) or 'none'
            raise Stop(f'no run named {", ".join(missing)} under {home / "runs"}; there: {have}')
        return [found[name] for name in dict.fromkeys(only)]
    found = {name: folder for name, folder in found.items() if not (folder / BLEND).exists()}
    if not found:
        raise Stop(f'no run under {home / "runs"}; train one first: python train.py')
    return list(found.values())


def claim_blend(run: Path, config: dict[str, Any]) -> None:
    """Write the blend's blend.json. Raises: Stop where the folder is another run's or blend's."""
    path = run / BLEND
    if path.exists():
        saved = read_json(path)
        if differing := [k for k in BLEND_FLAGS if saved.get(k) != config.get(k)]:
            pairs = ', '.join(f'{k} {saved.get(k)!r} (now {config.get(k)!r})' for k in differing)
            raise Stop(f'{run} was blended in another way: {pairs}; choose another --name')
    elif run.exists() and any(run.iterdir()):
        raise Stop(f'{run} is there already and no blend; choose another --name')
    write_json(path, config)


def environment(device: str) -> dict[str, Any]:
    """What a result may depend on beside the flags: device, versions, and the code's commit."""
    packages = ('fastai', 'torch', 'torchvision', 'timm', 'kornia', 'numpy', 'pillow')
    versions = {package: version(package) for package in packages}
    return {'device': device, 'python': platform.python_version(), **versions, 'commit': commit()}


def read_config(run: Path) -> dict[str, Any]:
    """What a run was trained with. Raises: Stop where what rebuilds its model is not there."""
    config = read_json(run / 'config.json')
    needed = {'arch': str, 'size': int, 'mean': list, 'std': list, 'folds_sha256': str}
    if wrong := [key for key, kind in needed.items() if not isinstance(config.get(key), kind)]:
        raise Stop(f'{run / "config.json"} lacks {", ".join(wrong)}, or holds another type there')
    return config


def unfinished(run: Path, folds: list[int]) -> list[int]:
    """The folds that train.py has not finished."""
    return [k for k in folds if not (run / f'fold{k}' / 'oof.csv').exists()]


def to_train(run: Path, folds: list[int]) -> str:
    """A sentence that names the unfinished folds and the command that trains them."""
    missing = ', '.join(map(str, unfinished(run, folds)))
    command = read_config(run).get('command', 'python train.py with its flags')
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
