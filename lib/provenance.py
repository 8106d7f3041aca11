"""Checks of where a blend's predictions come from: their runs, weights, folds and versions."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib import files, parts, tables
from lib.cli import Stop
from lib.runs import BLEND, Run


def check_free(run: Run, blend: dict[str, Any]) -> None:
    """Check that a blend with the settings `blend` can be kept as `run`. Raises: Stop if not."""
    if run.name in blend['runs']:
        raise Stop(f'--name {run.name} is one of the runs that are blended; choose another')
    if run.blend:
        flags = ('how', 'mix', 'runs', 'calibrate', 'prior')
        was = {k: run.blend.get(k) for k in flags if run.blend.get(k) != blend[k]}
        if pairs := ', '.join(f'{k} {value!r} (now {blend[k]!r})' for k, value in was.items()):
            raise Stop(f'{run} was blended in another way: {pairs}; choose another --name')
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise Stop(f'{run} exists and is not a blend; choose another --name')


def keep(run: Run, blend: dict[str, Any]) -> None:
    """Write blend.json into `run`, and delete the predictions of an earlier blend. Raises: Stop.

    If the process is killed, the blend has no predictions, and the same command makes them.
    """
    check_free(run, blend)  # once more, now that this process holds the lock
    for name in ('oof.csv', 'test.csv'):
        (run.folder / name).unlink(missing_ok=True)
    files.write_json(run.folder / BLEND, blend)


def check_runs(runs: Sequence[Run], table: pd.DataFrame | None, path: Path) -> dict[str, str]:
    """Check that the predictions of `runs` fit their weights and folds.csv; print what they are.

    A line says of how many TTA passes they are the mean, and a warning names a kept blend that is
    older than the predictions of its runs. `table`: all of folds.csv, whose path is `path`; None
    where there is none. Returns: its fingerprint. Raises: Stop where something does not fit.
    """
    fingerprint = tables.fingerprint(path) if table is not None else {}
    for run in runs:
        # the predictions of others, or runs without their folds.csv, cannot be checked
        if table is not None and run.has_begun:
            folds = sorted(table.fold.dropna().astype(int).unique().tolist())
            run.check_fingerprint(fingerprint)
            if run.unfinished(folds):
                missing = run.describe_unfinished(folds)
                raise Stop(f'leave this run out by --only, or train it: {missing}')
            n_tta = parts.read_n_tta(parts.list_parts(run, table, folds))
            print(f'{run}: mean of {n_tta} TTA passes')
        if fingerprint and run.blend and not tables.is_same(run.blend, fingerprint):
            raise Stop(f'{run} was blended on another folds.csv; blend it anew as another --name')
        saved = run.blend.get('predictions_sha256', {})
        others = [Run(run.folder.with_name(name)) for name in saved]
        now = hash_predictions([other for other in others if other.folder.exists()])
        if changed := [name for name in now if now[name] != saved[name]]:
            print(
                f'warning: {run} was blended before the predictions of {", ".join(changed)} '
                f'changed; the same blend.py --name {run.name} makes it anew'
            )
    return fingerprint


def hash_predictions(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """The SHA-256 of each run's predictions, by the run's name and by file.

    The text of the image names and of `pred` is hashed, and not `prob`, which follows from them.
    """
    hashes: dict[str, dict[str, str]] = {run.name: {} for run in runs}
    for path in (run.folder / name for run in runs for name in ('oof.csv', 'test.csv')):
        if path.exists():
            table = tables.read_csv(path, ['image_name'])
            text = table.filter(['image_name', 'pred' if 'pred' in table else 'target']).to_csv()
            hashes[path.parent.name][path.name] = hashlib.sha256(text.encode()).hexdigest()
    return hashes
