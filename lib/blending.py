"""Ways to blend the predictions of several runs into one.

Every blend is a weighted sum over the runs, of their predictions, their ranks or their logits. The
ways differ only in that scale and in the weights.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from lib import score
from lib.cli import Stop
from lib.predictions import OofTable

FITTED = ('greedy', 'stack')  # whose weights are fitted to the out-of-fold predictions
N_STEPS = 50  # of the hill climb; the best so far is kept
STACK_C = 0.01  # scikit-learn's inverse of the penalty on the weights of logits


def to_scale(how: str, preds: np.ndarray, folds: np.ndarray | None = None) -> np.ndarray:
    """The columns that the weights multiply.

    They are `preds` (n, k) itself; for rank, the ranks within each fold; for stack, the logits and
    a column of ones, whose weight is the intercept. `folds`: (n, k), the fold of each image in each
    run; None for test images, which are ranked among themselves.
    """
    if how == 'rank':
        folds = np.zeros(preds.shape) if folds is None else folds
        columns = zip(preds.T, folds.T, strict=True)
        return np.column_stack([score.rank_within_folds(*column) for column in columns])
    if how == 'stack':
        return np.column_stack([logit(np.clip(preds, 1e-6, 1 - 1e-6)), np.ones(len(preds))])
    return preds


def weigh(how: str, scaled: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum (n,) of `to_scale`'s columns, as predictions in 0..1."""
    total = scaled @ weights
    return expit(total) if how == 'stack' else np.clip(total, 0, 1)


def fit(
    how: str, oofs: OofTable, weights: Sequence[float]
) -> tuple[Sequence[float], dict[int, Sequence[float]]]:
    """Weights (k,) for the columns of `to_scale`: those for test images, and those of each fold.

    Where `how` is one of FITTED, the first are fitted to all rows, and those of a fold to the other
    folds, so that the blend's AUC is out of fold for the weights too. Else all of them are
    `weights`. Raises: Stop where the other folds lack a class.
    """
    target, fold = oofs.rows.target.to_numpy(), oofs.rows.fold.to_numpy()
    if how not in FITTED:
        return weights, dict.fromkeys(np.unique(fold), weights)
    fit_weights = {'greedy': greedy_weights, 'stack': stack_weights}[how]
    scaled = to_scale(how, oofs.preds, oofs.folds)
    fold_weights = {}
    for k in np.unique(fold):
        if len(np.unique(target[fold != k])) < 2:
            raise Stop(f'--how {how} needs targets of 0 and of 1 outside of every fold')
        fold_weights[k] = fit_weights(scaled[fold != k], target[fold != k])
    return fit_weights(scaled, target), fold_weights


def blend_by_fold(how: str, oofs: OofTable, fold_weights: dict[int, Sequence[float]]) -> np.ndarray:
    """The out-of-fold blend (n,), which uses each fold's weights for the rows of that fold."""
    scaled, fold = to_scale(how, oofs.preds, oofs.folds), oofs.rows.fold.to_numpy()
    pred = np.empty(len(fold))
    for k, weights in fold_weights.items():
        pred[fold == k] = weigh(how, scaled[fold == k], weights)
    return pred


def leave_folds_out(how: str, oofs: OofTable) -> Callable[[int], np.ndarray] | None:
    """A function that blends without a fold; None where `how` fits no weights.

    It takes a fold k and returns the blend (n,) of the other folds' rows as if k did not exist, and
    NaN in the rows of k. Fitted weights carry the targets of k into the blend of the other
    folds, so anything that is fitted to that blend and then scored on k needs this one instead.
    The function raises Stop where there are fewer than 3 folds.
    """

    def blend_without(k: int) -> np.ndarray:
        if oofs.rows.fold.nunique() < 3:
            raise Stop(f'--calibrate with --how {how}, which fits weights too, needs three folds')
        others = (oofs.rows.fold != k).to_numpy()
        rest, pred = oofs.take(others), np.full(len(others), np.nan)
        pred[others] = blend_by_fold(how, rest, fit(how, rest, ())[1])
        return pred

    return blend_without if how in FITTED else None


def greedy_weights(preds: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights (k,) for the mean with the best AUC, found by hill climbing: one run is added at a
    time, and the same run may be added again.

    Source: https://doi.org/10.1145/1015330.1015432 (Caruana et al. 2004)
    """

    def auc(pred: np.ndarray) -> float:
        """The same as score.auc, but several times faster."""
        p, n = np.sort(pred[target == 1]), np.sort(pred[target == 0])
        below = np.searchsorted(n, p, 'left') + np.searchsorted(n, p, 'right')
        return below.sum() / (2 * len(p) * len(n))

    counts, total, best = np.zeros(preds.shape[1]), np.zeros(len(preds)), -1.0
    for _ in range(N_STEPS):
        aucs = [auc(total + pred) for pred in preds.T]
        j = int(np.argmax(aucs))
        counts[j] += 1
        total += preds[:, j]
        if aucs[j] > best + 1e-12:
            best, weights = aucs[j], counts / counts.sum()
    return weights


def stack_weights(scaled: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights of the logits and, last, the intercept, by penalised logistic regression: (k + 1,).

    The penalty makes similar runs share their weight.
    """
    model = LogisticRegression(C=STACK_C, max_iter=1000).fit(scaled[:, :-1], target)
    return np.r_[model.coef_[0], model.intercept_]


def parse_mix(text: str) -> dict[str, float]:
    """The weights in a text like 'a=.5,b=.5', by run, scaled to a sum of 1. Raises: Stop."""
    weights: dict[str, float] = {}
    for word in text.split(','):
        name, equals, number = word.strip().rpartition('=')
        try:
            weight = float(number)
        except ValueError:
            weight = np.nan
        if not (name and equals and 0 <= weight < np.inf):
            raise Stop(f'--mix takes RUN=WEIGHT,RUN=WEIGHT with weights from 0 up, not {word!r}')
        if name in weights:
            raise Stop(f'--mix names {name} twice')
        weights[name] = weight
    total = sum(weights.values())
    if not total > 0:
        raise Stop('the weights of --mix are all 0')
    if abs(total - 1) < 1e-9:
        return weights  # as typed: a division could change the last bit
    return {name: weight / total for name, weight in weights.items()}
