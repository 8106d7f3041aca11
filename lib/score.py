"""AUC and its interval: pooled, by source, and the difference of two predictions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

N_DRAWS = 1000


def auc(target: np.ndarray, pred: np.ndarray) -> float:
    """Area under the ROC curve of (n,) targets 0/1 and scores; NaN where there is but one class."""
    if len(np.unique(target)) < 2:
        return float('nan')
    return float(roc_auc_score(target, pred))


def bootstrap(
    target: np.ndarray, preds: Sequence[np.ndarray], group: np.ndarray, seed: int = 0
) -> np.ndarray:
    """AUCs of each of `preds` ((n,) each) over draws of whole groups with replacement.

    Images of one patient are alike, so the patient is what is drawn. A draw is a count for each
    image; its AUC comes from these counts on scores sorted once, instead of a sort a draw. The
    columns share their draws, so that their difference is a paired one.

    Returns: (N_DRAWS, len(preds)); a draw with one class only is NaN.
    """
    code, names = pd.factorize(np.asarray(group), sort=True)  # the same draws in any row order
    sorted_ = []
    for pred in preds:
        order = np.argsort(pred, kind='stable')
        starts = np.flatnonzero(np.r_[True, np.diff(np.asarray(pred)[order]) != 0])  # of ties
        sorted_.append((code[order], np.asarray(target)[order].astype(float), starts))
    rng = np.random.default_rng(seed)
    aucs = np.full((N_DRAWS, len(preds)), np.nan)
    for draw in aucs:
        counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        for column, (codes, targets, starts) in enumerate(sorted_):
            weight = counts[codes]
            positive = np.add.reduceat(weight * targets, starts)
            negative = np.add.reduceat(weight * (1 - targets), starts)
            pairs = positive.sum() * negative.sum()
            below = np.cumsum(negative) - negative / 2  # a tie counts half
            draw[column] = (positive @ below) / pairs if pairs else np.nan
    return aucs


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of (N_DRAWS,) draws; NaN where half of them have no value."""
    if np.isnan(draws).mean() > 0.5:
        return float('nan'), float('nan')
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def table(oof: pd.DataFrame, columns: Sequence[str]) -> str:
    """Printed lines: the AUC of each of `columns` over all of `oof` and within each source.

    `oof` has target, group and source. Where sources are mixed, the AUC of the source alone
    (a source's rate of melanomas as the score) stands beside the pooled figure: what a model
    could reach by telling the archives apart.
    """
    lines = []
    for column in columns:
        lines.append(f'{column:<10} all sources   {describe(oof, column)}')
        if oof.source.nunique() > 1:
            for source, part in oof.groupby('source'):
                lines.append(f'{"":<10} {source:<13} {describe(part, column)}')
    if oof.source.nunique() > 1:
        rate = oof.groupby('source').target.transform('mean')
        lines.append(f'the source alone, no pixel seen: AUC {auc(oof.target, rate):.4f}')
    return '\n'.join(lines)


def describe(oof: pd.DataFrame, column: str) -> str:
    """'AUC .8512 [.8377, .8645] of 6264 images, 996 melanomas', the 95 % interval over groups."""
    counts = f'of {len(oof)} images, {int(oof.target.sum())} melanomas'
    value = auc(oof.target, oof[column])
    if np.isnan(value):
        return f'AUC not defined {counts}: one class only'
    draws = bootstrap(oof.target, [oof[column]], oof.group)
    low, high = interval(draws[:, 0])
    return f'AUC {value:.4f} [{low:.4f}, {high:.4f}] {counts}'


def difference(oof: pd.DataFrame, a: str, b: str) -> str:
    """'+.0031 [+.0010, +.0052]': the AUC of column `a` less that of `b`, over the same draws."""
    draws = bootstrap(oof.target, [oof[a], oof[b]], oof.group)
    low, high = interval(draws[:, 0] - draws[:, 1])
    return f'{auc(oof.target, oof[a]) - auc(oof.target, oof[b]):+.4f} [{low:+.4f}, {high:+.4f}]'
