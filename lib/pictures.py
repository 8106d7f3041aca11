"""Pictures that training leaves behind, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.files import atomic

if TYPE_CHECKING:
    from torch import Tensor

BLUE, RED = '#3f7fbf', '#d2603a'


def draw_range_test(
    path: Path, lrs: np.ndarray, losses: np.ndarray, lr_min: float, lr_max: float
) -> None:
    """Save a range test, loss over learning rate, with the two rates read off it, as PNG."""
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axes = figure.add_subplot()
    axes.plot(lrs, losses, color=BLUE)
    axes.axvline(lr_min, color=RED, linestyle=':', label=f'--lr_min {lr_min:.1e}')
    axes.axvline(lr_max, color=RED, linestyle='--', label=f'--lr_max {lr_max:.1e}')
    # the divergence at the end would flatten the rest of the curve
    low, high = losses.min(), losses[: max(2, len(losses) // 4)].max()
    axes.set_ylim(low - 0.3 * (high - low), high + 1.5 * (high - low))
    axes.set(xscale='log', xlabel='learning rate', ylabel='smoothed loss', title='LR range test')
    axes.legend()
    _save(figure, path)


def draw_history(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Save the rows of a fold's history.csv as PNG: losses, AUC and learning rate by epoch."""
    history = pd.DataFrame(rows)
    figure = Figure(figsize=(12, 3.6), layout='constrained')
    loss, auc, lr = figure.subplots(1, 3)
    loss.plot(history.epoch, history.train_loss, color=BLUE, marker='.', label='training')
    loss.plot(history.epoch, history.valid_loss, color=RED, marker='.', label='held out')
    loss.legend()
    auc.plot(history.epoch, history.auc, color=RED, marker='.')
    lr.plot(history.epoch, history.lr, color=BLUE, marker='.')
    for axes, title in ((loss, 'loss'), (auc, 'AUC, held out'), (lr, 'learning rate at the end')):
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def draw_batch(
    path: Path, x: 'Tensor', y: 'Tensor', mean: Sequence[float], std: Sequence[float]
) -> None:
    """Save the first images of a training batch as the model sees them, as PNG.

    `x`: (B, 3, H, W) float, augmented and normalized with `mean` and `std`; `y`: (B,) 0/1.
    """
    shown = np.clip(np.moveaxis(x[:16].cpu().numpy(), 1, 3) * std + mean, 0, 1)
    lines = -(-len(shown) // 8)
    figure = Figure(figsize=(1.8 * min(len(shown), 8), 2 * lines), layout='constrained')
    for i, image in enumerate(shown):
        axes = figure.add_subplot(lines, min(len(shown), 8), i + 1)
        axes.imshow(image)
        axes.axis('off')
        axes.set_title('malignant' if y[i] else 'benign', fontsize=9)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
