"""Old names, until train.py, infer.py and folds.py use the new ones: delete this file then."""

from lib.calibration import threshold  # noqa: F401
from lib.prior import blend_odds, evaluation_rows, melanoma_rate, to_prior

population, rate, shift = evaluation_rows, melanoma_rate, to_prior


def trained_odds_of(folders, targets, weights=(1,), how='mean'):
    return blend_odds(how, folders, weights, targets, targets)['odds']
