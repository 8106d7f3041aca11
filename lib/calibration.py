"""Probabilities from predictions: how they are calibrated, and how good they are."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from lib.cli import Stop
from lib.summary import MIN_CLASS
from lib.tables import competition_of
from lib.thresholds import Curve, count_at_thresholds

N_BINS = 10
RANKS = 'ranks are no probabilities; --how mean has them'  # why there are none
QUALITY_NOTE = (  # below each table of it
    'The calibration error is over bins of equally many images. A slope below 1 says that '
    'probabilities are too extreme, an intercept below 0 that they are too high.'
)
TINY = 1e-7  # keeps probabilities off 0 and 1, which have no finite logit


@dataclass(frozen=True)
class Calibration:
    """Probabilities, how they came about, and how good they are on the rows that are judged.

    The tables are empty where those rows have one class, one prediction or one fold only.
    """

    prob: np.ndarray  # (n,) of the out-of-fold rows
    curve: Curve  # for other images, as those of the test
    sentence: str  # how prob was computed, and on which images it is judged; or why there is none
    prior: float = np.nan  # the rate of malignant images that prob is for
    odds: float | None = None  # from which `to_prior` moves pred; None by Platt
    quality: pd.DataFrame = field(default_factory=pd.DataFrame)  # a row each of pred and of prob
    bins: pd.DataFrame = field(default_factory=pd.DataFrame)  # of `reliability`, by the same names
    thresholds: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def record(self) -> dict[str, Any]:
        """What scores.json holds of it."""
        return {k: v for k, v in vars(self).items() if k not in ('prob', 'curve')}


def evaluation_rows(oof: pd.DataFrame) -> tuple[np.ndarray, str]:
    """The rows of `oof` (target, source) on which `prob` is fitted and judged: (n,) bool, in words.

    They are the competition's own, as the test images are; all, where it has fewer than 20
    malignant or benign images.
    """
    competition = competition_of(oof)
    own = (oof.source == competition.source).to_numpy()
    malignant = int(oof.target[own].sum())
    if oof.source.nunique() > 1 and min(malignant, own.sum() - malignant) >= MIN_CLASS:
        counts = f'the {own.sum()} images of {competition.source}, {malignant}'
    else:
        own = np.full(len(oof), True)
        counts = f'all {len(oof)} images, {int(oof.target.sum())}'
    return own, f'{counts} malignant'


def malignant_rate(oof: pd.DataFrame, prior: float | None = None) -> float:
    """`prior` if it is given, else the rate of malignant images in the competition's own source, or
    without it in all rows. Raises: Stop where it is 0 or 1, which no probability can be moved to.
    """
    if prior is not None:
        return prior
    competition = competition_of(oof)
    own = oof.target[oof.source == competition.source]
    rate = float((own if len(own) else oof.target).mean())
    if not 0 < rate < 1:
        raise Stop(f'the rate of malignant images is {rate:.0f}; say another with --prior, as .018')
    return rate


def class_weights(target: np.ndarray, prior: float) -> np.ndarray:
    """A weight for each image, (n,): malignant ones become `prior` of all; ones for one class."""
    rate = np.mean(target)
    if rate in (0, 1):
        return np.ones(len(target))
    return np.where(target == 1, prior / rate, (1 - prior) / (1 - rate))


def to_prior(pred: np.ndarray, prior: float, odds: float) -> np.ndarray:
    """`pred` (n,) of a model trained at `odds`, moved to a rate `prior` by a constant on the logit.

    Source: https://doi.org/10.1162/089976602753284446
    """
    factor = prior / (1 - prior) / odds
    return pred * factor / (pred * factor + (1 - pred))


def fit_odds(pred: np.ndarray, prior: float, weight: np.ndarray) -> float:
    """The odds at which a model was trained, as the level of its out-of-fold `pred` (n,) shows.

    From these odds `to_prior` moves `pred` to a weighted mean of `prior`. They need nobody's word
    on how a model was trained, so they hold for blends and for the predictions of others too, and
    where sources are mixed: a model recognises the source, so that the competition's own images
    stand at other odds than an epoch as a whole. Raises: Stop where too many are 0 or 1.
    """

    def excess(log_odds: float) -> float:
        return np.average(to_prior(pred, prior, np.exp(log_odds)), weights=weight) - prior

    if excess(-50) * excess(50) >= 0:
        raise Stop(f'too many predictions are 0 or 1 for a constant to give a mean of {prior:.4g}')
    return float(np.exp(brentq(excess, -50, 50)))


def fit_platt(pred: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Curve:
    """A logistic curve over the logit of `pred` (Platt). Raises: Stop where its slope is negative.

    Source: Platt 1999, Probabilistic outputs for support vector machines.
    """
    if len(np.unique(target)) < 2:
        raise Stop('--calibrate platt needs targets of 0 and of 1 in every fold')
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


def measure_quality(
    target: np.ndarray, prob: np.ndarray, weight: np.ndarray
) -> dict[str, float | None]:
    """How well calibrated (n,) probabilities are.

    `brier` is the mean squared difference from the target, `ece` the expected calibration error
    over bins of equally many images. Below a `slope` of 1 the probabilities are too extreme, below
    an `intercept` of 0 too high; both are None where there is one class or one value.
    """
    brier = float(np.average((prob - target) ** 2, weights=weight))
    bins = reliability(target, prob, weight)
    ece = float(np.average((bins.predicted - bins.observed).abs(), weights=bins.weight))
    x = logit(np.clip(prob, TINY, 1 - TINY))
    if len(np.unique(target)) < 2 or np.ptp(x) == 0:
        return {'brier': brier, 'ece': ece, 'slope': None, 'intercept': None}
    slope, _ = _fit_logistic(x, target, weight)
    rate = np.average(target, weights=weight)
    intercept = brentq(lambda a: np.average(expit(x + a), weights=weight) - rate, -50, 50)
    return {'brier': brier, 'ece': ece, 'slope': slope, 'intercept': float(intercept)}


def reliability(target: np.ndarray, prob: np.ndarray, weight: np.ndarray) -> pd.DataFrame:
    """A reliability diagram's bins, a row each: the weighted means `predicted` and `observed`, the
    bin's `weight`, and its number of `images`. Bins have equally many images, but for ties."""
    edges = np.unique(np.quantile(prob, np.linspace(0, 1, N_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, prob, side='right') - 1, 0, max(len(edges) - 2, 0))
    columns = {'predicted': weight * prob, 'observed': weight * target, 'weight': weight}
    table = pd.DataFrame(columns | {'images': 1}).groupby(bins).sum()
    means = table[['predicted', 'observed']].div(table.weight, axis=0)
    return table.assign(**means)


def calibrate(oof: pd.DataFrame, prior: float | None = None, platt: bool = False) -> Calibration:
    """The probabilities of a run's or a blend's `oof` (target, source, fold, pred).

    `pred` is moved to the rate `prior` (None: that of the competition's own images) by a constant
    on the logit or, with `platt`, is mapped in each fold by a logistic curve fitted to the others.
    Quality is measured in each fold with the constant or the curve of the others. Where there can
    be no probabilities, as with one class only, the sentence says why.
    """
    pred, target, fold = (oof[name].to_numpy() for name in ('pred', 'target', 'fold'))

    def fit(rows: np.ndarray, rate: float) -> Curve:
        weight = class_weights(target[rows], rate)
        if platt:
            return fit_platt(pred[rows], target[rows], weight)
        return partial(to_prior, prior=rate, odds=fit_odds(pred[rows], rate, weight))

    try:
        prior, (own, population) = malignant_rate(oof, prior), evaluation_rows(oof)
        weight = class_weights(target[own], prior)  # ones, where these rows have that rate
        curve, across = fit(own, prior), np.full(len(pred), np.nan)
        for k in np.unique(fold):
            if (others := own & (fold != k)).any():
                rate = target[others].mean() if np.allclose(weight, 1) else prior  # their own rate
                rate = rate if 0 < rate < 1 else prior
                across[fold == k] = fit(others, rate)(pred[fold == k])
        if platt and np.isnan(across).any():
            raise Stop('--calibrate platt needs images to judge in two folds')
    except Stop as why:
        return no_probabilities(oof, str(why))
    if not np.allclose(weight, 1):
        population += f', weighted to the rate {prior:.4g}'
    method = f'prob is pred with one constant added to its logit, so that its mean is {prior:.4g}'
    if platt:
        method = 'prob is pred by a logistic curve; test images get the curve of all folds together'
    method += f'. It is judged on {population}'
    prob, odds = (across, None) if platt else (curve(pred), curve.keywords['odds'])
    fitted = Calibration(prob, curve, method, prior, odds)
    if len(np.unique(target[own])) < 2 or np.ptp(pred[own]) == 0 or np.isnan(across).any():
        return fitted
    method += f', in each fold with the {"curve" if platt else "constant"} of the others'
    judged = {'pred': pred[own], 'prob': across[own]}
    quality = {name: measure_quality(target[own], p, weight) for name, p in judged.items()}
    bins = {name: reliability(target[own], p, weight) for name, p in judged.items()}
    quality, slope = pd.DataFrame(quality, dtype=float).T, quality['prob']['slope']
    if slope is not None and not 0.2 <= slope <= 5:
        method += f'. Its slope of {slope:.2g} is far from 1, so it is no probability'
    return replace(
        fitted,
        sentence=method,
        quality=quality,
        bins=pd.concat(bins, names=['name']).reset_index('name'),
        thresholds=count_at_thresholds(target[own], pred[own], curve, prior),
    )


def no_probabilities(oof: pd.DataFrame, why: str) -> Calibration:
    """A Calibration of NaN, for predictions that are no probabilities."""
    nothing = partial(np.full_like, fill_value=np.nan, dtype=float)
    return Calibration(nothing(oof.pred.to_numpy()), nothing, f'prob is empty, since {why}')


def format_quality(fitted: Calibration) -> str:
    """The sentence as printed, and the table of `tabulate_quality`."""
    table = '' if fitted.quality.empty else f'\n{tabulate_quality(fitted.quality).to_string()}'
    return f'{fitted.sentence}{table}'


def tabulate_quality(quality: pd.DataFrame) -> pd.DataFrame:
    """How good pred and prob are as probabilities (rows of `measure_quality`), as text."""
    columns = {'brier': 'Brier score', 'ece': 'expected calibration error'}
    columns |= {'slope': 'calibration slope', 'intercept': 'calibration intercept'}
    digits = '{:.4f}'.format
    return quality.map(lambda x: '-' if np.isnan(x) else digits(x)).rename(columns=columns)
