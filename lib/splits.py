"""Groups, known duplicates, stratified group folds, and the check that no group leaks."""

import warnings

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from lib.cli import Stop


def groups(table: pd.DataFrame, duplicates: pd.DataFrame | None = None) -> pd.Series:
    """The group of each row, as text: its patient, else its lesion, else its image.

    `table` has `image_name` and may have `patient_id` and `lesion_id`; `duplicates` is two columns
    of image names. Groups that share a lesion or a duplicate are one, chains of them too, under
    the first of their names; a chain may run over an image that the table does not have.
    """
    group = table.image_name.astype('str')
    ends = []  # of the edges between groups: two series of names, end to end
    for column in ('lesion_id', 'patient_id'):
        if column in table:
            group = table[column].astype('str').fillna(group)
    if 'lesion_id' in table:
        ends.append((group, table.lesion_id.astype('str').fillna(group)))
    if duplicates is not None:
        of_image = dict(zip(table.image_name, group, strict=True))
        known = [duplicates.iloc[:, i].map(lambda name: of_image.get(name, name)) for i in (0, 1)]
        ends.append(tuple(known))
    left = pd.concat([group, *(a for a, _ in ends)], ignore_index=True)
    right = pd.concat([group, *(b for _, b in ends)], ignore_index=True)
    codes, names = pd.factorize(pd.concat([left, right]), sort=True)
    edges = np.split(codes, 2)
    graph = coo_array((np.ones(len(left)), edges), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1][codes[: len(group)]]
    return group.groupby(component).transform('min').rename('group')


def assign(table: pd.DataFrame, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each row: (n,) int in 0..n_folds-1, by `target` and `source`, whole groups.

    Raises: Stop where a class has fewer groups than there are folds.
    """
    for target, name in ((1, 'melanoma'), (0, 'benign')):
        n = table.group[table.target == target].nunique()
        if n < n_folds:
            raise Stop(f'{n_folds} folds need as many {name} groups; there are {n}: --n_folds {n}')
    fold = np.empty(len(table), dtype=int)
    strata = table.source.astype('str') + table.target.astype(int).astype('str')
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # a source with fewer melanomas than folds is no mistake
        warnings.simplefilter('ignore', UserWarning)
        for k, (_, rows) in enumerate(splitter.split(table, strata, table.group)):
            fold[rows] = k
    return fold


def leaks(group: pd.Series, fold: pd.Series) -> list[str]:
    """The groups whose rows lie in more than one fold; rows without a fold (NaN) do not count."""
    n_folds = fold.groupby(group).nunique()
    return sorted(n_folds.index[n_folds > 1])


def check(group: pd.Series, fold: pd.Series) -> None:
    """Raises: Stop that names a group in two folds, if there is one."""
    if leaking := leaks(group, fold):
        folds = sorted(fold[group == leaking[0]].dropna().astype(int).unique())
        raise Stop(
            f'{len(leaking)} of {group.nunique()} groups are in more than one fold, so a score '
            f'would be too good: {leaking[0]} is in folds {", ".join(map(str, folds))}'
        )


def check_classes(target: pd.Series, fold: pd.Series) -> None:
    """Raises: Stop where the folds beside one of them do not hold melanomas and benign images."""
    for k in sorted(fold.unique()):
        if target[fold != k].nunique() < 2:
            raise Stop(f'without fold {int(k)} there are not both melanomas and benign images left')
