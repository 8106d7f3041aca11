"""Predictions of several runs to one, and how much each run is worth in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from lib import score
from lib.cli import Stop
from lib.predictions import Together

N_STEPS = 50  # of the hill climb; the best so far is kept
STACK_C = 0.01  # scikit-learn's inverse of the penalty on the weights of logits


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
