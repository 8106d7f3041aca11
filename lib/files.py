"""Reading and writing text, JSON, CSV and folders; each is written whole or not at all."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import ranks
from lib.cli import Stop


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it is renamed to `path` if the block succeeds.

    A reader of `path` sees the old file or the new one, whole, even after a power cut. The
    temporary name is always the same, so the next try overwrites what a killed process has left. A
    process holds a lock while it writes a file that another process may write too.
    """
    if ranks.following:  # the launcher's first process writes the file
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.part{path.suffix}')
    try:
        yield temporary
        with open(temporary, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        # the error of a full disk does not name the file
        if str(e.filename) in ('None', str(temporary)):
            e.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into; it takes the place of `path` if the block ends
    well.

    Whoever looks finds the old folder, or the new one, whole, or for an instant none. One process
    at a time may do this; what a killed one has left is deleted by the next.
    """
    new, old = (path.with_name(f'.{path.name}.{kind}') for kind in ('part', 'old'))
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for file in filter(Path.is_file, new.rglob('*')):
            with open(file, 'rb+') as f:
                os.fsync(f.fileno())
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, all or nothing."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='\n')


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` to `path` as JSON, all or nothing. NaN becomes null, since JSON has no NaN."""
    write_text(path, json.dumps(_plain(data), indent=1, allow_nan=False) + '\n')


def _plain(value: Any) -> Any:
    """`value` in types that JSON has: numpy's arrays as lists, its numbers as Python's."""
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
    """The JSON object in `path`. Raises: Stop where there is none."""
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


def check_out(path: Path, header: list[str]) -> None:
    """Check that --out may be written to `path`, with this `header`.

    Raises: Stop where `path` exists and is not an earlier table with the same header: a typing
    error must not overwrite a photo or folds.csv. Under a launcher it is refused too.
    """
    if ranks.WORLD > 1:
        raise Stop('--images runs in one process; start it without a launcher')
    if path.suffix.lower() != '.csv':
        raise Stop(f'--out must name a .csv file, not {path}')
    if path.exists():
        with open(path, 'rb') as f:
            first = f.readline(1000).strip()
        if first != ','.join(header).encode():
            raise Stop(
                f'{path} exists and is not a table of {", ".join(header)}, so it is not '
                'overwritten; choose another --out'
            )
