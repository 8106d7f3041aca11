"""The figures of the report, as PNG."""

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from lib.pictures import BLUE, RED
from lib.score import resample
from lib.summary import MIN_CLASS, POOLED, resampling_unit, shorten

LINE = {'color': 'black', 'linewidth': 0.8, 'linestyle': ':'}  # of chance, or of all rows
N_BAND_DRAWS = 200


def to_png(
    title: str, draw: Callable[..., None], *args: Any, size: Sequence[float] = (5.4, 4.2), note=''
) -> dict[str, str]:
    """`draw(axes, *args)` as a `png` of `size` inches in base64, with its `title` and a `note`."""
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.add_subplot()
    axes.spines[['top', 'right']].set_visible(False)
    draw(axes, *args)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # boxes stand for signs without one
        return {'title': title, 'png': encode(figure.savefig, 'png'), 'note': note}


def encode(save: Callable[..., None], form: str) -> str:
    """What `save(file, format=form)` writes, in base64."""
    data = io.BytesIO()
    save(data, format=form)
    return base64.b64encode(data.getvalue()).decode()


def draw_predictions(
    oof: pd.DataFrame, rows: pd.DataFrame, bins: pd.DataFrame
) -> list[dict[str, str]]:
    """ROC, precision and recall, AUC by fold and subgroup, and reliability, of a blend's `oof`.

    `rows`: of summary.summarize; `bins`: of a Calibration.
    """
    target, pred, drawn = oof.target.to_numpy(), oof.pred.to_numpy(), []
    if len(np.unique(target)) == 2:
        note = f'The band holds 95 % of {N_BAND_DRAWS} draws of {resampling_unit(oof)}.'
        band = roc_band(target, pred, oof.group.to_numpy())
        drawn.append(to_png('ROC curve', draw_roc, target, pred, band, note=note))
        drawn.append(to_png('Precision-recall curve', draw_precision_recall, target, pred))
    rows = rows[(rows.measure == 'auc') & (rows.kind.ne('main') | rows.label.eq(POOLED))]
    has_folds = rows.kind.eq('fold').any()  # outside images have none
    size, title = (7, 0.9 + 0.27 * len(rows)), 'AUC by fold and subgroup'
    title = title if has_folds else 'AUC by subgroup'
    note = f'A subgroup with fewer than {MIN_CLASS} of a class has its counts only.'
    drawn.append(to_png(title, draw_forest, rows, size=size, note=note))
    if not bins.empty:
        note = 'pred is as the models give it, prob is made a probability. Bins hold '
        note += 'equally many images. The dotted line is perfect calibration.'
        drawn.append(to_png('Reliability of pred and of prob', draw_reliability, bins, note=note))
    return drawn


def roc_band(target: np.ndarray, pred: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The 95 % band of the ROC curve over draws of whole groups: (101, 3) of the false positive
    rate, and the low and the high end of the sensitivity there."""
    grid, curves = np.linspace(0, 1, 101), []
    code, weights = resample(group, N_BAND_DRAWS, seed=0)
    for weight in weights:
        of_image = weight[code]
        if len(np.unique(target[of_image > 0])) == 2:
            fpr, tpr, _ = roc_curve(target, pred, sample_weight=of_image)
            curves.append(np.interp(grid, fpr, tpr))
    if not curves:
        return np.full((101, 3), np.nan)
    return np.column_stack([grid, *np.percentile(curves, [2.5, 97.5], axis=0)])


def draw_roc(axes: Axes, target: np.ndarray, pred: np.ndarray, band: np.ndarray) -> None:
    """The ROC curve with its band of `roc_band`."""
    fpr, tpr, _ = roc_curve(target, pred)
    axes.fill_between(*band.T, color=BLUE, alpha=0.3, linewidth=0)
    axes.plot([0, 1], [0, 1], **LINE)
    axes.plot(fpr, tpr, color=BLUE)
    axes.set(xlabel='false positive rate', ylabel='sensitivity (true positive rate)')
    axes.set(xlim=(0, 1), ylim=(0, 1.01))


def draw_precision_recall(axes: Axes, target: np.ndarray, pred: np.ndarray) -> None:
    """Precision over recall; chance is the rate of malignant images."""
    precision, recall, _ = precision_recall_curve(target, pred)
    axes.plot([0, 1], [target.mean()] * 2, **LINE)
    axes.plot(recall, precision, color=BLUE)
    axes.set(xlabel='recall (sensitivity)', ylabel='precision', xlim=(0, 1), ylim=(0, 1.01))


def draw_forest(axes: Axes, rows: pd.DataFrame) -> None:
    """The AUC of `rows` (of summary.summarize), one below the other; the first is of all images."""
    places = -np.arange(len(rows))
    for y, row in zip(places, rows.itertuples(), strict=True):
        counts = f'{row.images} images, {row.malignant} malignant'
        axes.text(1.01, y, counts, va='center', fontsize=8, transform=axes.get_yaxis_transform())
        if np.isnan(row.value):  # too few
            text = f'< {MIN_CLASS} of a class' if row.kind == 'subgroup' else row.note
            axes.text(0.01, y, text, va='center', fontsize=8, transform=axes.get_yaxis_transform())
        axes.plot([row.low, row.high], [y, y], color=BLUE, linewidth=2)
        axes.plot(row.value, y, 'o', color=BLUE, markersize=5)
    names = rows.label.where(rows.label != POOLED, 'all').map(shorten)
    axes.set_yticks(places, names.str.replace('$', r'\$'))
    lowest = np.nanmin([0.95, *rows.low, *rows.value])
    axes.set(xlim=(lowest - 0.02, 1), ylim=(places[-1] - 0.6, 0.6), xlabel='AUC')
    axes.axvline(rows.value.iloc[0], **LINE)


def draw_reliability(axes: Axes, bins: pd.DataFrame) -> None:
    """The observed rate of malignant images over the predicted one, in bins, of pred and prob."""
    root = (lambda x: np.sqrt(np.maximum(x, 0)), np.square)  # gives small probabilities room
    axes.set_xscale('function', functions=root)
    axes.set_yscale('function', functions=root)
    axes.plot([0, 1], [0, 1], **LINE)
    for name, colour, marker in (('pred', RED, 's'), ('prob', BLUE, 'o')):
        of_name = bins[bins.name == name]
        axes.plot(of_name.predicted, of_name.observed, color=colour, marker=marker, label=name)
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    axes.set_xticks(ticks, ticks)
    axes.set_yticks(ticks, ticks)
    axes.tick_params(axis='x', labelsize=9)
    axes.set(xlim=(0, 1), xlabel='predicted probability')
    axes.set(ylim=(0, 1), ylabel='observed rate of malignant images')
    axes.legend(frameon=False)


def draw_correlations(names: Sequence[str], rho: np.ndarray) -> dict[str, str]:
    """A matrix plot of the runs' rank correlations, (k, k). Its note says which number is whose,
    since a picture's font lacks the signs of some names."""
    k = len(names)

    def draw(axes: Axes) -> None:
        axes.imshow(rho, cmap='Blues', vmin=min(0, rho.min()), vmax=1)
        for i, j in np.ndindex(rho.shape) if k <= 12 else ():
            colour = 'white' if rho[i, j] > 0.6 else 'black'
            axes.text(j, i, f'{rho[i, j]:.2f}', ha='center', va='center', color=colour, fontsize=9)
        numbers = [str(i + 1) for i in range(k)]
        axes.set_xticks(range(k), numbers)
        axes.set_yticks(range(k), numbers)

    side, note = 1.6 + 0.42 * k, ', '.join(f'{i + 1}: {name}' for i, name in enumerate(names))
    return to_png('Rank correlation of the runs', draw, size=(side, side), note=note)
