"""Predictions in files, ours or anybody's: read, checked, and put side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib import files, splits
from lib.cli import Stop
from lib.tables import OOF_COLUMNS, read_csv


def read_oof(path: Path) -> pd.DataFrame:
    """A run's out-of-fold predictions, anybody's: image_name, target (0/1) and pred (0..1), in any
    order; also fold, source, group if they are there.

    Returns: a row an image, by image_name; what is not known is NaN. Raises: Stop that names the
    file and the first image that is wrong.
    """
    table = _read(path, ['image_name', 'target', 'pred'])
    target = _numbers(table.target)
    if not np.isin(target, [0, 1]).all():
        raise Stop(f'{path}: the target of {_first(table, ~np.isin(target, [0, 1]))} is not 0 or 1')
    fold = _numbers(table.fold) if 'fold' in table else np.full(len(table), np.nan)
    if 'fold' in table and not ((fold >= 0) & (fold % 1 == 0)).all():
        wrong = _first(table, ~((fold >= 0) & (fold % 1 == 0)))
        raise Stop(f'{path}: the fold of {wrong} is not a whole number from 0 up')
    for column in ('patient_id', 'group', 'source'):
        if column not in table:
            table[column] = pd.Series(np.nan, table.index, dtype='str')
    for column in {'age_approx', 'width', 'height'} & set(table):
        table[column] = _numbers(table[column])
    table = table.assign(target=target.astype(int), fold=fold, pred=_predictions(path, table))
    return table.set_index('image_name', drop=False)


def read_test(path: Path) -> pd.Series:
    """A run's test predictions by image_name: the column pred, or the target of a submission."""
    table = _read(path, ['image_name'])
    if 'pred' not in table:
        table = table.rename(columns={'target': 'pred'})
    if 'pred' not in table:
        raise Stop(f'{path} lacks the column pred; it has {", ".join(table)}')
    return pd.Series(_predictions(path, table), index=table.image_name)


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    table = read_csv(path, columns)
    if table.image_name.isna().any():
        raise Stop(f'{path} has a row without image_name')
    if not table.image_name.is_unique:
        raise Stop(f'{path} holds {_first(table, table.image_name.duplicated())} more than once')
    return table


def _first(table: pd.DataFrame, wrong: np.ndarray) -> str:
    return str(table.image_name[np.asarray(wrong)].iloc[0])


def _numbers(column: pd.Series) -> np.ndarray:
    """The text of a column as float, to the last bit; NaN where it is no number."""

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return np.nan

    return np.array([number(text) for text in column], dtype=float)


def _predictions(path: Path, table: pd.DataFrame) -> np.ndarray:
    pred = _numbers(table.pred)
    wrong = ~((pred >= 0) & (pred <= 1))  # NaN is neither
    if wrong.any():
        raise Stop(f'{path}: the prediction for {_first(table, wrong)} is not between 0 and 1')
    return pred


@dataclass
class Together:
    """Out-of-fold predictions of k runs on the n images that all of them have."""

    rows: pd.DataFrame  # image_name, target, group, source, fold and what else is known
    names: list[str]
    preds: np.ndarray  # (n, k), 0..1
    folds: np.ndarray  # (n, k): of each run, whose folds may differ
    left_out: int  # images that not all runs have


def read_oofs(folders: Sequence[Path], table: pd.DataFrame | None) -> Together | None:
    """The out-of-fold predictions of the runs in `folders`; None where one has no oof.csv.

    `table`: the labelled rows of folds.csv, whose group, source and fold are then taken; without
    it those of the first run that knows them, the patient or the image for the group. Folds that
    nobody names, or that part a group, are drawn anew. A run that was trained here must hold just
    these rows; those of others may know fewer or more images.

    Raises: Stop where the runs share no image, or differ on a target.
    """
    if not all((folder / 'oof.csv').exists() for folder in folders):
        return None
    oofs = {folder: read_oof(folder / 'oof.csv') for folder in folders}
    rows = None if table is None else table.set_index('image_name', drop=False)
    for oof in oofs.values() if rows is None else ():
        rows = oof if rows is None else rows.combine_first(oof).loc[rows.index]
    every = set(rows.index).union(*(oof.index for oof in oofs.values()))
    shared = set(rows.index).intersection(*(oof.index for oof in oofs.values()))
    if not shared:
        raise Stop(f'{", ".join(f.name for f in folders)} have no labelled image in common')
    for folder, oof in oofs.items():
        if table is not None and (folder / 'config.json').exists():
            used = rows[~rows.index.isin(files.skipped(folder))]
            _check_same(folder / 'oof.csv', set(oof.index) ^ set(used.index))
            _check_equal(folder / 'oof.csv', used, oof, 'fold')
        _check_equal(folder / 'oof.csv', rows[rows.index.isin(shared)], oof, 'target')
    rows = rows[rows.index.isin(shared)].reset_index(drop=True)
    rows['group'] = rows.group.fillna(rows.patient_id).fillna(rows.image_name)
    rows['source'] = rows.source.fillna('unknown')
    if rows.fold.isna().any() or splits.leaks(rows.group, rows.fold):
        classes = rows.groupby('target').group.nunique()
        n = min(5, classes.min()) if len(classes) > 1 else 1
        rows['fold'] = splits.assign(rows, int(n), 0) if n > 1 else 0
        print(f'folds are not known, or part a patient: {n} are drawn by group to fit and score by')
    columns = [oof.loc[rows.image_name].reset_index(drop=True) for oof in oofs.values()]
    folds = np.column_stack([c.fold.fillna(rows.fold) for c in columns])
    preds = np.column_stack([c.pred for c in columns])
    rows = rows.astype({'fold': int}).drop(columns=['pred', 'pred_plain', 'prob'], errors='ignore')
    return Together(rows, [f.name for f in folders], preds, folds, len(every) - len(shared))


def read_tests(folders: Sequence[Path], table: pd.DataFrame | None) -> pd.DataFrame | None:
    """The runs' test predictions, (m, k): a row an image, named, a column a run.

    In the order of `table`, the test rows of folds.csv, or of the first run. None where there are
    no test images. Raises: Stop where a run's images are others: a submission needs them all.
    """
    paths = [folder / 'test.csv' for folder in folders]
    if not any(path.exists() for path in paths) or (table is not None and table.empty):
        return None
    tests = [read_test(path) for path in paths]
    names = tests[0].index if table is None else pd.Index(table.image_name)
    for path, pred in zip(paths, tests, strict=True):
        _check_same(path, set(pred.index) ^ set(names))
    columns = {path.parent.name: pred.loc[names] for path, pred in zip(paths, tests, strict=True)}
    return pd.DataFrame(columns, index=names)


def _check_same(path: Path, other: set[str]) -> None:
    if other:
        raise Stop(
            f'{path} is of other images than the rest: {len(other)} are in one of them only, such '
            f'as {min(other)}'
        )


def _check_equal(path: Path, rows: pd.DataFrame, oof: pd.DataFrame, column: str) -> None:
    """Raises: Stop where `oof` has another `column` for one of `rows`; both by image_name."""
    differs = oof[column].loc[rows.index].to_numpy() != rows[column].to_numpy()
    if differs.any():
        raise Stop(
            f'{path} has another {column} for {differs.sum()} images, such as '
            f'{_first(rows, differs)}; it belongs to another folds.csv'
        )


def write(folder: Path, oof: pd.DataFrame | None, tests: pd.DataFrame | None) -> None:
    """Write a blend's oof.csv and test.csv, those that there are."""
    columns = [c for c in [*OOF_COLUMNS, 'pred', 'prob'] if oof is not None and c in oof]
    for name, rows in (('oof.csv', oof if oof is None else oof[columns]), ('test.csv', tests)):
        if rows is not None:
            files.write_csv(folder / name, rows)
        else:
            (folder / name).unlink(missing_ok=True)  # of a blend before
