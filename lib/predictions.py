"""Files of predictions, from our runs or from others: read, checked, and put side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from lib import files, splits
from lib.cli import Stop
from lib.runs import Run
from lib.tables import OOF_COLUMNS, Competition, parse_numbers, read_csv, refuse


def read_oof(path: Path) -> pd.DataFrame:
    """A run's out-of-fold predictions, from whoever made them.

    The file has image_name, target (0/1) and pred (a number), in any order of rows, and may have
    fold, source, patient_id and group. Returns: one row per image, indexed by image_name, with NaN
    where nothing is known. Raises: Stop that names the file and the first image that is wrong.
    """
    table = _read(path, ['image_name', 'target', 'pred'])
    columns = {'fold', 'age_approx', 'width', 'height'} & set(table) | {'target'}
    table = table.assign(**{c: parse_numbers(table[c]) for c in columns})
    wrong = table[~table.target.isin([0, 1])]
    refuse(wrong, '{file}: the target of {image_name} is not 0 or 1', path)
    if 'fold' in table:
        is_fold = (table.fold >= 0) & (table.fold % 1 == 0)
        sentence = '{file}: the fold of {image_name} is not a whole number from 0 up'
        refuse(table[~is_fold], sentence, path)
    types = {'fold': float, 'patient_id': object, 'group': object, 'source': object}
    table = table.reindex(columns=[*table, *(c for c in types if c not in table)]).astype(types)
    return table.astype({'target': int}).set_index('image_name', drop=False)


def read_test(path: Path) -> pd.Series:
    """A run's test predictions by image_name: the column pred, or the target of a submission."""
    return _read(path, ['image_name']).set_index('image_name').pred


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """The table in `path` as text, with `pred` (in a submission the column target) as float."""
    table = read_csv(path, columns)
    if 'pred' not in table:
        table = table.rename(columns={'target': 'pred'})
    if 'pred' not in table:
        raise Stop(f'{path} lacks the column pred; it has {", ".join(table)}')
    if table.image_name.isna().any():
        raise Stop(f'{path} has a row without image_name')
    is_repeated = table.image_name.duplicated()
    refuse(table[is_repeated], '{file}: it holds {image_name} more than once', path)
    table['pred'] = parse_numbers(table.pred)
    wrong = table[~np.isfinite(table.pred)]
    refuse(wrong, '{file}: the prediction for {image_name} is not a number', path)
    return table


@dataclass
class OofTable:
    """Out-of-fold predictions of k runs on the n images that all of them have."""

    rows: pd.DataFrame  # image_name, target, group, source, fold and what else is known
    names: list[str]
    preds: np.ndarray  # (n, k)
    folds: np.ndarray  # (n, k): of each run, whose folds may differ
    n_not_shared: int  # images that not all runs have
    has_folds: bool = True  # whether all runs say of which fold each image is
    leaks: list[str] = field(default_factory=list)  # sentences on runs whose folds split patients

    @property
    def model_folds(self) -> np.ndarray:
        """The fold of each image, (n,) int, whose models predicted it, which decide the level of
        its predictions: that of all runs, or of `rows` where the runs' folds differ; 0 where a run
        does not tell."""
        if not self.has_folds:
            return np.zeros(len(self.rows), dtype=int)
        is_shared = (self.folds == self.folds[:, :1]).all()
        return (self.folds[:, 0] if is_shared else self.rows.fold.to_numpy()).astype(int)


def read_oofs(runs: Sequence[Run], labelled: pd.DataFrame | None) -> OofTable | None:
    """The out-of-fold predictions of `runs`, side by side; None where one has no oof.csv.

    `labelled`: the labelled rows of folds.csv, or None. Raises: Stop where the runs share no image,
    differ on a target, or where one that was trained here does not fit `labelled`.
    """
    paths = [run.folder / 'oof.csv' for run in runs]
    if missing := [run.name for run, path in zip(runs, paths, strict=True) if not path.exists()]:
        print(f'no out-of-fold score and no prob: there is no oof.csv of {", ".join(missing)}')
        return None
    oofs = [read_oof(path) for path in paths]
    known = describe_images(oofs, labelled)
    for run, path, oof in zip(runs, paths, oofs, strict=True):
        if labelled is not None and run.has_begun:
            _check_same_images(path, oof.index, known.index)
            _check_equal(path, known, oof, 'fold')
        _check_equal(path, known[known.index.isin(oof.index)], oof, 'target')
    lined_up = line_up([run.name for run in runs], oofs, known)
    print(*lined_up.leaks, sep='\n', end='\n' if lined_up.leaks else '')
    if not lined_up.has_folds:
        print('not every run tells its folds, so no AUC by fold can be given')
    return lined_up


def describe_images(oofs: Sequence[pd.DataFrame], labelled: pd.DataFrame | None) -> pd.DataFrame:
    """What is known of the images, by image_name: `labelled`, or where there is no folds.csv what
    the first of the `oofs` says, and the others where it says nothing."""
    if labelled is not None:
        return labelled.set_index('image_name', drop=False)
    known = oofs[0]
    for oof in oofs[1:]:
        known = known.combine_first(oof).loc[known.index]
    return known


def line_up(names: list[str], oofs: Sequence[pd.DataFrame], known: pd.DataFrame) -> OofTable:
    """The rows that all `oofs` and `known` have, each with a group and a fold. Raises: Stop."""
    images = [set(table.index) for table in (known, *oofs)]
    rows = known[known.index.isin(set.intersection(*images))]
    if rows.empty:
        tables = dict(zip([*names, 'all known images'], [*oofs, known], strict=True))
        some = ', '.join(f'{table.index[0]} in {name}' for name, table in tables.items())
        raise Stop(f'the tables have no labelled image in common; their names are such as {some}')
    rows = _with_groups_and_folds(rows.reset_index(drop=True))
    oofs = [oof.loc[rows.image_name].reset_index(drop=True) for oof in oofs]
    preds = np.column_stack([oof.pred for oof in oofs])
    leaks = [say_leaks(name, rows.group, oof.fold) for name, oof in zip(names, oofs, strict=True)]
    folds = np.column_stack([oof.fold.fillna(rows.fold) for oof in oofs])
    has_folds = all(oof.fold.notna().all() for oof in oofs)
    rows = rows.drop(columns=['pred', 'pred_plain', 'prob'], errors='ignore')
    n_not_shared = len(set.union(*images)) - len(rows)
    return OofTable(rows, names, preds, folds, n_not_shared, has_folds, list(filter(None, leaks)))


def say_leaks(name: str, group: pd.Series, fold: pd.Series) -> str:
    """A sentence where the folds of a run split groups, so that its models have seen the patients
    that they are scored on; else ''. Rows without a fold do not count."""
    if not (leaks := splits.find_leaks(group, fold)):
        return ''
    return (
        f'warning: {len(leaks)} of {group.nunique()} patients or lesions, such as {leaks[0]}, are '
        f'in more than one fold of {name}: its score is too good'
    )


def _with_groups_and_folds(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with a group (the patient, or the image), a source and a fold each. Folds are assigned
    anew where they are not known, or where they split a group."""
    rows['group'] = rows.group.fillna(rows.patient_id).fillna(rows.image_name)
    rows['source'] = rows.source.fillna('unknown')
    if rows.fold.isna().any() or splits.find_leaks(rows.group, rows.fold):
        classes = rows.groupby('target').group.nunique()
        n = int(min(5, classes.min())) if len(classes) > 1 else 1
        rows['fold'] = splits.assign_folds(rows, n, 0) if n > 1 else 0
        print(
            'the folds are not known, or a patient is in two of them; what is fitted is fitted on '
            + (f'{n} new folds, assigned by group' if n > 1 else 'all images together')
        )
    return rows.astype({'fold': int})


def read_tests(runs: Sequence[Run], test: pd.DataFrame | None) -> pd.DataFrame | None:
    """The runs' test predictions, (m, k): one row per image, by name, and one column per run.

    The rows come in the order of `test`, the test rows of folds.csv, or of the first run. None
    where there are no test images. Raises: Stop where a run has other images: a submission needs
    all of them.
    """
    paths = [run.folder / 'test.csv' for run in runs]
    if not any(path.exists() for path in paths) or (test is not None and test.empty):
        return None
    preds = [read_test(path) for path in paths]
    names = preds[0].index if test is None else pd.Index(test.image_name)
    for path, pred in zip(paths, preds, strict=True):
        _check_same_images(path, pred.index, names)
    return pd.concat([pred.loc[names] for pred in preds], axis=1, keys=[run.name for run in runs])


def check_range(how: str, oofs: OofTable | None, tests: pd.DataFrame | None) -> None:
    """Raises: Stop where there are no predictions, and, unless `how` is rank, where some are
    outside of 0..1; it lists their files."""
    preds = {}
    if oofs is None and tests is None:
        raise Stop('these runs share no kind of predictions; make them first: python infer.py')
    if oofs is not None:
        preds |= dict(zip([f'{name}/oof.csv' for name in oofs.names], oofs.preds.T, strict=True))
    if tests is not None:
        preds |= dict(tests.add_suffix('/test.csv').items())
    outside = [
        f'{file}: {n} of {len(pred)}, which go from {pred.min():.4g} to {pred.max():.4g}'
        for file, pred in preds.items()
        if (n := ((pred < 0) | (pred > 1)).sum())
    ]
    if outside and how != 'rank':
        raise Stop(
            f'these predictions are not between 0 and 1: {"; ".join(outside)}. Take --how rank, '
            'which asks for their order alone, or leave these runs out with --only'
        )


def _check_same_images(path: Path, names: pd.Index, others: pd.Index) -> None:
    if differing := set(names) ^ set(others):
        few = f'{len(differing)} are in one of them only, such as {min(differing)}'
        raise Stop(f'{path} and the other tables name different images: {few}; make it anew')


def _check_equal(path: Path, rows: pd.DataFrame, oof: pd.DataFrame, column: str) -> None:
    """Raises: Stop where `oof` has another `column` for one of `rows`; both by image_name."""
    differs = oof[column].loc[rows.index].to_numpy() != rows[column].to_numpy()
    if differs.any():
        some = f'{differs.sum()} images, such as {rows.image_name[differs].iloc[0]}'
        raise Stop(f'{path} has another {column} for {some}; it belongs to another folds.csv')


def write(folder: Path, oof: pd.DataFrame | None, test: pd.DataFrame | None) -> None:
    """Write a blend's oof.csv and test.csv. Both are deleted first, so that after a kill they are
    never of two blends."""
    for name in ('oof.csv', 'test.csv'):
        (folder / name).unlink(missing_ok=True)
    for name, rows in (('oof.csv', oof), ('test.csv', test)):
        if rows is not None:
            files.write_csv(folder / name, rows.filter([*OOF_COLUMNS, 'pred', 'prob']))


def write_submission(path: Path, test: pd.DataFrame, competition: Competition) -> None:
    """Write `test` (image_name, pred) to `path` in the columns that the competition asks for."""
    columns = {competition.id_column: test.image_name, 'target': test.pred}
    files.write_csv(path, pd.DataFrame(columns))
