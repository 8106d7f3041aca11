"""The figures of the report, as SVG in the page's own colours."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.pictures import BLUE, RED
from lib.score import resample
from lib.summary import MIN_CLASS, shorten
from lib.tables import competition_of

INK = '#010203'  # becomes the page's own colour of text, light or dark
LINE = {'color': INK, 'linewidth': 0.8, 'linestyle': ':'}  # of chance, or of all rows
N_BAND_DRAWS = 200
SIZE = (5.4, 4.2)  # inches
STYLE = {
    **dict.fromkeys(['text.color', 'axes.labelcolor', 'axes.edgecolor'], INK),
    **dict.fromkeys(['xtick.color', 'ytick.color'], INK),
    **dict.fromkeys(['axes.spines.top', 'axes.spines.right'], False),
    'font.size': 11,
    'svg.hashsalt': 'report',  # the same page from the same files
    'svg.fonttype': 'none',  # text stays text: the browser has fonts for names that ours lack
    'text.parse_math': False,  # a run's name may hold a $
}


def to_svg(
    title: str, draw: Callable[..., None], *args: Any, size: Sequence[float] = SIZE, note: str = ''
) -> dict[str, str]:
    """`draw(axes, *args)` as `svg`, with its `title`, a `note`, and its width in `points`."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from font')  # as of Chinese names
        figure = Figure(figsize=size, layout='constrained')
        draw(figure.add_subplot(), *args)
        text = io.StringIO()
        figure.savefig(text, format='svg', transparent=True, metadata={'Date': None})
    svg = text.getvalue()
    svg = svg[svg.index('<svg') :].replace(INK, 'currentColor')
    svg = re.sub(r'<g id="[^"]*">', '<g>', svg)  # ids would be the same in every figure
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)  # the page decides the width
    return {'title': title, 'svg': svg, 'note': note, 'points': str(round(72 * size[0]))}


def draw_predictions(oof: pd.DataFrame, scores: dict[str, Any]) -> list[dict[str, str]]:
    """ROC, precision and recall, AUC by subgroup, reliability, histogram, of one blend's `oof`."""
    target, pred = oof.target.to_numpy(), oof.pred.to_numpy()
    summary, facts, figures = scores['summary'], scores['probability'], []
    positives = competition_of(oof).positives
    if len(np.unique(target)) == 2:
        curves = curves_with_bands(target, pred, oof.group)
        note = f'The band holds 95 % of {N_BAND_DRAWS} draws of {summary["resampling_unit"]}.'
        labels = ('false positive rate', 'sensitivity (true positive rate)')
        args = (curves['grid'], curves['roc'], [0, 1], labels)
        figures.append(to_svg('ROC curve', _draw_curve, *args, note=note))
        labels = ('recall (sensitivity)', 'precision')
        args = (curves['grid'], curves['precision'], [target.mean()] * 2, labels)
        figures.append(to_svg('Precision-recall curve', _draw_curve, *args, note=note))
    rows = {'all': summary['pooled']} | {f'fold {k}': row for k, row in summary['folds'].items()}
    for kind, subgroups in summary['subgroups'].items():
        rows |= {f'{kind}: {value}': row for value, row in subgroups.items()}
    size = (6, 0.9 + 0.27 * len(rows))
    note = f'A subgroup with fewer than {MIN_CLASS} of a class has its counts only.'
    title = 'AUC by fold, source and subgroup'
    figures.append(to_svg(title, _draw_forest, rows, positives, size=size, note=note))
    if 'before' in facts:
        note = 'Bins hold equally many images. The dotted line is perfect calibration.'
        args = (facts, positives)
        figures.append(to_svg('Reliability, before and after', _draw_reliability, *args, note=note))
    return [*figures, to_svg('Predictions', _draw_histogram, target, pred, positives)]


def curves_with_bands(
    target: np.ndarray, pred: np.ndarray, group: np.ndarray
) -> dict[str, np.ndarray]:
    """The ROC and precision-recall curves with 95 % bands over draws of whole groups.

    Returns: `grid`, (101,) of 0..1; `roc`, the sensitivity at these false positive rates, and
    `precision` at these sensitivities: (101, 3) each: value, low, high.
    """
    grid = np.linspace(0, 1, 101)
    order = np.argsort(-pred, kind='stable')
    positive = target[order].astype(float)
    ends = np.flatnonzero(np.r_[np.diff(pred[order]) != 0, True])  # of ties

    def at_grid(counts: np.ndarray) -> np.ndarray:
        weight = counts[order]
        tp = np.cumsum(weight * positive)[ends]
        called = np.cumsum(weight)[ends]
        fp = called - tp
        if not tp[-1] or not fp[-1]:
            return np.full((2, len(grid)), np.nan)
        roc = np.interp(grid, np.r_[0, fp / fp[-1]], np.r_[0, tp / tp[-1]])
        reached = np.searchsorted(tp, np.maximum(grid * tp[-1] - 1e-9, 1e-9))
        return np.stack([roc, (tp / np.maximum(called, 1))[np.minimum(reached, len(tp) - 1)]])

    code, weights = resample(group, N_BAND_DRAWS, seed=0)
    draws = [at_grid(weight[code]) for weight in weights]
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    value = at_grid(np.ones(len(pred)))
    roc, precision = np.stack([value, low, high], axis=-1)
    return {'grid': grid, 'roc': roc, 'precision': precision}


def _draw_curve(
    axes: Axes, grid: np.ndarray, curve: np.ndarray, chance: list[float], labels: tuple[str, str]
) -> None:
    axes.plot([0, 1], chance, **LINE)
    axes.fill_between(grid, curve[:, 1], curve[:, 2], color=BLUE, alpha=0.3, linewidth=0)
    axes.plot(grid, curve[:, 0], color=BLUE)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel=labels[0], ylabel=labels[1])


def _draw_forest(axes: Axes, rows: dict[str, dict[str, Any]], positives: str) -> None:
    places, lowest = -np.arange(len(rows)), 0.95
    for y, row in zip(places, rows.values(), strict=True):
        counts = f'{row["images"]} images, {row["melanomas"]} {positives}'
        axes.text(1.01, y, counts, va='center', fontsize=8, transform=axes.get_yaxis_transform())
        if 'auc' in row:
            value, low, high = row['auc']
            if low is not None:
                axes.plot([low, high], [y, y], color=BLUE, linewidth=2)
            axes.plot(value, y, 'o', color=BLUE, markersize=5)
            lowest = min(lowest, value if low is None else low)  # low is at most value
    axes.set_yticks(places, rows)
    axes.set(xlim=(lowest - 0.02, 1), ylim=(places[-1] - 0.6, 0.6), xlabel='AUC')
    if 'auc' in rows['all']:
        axes.axvline(rows['all']['auc'][0], **LINE)


def _draw_reliability(axes: Axes, facts: dict[str, Any], positives: str) -> None:
    root = (lambda x: np.sqrt(np.maximum(x, 0)), np.square)  # gives small probabilities room
    axes.set_xscale('function', functions=root)
    axes.set_yscale('function', functions=root)
    axes.plot([0, 1], [0, 1], **LINE)
    for name, colour, marker in (('before', RED, 's'), ('after', BLUE, 'o')):
        x, y = ([b[c] for b in facts[f'bins_{name}']] for c in ('predicted', 'observed'))
        label = f'{name}, Brier {facts[name]["brier"]:.4f}'
        axes.plot(x, y, color=colour, marker=marker, label=label)
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    axes.set_xticks(ticks, ticks)
    axes.set_yticks(ticks, ticks)
    axes.tick_params(axis='x', labelsize=9)
    axes.set(xlim=(0, 1), xlabel='predicted probability')
    axes.set(ylim=(0, 1), ylabel=f'observed rate of {positives}')
    axes.legend(frameon=False)


def _draw_histogram(axes: Axes, target: np.ndarray, pred: np.ndarray, positives: str) -> None:
    for value, name, colour in ((0, 'benign', BLUE), (1, positives, RED)):
        of_class = pred[target == value]
        if len(of_class):
            weights = np.full(len(of_class), 1 / len(of_class))
            style = {'color': colour, 'histtype': 'stepfilled', 'alpha': 0.45, 'label': name}
            axes.hist(of_class, np.linspace(0, 1, 41), weights=weights, **style)
    axes.set(xlabel='pred', ylabel='share of the class', xlim=(0, 1))
    axes.legend(frameon=False)


def draw_correlations(names: Sequence[str], rho: np.ndarray) -> dict[str, str]:
    """A matrix plot of the runs' rank correlations, (k, k)."""
    k = len(names)

    def draw(axes: Axes) -> None:
        axes.imshow(rho, cmap='Blues', vmin=min(0, rho.min()), vmax=1)
        for i, j in np.ndindex(rho.shape) if k <= 12 else ():
            colour = '#ffffff' if rho[i, j] > 0.6 else '#102030'
            axes.text(j, i, f'{rho[i, j]:.2f}', ha='center', va='center', color=colour, fontsize=9)
        axes.set_xticks(range(k), [str(i + 1) for i in range(k)])
        axes.set_yticks(range(k), [f'{shorten(name)}  {i + 1}' for i, name in enumerate(names)])

    side = 1.6 + 0.42 * k
    return to_svg('Rank correlation of the runs', draw, size=(side + 2, side))


def draw_histories(runs: Mapping[str, Path]) -> list[dict[str, str]]:
    """AUC and loss on the held-out fold by epoch, one line per fold, of the runs of train.py."""
    paths = {name: sorted(run.glob('fold*/history.csv')) for name, run in runs.items()}
    histories = {name: [pd.read_csv(p) for p in folds] for name, folds in paths.items() if folds}
    note = 'One line per fold, on its images of target 1 and a sample of its benign images.'
    return [
        to_svg(f'Held-out {name} by epoch', _draw_histories, histories, column, note=note)
        for name, column in (('AUC', 'auc'), ('loss', 'valid_loss'))
        if histories
    ]


def _draw_histories(axes: Axes, histories: dict[str, list[pd.DataFrame]], column: str) -> None:
    for i, (name, folds) in enumerate(histories.items()):
        for k, history in enumerate(folds):
            label = shorten(name) if k == 0 else None
            axes.plot(history.epoch, history[column], color=f'C{i}', linewidth=1.2, label=label)
    axes.set(xlabel='epoch')
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(histories) <= 8:
        axes.legend(frameon=False, fontsize=9)
