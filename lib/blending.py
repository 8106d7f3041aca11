"""Predictions of several runs to one, and how much each run is worth in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from lib import files, score, splits
from lib.cli import Stop
from lib.tables import OOF_COLUMNS, read_csv

N_STEPS = 50  # of the hill climb; the best so far is kept
STACK_C = 0.01  # scikit-learn's inverse of the penalty on the weights of logits


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


@dataclass
class Method:
    """A way to blend: columns (n, k) to features, features to weights (k,), weights to one."""

    features: Callable[[np.ndarray, np.ndarray], np.ndarray]  # of preds and folds, (n, k) both
    fit: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None  # of features and target
    link: Callable[[np.ndarray], np.ndarray] = lambda total: np.clip(total, 0, 1)


def _as_they_are(preds: np.ndarray, folds: np.ndarray) -> np.ndarray:
    return preds


def _ranks(preds: np.ndarray, folds: np.ndarray) -> np.ndarray:
    columns = zip(preds.T, folds.T, strict=True)
    return np.column_stack([score.ranked(pred, fold) for pred, fold in columns])


def _logits(preds: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """With a column of ones, whose weight is the intercept."""
    return np.column_stack([logit(np.clip(preds, 1e-6, 1 - 1e-6)), np.ones(len(preds))])


def climb(preds: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights (k,) by which the mean of columns has the best AUC, by adding a run at a time, the
    same again if it helps. Source: https://doi.org/10.1145/1015330.1015432 (Caruana et al. 2004)
    """
    positive, negative = preds[target == 1], preds[target == 0]

    def auc(p: np.ndarray, n: np.ndarray) -> float:
        """As score.auc, but several times faster: only the benign scores are sorted."""
        p, n = np.sort(p), np.sort(n)
        below = np.searchsorted(n, p, 'left') + np.searchsorted(n, p, 'right')
        return below.sum() / (2 * len(p) * len(n))

    counts, best = np.zeros(preds.shape[1]), (-1.0, np.zeros(preds.shape[1]))
    p, n = np.zeros(len(positive)), np.zeros(len(negative))
    for _ in range(N_STEPS):
        aucs = [auc(p + positive[:, j], n + negative[:, j]) for j in range(preds.shape[1])]
        j = int(np.argmax(aucs))
        counts[j] += 1
        p, n = p + positive[:, j], n + negative[:, j]
        if aucs[j] > best[0] + 1e-12:
            best = (aucs[j], counts.copy())
    return best[1] / best[1].sum()


def stack(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights of the logits and, last, the intercept, by penalised logistic regression: (k + 1,).

    The penalty has runs that are alike share their weight.
    """
    model = LogisticRegression(C=STACK_C, max_iter=1000).fit(features[:, :-1], target)
    return np.r_[model.coef_[0], model.intercept_]


METHODS = {
    'mean': Method(_as_they_are),
    'rank': Method(_ranks),
    'greedy': Method(_as_they_are, climb),
    'stack': Method(_logits, stack, expit),
}


@dataclass
class Blend:
    """A blend of k runs; what has no out-of-fold predictions has no `oof`."""

    weights: np.ndarray  # (k,), and the intercept of a stack
    oof: np.ndarray | None = None  # (n,): each fold by weights that were fitted without it
    naive: np.ndarray | None = None  # (n,): by fitted `weights`, which have seen these targets
    without: np.ndarray | None = None  # (k,): the AUC of `oof` with each run left out


def blend(
    how: str, runs: Together | None, n_runs: int, mix: np.ndarray | None = None
) -> tuple[Blend, Callable[[np.ndarray], np.ndarray]]:
    """Blend k runs by one of METHODS, or by the weights `mix` (k,).

    Weights that are fitted are fitted on the other folds for each fold's out-of-fold blend, so
    that its AUC is out-of-fold for the weights too, and on all rows for the test images. A run is
    left out by its weight alone; the others keep theirs.

    Returns: the Blend, and a function of test predictions (m, k) to (m,).
    """
    method = METHODS[how]
    weights = np.full(n_runs, 1 / n_runs) if mix is None else mix

    def combine(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return method.link(features @ weights)

    def of_test(preds: np.ndarray) -> np.ndarray:
        return combine(method.features(preds, np.zeros(preds.shape, dtype=int)), weights)

    if runs is None:
        return Blend(weights), of_test
    target, fold = runs.rows.target.to_numpy(), runs.rows.fold.to_numpy()
    features = method.features(runs.preds, runs.folds)
    of_fold = dict.fromkeys(np.unique(fold), weights)
    if method.fit is not None:
        for k in of_fold:
            if len(np.unique(target[fold != k])) < 2:
                raise Stop(f'--how {how} needs melanomas and benign images outside of every fold')
            of_fold[k] = method.fit(features[fold != k], target[fold != k])
        weights = method.fit(features, target)
    oof = np.empty(len(target))
    for k, w in of_fold.items():
        oof[fold == k] = combine(features[fold == k], w)
    without = np.full(n_runs, np.nan)
    for run in range(n_runs if n_runs > 1 else 0):
        rest, known = np.empty(len(target)), True
        for k, w in of_fold.items():
            less = np.where(np.arange(len(w)) == run, 0, w)
            total = less[:n_runs].sum()
            known &= bool(total > 0)
            if how != 'stack':
                less = less / (total or 1)
            rest[fold == k] = combine(features[fold == k], less)
        without[run] = score.auc(target, rest) if known else np.nan
    naive = combine(features, weights) if method.fit else None
    return Blend(weights, oof, naive, without), of_test


def mixed(text: str) -> dict[str, float]:
    """The weights in 'a=.5,b=.5' by run; they are scaled to a sum of 1. Raises: Stop."""
    found: dict[str, float] = {}
    for word in text.split(','):
        name, equals, number = word.strip().rpartition('=')
        try:
            weight = float(number)
        except ValueError:
            weight = np.nan
        if not (name and equals and 0 <= weight < np.inf):
            raise Stop(f'--mix takes RUN=WEIGHT,RUN=WEIGHT with weights from 0 up, not {word!r}')
        if name in found:
            raise Stop(f'--mix names {name} twice')
        found[name] = weight
    total = sum(found.values())
    if not total > 0:
        raise Stop('the weights of --mix are all 0')
    exact = abs(total - 1) < 1e-9  # as typed, not moved by the last bit
    return {name: weight if exact else weight / total for name, weight in found.items()}


def compare(runs: Together, blended: Blend) -> dict[str, dict[str, Any]]:
    """What each run is worth: by its name, its `auc` with interval, its AUC less the best run's
    (`difference`, paired), its `weight`, its mean rank `correlation` with the others, and the
    blend's AUC `without` it."""
    target, group = runs.rows.target.to_numpy(), runs.rows.group
    aucs, best, differences = score.compare(target, list(runs.preds.T), group)
    rho = score.rank_correlations(runs.preds.T)
    k = len(runs.names)
    return {
        name: {
            'auc': aucs[i],
            'difference': None if i == best else differences[i],
            'weight': blended.weights[i],
            'correlation': (rho[i].sum() - 1) / (k - 1) if k > 1 else None,
            'correlations': rho[i],
            'without': None if np.isnan(blended.without[i]) else blended.without[i],
        }
        for i, name in enumerate(runs.names)
    }


def lines(found: dict[str, dict[str, Any]]) -> str:
    """Printed lines: a row a run of `compare`."""
    rows = [('run', 'weight', 'AUC', 'less the best run', 'agreement', 'without, others kept')]
    for name, run in found.items():
        less = 'the best' if run['difference'] is None else str(run['difference'])
        numbers = [
            f'{run[c]:.4f}' if run[c] is not None else '-' for c in ('correlation', 'without')
        ]
        rows.append((name, f'{run["weight"]:.3f}', str(run['auc']), less, *numbers))
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    text = ['  '.join(f'{cell:<{w}}' for cell, w in zip(row, widths, strict=True)) for row in rows]
    return '\n'.join(line.rstrip() for line in text)
