"""How good predictions are: AUC and what is quoted beside it, each with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from lib.cli import Stop

N_DRAWS = 1000
MIN_CLASS = 20  # below as many melanomas or benign images a subgroup shows its counts only
MOST = 30  # subgroups of a kind, the largest
AGES = [0, 30, 45, 60, 75, np.inf]
AGE_BANDS = ['under 30', '30 to 44', '45 to 59', '60 to 74', '75 and over']
MEASURES = {
    'auc': 'AUC',
    'average_precision': 'average precision',
    'pauc_80': 'pAUC above 80 % sensitivity (0 to .2)',
    'sens_at_spec_80': 'sensitivity at 80 % specificity',
    'sens_at_spec_90': 'sensitivity at 90 % specificity',
    'sens_at_spec_95': 'sensitivity at 95 % specificity',
    'spec_at_sens_95': 'specificity at 95 % sensitivity',
}


class Estimate(NamedTuple):
    """A figure and its 95 % interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return '-'
        if self.low is None:
            return f'{self.value:.4f} [no interval]'
        return f'{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]'


def auc(target: np.ndarray, pred: np.ndarray) -> float:
    """Area under the ROC curve of (n,) targets 0/1 and scores; NaN where there is but one class."""
    if len(np.unique(target)) < 2:
        return float('nan')
    return float(roc_auc_score(target, pred))


def measured(positive: np.ndarray, negative: np.ndarray) -> list[float]:
    """The MEASURES, from the melanomas and benign images at each score, ascending: (k,) counts.

    A threshold calls the scores above it. Sensitivity at a specificity is the best that a
    threshold reaches which keeps at least that specificity, and the other way round. The partial
    AUC is ISIC 2024's: the area of the ROC curve where the sensitivity is above .8, 0 to .2.
    Source: https://www.kaggle.com/competitions/isic-2024-challenge/overview/evaluation
    """
    missed, spared = np.cumsum(positive), np.cumsum(negative)  # with the threshold at each score
    p, n = missed[-1], spared[-1]
    if not p or not n:
        return [np.nan] * len(MEASURES)
    auc = positive @ (spared - negative / 2) / (p * n)  # a tie counts half
    tp, fp = p - missed + positive, n - spared + negative
    precision = (positive / p) @ (tp / np.maximum(tp + fp, 1))
    few, slack = 0.2 * p, 1e-9
    last = np.searchsorted(missed, few)
    x, y = np.r_[0, missed[: last + 1]], np.r_[0, spared[: last + 1]]
    x, y = np.r_[x[:-1], few], np.r_[y[:-1], np.interp(few, x[-2:], y[-2:])]
    partial = np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (p * n)
    sensitivities = [
        1 - missed[np.searchsorted(spared, s * n - slack)] / p for s in (0.8, 0.9, 0.95)
    ]
    last = np.searchsorted(missed, 0.05 * p + slack, side='right') - 1
    return [auc, precision, partial, *sensitivities, spared[last] / n if last >= 0 else 0.0]


def bootstrap(
    target: np.ndarray, preds: Sequence[np.ndarray], group: np.ndarray, seed: int = 0
) -> np.ndarray:
    """The MEASURES of each of `preds` ((n,) each) over draws of whole groups with replacement.

    Images of one patient are alike, so the patient is what is drawn. A draw is a count for each
    image; its measures come from these counts on scores sorted once, instead of a sort a draw.
    The preds share their draws, so that their difference is a paired one.

    Returns: (N_DRAWS, len(preds), len(MEASURES)); a draw with one class only is NaN.
    """
    code, names = pd.factorize(np.asarray(group), sort=True)  # the same draws in any row order
    sorted_ = []
    for pred in preds:
        order, starts = _sorted(np.asarray(pred))
        sorted_.append((code[order], np.asarray(target)[order].astype(float), starts))
    rng = np.random.default_rng(seed)
    draws = np.full((N_DRAWS, len(preds), len(MEASURES)), np.nan)
    for draw in draws:
        counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        counts = counts.astype(float)
        for column, (codes, targets, starts) in enumerate(sorted_):
            weight = counts[codes]
            positive = weight * targets
            negative = weight - positive
            if len(starts) < len(codes):
                positive = np.add.reduceat(positive, starts)
                negative = np.add.reduceat(negative, starts)
            draw[column] = measured(positive, negative)
    return draws


def _sorted(pred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `pred` (n,) in ascending order, and where each new score begins among them."""
    order = np.argsort(pred, kind='stable')
    return order, np.flatnonzero(np.r_[True, np.diff(pred[order]) != 0])


def interval(draws: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The 95 % percentile interval of (N_DRAWS,) draws; None where half of them have no value."""
    if np.isnan(draws).mean() > 0.5:
        return None, None
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def part(oof: pd.DataFrame, pred: str) -> dict[str, Any]:
    """Counts of the rows of `oof` (target, group, and the column `pred`) and their MEASURES.

    Returns: `images`, `melanomas`, `groups`, an Estimate a measure, and a `note` where a figure
    cannot be had: a sentence instead of a made-up number. Raises: Stop where a score is NaN.
    """
    return _part(oof, pred)[0]


def _part(oof: pd.DataFrame, pred: str, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """`part`, and the draws of the AUC, (N_DRAWS,)."""
    target, scores = oof.target.to_numpy(), oof[pred].to_numpy(dtype=float)
    if not np.isfinite(scores).all():
        raise Stop(
            f'{(~np.isfinite(scores)).sum()} of {len(scores)} scores in {pred} are no number'
        )
    found = {'images': len(oof), 'melanomas': int(target.sum()), 'groups': int(oof.group.nunique())}
    nothing = np.full(N_DRAWS, np.nan)
    if len(np.unique(target)) < 2:
        return found | {'note': 'one class only, so that nothing can be ranked'}, nothing
    order, starts = _sorted(scores)
    ordered = target[order].astype(float)
    values = measured(np.add.reduceat(ordered, starts), np.add.reduceat(1 - ordered, starts))
    if found['groups'] < 2:
        found['note'] = 'a single patient, so that there is no interval'
        return found | dict(zip(MEASURES, map(Estimate, values), strict=True)), nothing
    if len(starts) == 1:
        found['note'] = 'all predictions are the same'
    draws = bootstrap(target, [scores], oof.group, seed)[:, 0]
    for k, name in enumerate(MEASURES):
        found[name] = Estimate(float(values[k]), *interval(draws[:, k]))
    return found, draws[:, 0]


def ranked(pred: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Scores as ranks within each fold, between 0 and 1, a tie as its mean: (n,).

    The models of two folds may differ in level, which costs a pooled AUC; ranks have no level.
    """
    of_fold = pd.Series(np.asarray(pred)).groupby(np.asarray(fold), dropna=False)
    return ((of_fold.rank() - 0.5) / of_fold.transform('size')).to_numpy()


def summary(oof: pd.DataFrame, pred: str = 'pred') -> dict[str, Any]:
    """All that is said of one column of out-of-fold predictions, as saved in JSON.

    `oof`: target, group, source, fold, the column `pred`; sex, age_approx (years), anatom_site if
    known. Returns: what `overall` does, and `subgroups`.
    """
    return overall(oof, pred) | {'subgroups': subgroups(oof, pred)}


def overall(oof: pd.DataFrame, pred: str = 'pred') -> dict[str, Any]:
    """What is said of all rows of `oof` together (target, group, source, fold, and `pred`).

    Returns: `pooled`, `drawn`, `ranked` (pooled after ranking within each fold), `folds`,
    `fold_mean` and `fold_sd` of the folds' AUCs, `sources`, `source_alone` (the AUC of a source's
    rate of melanomas as the score: what telling the archives apart is worth).
    """
    found = {'pooled': part(oof, pred), 'drawn': drawn(oof)}
    in_folds = oof.assign(**{pred: ranked(oof[pred], oof.fold)})
    found['ranked'] = {'auc': part(in_folds, pred).get('auc', Estimate(None))}
    # a seed each: with the same draws in all folds their mean would vary too much
    folds = {str(k): _part(rows, pred, int(k)) for k, rows in oof.groupby('fold')}
    found['folds'] = {k: figures for k, (figures, _) in folds.items()}
    aucs = [figures['auc'].value for figures, _ in folds.values() if 'auc' in figures]
    if aucs:
        # no group is in two folds, so that draw by draw is as good as any pairing
        draws = np.mean([draws for figures, draws in folds.values() if 'auc' in figures], axis=0)
        found['fold_mean'] = Estimate(float(np.mean(aucs)), *interval(draws))
    if len(aucs) > 1:
        found['fold_sd'] = float(np.std(aucs, ddof=1))
    if oof.source.nunique() > 1:
        found['sources'] = by_source(oof, pred)
        rate = oof.groupby('source').target.transform('mean')
        found['source_alone'] = auc(oof.target, rate)
    return found


def drawn(oof: pd.DataFrame) -> str:
    """What an interval draws, in words."""
    if oof.group.nunique() == len(oof) > 1:
        return 'images (no patient with several is known; else the interval is too narrow)'
    return 'patients or lesions'


def by_source(oof: pd.DataFrame, pred: str) -> dict[str, dict[str, Any]]:
    """`part` of each source."""
    return {source: part(rows, pred) for source, rows in oof.groupby('source')}


def subgroups(oof: pd.DataFrame, pred: str) -> dict[str, dict[str, dict[str, Any]]]:
    """`part` of each sex, age band, site and source; of a small one the counts alone."""
    by = {
        'sex': oof.get('sex'),
        'age': oof.get('age_approx'),
        'site': oof.get('anatom_site'),
        'source': oof.source if oof.source.nunique() > 1 else None,
    }
    if by['age'] is not None:
        by['age'] = pd.cut(by['age'], AGES, right=False, labels=AGE_BANDS).astype('str')
    found = {}
    for name, values in by.items():
        if values is None or values.isna().all():
            continue
        values = values.fillna('not known')
        values = values.where(values.isin(values.value_counts().index[:MOST]), 'others')
        groups = oof.groupby(values)
        order = [band for band in AGE_BANDS if band in groups.groups] if name == 'age' else []
        for value in [*order, *(g for g in groups.groups if g not in order)]:
            rows = groups.get_group(value)
            n, melanomas = len(rows), int(rows.target.sum())
            if min(melanomas, n - melanomas) < MIN_CLASS:
                note = f'fewer than {MIN_CLASS} melanomas or benign images'
                found.setdefault(name, {})[value] = {
                    'images': n, 'melanomas': melanomas, 'note': note,
                }  # fmt: skip
            else:
                found.setdefault(name, {})[value] = part(rows, pred)
    return found


def lines(summaries: Mapping[str, dict[str, Any]]) -> str:
    """Printed lines: a figure a row, a column for each of `summaries`, by its name."""
    every = list(summaries.values())
    rows: list[tuple[str, list[str]]] = [('', list(summaries))]

    def add(label: str, values: list[Any], note: str = '') -> None:
        rows.append((label, [*map(str, values), note]))

    def counts(figures: dict[str, Any]) -> str:
        text = f'{figures["images"]} images, {figures["melanomas"]} melanomas'
        return text + (f'; {figures["note"]}' if 'note' in figures else '')

    def take(figures: list[dict[str, Any]], name: str = 'auc') -> list[Estimate]:
        return [f.get(name, Estimate(None)) for f in figures]

    pooled = [s['pooled'] for s in every]
    add('AUC, pooled', take(pooled), counts(pooled[0]))
    add('  ranked in each fold', take([s['ranked'] for s in every]))
    if 'fold_mean' in every[0]:
        sds = ', '.join(f'{s["fold_sd"]:.4f}' for s in every if 'fold_sd' in s)
        n = sum('auc' in figures for figures in every[0]['folds'].values())
        text = f'over {n} folds' + (f', sd {sds}' if sds else '')
        add('  mean over folds', take(every, 'fold_mean'), text)
    for source in every[0].get('sources', {}):
        inside = [s['sources'][source] for s in every]
        add(f'  within {source}', take(inside), counts(inside[0]))
    if 'source_alone' in every[0]:
        alone = f'{every[0]["source_alone"]:.4f}'
        add('  the source alone', [alone] * len(every), 'no pixel seen')
    for name, label in list(MEASURES.items())[1:]:
        if name in pooled[0]:
            add(label, take(pooled, name))
    widths = [max(len(label) for label, _ in rows)]
    widths += [max(len(cells[k]) for _, cells in rows) for k in range(len(every))]
    return '\n'.join(
        '  '.join(f'{cell:<{w}}' for cell, w in zip([label, *cells], [*widths, 0], strict=False))
        .rstrip()
        for label, cells in rows
    )  # fmt: skip


class Difference(NamedTuple):
    """An AUC less another one, its 95 % interval, and the p value of no difference."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None

    def __str__(self) -> str:
        if self.value is None:
            return '-'
        if self.low is None:
            return f'{self.value:+.4f} [no interval]'
        least = 2 / (N_DRAWS + 1)  # what as many draws can tell from nothing
        p = f'p < {least:.3f}' if self.p <= least else f'p = {self.p:.3f}'
        return f'{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}], {p}'


def compare(
    target: np.ndarray,
    preds: Sequence[np.ndarray],
    group: np.ndarray,
    base: int | None = None,
) -> tuple[list[Estimate], int, list[Difference]]:
    """The AUC of each of `preds` ((n,) each), and each one's AUC less that of `preds[base]`, by
    default the best one's; with the number of that one between.

    Differences are paired, over the same draws of groups. p is twice the share of draws on the
    other side of zero.
    """
    values = np.array([auc(target, pred) for pred in preds])
    if np.isnan(values).any():  # one class only
        nothing = Difference(None, None, None, None)
        return [Estimate(None)] * len(preds), base or 0, [nothing] * len(preds)
    base = int(np.argmax(values)) if base is None else base
    draws = np.full((N_DRAWS, len(preds)), np.nan)
    if pd.Series(np.asarray(group)).nunique() > 1:
        draws = bootstrap(target, preds, group)[:, :, 0]
    estimates, differences = [], []
    for k, value in enumerate(map(float, values)):
        estimates.append(Estimate(value, *interval(draws[:, k])))
        apart = draws[:, k] - draws[:, base]
        low, high = interval(apart)
        p = None
        if low is not None:
            apart = apart[~np.isnan(apart)]
            tail = (1 + min((apart <= 0).sum(), (apart >= 0).sum())) / (1 + len(apart))
            p = float(min(1, 2 * tail))
        differences.append(Difference(value - float(values[base]), low, high, p))
    return estimates, base, differences


def curves(
    target: np.ndarray, pred: np.ndarray, group: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """The ROC and precision-recall curves with 95 % bands over draws of whole groups.

    Returns: `grid`, (101,) of 0..1; `roc`, the sensitivity at these shares of false alarms, and
    `precision` at these sensitivities: (101, 3) each: value, low, high.
    """
    grid = np.linspace(0, 1, 101)
    order = np.argsort(-pred, kind='stable')
    code, names = pd.factorize(np.asarray(group), sort=True)
    code, positive = code[order], target[order].astype(float)
    ends = np.flatnonzero(np.r_[np.diff(pred[order]) != 0, True])  # of ties

    def at(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = counts[code]
        tp = np.cumsum(weight * positive)[ends]
        called = np.cumsum(weight)[ends]
        fp = called - tp
        if not tp[-1] or not fp[-1]:
            return np.full((2, len(grid)), np.nan)
        roc = np.interp(grid, np.r_[0, fp / fp[-1]], np.r_[0, tp / tp[-1]])
        reached = np.searchsorted(tp, np.maximum(grid * tp[-1] - 1e-9, 1e-9))
        return roc, (tp / np.maximum(called, 1))[np.minimum(reached, len(tp) - 1)]

    value = np.array(at(np.ones(len(names))))
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(names), size=(200, len(names)))
    drawn = [at(np.bincount(d, minlength=len(names)).astype(float)) for d in draws]
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    roc, precision = (np.column_stack([value[k], low[k], high[k]]) for k in (0, 1))
    return {'grid': grid, 'roc': roc, 'precision': precision}


def rank_correlations(preds: Sequence[np.ndarray]) -> np.ndarray:
    """Spearman's correlation of each two of `preds`, (k, k); a constant agrees with nothing."""
    ranks = np.array([rankdata(pred) for pred in preds])
    if ranks.shape[1] < 2:
        return np.eye(len(ranks))
    with np.errstate(invalid='ignore'):
        found = np.atleast_2d(np.corrcoef(ranks))
    return np.where(np.eye(len(ranks), dtype=bool), 1.0, np.nan_to_num(found))
