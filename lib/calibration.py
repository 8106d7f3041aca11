"""Probabilities from predictions: how they are calibrated, how good they are, and thresholds."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from lib.cli import Stop
from lib.prior import class_weights, evaluation_rows, fit_odds, melanoma_rate, to_prior

SENSITIVITIES = (0.8, 0.85, 0.9, 0.95, 0.98)
N_BINS = 10
TINY = 1e-7  # keeps probabilities off 0 and 1, which have no finite logit
Curve = Callable[[np.ndarray], np.ndarray]  # from pred to prob, (n,) both


def fit_platt(pred: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Curve:
    """A logistic curve over the logit of `pred` (Platt). Raises: Stop where its slope is negative.

    Source: Platt 1999, Probabilistic outputs for support vector machines.
    """
    slope, intercept = _fit_logistic(logit(np.clip(pred, TINY, 1 - TINY)), target, weight)
    if slope <= 0:
        raise Stop('targets of 1 have lower predictions than of 0; leave --calibrate out')
    return lambda p: expit(slope * logit(p) + intercept)


def _fit_logistic(x: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """The slope and intercept of a logistic curve over `x` (n,), without a penalty."""
    # scikit-learn's default solver stops too early where x varies little
    newton = LogisticRegression(C=np.inf, solver='newton-cholesky', tol=1e-10, max_iter=1000)
    curve = newton.fit(x[:, None], target, weight)
    return float(curve.coef_[0, 0]), float(curve.intercept_[0])


def fit_platt_across_folds(
    pred: np.ndarray,
    oof: pd.DataFrame,
    own: np.ndarray,
    prior: float,
    pred_without: Callable[[int], np.ndarray] | None = None,
) -> tuple[np.ndarray, Curve]:
    """Out-of-fold probabilities (n,) for the rows of `oof` (target, fold), and the final curve.

    Each fold's probabilities come from a curve that is fitted to the other folds; the final curve
    is fitted to all. Only rows of `own`, (n,) bool, are fitted to. `pred_without(k)` is `pred` (n,)
    as it would be without the targets of fold k; None where `pred` was not fitted to targets.
    Raises: Stop where a class is missing.
    """
    target, fold = oof.target.to_numpy(), oof.fold.to_numpy()

    def fit(pred: np.ndarray, rows: np.ndarray) -> Curve:
        if len(np.unique(target[rows])) < 2:
            raise Stop('--calibrate platt needs targets of 0 and of 1 in every fold')
        return fit_platt(pred[rows], target[rows], class_weights(target[rows], prior))

    prob = np.empty(len(pred))
    for k in np.unique(fold):
        others = pred if pred_without is None else pred_without(k)
        prob[fold == k] = fit(others, own & (fold != k))(pred[fold == k])
    return prob, fit(pred, own)


class Quality(NamedTuple):
    """How well calibrated probabilities are; the best values are 0, 0, 1 and 0."""

    brier: float  # mean squared difference from the target
    ece: float  # expected calibration error, over bins of as many images each
    slope: float | None  # calibration slope; below 1 the probabilities are too extreme
    intercept: float | None  # to be added to the logit; below 0 the probabilities are too high


def measure_quality(target: np.ndarray, prob: np.ndarray, weight: np.ndarray) -> Quality:
    """The Quality of (n,) probabilities; without a slope where there is one class or one value."""
    brier = float(np.average((prob - target) ** 2, weights=weight))
    bins = reliability(target, prob, weight)
    ece = float(np.average((bins.predicted - bins.observed).abs(), weights=bins.weight))
    x = logit(np.clip(prob, TINY, 1 - TINY))
    if len(np.unique(target)) < 2 or np.ptp(x) == 0:
        return Quality(brier, ece, None, None)
    slope, _ = _fit_logistic(x, target, weight)
    rate = np.average(target, weights=weight)
    intercept = brentq(lambda a: np.average(expit(x + a), weights=weight) - rate, -50, 50)
    return Quality(brier, ece, slope, float(intercept))


def reliability(target: np.ndarray, prob: np.ndarray, weight: np.ndarray) -> pd.DataFrame:
    """A reliability diagram's bins, a row each: the weighted means `predicted` and `observed`, the
    bin's `weight`, and its number of `images`. Bins have as many images each, but for ties."""
    edges = np.unique(np.quantile(prob, np.linspace(0, 1, N_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, prob, side='right') - 1, 0, max(len(edges) - 2, 0))
    columns = {'predicted': weight * prob, 'observed': weight * target, 'weight': weight}
    table = pd.DataFrame(columns | {'images': 1}).groupby(bins).sum()
    means = table[['predicted', 'observed']].div(table.weight, axis=0)
    return table.assign(**means)


def threshold(target: np.ndarray, pred: np.ndarray, sensitivity: float) -> float:
    """The highest `pred` that at least `sensitivity` of the melanomas reach; there must be one."""
    melanomas = np.sort(pred[target == 1])[::-1]
    return float(melanomas[int(np.ceil(sensitivity * len(melanomas) - 1e-9)) - 1])


def thresholds(
    target: np.ndarray, pred: np.ndarray, curve: Curve, prior: float
) -> list[dict[str, float]]:
    """A decision threshold for each of SENSITIVITIES, and its cost at a rate of melanomas `prior`.

    A row has the sensitivity that is `wanted` and reached, the threshold in `pred` and in `prob`,
    and how many of 1,000 lesions are true positives, false negatives and false positives.
    """
    rows = []
    for wanted in SENSITIVITIES:
        at = threshold(target, pred, wanted)
        sensitivity = float(np.mean(pred[target == 1] >= at))
        specificity = float(np.mean(pred[target == 0] < at))
        row = {'wanted': wanted, 'sensitivity': sensitivity, 'specificity': specificity}
        row |= {'pred': at, 'prob': float(curve(np.array([at]))[0])}
        row['true_positives'] = 1000 * prior * sensitivity
        row['false_negatives'] = 1000 * prior * (1 - sensitivity)
        row['false_positives'] = 1000 * (1 - prior) * (1 - specificity)
        rows.append(row)
    return rows


def add_prob(
    oof: pd.DataFrame,
    test: pd.DataFrame | None,
    blend: dict[str, Any],
    pred_without: Callable[[int], np.ndarray] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame | None, dict[str, Any]]:
    """Add a column `prob` to `oof` (target, source, fold, pred) and `test` (pred).

    `blend` holds `odds`, at which the models were trained, or None and the reason in `no_odds`;
    `of_ranks`; `calibrate`, which is 'platt', or None to move `pred` to the rate `prior`; and
    `prior`, or None for the rate of the competition's own images. `pred_without` is as in
    `fit_platt_across_folds`.

    Returns: the two tables, and facts about `prob`: the `prior`, the `population` it is judged on,
    its Quality `before` and `after`, the bins of the reliability diagram, and the thresholds; or
    only a `note` that says why there are no probabilities.
    """
    try:
        prob, curve, facts = _calibrate(oof, blend, pred_without)
    except Stop as why:  # such as one class only; the submission is written all the same
        return oof, test, {'note': str(why)}
    if test is not None:
        test = test.assign(prob=curve(test.pred.to_numpy()))
    return oof.assign(prob=prob), test, facts


def _calibrate(
    oof: pd.DataFrame,
    blend: dict[str, Any],
    pred_without: Callable[[int], np.ndarray] | None,
) -> tuple[np.ndarray, Curve, dict[str, Any]]:
    pred, target = oof.pred.to_numpy(), oof.target.to_numpy()
    if blend['of_ranks'] and oof.source.nunique() > 1:
        raise Stop(
            'out-of-fold predictions were ranked over all sources and test predictions among '
            'themselves, so no curve fits both; --how mean gives probabilities'
        )
    own, population = evaluation_rows(oof)
    odds, calibrate, prior = (blend[key] for key in ('odds', 'calibrate', 'prior'))
    prior = melanoma_rate(oof, prior)
    weight = class_weights(target[own], prior)  # ones, where these rows have that rate
    if not np.allclose(weight, 1):
        population += f', weighted to the rate {prior:.4g}'
    facts = {'prior': prior, 'population': population, 'odds': odds, 'calibrate': calibrate}
    if odds is None:
        facts['no_odds'] = blend['no_odds']
    if calibrate is not None:
        prob, curve = fit_platt_across_folds(pred, oof, own, prior, pred_without)
    else:
        trained_at = fit_odds(pred[own], prior, weight) if odds is None else odds
        curve = partial(to_prior, prior=prior, odds=trained_at)
        prob = curve(pred)
    if len(np.unique(target[own])) > 1:
        for name, values in (('before', pred[own]), ('after', prob[own])):
            facts[name] = measure_quality(target[own], values, weight)._asdict()
            facts[f'bins_{name}'] = reliability(target[own], values, weight).to_dict('records')
        facts['thresholds'] = thresholds(target[own], pred[own], curve, prior)
    return prob, curve, facts


def describe(facts: dict[str, Any]) -> str:
    """A sentence that says how `prob` was computed, and on which images it is judged."""
    if 'note' in facts:
        return f'no prob: {facts["note"]}'
    rate = f'the rate {facts["prior"]:.4g}'
    if facts['calibrate']:
        method = f'fitted by {facts["calibrate"]} across folds; the curve comes from the models of '
        method += 'single folds and is applied to the mean of all'
    elif facts['odds'] is None:
        method = f'pred moved so that its mean is {rate}, since {facts["no_odds"]}'
    else:
        method = f'pred moved from odds of {facts["odds"]:.3g} to {rate}'
    return f'probabilities: {method}; judged on {facts["population"]}'


def format_quality(facts: dict[str, Any]) -> str:
    """The sentence of `describe`, and a table of the Quality before and after."""
    if 'before' not in facts:
        return describe(facts)
    table = pd.DataFrame({name: facts[name] for name in ('before', 'after')}, dtype=float).T
    table = table.rename(columns={'brier': 'Brier', 'ece': 'ECE'})
    table = table.to_string(float_format='{:.4f}'.format, na_rep='-')
    return f'{describe(facts)}\n{table}'
