"""Groups of images, stratified folds of whole groups, and the check that no group leaks."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from lib.cli import Stop


def join_groups(table: pd.DataFrame, duplicates: pd.DataFrame | None = None) -> pd.Series:
    """The group of each row, as text: its patient, else its lesion, else its image.

    `table` has `image_name` and may have `patient_id` and `lesion_id`; `duplicates` is two columns
    of image names. Groups that share a lesion or a pair of duplicates are joined, also through a
    chain of them and through an image that is not in the table. A joined group has the first of
    their names in alphabetical order; where the group of an earlier row is called so too, the kind
    is put before it.
    """
    ids = table.reindex(columns=['patient_id', 'lesion_id', 'image_name']).astype(object)
    kinds = ids.apply(lambda column: f'{column.name} ' + column)  # patient 5 is not lesion 5
    name, own = (frame.bfill(axis=1).iloc[:, 0] for frame in (ids, kinds))
    # the edges of a graph in which each connected part is one group
    one, two = own, kinds.lesion_id.fillna(own)
    if duplicates is not None:
        own_of = dict(zip(table.image_name, own, strict=True))
        pairs = duplicates.map(lambda name: own_of.get(name, f'image_name {name}'))
        one, two = pd.concat([one, pairs.iloc[:, 0]]), pd.concat([two, pairs.iloc[:, 1]])
    codes, nodes = pd.factorize(pd.concat([one, two]))
    left, right = np.split(codes, 2)
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(nodes), len(nodes)))
    component = connected_components(graph, directed=False)[1][codes[: len(table)]]
    group = name.groupby(component).transform('min')
    first = pd.Series(component, group.index).groupby(group).transform('first')
    return group.where(first == component, own.groupby(component).transform('min')).rename('group')


def warn_of_groups(table: pd.DataFrame, group: pd.Series) -> None:
    """Print warnings of what may part the images of one patient or join those of several.

    They are of images of `table` (patient_id, lesion_id, source) without patient or lesion, of
    lesions with several patients, of patients in several sources, of ids that differ by case or a
    .0 alone, and of a `group` (n,) of over a tenth of all images, as no real patient has.
    """
    known = table.reindex(columns=['patient_id', 'lesion_id'])
    if n := known.isna().all(axis=1).sum():
        what = f'{n} of {len(table)} images have no patient or lesion'
        print(f'{what}: those of one patient are not kept together')
    n_patients = known.groupby('lesion_id').patient_id.nunique()
    if len(several := n_patients[n_patients > 1]):
        what = f'{len(several)} lesions are of several patients, such as {several.index[0]}'
        print(f'warning: {what}; those patients are one group')
    if 'source' in table and 'patient_id' in table:
        n_sources = table.groupby('patient_id').source.nunique()
        if len(several := n_sources[n_sources > 1]):
            what = f'{len(several)} patients are in several sets, such as {several.index[0]}'
            print(f'{what}; each is taken as one person')
    ids = table.get('patient_id', group).dropna().drop_duplicates().astype(object)
    alike = ids.groupby(ids.str.lower().str.removesuffix('.0')).agg(list)
    if len(alike := alike[alike.str.len() > 1]):
        what = f'{len(alike)} patients differ from another by case or by .0 alone, such as'
        print(f'warning: {what} {" and ".join(alike.iloc[0])}; they are taken as different people')
    sizes = group.value_counts()
    if len(large := sizes[(sizes > len(group) / 10) & (sizes > 1)]):
        what = f'{large.index[0]} has {large.iloc[0]} of {len(group)} images; is it one patient?'
        print(f'warning: {len(large)} groups have over a tenth of all images: {what}')


def assign_folds(table: pd.DataFrame, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each row, (n,) int from 0 up: whole groups, stratified by target and source.

    Raises: Stop where a class has fewer groups than there are folds.
    """
    for target in (1, 0):
        n = table.group[table.target == target].nunique()
        if n < n_folds:
            wanted = f'{n_folds} folds need as many groups of target {target}'
            raise Stop(f'{wanted}; there are {n}' + (f': --n_folds {n}' if n > 1 else ''))
    fold = np.empty(len(table), dtype=int)
    strata = table.source.astype(object) + table.target.astype(int).astype(str)
    # Shuffled here, in the order that its own shuffle=True gives: before version 1.7 that mixed up
    # which group had which images, and the folds were not stratified.
    names, codes = np.unique(table.group, return_inverse=True)
    shuffled = np.random.RandomState(seed).permutation(len(names))
    groups, splitter = np.argsort(shuffled)[codes], StratifiedGroupKFold(n_folds)
    with warnings.catch_warnings():  # a source may have fewer malignant images than there are folds
        warnings.simplefilter('ignore', UserWarning)
        for k, (_, rows) in enumerate(splitter.split(table, strata, groups)):
            fold[rows] = k
    return fold


def find_leaks(group: pd.Series, fold: pd.Series) -> list[str]:
    """The groups whose rows lie in more than one fold; rows without a fold (NaN) do not count."""
    n_folds = fold.groupby(group).nunique()
    return sorted(n_folds.index[n_folds > 1])


def check_groups(group: pd.Series, fold: pd.Series) -> None:
    """Check that no group is in two folds. Raises: Stop that names a group that is."""
    if leaking := find_leaks(group, fold):
        folds = sorted(fold[group == leaking[0]].dropna().astype(int).unique())
        raise Stop(
            f'{len(leaking)} of {group.nunique()} groups are in more than one fold, so a score '
            f'would be too good: {leaking[0]} is in folds {", ".join(map(str, folds))}'
        )


def check_classes(target: pd.Series, fold: pd.Series) -> None:
    """Check that a model of any fold trains on both classes. Raises: Stop where one does not."""
    for k in sorted(fold.unique()):
        if target[fold != k].nunique() < 2:
            raise Stop(f'the labelled images outside of fold {int(k)} are all of one class')


def report_leaks(
    path: Path, table: pd.DataFrame, fold_column: str, duplicates: pd.DataFrame | None
) -> None:
    """Print how many groups of `table`, somebody's table of folds, lie in more than one fold.

    `path` is its file, for the messages. A negative number in `fold_column` is not a fold. Raises:
    Stop where a group or a known pair of `duplicates` is in more than one fold, and where the
    column holds no folds or no patient is known, since nothing can be found then.
    """
    unit = next((c for c in ('group', 'patient_id', 'lesion_id') if c in table), None)
    if unit is None:
        raise Stop(f'{path} needs one of group, patient_id, lesion_id')
    group = table.group.fillna(table.image_name) if unit == 'group' else join_groups(table)
    fold = table[fold_column]  # numbered, or named, such as 'a' and 'b'
    number = pd.to_numeric(fold, errors='coerce')
    if number.notna().any():
        if len(wrong := fold[number.isna() & fold.notna() | (number % 1 > 0)]):
            raise Stop(f'{path}: {wrong.iloc[0]!r} in {fold_column} is no fold; others are numbers')
        fold = number.where(number >= 0).astype('Int64')
    used, sizes = fold.notna(), fold.value_counts().sort_index()
    counts = ', '.join(f'{n} in {k}' for k, n in sizes.iloc[:20].items())
    print(f'{path}: {used.sum()} of {len(table)} rows have a fold in {fold_column}: {counts}')
    if len(sizes) < 2:
        raise Stop(f'{path}: {fold_column} has {len(sizes)} folds; no model leaves any rows out')
    ids = table[[c for c in ('group', 'patient_id', 'lesion_id') if c in table]]
    if ids[used].isna().all(axis=None):
        raise Stop(f'{path}: no row has a {unit}, so no leak can be seen')
    warn_of_groups(table[used].assign(patient_id=ids[used].bfill(axis=1).iloc[:, 0]), group[used])
    leaking, n = find_leaks(group, fold), group[used].nunique()
    print(f'{len(leaking)} of {n} groups (by {unit}) are in more than one of {len(sizes)} folds')
    parted = []
    if duplicates is not None:
        fold_of = dict(zip(table.image_name[used], fold[used], strict=True))
        pairs = [p for p in duplicates.itertuples(index=False) if fold_of.keys() >= set(p)]
        parted = [' and '.join(pair) for pair in pairs if len({fold_of[name] for name in pair}) > 1]
        print(f'{len(parted)} known pairs of duplicates are in different folds')
    if examples := [*leaking, *parted]:
        raise Stop(f'{path} leaks, for example {examples[0]}: a score on these folds is too good')
