"""Per-epoch downsampling of the benign majority, without replacement across epochs."""

import numpy as np
from fastai.vision.all import Callback, TfmdDL


def draw(n: int, k: int, seed: int, epoch: int) -> np.ndarray:
    """The `k` of `n` benign images that an epoch trains on: (k,) int positions, none twice.

    All epochs together read one long sequence of permutations, so that no image is used again
    before all have been used. The result depends on (seed, epoch) alone. Where an epoch spans two
    permutations, the second one starts with images that this epoch has not used yet.
    """
    row = np.empty(0, dtype=int)
    for cycle in range(((epoch + 1) * k - 1) // n + 1):
        permutation = np.random.default_rng([seed, cycle]).permutation(n)
        carried = len(row) % k  # images that the epoch has from the last permutation
        used = np.isin(permutation, row[len(row) - carried :])
        row = np.concatenate([row, permutation[~used], permutation[used]])
    return row[epoch * k : (epoch + 1) * k]


class Downsample(Callback):
    """Each epoch trains on every melanoma and `neg_ratio` times as many benign images.

    `targets`: (n,) 0/1 of the rows of `dl`, the training loader. Its length is set at once, since
    `lr_find` needs it before the first epoch. `neg_ratio` 0 means all images in each epoch.
    `batch_size`: images per step, in all processes together. More benign images fill the last batch
    of an epoch, since a smaller step would give its images more weight, and a single image has no
    batch statistics. Where there are no more benign images, the last batch is left out.
    """

    def __init__(
        self, dl: TfmdDL, targets: np.ndarray, neg_ratio: float, seed: int, batch_size: int
    ):
        self.positive, self.negative = np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)
        self.seed, self.batch_size = seed, batch_size
        n_positive, n_negative = len(self.positive), len(self.negative)
        wanted = max(1, round(neg_ratio * n_positive)) if neg_ratio else n_negative
        n_batches = min(-(-(n_positive + wanted) // batch_size), len(targets) // batch_size)
        self.k = min(wanted, n_negative)
        if n_batches * batch_size > n_positive:
            self.k = n_batches * batch_size - n_positive
        self.loader = dl  # not `dls.train`: with several processes that wraps it
        self.set_epoch(dl, 0)

    def indexes(self, epoch: int) -> list[int]:
        """The rows that an epoch trains on, shuffled."""
        benign = self.negative[draw(len(self.negative), self.k, self.seed, epoch)]
        rows = np.concatenate([self.positive, benign])
        rows = np.random.default_rng([self.seed, epoch, 1]).permutation(rows)
        # drop an incomplete last batch, unless it is the only one
        return rows[: max(len(rows) // self.batch_size, 1) * self.batch_size].tolist()

    def set_epoch(self, dl: TfmdDL, epoch: int) -> None:
        """Have `dl` give an epoch's rows; with workers too, which are started afterwards."""
        rows = self.indexes(epoch)
        dl.get_idxs, dl.n = (lambda: rows), len(rows)

    def before_epoch(self) -> None:
        """Choose the rows of the epoch that begins."""
        self.set_epoch(self.loader, self.epoch)


def choose_monitored(targets: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The rows of a fold that are scored after each epoch: sorted positions in `targets`.

    They are all melanomas, and benign images up to `n` rows, the same in each epoch so that epochs
    can be compared. A whole fold of the competition has seven times the images of an epoch.
    """
    positive, negative = np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)
    k = min(len(negative), max(n - len(positive), 1))
    benign = np.random.default_rng(seed).choice(negative, k, replace=False)
    return np.sort(np.concatenate([positive, benign]))
