"""Pictures, drawn by matplotlib without a screen."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lib.files import atomic


def draw_range_test(
    path: Path, lrs: np.ndarray, losses: np.ndarray, lr_min: float, lr_max: float
) -> None:
    """Save a range test, loss over learning rate, with the two rates read off it, as PNG."""
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axes = figure.add_subplot()
    axes.plot(lrs, losses, color='#1f5a85')
    for rate, name, style in ((lr_min, 'lr_min', ':'), (lr_max, 'lr_max', '--')):
        axes.axvline(rate, color='#b3361f', linestyle=style, label=f'--{name} {rate:.1e}')
    # the explosion at the end would flatten what is to be seen
    low, high = losses.min(), losses[: max(2, len(losses) // 4)].max()
    axes.set_ylim(low - 0.3 * (high - low), high + 1.5 * (high - low))
    axes.set(xscale='log', xlabel='learning rate', ylabel='smoothed loss', title='LR range test')
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
