"""The rate of melanomas that probabilities refer to, and the odds that a model was trained at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from lib.cli import Stop
from lib.runs import Run
from lib.summary import MIN_CLASS
from lib.tables import competition_of


def evaluation_rows(oof: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Which rows of `oof` (target, source) probabilities are for and judged on: (n,) bool, a name.

    They are the competition's own, as the test images are; all, where it has fewer than 20
    melanomas or benign images.
    """
    competition = competition_of(oof)
    own = (oof.source == competition.source).to_numpy()
    melanomas = int(oof.target[own].sum())
    if oof.source.nunique() > 1 and min(melanomas, own.sum() - melanomas) >= MIN_CLASS:
        counts = f'the {own.sum()} images of {competition.source}, {melanomas}'
    else:
        own = np.full(len(oof), True)
        counts = f'all {len(oof)} images, {int(oof.target.sum())}'
    return own, f'{counts} {competition.positives}'


def melanoma_rate(oof: pd.DataFrame, prior: float | None = None) -> float:
    """`prior` if it is given, else the rate of melanomas in the competition's own source, or in all
    rows without it.

    Raises: Stop where it is 0 or 1, which no probability can be moved to.
    """
    if prior is not None:
        return prior
    competition = competition_of(oof)
    own = oof.target[oof.source == competition.source]
    rate = float((own if len(own) else oof.target).mean())
    if not 0 < rate < 1:
        raise Stop(
            f'the rate of {competition.positives} is {rate:.0f}; say another with --prior, as .018'
        )
    return rate


def trained_odds(targets: Sequence[float], neg_ratio: float) -> float:
    """The odds of melanoma in an epoch on labelled `targets`, with `neg_ratio` as in Downsample.

    The benign images that fill an epoch's last batch, fewer than `batch_size`, are left out. They
    matter where melanomas are few: with 30 in batches of 32 the odds are .88, and not 1.
    """
    positive = float(np.sum(targets))
    negative = len(targets) - positive
    wanted = neg_ratio * positive if neg_ratio else negative
    return positive / max(1.0, min(wanted, negative))


def blend_odds(
    how: str,
    runs: Sequence[Run],
    weights: Sequence[float],
    trained_on: Sequence[float],
    blended_on: Sequence[float],
) -> dict[str, Any]:
    """The odds of melanoma at which a blend of `runs` was trained.

    Returns: `odds`, the weighted geometric mean of the runs' odds, or None with the reason in
    `no_odds`; and `of_ranks`, whether it is a blend of ranks or a kept blend in it is one.

    `trained_on`: the targets of the images that the runs were trained on; `blended_on`: those that
    a stack was fitted on, whose odds it has. There are none where odds differ tenfold or more: the
    mean of such predictions is not that of a model trained at the mean odds (measured: the
    intercept of 1:1 beside 1:56 is off by .5).
    """
    blends = [run.blend for run in runs if run.blend]
    of_ranks = how == 'rank' or any(k.get('of_ranks', k.get('how') == 'rank') for k in blends)
    if how == 'stack':
        return {'of_ranks': of_ranks, 'odds': trained_odds(blended_on, 0)}
    weights = np.asarray(weights)
    used = np.flatnonzero(weights)
    odds = np.array([run_odds(runs[k], trained_on) for k in used])
    if of_ranks:
        no_odds = 'it is a blend of ranks'
    elif np.isnan(odds).any():
        no_odds = 'not every run says at what odds it was trained'
    elif max(odds) >= 10 * min(odds):
        no_odds = f'its runs were trained at unlike odds, from {min(odds):.3g} to {max(odds):.3g}'
    else:
        return {'of_ranks': False, 'odds': float(np.exp(np.dot(weights[used], np.log(odds))))}
    return {'of_ranks': of_ranks, 'odds': None, 'no_odds': no_odds}


def run_odds(run: Run, targets: Sequence[float]) -> float:
    """The odds that a run was trained at, or a kept blend's; NaN for anybody else's predictions."""
    if run.has_begun:
        return trained_odds(targets, run.config.get('neg_ratio', 1.0))
    return run.blend.get('odds') or np.nan


def to_prior(pred: np.ndarray, prior: float, odds: float) -> np.ndarray:
    """`pred` (n,) of a model trained at `odds`, moved to a rate `prior` by a constant on the logit.

    Source: https://doi.org/10.1162/089976602753284446
    """
    factor = prior / (1 - prior) / odds
    return pred * factor / (pred * factor + (1 - pred))


def fit_odds(pred: np.ndarray, prior: float, weight: np.ndarray | None = None) -> float:
    """The odds from which `to_prior` moves `pred` to a mean of `prior`, where nobody says them.

    Raises: Stop where all are 0 or 1.
    """

    def excess(log_odds: float) -> float:
        return np.average(to_prior(pred, prior, np.exp(log_odds)), weights=weight) - prior

    if excess(-50) * excess(50) >= 0:
        raise Stop('the predictions are all 0 or all 1, so they cannot be moved to a rate')
    return float(np.exp(brentq(excess, -50, 50)))


def class_weights(target: np.ndarray, prior: float) -> np.ndarray:
    """A weight for each image, (n,), so that melanomas are `prior` of all; ones for one class."""
    rate = np.mean(target)
    if rate in (0, 1):
        return np.ones(len(target))
    return np.where(target == 1, prior / rate, (1 - prior) / (1 - rate))
