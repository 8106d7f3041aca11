"""Ways to blend the predictions of several runs into one.

Every blend is a weighted sum over the runs, of their predictions, their ranks or their logits. The
ways differ only in that scale and in the weights.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from lib import score, summary
from lib.cli import Stop
from lib.predictions import OofTable
from lib.runs import Run

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
    n_runs, n_malignant = len(oofs.names), int(target.sum())
    if how == 'greedy' and (n_runs > 10 or n_malignant < 100):
        print(
            f'warning: there are {n_runs} runs and {n_malignant} malignant images; in simulations '
            'with more than 10 runs, or fewer than 100 malignant images, the plain mean was better'
        )
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
    fold = oofs.rows.fold.to_numpy()
    scaled = to_scale(how, oofs.preds, oofs.folds)
    pred = np.empty(len(fold))
    for k, weights in fold_weights.items():
        pred[fold == k] = weigh(how, scaled[fold == k], weights)
    return pred


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

    The penalty makes similar runs share their weight. It is Newton's method, since scikit-learn's
    default stops early.
    """
    newton = LogisticRegression(C=STACK_C, solver='newton-cholesky', tol=1e-10, max_iter=1000)
    model = newton.fit(scaled[:, :-1], target)
    return np.r_[model.coef_[0], model.intercept_]


def parse_mix(text: str) -> dict[str, float]:
    """The weights in a text like 'a=.5,b=.5', by run, scaled to a sum of 1. Raises: Stop."""
    try:
        pairs = [word.strip().rsplit('=', 1) for word in text.split(',')]
        weights = {name.strip(): float(number) for name, number in pairs}
    except ValueError:
        weights, pairs = {}, []
    total = sum(weights.values())
    if not (len(weights) == len(pairs) and 0 < total < np.inf and min(weights.values()) >= 0):
        raise Stop(f'--mix takes RUN=WEIGHT,RUN=WEIGHT with weights from 0 up, not {text!r}')
    return {name: weight / total for name, weight in weights.items()}


def rank_correlations(preds: np.ndarray) -> np.ndarray:
    """Spearman's correlation of any two columns of `preds` (n, k): (k, k); 0 for a constant."""
    rho = pd.DataFrame(preds).corr('spearman').fillna(0).to_numpy(copy=True)
    np.fill_diagonal(rho, 1)
    return rho


def compare_runs(oofs: OofTable, blended: np.ndarray, weights: Sequence[float]) -> pd.DataFrame:
    """A row for each run: its `weight`, what `score.compare_paired` says of it and of the blend
    (n,), and `correlation`, the mean of its rank correlations with the others.

    Runs are compared with the blend and not with the best run, since a run that is chosen by its
    AUC and then compared by it seems better than it is.
    """
    k = len(oofs.names)
    preds = [*oofs.preds.T, blended]
    rows = score.compare_paired(oofs.rows.target, preds, k, oofs.rows.group)[:k]
    rho = rank_correlations(oofs.preds)
    correlations = (rho.sum(axis=0) - 1) / (k - 1) if k > 1 else np.nan
    return rows.assign(weight=weights[:k], correlation=correlations).set_index(pd.Index(oofs.names))


def print_scores(
    runs: Sequence[Run], oof: pd.DataFrame, compared: pd.DataFrame, rows: pd.DataFrame
) -> None:
    """Print what each run (`compare_runs`) and the blend (`rows`, of summary.summarize) score. Of a
    single run that was trained here train.py and infer.py have printed them, so only the first."""
    if len(runs) == 1 and runs[0].has_begun and compared.difference.iloc[0] == 0:
        print(f'{runs[0]}: out of fold: {rows.label[0]} {summary.format_rows(rows[:1])[0]}')
        return
    print(f'out-of-fold AUC [95 % interval over {summary.resampling_unit(oof)}]')
    print(summary.format_table(tabulate_runs(compared).rename(summary.shorten)))
    print(summary.format_summaries({'blend': rows}))


def tabulate_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """A table of text, a line for each run, from `compare_runs`."""
    table = pd.DataFrame({'weight': runs.weight.map('{:.3f}'.format)})
    aucs = runs[['auc', 'auc_low', 'auc_high']].itertuples(index=False)
    table['AUC'] = [score.format_estimate(*auc) for auc in aucs]
    if len(runs) > 1:
        table['minus the blend'] = runs.apply(score.format_difference, axis=1)
        table['correlation'] = runs.correlation.map('{:.4f}'.format)
    return table
