"""Reading and writing text, JSON and CSV; each is written whole or not at all."""

import hashlib
import json
import math
import os
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
    caller must hold a lock where another process may write the same file.
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


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, all or nothing."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='\n')


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` to `path` as JSON, all or nothing: tables as lists of rows, NaN as null."""
    write_text(path, json.dumps(_plain(data), indent=1, allow_nan=False) + '\n')


def _plain(value: Any) -> Any:
    """`value` in types that JSON has."""
    if isinstance(value, pd.DataFrame):
        is_numbered = isinstance(value.index, pd.RangeIndex)
        value = value.reset_index(drop=is_numbered).to_dict('records')
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
        raise Stop(f'{path} is missing or no JSON ({e}); bring it back, or make it anew') from None
    if not isinstance(data, dict):
        raise Stop(f'{path} holds no JSON object; bring it back, or make it anew')
    return data


def check_new(path: Path) -> None:
    """Raises: Stop where --out is no new CSV, or where several processes would write it."""
    if ranks.WORLD > 1:
        raise Stop('--images runs in one process; start it without a launcher')
    if path.exists() or path.suffix != '.csv':
        raise Stop(f'--out {path} must be a new file that ends in .csv')


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
