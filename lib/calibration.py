"""Predictions to probabilities: moved to a rate or fitted by Platt, judged, decision thresholds."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from lib.cli import Stop
from lib.prior import class_weights, evaluation_rows, melanoma_rate, odds_of_level, to_prior

SENSITIVITIES = (0.8, 0.85, 0.9, 0.95, 0.98)
N_BINS = 10
TINY = 1e-7  # a logit needs a probability inside of 0..1
Curve = Callable[[np.ndarray], np.ndarray]  # from pred to prob, (n,) both


def fit_platt(pred: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Curve:
    """A logistic curve over the logit of `pred`. Raises: Stop where it would fall.

    Source: Platt 1999, Probabilistic outputs for support vector machines.
    """
    slope, intercept = _fit_logistic(logit(np.clip(pred, TINY, 1 - TINY)), target, weight)
    if slope <= 0:
        raise Stop(
            'platt finds that targets of 1 have the lower predictions; leave --calibrate out'
        )
    return lambda p: expit(slope * logit(p) + intercept)


def _fit_logistic(x: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """The slope and intercept of a logistic curve over `x` (n,), without a penalty."""
    # scikit-learn's default stops early where x varies little, as the logits of a young model do
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
    """Probabilities of `oof` (target, fold), each fold's by the curve of the other folds' `own`
    rows, (n,), and the curve of all `own` rows. Raises: Stop where a class is missing.

    `pred_without`: of a fold, gives what `pred` (n,) would be if that fold's targets were not
    known; None where `pred` was not fitted to targets.
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
    """How far probabilities can be believed; the best is 0, 0, 1 and 0."""

    brier: float  # mean squared distance from the truth
    ece: float  # mean distance of a bin's mean probability from its rate, equal-mass bins
    slope: float | None  # of the truth's logit over the probability's; below 1: too extreme
    intercept: float | None  # what to add to the logit for the right mean; below 0: too high


def measure_quality(target: np.ndarray, prob: np.ndarray, weight: np.ndarray) -> Quality:
    """The Quality of (n,) probabilities; no slope where one class is missing or all are equal."""
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
    """A row a bin of as many images each (equal probabilities stay in one bin): the weighted means
    `predicted` and `observed`, the bin's `weight`, and `images`."""
    edges = np.unique(np.quantile(prob, np.linspace(0, 1, N_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, prob, side='right') - 1, 0, max(len(edges) - 2, 0))
    columns = {'predicted': weight * prob, 'observed': weight * target, 'weight': weight}
    table = pd.DataFrame(columns | {'images': 1}).groupby(bins).sum()
    means = table[['predicted', 'observed']].div(table.weight, axis=0)
    return table.assign(**means)


def threshold(target: np.ndarray, pred: np.ndarray, sensitivity: float) -> float:
    """The highest value of `pred` such that at least `sensitivity` of the melanomas reach it.

    Raises: Stop where there is no melanoma.
    """
    melanomas = np.sort(pred[target == 1])[::-1]
    if not len(melanomas):
        raise Stop('there is no target of 1 to choose a threshold by')
    return float(melanomas[int(np.ceil(sensitivity * len(melanomas) - 1e-9)) - 1])


def thresholds(
    target: np.ndarray, pred: np.ndarray, curve: Curve, prior: float
) -> list[dict[str, float]]:
    """What each of SENSITIVITIES costs, of 1,000 lesions of which `prior` are melanomas: a row each
    of the sensitivity `wanted` and reached, and of its threshold in `pred` and in `prob`."""
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
    """`oof` (target, source, fold, pred) and `test` (pred) with `prob` beside `pred`.

    `blend`: `odds`, what the models were trained at, or None and in `no_odds` why; `of_ranks`;
    `calibrate`, 'platt', or None to move `pred` to the rate `prior`, once; `prior`, None for the
    rate of the competition's own images. `pred_without`: as in `fit_platt_across_folds`.

    Returns: the two tables, and what to say of `prob`: the `prior`, the `population` it is judged
    on, its Quality `before` and `after`, the bins of the reliability diagram, the thresholds; or a
    `note`, where there can be no probabilities.
    """
    try:
        prob, curve, facts = _calibrate(oof, blend, pred_without)
    except Stop as why:  # one class, or predictions of 0 and 1 alone: still a submission
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
            'out-of-fold images were ranked among those of all sources, test images among '
            'themselves, so no curve turns both into probabilities; --how mean has them'
        )
    own, population = evaluation_rows(oof)
    odds, calibrate, prior = (blend[key] for key in ('odds', 'calibrate', 'prior'))
    prior = melanoma_rate(oof) if prior is None else prior
    weight = class_weights(target[own], prior)  # ones, where these rows have that rate
    if not np.allclose(weight, 1):
        population += f', weighted to the rate {prior:.4g}'
    facts = {'prior': prior, 'population': population, 'odds': odds, 'calibrate': calibrate}
    if odds is None:
        facts['no_odds'] = blend['no_odds']
    if calibrate is not None:
        prob, curve = fit_platt_across_folds(pred, oof, own, prior, pred_without)
    else:
        trained_at = odds_of_level(pred[own], prior, weight) if odds is None else odds
        curve = partial(to_prior, prior=prior, odds=trained_at)
        prob = curve(pred)
    if len(np.unique(target[own])) > 1:
        for name, values in (('before', pred[own]), ('after', prob[own])):
            facts[name] = measure_quality(target[own], values, weight)._asdict()
            bins = reliability(target[own], values, weight)
            facts[f'bins_{name}'] = bins.to_dict('records')
        facts['thresholds'] = thresholds(target[own], pred[own], curve, prior)
    return prob, curve, facts


def describe(facts: dict[str, Any]) -> str:
    """How `prob` came from `pred`, and what it is judged on: a sentence."""
    if 'note' in facts:
        return f'no prob: {facts["note"]}'
    rate = f'the rate {facts["prior"]:.4g}'
    if facts['calibrate']:
        way = f'fitted by {facts["calibrate"]} across folds; the curve comes from the models of '
        way += 'single folds and is applied to the mean of all'
    elif facts['odds'] is None:
        way = f'pred moved so that its mean is {rate}, since {facts["no_odds"]}'
    else:
        way = f'pred moved from odds of {facts["odds"]:.3g} to {rate}'
    return f'probabilities: {way}; judged on {facts["population"]}'


def format_quality(facts: dict[str, Any]) -> str:
    """Text: the sentence of `describe`, and the Quality before and after."""
    if 'before' not in facts:
        return describe(facts)
    table = pd.DataFrame({name: facts[name] for name in ('before', 'after')}, dtype=float).T
    table = table.rename(columns={'brier': 'Brier', 'ece': 'ECE'})
    table = table.to_string(float_format='{:.4f}'.format, na_rep='-')
    return f'{describe(facts)}\n{table}'
