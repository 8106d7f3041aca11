"""Where a blend's predictions come from: which runs, of which weights and folds, and since when."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib import files, parts, tables
from lib.cli import Stop
from lib.runs import BLEND, Run


def check_free(run: Run, blend: dict[str, Any]) -> None:
    """Raises: Stop where a blend, of which blend.json will say `blend`, cannot be kept in `run`."""
    if run.name in blend['runs']:
        raise Stop(f'--name {run.name} is one of the runs that are blended; choose another')
    if run.blend:
        flags = ('how', 'mix', 'runs', 'calibrate', 'prior')
        was = {k: run.blend.get(k) for k in flags if run.blend.get(k) != blend[k]}
        if pairs := ', '.join(f'{k} {value!r} (now {blend[k]!r})' for k, value in was.items()):
            raise Stop(f'{run} was blended in another way: {pairs}; choose another --name')
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise Stop(f'{run} is there already and no blend; choose another --name')


def keep(run: Run, blend: dict[str, Any]) -> None:
    """Write blend.json into `run`, without the predictions of an earlier blend. Raises: Stop.

    Killed here or later, it is a blend without predictions, which the same command makes.
    """
    check_free(run, blend)  # once more, now that nobody else blends
    for name in ('oof.csv', 'test.csv'):
        (run.folder / name).unlink(missing_ok=True)
    files.write_json(run.folder / BLEND, blend)


def check(runs: Sequence[Run], table: pd.DataFrame | None, path: Path) -> dict[str, str]:
    """Print how many TTA passes the predictions of our runs are the mean of, and which kept blends
    are older than the predictions of their runs.

    `table`: all of folds.csv, which lies at `path`; None without it. Returns: its fingerprint.
    Raises: Stop where a run's predictions are not of its weights, or of another folds.csv.
    """
    fingerprint = tables.fingerprint(path) if table is not None else {}
    for run in runs:
        # others' predictions, or ours far from where they were made, have nothing to be checked by
        if table is not None and run.has_begun:
            folds = sorted(table.fold.dropna().astype(int).unique().tolist())
            run.check_table(fingerprint)
            if run.unfinished(folds):
                raise Stop(run.training_note(folds))
            n_tta = parts.n_tta(parts.of_run(run, table, folds))
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
    """The SHA-256 of what each run predicts, by its name and by file.

    It is of the names and of `pred` as text, and not of `prob`, which follows from them.
    """
    hashes: dict[str, dict[str, str]] = {run.name: {} for run in runs}
    for path in (run.folder / name for run in runs for name in ('oof.csv', 'test.csv')):
        if path.exists():
            table = tables.read_csv(path, ['image_name'])
            text = table.filter(['image_name', 'pred' if 'pred' in table else 'target']).to_csv()
            hashes[path.parent.name][path.name] = hashlib.sha256(text.encode()).hexdigest()
    return hashes
