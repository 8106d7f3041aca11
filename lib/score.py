"""How good predictions are: measures, their intervals over patients, and paired comparisons."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.special import expit, logit
from scipy.stats import t
from sklearn.metrics import roc_auc_score

from lib.cli import Stop

N_DRAWS = 1000
MEASURES = {
    'auc': 'AUC',
    'average_precision': 'average precision',
    'pauc_80': 'pAUC above 80 % sensitivity (0 to .2)',
    'sens_at_spec_80': 'sensitivity at 80 % specificity',
    'sens_at_spec_90': 'sensitivity at 90 % specificity',
    'sens_at_spec_95': 'sensitivity at 95 % specificity',
    'spec_at_sens_95': 'specificity at 95 % sensitivity',
}
TOPS = {'pauc_80': 0.2}  # the highest value, where it is not 1


def format_estimate(value: float, low: float, high: float, digits: str = '.4f') -> str:
    """A figure and its 95 % interval as text; NaN stands for what cannot be computed."""
    if np.isnan(value):
        return '-'
    return f'{value:{digits}}' + ('' if np.isnan(low) else f' [{low:{digits}}, {high:{digits}}]')


def auc(target: np.ndarray, pred: np.ndarray) -> float:
    """Area under the ROC curve of (n,) targets 0/1 and scores; NaN where there is but one class."""
    return float(roc_auc_score(target, pred)) if len(np.unique(target)) > 1 else float('nan')


def measures_from_counts(positive: np.ndarray, negative: np.ndarray) -> list[float]:
    """The MEASURES, from the malignant and benign images at each score, ascending: (k,) counts.

    Sensitivity at a specificity is the best that any threshold reaches while it keeps at least that
    specificity, and the other way round. The partial AUC is the one that ISIC 2024 is scored by:
    the area between the ROC curve and the line of 80 % sensitivity, from 0 to .2.
    Source: https://www.kaggle.com/competitions/isic-2024-challenge/overview/evaluation
    """
    fn, tn = np.cumsum(positive), np.cumsum(negative)  # with the threshold at each score
    p, n = fn[-1], tn[-1]
    if not p or not n:
        return [np.nan] * len(MEASURES)
    auc = positive @ (tn - negative / 2) / (p * n)  # a tie counts half
    tp, fp = p - fn + positive, n - tn + negative
    precision = (positive / p) @ (tp / np.maximum(tp + fp, 1))

    most, slack = 0.2 * p, 1e-9  # most: the malignant images that may be missed
    last = np.searchsorted(fn, most)
    x, y = (np.concatenate([[0.0], counts[: last + 1]]) for counts in (fn, tn))
    x[-1], y[-1] = most, np.interp(most, x[-2:], y[-2:])
    partial = np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (p * n)

    sensitivities = [1 - fn[np.searchsorted(tn, s * n - slack)] / p for s in (0.8, 0.9, 0.95)]
    last = np.searchsorted(fn, 0.05 * p + slack, side='right') - 1
    return [auc, precision, partial, *sensitivities, tn[last] / n if last >= 0 else 0.0]


def resample(group: np.ndarray, n_draws: int, seed: int) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Draw whole groups with replacement, since images of one patient are alike.

    Returns: the number of each image's group, (n,), and for each draw how often each group is in
    it, (groups,) float.
    """
    code, names = pd.factorize(np.asarray(group), sort=True)  # the same draws in any row order
    rng, n = np.random.default_rng(seed), len(names)
    draws = (rng.integers(n, size=n) for _ in range(n_draws))
    return code, (np.bincount(draw, minlength=n).astype(float) for draw in draws)


def bootstrap(
    target: np.ndarray, preds: Sequence[np.ndarray], group: np.ndarray, seed: int = 0
) -> np.ndarray:
    """The MEASURES of each of `preds` ((n,) each) in the same N_DRAWS draws of whole groups.

    Returns: (N_DRAWS, len(preds), len(MEASURES)); NaN in a draw of one class, or of one group only.
    """
    draws = np.full((N_DRAWS, len(preds), len(MEASURES)), np.nan)
    code, weights = resample(group, N_DRAWS, seed)
    if code.max() > 0:
        counts = [_count_by_group(target, pred, code) for pred in preds]
        for draw, weight in zip(draws, weights, strict=True):
            draw[:] = [measures_from_counts(*(count @ weight for count in both)) for both in counts]
    return draws


def _count_by_group(target: np.ndarray, pred: np.ndarray, code: np.ndarray) -> list[csr_array]:
    """How many malignant and how many benign images each group has at each score, ascending: two
    (scores, groups). `code`: the number of each image's group, (n,).

    Scores that follow each other without a malignant image count as one, which leaves every measure
    as it is: so a draw costs as much as there are groups and malignant images, however many are
    benign. On 401,059 images with 393 malignant lesions of 1,042 patients, as ISIC 2024 has, all
    figures of a summary took 9 s instead of 247 s with counts by image, on one core, and 0.3 GB.
    """
    target, pred = np.asarray(target), np.asarray(pred)
    order = np.argsort(pred, kind='stable')  # once for all draws
    is_malignant = target[order] == 1
    is_new = np.r_[True, np.diff(pred[order]) != 0]  # where each score begins
    with_malignant = np.logical_or.reduceat(is_malignant, np.flatnonzero(is_new))
    begins = with_malignant | np.r_[True, with_malignant[:-1]]
    place = (np.cumsum(begins) - 1)[np.cumsum(is_new) - 1]
    shape, code = (place[-1] + 1, code.max() + 1), code[order]
    return [
        csr_array((np.ones(of_class.sum()), (place[of_class], code[of_class])), shape)
        for of_class in (is_malignant, ~is_malignant)
    ]


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of (N_DRAWS,) draws; NaN where over half have no value, or where
    they do not vary."""
    if np.isnan(draws).mean() > 0.5 or np.nanstd(draws) == 0:
        return np.nan, np.nan
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def logit_interval(
    value: float, draws: np.ndarray, n_groups: int, nearest: float, top: float = 1.0
) -> tuple[float, float]:
    """The 95 % interval of a `value` between 0 and `top`: about two standard deviations of its
    (N_DRAWS,) draws to either side, on the logit, by Student's t with `n_groups` - 1 degrees of
    freedom; NaN where the draws tell none, as in `percentile_interval`.

    `n_groups`: groups with a malignant image. `nearest`: how near to 0 and `top`, where the logit
    is infinite, a share of `top` counts. Percentiles of the draws are too narrow where malignant
    images are few. On simulated patients (300 sets each), 37 with a melanoma and an AUC of .967
    percentiles hold the truth in 88 %, 1.96 standard deviations in 94 % and this interval in 95 %;
    with 15 of them and an AUC of .901 in 88, 94 and 96 %. With 15, percentiles hold the partial AUC
    in 73 to 86 %, and this interval in 93 %; the specificity at 95 % sensitivity in 68 to 82 % and
    in 93 to 94 %.
    """
    if np.isnan(percentile_interval(draws)[0]):
        return np.nan, np.nan
    spread = np.nanstd(logit(np.clip(draws / top, nearest, 1 - nearest)))
    center = logit(np.clip(value / top, nearest, 1 - nearest))
    width = spread * t.ppf(0.975, n_groups - 1)
    low, high = top * expit(center - width), top * expit(center + width)
    return float(min(low, value)), float(max(high, value))


def measure(oof: pd.DataFrame, pred: str = 'pred', least: int = 1) -> pd.DataFrame:
    """The MEASURES of the column `pred` in `oof` (target, group): a row each, by name.

    The columns are value, low and high (the 95 % interval), NaN where they cannot be computed, as
    with fewer than `least` images of a class, and in every row the numbers of `images` and of
    `malignant` ones, and a `note` that says why a figure is missing. Raises: Stop where a score is
    not a number.
    """
    target, scores = oof.target.to_numpy(), oof[pred].to_numpy(dtype=float)
    if n_wrong := int((~np.isfinite(scores)).sum()):
        raise Stop(f'{n_wrong} of {len(scores)} scores in {pred} are not numbers')
    counts = {'images': len(oof), 'malignant': int(target.sum()), 'note': ''}
    rows = pd.DataFrame({'value': np.nan, 'low': np.nan, 'high': np.nan} | counts, list(MEASURES))
    if len(np.unique(target)) < 2 and least == 1:
        return rows.assign(note='one class only, so that nothing can be ranked')
    if min(target.sum(), len(target) - target.sum()) < least:
        return rows.assign(note=f'fewer than {least} of a class')
    if np.ptp(scores) == 0:
        rows['note'] = 'all predictions are the same'
    of_all = _count_by_group(target, scores, np.zeros(len(oof), dtype=int))
    rows['value'] = measures_from_counts(*(count.sum(axis=1) for count in of_all))
    n_groups, n_pairs = _malignant_groups(target, oof.group), target.sum() * (1 - target).sum()
    if n_groups < 2:  # images of one patient are alike: how much others differ is not known
        return rows.assign(
            note='one patient has all malignant images, so that there is no interval'
        )
    draws = bootstrap(target, [scores], oof.group)[:, 0]
    rows[['low', 'high']] = [percentile_interval(of_measure) for of_measure in draws.T]
    halves = {'auc': 0.5 / n_pairs, 'pauc_80': 0.5 / n_pairs}  # of a measure's smallest step
    for name, half in (halves | {'spec_at_sens_95': 0.5 / (1 - target).sum()}).items():
        of_measure, top = draws[:, list(MEASURES).index(name)], TOPS.get(name, 1.0)
        interval = logit_interval(rows.value[name], of_measure, n_groups, half, top)
        rows.loc[name, ['low', 'high']] = interval
    return rows


def _malignant_groups(target: np.ndarray, group: np.ndarray) -> int:
    return len(np.unique(np.asarray(group)[np.asarray(target) == 1]))


def rank_within_folds(pred: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Scores as ranks within each fold, between 0 and 1, a tie as its mean: (n,).

    The models of two folds may differ in level, which costs a pooled AUC; ranks have no level.
    """
    of_fold = pd.Series(np.asarray(pred)).groupby(np.asarray(fold), dropna=False)
    return ((of_fold.rank() - 0.5) / of_fold.transform('size')).to_numpy()


def compare_paired(
    target: np.ndarray, preds: Sequence[np.ndarray], base: int, group: np.ndarray
) -> pd.DataFrame:
    """The AUC of each of `preds` ((n,) each), and each one's AUC less that of `preds[base]`.

    Returns: a row for each, with auc, auc_low, auc_high, difference, difference_low and
    difference_high (95 % intervals) and p; NaN where there is one class only, and without an
    interval where draws tell none. Differences are paired, over the same draws of groups: interval
    and p are those of Student's t on the standard deviation of the draws, which holds where few
    groups have a malignant image; percentiles do not. p holds for a base that was chosen without
    looking at these AUCs.
    """
    target, n_groups = np.asarray(target), _malignant_groups(target, group)
    values, rows = [auc(target, pred) for pred in preds], []
    draws = bootstrap(target, preds, group)[:, :, 0]
    nearest = 0.5 / max(target.sum() * (1 - target).sum(), 1)
    for value, of_pred in zip(values, draws.T, strict=True):
        apart, difference = of_pred - draws[:, base], value - values[base]
        interval = low, high, p = (np.nan,) * 3
        if n_groups > 1:
            interval = logit_interval(value, of_pred, n_groups, nearest)
            if not np.isnan(percentile_interval(apart)[0]):
                spread = np.nanstd(apart)
                width = spread * t.ppf(0.975, n_groups - 1)
                low, high = difference - width, difference + width
                p = 2 * t.sf(abs(difference) / spread, n_groups - 1)
        rows.append((value, *interval[:2], difference, low, high, p))
    names = ['auc', 'auc_low', 'auc_high', 'difference', 'difference_low', 'difference_high', 'p']
    return pd.DataFrame(rows, columns=names)


def format_difference(row: pd.Series) -> str:
    """A difference, its interval and its p, from a row of `compare_paired`, as text."""
    figures = row.difference, row.difference_low, row.difference_high
    p = ', p < 0.001' if row.p < 0.001 else f', p = {row.p:.3f}'
    return format_estimate(*figures, '+.4f') + ('' if np.isnan(row.p) else p)
