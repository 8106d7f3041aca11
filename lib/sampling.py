"""Per-epoch downsampling of the benign majority, without replacement across epochs."""

from collections.abc import Sequence

import numpy as np
from fastai.vision.all import Callback, TfmdDL

from lib.cli import Stop


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
    """Each epoch trains on every malignant image and `neg_ratio` times as many benign ones.

    `targets`: (n,) 0/1 of the rows of `dl`, the training loader. Its length is set at once, since
    `lr_find` needs it before the first epoch. `neg_ratio` 0 means all images in each epoch. A step
    takes `accumulate` batches of `batch_size` images, in all processes together. More benign images
    fill the last step of an epoch, since a smaller one would give its images more weight, and a
    single image has no batch statistics. Where there are too few, that step is left out.
    Raises: Stop where an epoch is smaller than a step of several batches.
    """

    def __init__(
        self,
        dl: TfmdDL,
        targets: Sequence[int],
        neg_ratio: float,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
    ):
        targets = np.asarray(targets)
        self.positive, self.negative = np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)
        self.seed, self.of_step = seed, batch_size * accumulate
        n_positive, n_negative = len(self.positive), len(self.negative)
        wanted = max(1, round(neg_ratio * n_positive)) if neg_ratio else n_negative
        self.k = min(wanted, n_negative)
        if accumulate > 1 and n_positive + self.k < self.of_step:
            most = (n_positive + self.k) // batch_size
            raise Stop(
                f'--accumulate {accumulate} makes steps of {self.of_step} images, and an epoch has '
                f'{n_positive + self.k}; take '
                + (f'--accumulate {most} at most' if most else 'a smaller --batch_size')
            )
        n_steps = min(-(-(n_positive + wanted) // self.of_step), len(targets) // self.of_step)
        if n_steps * self.of_step > n_positive:
            self.k = n_steps * self.of_step - n_positive
        self.loader = dl  # not `dls.train`: with several processes that wraps it
        self.set_epoch(dl, 0)

    def indexes(self, epoch: int) -> list[int]:
        """The rows that an epoch trains on, shuffled."""
        benign = self.negative[draw(len(self.negative), self.k, self.seed, epoch)]
        rows = np.concatenate([self.positive, benign])
        rows = np.random.default_rng([self.seed, epoch, 1]).permutation(rows)
        # drop an incomplete last step, unless it is the only one
        return rows[: max(len(rows) // self.of_step, 1) * self.of_step].tolist()

    def set_epoch(self, dl: TfmdDL, epoch: int) -> None:
        """Have `dl` give an epoch's rows; with workers too, which are started afterwards."""
        rows = self.indexes(epoch)
        dl.get_idxs, dl.n = (lambda: rows), len(rows)

    def before_epoch(self) -> None:
        """Choose the rows of the epoch that begins."""
        self.set_epoch(self.loader, self.epoch)
