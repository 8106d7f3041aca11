"""Test-time augmentation by fastai's `Learner.tta`, with repeatable draws and a progress bar."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from fastai.vision.all import (
    Callback,
    DataLoaders,
    Learner,
    ProgressCallback,
    TensorImage,
    Transform,
    noop,
)
from torch import nn
from tqdm import tqdm

from lib.callbacks import NO_BAR, seed_all
from lib.cli import Stop
from lib.model import ProbabilityModel
from lib.speed import layout, ready_memory


class SeedBatch(Transform):
    """Seeds each batch by (seeds, pass, batch number), so that its draws depend on nothing else.

    With `by_image`, and one image a batch, the hash of the image replaces the batch number: an
    image is then augmented in the same ways whatever other images there are. This is the first
    batch transform and not a callback, since torch's DataLoader draws from the global generator
    between a callback's events and the batch.
    """

    order = 1

    def __init__(self, seeds: Sequence[int], by_image: bool = False):
        self.seeds, self.by_image, self.n_pass, self.n_batch = seeds, by_image, 0, 0

    def encodes(self, x: TensorImage) -> TensorImage:
        number = self.n_batch
        if self.by_image:
            digest = hashlib.sha256(x.cpu().numpy().tobytes()).digest()
            number = int.from_bytes(digest[:8])
        seed_all(*self.seeds, self.n_pass, number)
        self.n_batch += 1
        return x


class Passes(Callback):
    """Tells a SeedBatch which pass begins, and shows a progress bar over all `n` passes."""

    def __init__(self, seed_batch: SeedBatch, n: int, label: str):
        self.seed_batch, self.n, self.label = seed_batch, n, label

    def before_fit(self) -> None:
        """Start the bar."""
        total, self.n_begun = self.n * len(self.dls.valid), 0
        self.bar = tqdm(total=total, desc=self.label, leave=False, disable=NO_BAR)

    def before_validate(self) -> None:
        """Begin the next pass at its first batch."""
        self.seed_batch.n_pass, self.seed_batch.n_batch = self.n_begun, 0
        self.n_begun += 1

    def after_batch(self) -> None:
        """Move the bar."""
        self.bar.update()

    def after_fit(self) -> None:
        """Take the bar away."""
        self.bar.close()


def predictor(
    dls: DataLoaders,
    model: nn.Module,
    precision: str = 'fp32',
    seed_batch: SeedBatch | None = None,
    n_tta: int = 0,
    label: str = 'predict',
) -> Learner:
    """A Learner whose `tta` and `get_preds` return (n, 1) probabilities on the CPU.

    `model` gives logits, and is changed to `precision` in place. `seed_batch` seeds the `n_tta`
    passes of tta.
    """
    ready_memory(dls.device)
    model = ProbabilityModel(model, dls.valid.bs, precision, layout(dls.device))
    seed_batch = seed_batch or SeedBatch([0])
    dls.valid.after_batch.add(seed_batch)
    # noop is never called; from a loss with an activation fastai would take a second sigmoid
    learn = Learner(dls, model, loss_func=noop, cbs=Passes(seed_batch, n_tta + 1, label))
    learn.remove_cb(ProgressCallback)  # it prints thousands of characters into a log file
    return learn


def check_finite(pred: torch.Tensor, label: str) -> np.ndarray:
    """Predictions (n, 1) as (n,) float64. Raises: Stop where one of them is not finite."""
    pred = pred[:, 0].double().numpy()
    if not np.isfinite(pred).all():
        raise Stop(
            f'{label}: the model predicts NaN or infinity. If it ran in half precision, try '
            '--precision fp32; otherwise its weights cannot be used'
        )
    return pred
