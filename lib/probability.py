"""Predictions to probabilities: the rate they are for, calibration, thresholds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from lib import files
from lib.cli import Stop
from lib.score import MIN_CLASS
from lib.tables import COMPETITION

SENSITIVITIES = (0.8, 0.85, 0.9, 0.95, 0.98)
N_BINS = 10
TINY = 1e-7  # a logit needs a probability inside of 0..1


def population(oof: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Which rows of `oof` (target, source) probabilities are for and judged on: (n,) bool, a name.

    The competition's own source, since the test images are its; all where it is not there, or
    has fewer than 20 melanomas or benign images.
    """
    own = (oof.source == COMPETITION).to_numpy()
    melanomas = int(oof.target[own].sum())
    if oof.source.nunique() > 1 and min(melanomas, own.sum() - melanomas) >= MIN_CLASS:
        return own, f'the {own.sum()} images of {COMPETITION}, {melanomas} melanomas'
    melanomas = int(oof.target.sum())
    return np.full(len(oof), True), f'all {len(oof)} images, {melanomas} melanomas'


def rate(oof: pd.DataFrame) -> float:
    """The rate of melanomas in the competition's own source, or in all rows without it.

    Raises: Stop where it is 0 or 1, which no probability can be moved to.
    """
    own = oof.target[oof.source == COMPETITION]
    found = float((own if len(own) else oof.target).mean())
    if not 0 < found < 1:
        raise Stop(f'the rate of melanomas is {found:.0f}; say another with --prior, as .018')
    return found


def trained_odds(targets: Sequence[float], neg_ratio: float) -> float:
    """The odds of melanoma in an epoch on labelled `targets` with `neg_ratio`: 1 at 1:1.

    As sampling.Downsample takes them: 0 is all images, and there are no more than there are.
    """
    positive = float(np.sum(targets))
    negative = len(targets) - positive
    wanted = neg_ratio * positive if neg_ratio else negative
    return positive / max(1.0, min(wanted, negative))


def trained_odds_of(
    folders: Sequence[Path],
    targets: Sequence[float],
    weights: Sequence[float] = (1,),
    how: str = 'mean',
) -> float | None:
    """The odds of melanoma that a blend of the runs in `folders` was trained at, their weighted
    geometric mean; None where that is not known, or the blend is of ranks.

    A stack is fitted on `targets`, at their own odds.
    """
    if how == 'stack':
        return trained_odds(targets, 0)
    logs, weights = [], np.asarray(weights)
    folders = [folder for folder, weight in zip(folders, weights, strict=True) if weight]
    for folder in folders:
        if (folder / 'config.json').exists():
            neg_ratio = files.read_json(folder / 'config.json').get('neg_ratio', 1.0)
            logs.append(np.log(trained_odds(targets, neg_ratio)))
        else:
            blend = folder / files.BLEND
            odds = files.read_json(blend).get('odds') if blend.exists() else None
            logs.append(np.log(odds or np.nan))
    found = float(np.exp(np.dot(weights[weights != 0], logs)))
    return None if how == 'rank' or np.isnan(found) else found


def shift(pred: np.ndarray, prior: float, odds: float) -> np.ndarray:
    """`pred` (n,) of a model trained at `odds`, moved to a rate `prior`; ranks stay as they are.

    Adds log(prior / (1 - prior)) - log(odds) to the logit.
    Source: https://doi.org/10.1162/089976602753284446
    """
    factor = prior / (1 - prior) / odds
    return pred * factor / (pred * factor + (1 - pred))


def odds_of_level(pred: np.ndarray, prior: float, weight: np.ndarray | None = None) -> float:
    """The odds that `pred` seems trained at, if its mean after `shift` is to be `prior`.

    For predictions of which nobody says how they were trained, or which are no probabilities at
    all, as the mean of ranks. Raises: Stop where all are 0 or 1.
    """

    def excess(log_odds: float) -> float:
        return np.average(shift(pred, prior, np.exp(log_odds)), weights=weight) - prior

    if excess(-50) * excess(50) >= 0:
        raise Stop('the predictions are all 0 or all 1, so they cannot be moved to a rate')
    return float(np.exp(brentq(excess, -50, 50)))


def class_weights(target: np.ndarray, prior: float) -> np.ndarray:
    """A weight for each image, (n,), so that melanomas are `prior` of all; ones for one class."""
    found = np.mean(target)
    if found in (0, 1):
        return np.ones(len(target))
    return np.where(target == 1, prior / found, (1 - prior) / (1 - found))


def platt(
    pred: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """A logistic curve over the logit of `pred`, fitted; Raises: Stop where it would fall.

    Source: Platt 1999, Probabilistic outputs for support vector machines
    """
    x = logit(np.clip(pred, TINY, 1 - TINY))[:, None]
    fitted = LogisticRegression(C=np.inf, max_iter=1000).fit(x, target, weight)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope <= 0:
        raise Stop('platt finds that melanomas have the lower predictions; leave --calibrate out')
    return lambda p: expit(slope * logit(p) + intercept)


def isotonic(
    pred: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """The best rising step curve over `pred`, fitted, with a millionth of `pred` in it.

    That millionth keeps the order on the flat stretches.
    """
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds='clip').fit(pred, target, weight)
    return lambda p: (1 - 1e-6) * fitted.predict(p) + 1e-6 * p


FITS = {'platt': platt, 'isotonic': isotonic}


def fit_across_folds(
    how: str, pred: np.ndarray, oof: pd.DataFrame, own: np.ndarray, prior: float
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Probabilities of each fold's rows by the fit on the other folds' `own` rows, and the fit on
    all of them, for the test images.

    Returns: (n,) for `oof` (target, fold), and a function of predictions. Raises: Stop where a
    class is missing.
    """
    target, fold = oof.target.to_numpy(), oof.fold.to_numpy()

    def fit(rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        if len(np.unique(target[rows])) < 2:
            raise Stop(f'--calibrate {how} needs melanomas and benign images in every fold')
        return FITS[how](pred[rows], target[rows], class_weights(target[rows], prior))

    honest = np.empty(len(pred))
    for k in np.unique(fold):
        honest[fold == k] = fit(own & (fold != k))(pred[fold == k])
    return honest, fit(own)


class Quality(NamedTuple):
    """How far probabilities can be believed; the best is 0, 0, 1 and 0."""

    brier: float  # mean squared distance from the truth
    ece: float  # mean distance of a bin's mean probability from its rate, equal-mass bins
    slope: float | None  # of the truth's logit over the probability's; below 1: too extreme
    intercept: float | None  # what to add to the logit for the right mean; below 0: too high


def quality(target: np.ndarray, prob: np.ndarray, weight: np.ndarray) -> Quality:
    """The Quality of (n,) probabilities; no slope where one class is missing or all are equal."""
    brier = float(np.average((prob - target) ** 2, weights=weight))
    bins = reliability(target, prob, weight)
    ece = float(np.average((bins.predicted - bins.observed).abs(), weights=bins.weight))
    x = logit(np.clip(prob, TINY, 1 - TINY))
    if len(np.unique(target)) < 2 or np.ptp(x) == 0:
        return Quality(brier, ece, None, None)
    curve = LogisticRegression(C=np.inf, max_iter=1000).fit(x[:, None], target, weight)
    found = np.average(target, weights=weight)
    intercept = brentq(lambda a: np.average(expit(x + a), weights=weight) - found, -50, 50)
    return Quality(brier, ece, float(curve.coef_[0, 0]), float(intercept))


def reliability(target: np.ndarray, prob: np.ndarray, weight: np.ndarray) -> pd.DataFrame:
    """A row a bin of as many images each (equal probabilities stay in one bin): the weighted means
    `predicted` and `observed`, the bin's `weight`, and `images`."""
    edges = np.unique(np.quantile(prob, np.linspace(0, 1, N_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, prob, side='right') - 1, 0, max(len(edges) - 2, 0))
    table = pd.DataFrame({'w': weight, 'p': weight * prob, 'y': weight * target, 'n': 1})
    table = table.groupby(bins).sum()
    return pd.DataFrame(
        {
            'predicted': table.p / table.w,
            'observed': table.y / table.w,
            'weight': table.w,
            'images': table.n,
        }
    )


def threshold(target: np.ndarray, pred: np.ndarray, sensitivity: float) -> float:
    """The highest value of `pred` such that at least `sensitivity` of the melanomas reach it."""
    melanomas = np.sort(pred[target == 1])[::-1]
    if not len(melanomas):
        raise Stop('there is no melanoma to choose a threshold by')
    return float(melanomas[int(np.ceil(sensitivity * len(melanomas) - 1e-9)) - 1])


def thresholds(
    target: np.ndarray,
    pred: np.ndarray,
    of_pred: Callable[[np.ndarray], np.ndarray],
    prior: float,
) -> list[dict[str, Any]]:
    """What each of SENSITIVITIES costs, per 1,000 lesions of which `prior` are melanomas.

    Returns: a row each of the sensitivity reached, the threshold in `pred` and in `prob`, the
    specificity, and of 1,000 lesions the melanomas `found` and `missed` and the benign `called`.
    """
    rows = []
    for wanted in SENSITIVITIES:
        at = threshold(target, pred, wanted)
        sensitivity = float(np.mean(pred[target == 1] >= at))
        specificity = float(np.mean(pred[target == 0] < at))
        rows.append(
            {
                'wanted': wanted,
                'sensitivity': sensitivity,
                'specificity': specificity,
                'pred': at,
                'prob': float(of_pred(np.array([at]))[0]),
                'found': 1000 * prior * sensitivity,
                'missed': 1000 * prior * (1 - sensitivity),
                'called': 1000 * (1 - prior) * (1 - specificity),
            }
        )
    return rows


def of_blend(
    oof: pd.DataFrame, odds: float | None, calibrate: str | None, prior: float | None
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """Probabilities for out-of-fold predictions and, by a function, for test predictions.

    `oof`: target, source, fold, pred. `odds`: what the models were trained at, None if that is
    not known. `calibrate`: one of FITS, or None to move `pred` to `prior`, once.

    Returns: (n,), the function, and what to say of it: the `prior`, the `population` it is judged
    on, its Quality `before` and `after`, the bins of the reliability diagram, the thresholds.
    """
    pred, target = oof.pred.to_numpy(), oof.target.to_numpy()
    own, named = population(oof)
    to = rate(oof) if prior is None else prior
    weight = class_weights(target[own], to)  # ones, where these rows have that rate
    if not np.allclose(weight, 1):
        named += f', weighted to the rate {to:.4g}'
    found: dict[str, Any] = {'prior': to, 'population': named, 'odds': odds, 'how': calibrate}
    if calibrate is not None:
        prob, of_pred = fit_across_folds(calibrate, pred, oof, own, to)
    else:
        level = odds_of_level(pred[own], to, weight) if odds is None else odds

        def of_pred(p: np.ndarray) -> np.ndarray:
            return shift(p, to, level)

        prob = of_pred(pred)
    if len(np.unique(target[own])) < 2:
        return prob, of_pred, found
    for name, values in (('before', pred), ('after', prob)):
        found[name] = quality(target[own], values[own], weight)._asdict()
        bins = reliability(target[own], values[own], weight)
        found[f'bins_{name}'] = bins.to_dict('records')
    found['thresholds'] = thresholds(target[own], pred[own], of_pred, to)
    return prob, of_pred, found


def lines(found: dict[str, Any]) -> str:
    """Printed lines: `of_blend`'s findings."""
    text = [describe(found)]
    if 'before' in found:
        text.append(f'{"":<8}{"Brier":>8}{"ECE":>8}{"slope":>8}{"intercept":>11}')
        for name in ('before', 'after'):
            brier, ece, *rest = found[name].values()
            slope, intercept = (f'{x:.2f}' if x is not None else '-' for x in rest)
            text.append(f'{name:<8}{brier:>8.4f}{ece:>8.4f}{slope:>8}{intercept:>11}')
    return '\n'.join(text)


def describe(found: dict[str, Any]) -> str:
    """How `prob` came from `pred`, and what it is judged on: a sentence."""
    if found['how']:
        way = (
            f'fitted by {found["how"]} across folds; the curve comes from the models of single '
            'folds and is applied to the mean of all'
        )
    elif found['odds'] is None:
        way = f'pred moved so that its mean is the rate {found["prior"]:.4g}, by these labels'
    else:
        way = f'pred moved from odds of {found["odds"]:.3g} to the rate {found["prior"]:.4g}'
    return f'probabilities: {way}; judged on {found["population"]}'
