"""Where a blend's predictions come from: which runs, of which weights and folds, and since when."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib import files, tables
from lib.cli import Stop


def read_folds(path: Path) -> tuple[pd.DataFrame | None, pd.DataFrame | None, str | None]:
    """The labelled rows of folds.csv, its test rows, its SHA-256; None thrice without the file."""
    if not path.exists():
        return None, None, None
    table = tables.read_folds(path)
    labelled = table[table.split == 'train'].astype({'fold': int, 'target': int})
    return labelled, table[table.split == 'test'], files.sha256(path)


def choose_folders(home: Path, only: str | None) -> list[Path]:
    """The folders of the runs to blend: those that `only` names, with commas between, or all.

    Raises: Stop where there is none of these, or a name is empty.
    """
    if only is not None and not all(name.strip() for name in only.split(',')):
        raise Stop(f'--only {only!r} holds an empty name; write names with single commas between')
    return files.predicted(home, only)


def check_free(folder: Path, blend: dict[str, Any]) -> None:
    """Raises: Stop where `blend` cannot be kept in `folder`: it is one of its runs, or another's.

    `blend`: what its blend.json will say; the same blend may be made again.
    """
    if folder.name in blend['runs']:
        raise Stop(f'--name {folder.name} is one of the runs that are blended; choose another')
    files.check_blend(folder, blend)


def check(folders: Sequence[Path], labelled: pd.DataFrame | None, folds_sha256: str | None) -> None:
    """Print how many TTA passes the predictions of our runs are the mean of, and which kept blends
    are older than the predictions of their runs.

    Raises: Stop where a run's predictions are not of its weights, or of another folds.csv.
    """
    for folder in folders:
        # others' predictions, or ours far from where they were made, have nothing to be checked by
        if labelled is not None and (folder / 'config.json').exists():
            n_tta = files.inferred(folder, sorted(labelled.fold.unique().tolist()))
            print(f'{folder}: mean of {n_tta} TTA passes')
        files.check_kept(folder, folds_sha256)
        if changed := _changed_runs(folder):
            print(
                f'warning: {folder} was blended before the predictions of {", ".join(changed)} '
                f'changed; the same blend.py --name {folder.name} makes it anew'
            )


def hash_predictions(folders: Sequence[Path]) -> dict[str, dict[str, str]]:
    """The SHA-256 of what each run predicts, by its name and by file.

    It is of the names and of `pred` as text, and not of `prob`, which follows from them.
    """
    return {folder.name: _hash_run(folder) for folder in folders}


def _hash_run(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in (folder / 'oof.csv', folder / 'test.csv'):
        if path.exists():
            table = tables.read_csv(path, ['image_name'])
            text = table.filter(['image_name', 'pred' if 'pred' in table else 'target']).to_csv()
            hashes[path.name] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def _changed_runs(kept: Path) -> list[str]:
    """The runs of a kept blend that predict something else since; none where it has no hashes."""
    blend = files.read_json(kept / files.BLEND) if (kept / files.BLEND).exists() else {}
    saved = blend.get('predictions_sha256', {})
    runs = [kept.parent / name for name in saved]
    return [run.name for run in runs if run.exists() and _hash_run(run) != saved[run.name]]
