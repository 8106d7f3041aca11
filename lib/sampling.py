"""Per-epoch downsampling of the benign majority, without replacement across epochs."""

import numpy as np
from fastai.vision.all import Callback, TfmdDL


def draw(n: int, k: int, seed: int, epoch: int) -> np.ndarray:
    """The `k` of `n` benign images that an epoch sees: (k,) int positions, none twice.

    Epochs read on through one long row of permutations, so that no image comes again before all
    have come; it depends on (seed, epoch) alone. An epoch may run over the end of a permutation:
    the next one then starts with images that this epoch has not had.
    """
    row = np.empty(0, dtype=int)
    for cycle in range(((epoch + 1) * k - 1) // n + 1):
        permutation = np.random.default_rng([seed, cycle]).permutation(n)
        begun = len(row) % k  # images that the epoch at the seam already has
        had = np.isin(permutation, row[len(row) - begun :])
        row = np.concatenate([row, permutation[~had], permutation[had]])
    return row[epoch * k : (epoch + 1) * k]


class Downsample(Callback):
    """Each epoch trains on every melanoma and `neg_ratio` times as many benign images.

    `targets`: (n,) 0/1 of the rows of `dl`, the training loader, whose length is set at once,
    since `lr_find` reckons with it before the first epoch. `neg_ratio` 0: all images each epoch.
    """

    def __init__(self, dl: TfmdDL, targets: np.ndarray, neg_ratio: float, seed: int):
        targets = np.asarray(targets)
        self.positive, self.negative = np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)
        wanted = max(1, round(neg_ratio * len(self.positive))) if neg_ratio else len(self.negative)
        self.k, self.seed = min(wanted, len(self.negative)), seed
        self.loader = dl  # not `dls.train`: with several processes that wraps it
        self.set_epoch(dl, 0)

    def indexes(self, epoch: int) -> list[int]:
        """The rows that an epoch trains on, shuffled."""
        drawn = self.negative[draw(len(self.negative), self.k, self.seed, epoch)]
        rows = np.concatenate([self.positive, drawn])
        return np.random.default_rng([self.seed, epoch, 1]).permutation(rows).tolist()

    def set_epoch(self, dl: TfmdDL, epoch: int) -> None:
        """Have `dl` give an epoch's rows; with workers too, which are started afterwards."""
        rows = self.indexes(epoch)
        dl.get_idxs, dl.n = (lambda: rows), len(rows)

    def before_epoch(self) -> None:
        """Choose the rows of the epoch that begins."""
        self.set_epoch(self.loader, self.epoch)


def monitored(targets: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Which of a fold's rows are scored each epoch: all melanomas, and benign ones up to `n` rows.

    A fold of the competition has seven times the images that an epoch trains on; the same rows
    each epoch, so that epochs can be compared. Returns: sorted positions in `targets`.
    """
    positive, negative = np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)
    k = min(len(negative), max(n - len(positive), 1))
    benign = np.random.default_rng(seed).choice(negative, k, replace=False)
    return np.sort(np.concatenate([positive, benign]))
