"""Decision thresholds: the predictions that reach a sensitivity, and what that costs."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from lib import score

SENSITIVITIES = (0.8, 0.85, 0.9, 0.95, 0.98)
SHARES = ['sensitivity', 'specificity']
COUNTS = ['true_positives', 'false_negatives', 'false_positives']  # of 1,000 images
OPTIMISTIC = (
    'The thresholds are chosen and counted on the same out-of-fold predictions, which is '
    'optimistic below 100 malignant images.'
)
Curve = Callable[[np.ndarray], np.ndarray]  # from pred to prob, (n,) both


def threshold(target: np.ndarray, pred: np.ndarray, sensitivity: float) -> float:
    """The highest `pred` that at least `sensitivity` of the malignant images reach."""
    malignant = np.sort(pred[target == 1])[::-1]
    return float(malignant[int(np.ceil(sensitivity * len(malignant) - 1e-9)) - 1])


def count_at_thresholds(
    target: np.ndarray, pred: np.ndarray, curve: Curve, prior: float
) -> pd.DataFrame:
    """A decision threshold for each of SENSITIVITIES, and its cost at the rate `prior`.

    A row has the sensitivity that is `wanted` and reached, the threshold in `pred` and in `prob`,
    and how many of 1,000 images are true positives, false negatives and false positives.
    """
    at = np.array([threshold(target, pred, wanted) for wanted in SENSITIVITIES])
    sensitivity = (pred[target == 1] >= at[:, None]).mean(axis=1)
    specificity = (pred[target == 0] < at[:, None]).mean(axis=1)
    return pd.DataFrame({
        'wanted': SENSITIVITIES, 'sensitivity': sensitivity, 'specificity': specificity,
        'pred': at, 'prob': curve(at),
        'true_positives': 1000 * prior * sensitivity,
        'false_negatives': 1000 * prior * (1 - sensitivity),
        'false_positives': 1000 * (1 - prior) * (1 - specificity),
    })  # fmt: skip


def measure_thresholds(rows: pd.DataFrame, at: pd.DataFrame) -> pd.DataFrame:
    """Sensitivity and specificity of `rows` (pred, target, group) at thresholds that were chosen
    elsewhere, `at` (wanted, pred, prob): a row each, with intervals over draws of whole groups."""
    target, hit = rows.target.to_numpy(), rows.pred.to_numpy() >= at.pred.to_numpy()[:, None]
    code, weights = score.resample(rows.group, score.N_DRAWS, seed=0)
    table, n = at[['wanted', 'pred', 'prob']].copy(), code.max() + 1
    classes = {'sensitivity': (target == 1, hit), 'specificity': (target == 0, ~hit)}
    of_group, draws = {}, {}  # per group: images right at each threshold, and images of the class
    for name, (own, right) in classes.items():
        counts = [np.bincount(code[own & of], minlength=n) for of in [*right, True]]
        of_group[name], draws[name] = np.array(counts), []
    for weight in weights:
        for name, counts in of_group.items():
            draws[name].append(counts @ weight)
    for name, (own, right) in classes.items():
        table[[name, low := f'{name}_low', high := f'{name}_high']] = np.nan
        if not own.any():
            continue
        table[name] = right[:, own].mean(axis=1)
        if (n_own := len(np.unique(code[own]))) > 1:
            *n_right, n_drawn = np.array(draws[name]).T
            with np.errstate(invalid='ignore'):  # a draw may have none of the class
                pairs, half = zip(table[name], n_right / n_drawn, strict=True), 0.5 / own.sum()
            table[[low, high]] = [score.logit_interval(*pair, n_own, half) for pair in pairs]
    return table


def tabulate_thresholds(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `count_at_thresholds` as text, a line for each sensitivity that is wanted."""
    table = {name: (100 * rows[name]).map('{:.1f} %'.format) for name in SHARES}
    table |= {name: rows[name].map('{:.0f}'.format) for name in COUNTS}
    table = pd.DataFrame(table).rename(columns=lambda name: name.replace('_', ' '))
    for name in ('pred', 'prob'):
        table[f'{name} at least'] = rows[name].map('{:.4g}'.format)
    table = table.rename(columns={'sensitivity': 'reached'})
    return table.set_index(pd.Index(name_wanted(rows)))


def name_wanted(rows: pd.DataFrame) -> list[str]:
    """What thresholds were chosen for, from the column `wanted`, as text."""
    return list((100 * rows.wanted).map('{:.0f} % sensitivity wanted'.format))
