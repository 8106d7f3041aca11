"""The runs of a blend compared with it and with each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib import score
from lib.blending import blend_by_fold
from lib.predictions import OofTable
from lib.score import Difference
from lib.summary import format_table, shorten


def rank_correlations(preds: np.ndarray) -> np.ndarray:
    """Spearman's correlation of any two columns of `preds` (n, k): (k, k); 0 for a constant."""
    rho = pd.DataFrame(preds).corr('spearman').fillna(0).to_numpy(copy=True)
    np.fill_diagonal(rho, 1)
    return rho


def compare_runs(
    how: str, oofs: OofTable, weights: Sequence[float], fold_weights: dict[int, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """Figures about each run, by its name.

    They are its `auc` with interval, its AUC less the blend's (`difference`, paired), its `weight`,
    its mean rank `correlation` with the others, and the blend's AUC `without` it. Runs are compared
    with the blend and not with the best run, since a run that is chosen by its AUC and then
    compared by it seems better than it is.
    """
    target, k = oofs.rows.target.to_numpy(), len(oofs.names)
    preds = [*oofs.preds.T, blend_by_fold(how, oofs, fold_weights)]
    aucs, differences = score.compare_paired(target, preds, k, oofs.rows.group)
    rho = rank_correlations(oofs.preds)

    def auc_without(run: int) -> float | None:
        """The other runs keep their weights. None where none is left, or with one class only."""
        rest = {fold: np.where(np.arange(len(w)) == run, 0, w) for fold, w in fold_weights.items()}
        if min(w[:k].sum() for w in rest.values()) <= 0 or len(np.unique(target)) < 2:
            return None
        if how != 'stack':
            rest = {fold: w / w.sum() for fold, w in rest.items()}
        return score.auc(target, blend_by_fold(how, oofs, rest))

    return {
        name: {
            'auc': aucs[i],
            'difference': differences[i],
            'weight': weights[i],
            'correlation': (rho[i].sum() - 1) / (k - 1) if k > 1 else None,
            'correlations': rho[i],
            'auc_without': auc_without(i) if k > 1 else None,
        }
        for i, name in enumerate(oofs.names)
    }


def compare_with_best_run(runs: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The best single `run` of `compare_runs`, and the blend's AUC less its own, `difference`.

    None where there is only one run or one class.
    """
    if len(runs) < 2 or any(run['auc'].value is None for run in runs.values()):
        return None
    name = max(runs, key=lambda name: runs[name]['auc'].value)
    value, low, high, p = runs[name]['difference']
    turned = Difference(-value) if low is None else Difference(-value, -high, -low, p)
    return {'run': name, 'difference': turned}


def describe_best_run(best: dict[str, Any]) -> str:
    """A sentence that says what `compare_with_best_run` returned."""
    run, difference = shorten(best['run']), Difference(*best['difference'])
    return (
        f"the blend's AUC minus that of the best single run, {run}: {difference}; this is "
        'conservative, since the best run is chosen by this same AUC'
    )


def format_runs(runs: dict[str, dict[str, Any]], best: dict[str, Any] | None) -> str:
    """A table of the runs, one row each, and the sentence on the best run, from `compare_runs`."""
    table = pd.DataFrame(index=[shorten(name) for name in runs])
    table['weight'] = [f'{run["weight"]:.3f}' for run in runs.values()]
    table['AUC'] = [str(run['auc']) for run in runs.values()]
    differences = [str(run['difference']) for run in runs.values()]
    table['minus blend'] = differences if len(runs) > 1 else '-'
    for column, key in (('Spearman', 'correlation'), ('without it', 'auc_without')):
        values = [run[key] for run in runs.values()]
        table[column] = ['-' if value is None else f'{value:.4f}' for value in values]
    text = format_table(table)
    return f'{text}\n{describe_best_run(best)}' if best else text
