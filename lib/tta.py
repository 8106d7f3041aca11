"""Passes over images for fastai's `Learner.tta`: repeatable draws, a progress bar, and a check."""

from collections.abc import Sequence

import numpy as np
import torch
from fastai.vision.all import Callback, DataLoaders, Learner, TensorImage, Transform, noop
from torch import nn
from tqdm import tqdm

from lib.callbacks import NO_BAR, seed_all
from lib.cli import Stop
from lib.model import ProbabilityModel


class SeedBatch(Transform):
    """Seeds each batch by (seeds, pass, batch number), so that its draws depend on nothing else.

    This is the first batch transform and not a callback, since torch's DataLoader draws from the
    global generator between a callback's events and the batch.
    """

    order = 1

    def __init__(self, seeds: Sequence[int]):
        self.seeds, self.n_pass, self.n_batch = seeds, 0, 0

    def encodes(self, x: TensorImage) -> TensorImage:
        seed_all(*self.seeds, self.n_pass, self.n_batch)
        self.n_batch += 1
        return x


class Passes(Callback):
    """Tells a SeedBatch which of `n` passes begins, and shows a progress bar over all of them."""

    def __init__(self, seed_batch: SeedBatch, n: int, label: str):
        self.seed_batch, self.n, self.label = seed_batch, n, label

    def before_fit(self) -> None:
        """Start the bar."""
        total, self.n_begun = self.n * len(self.dls.valid), 0
        self.bar = tqdm(total=total, desc=self.label, leave=False, disable=NO_BAR)

    def before_validate(self) -> None:
        """Begin the next pass at its first batch, since fastai may have tried one before."""
        self.seed_batch.n_pass, self.seed_batch.n_batch = self.n_begun, 0
        self.n_begun += 1

    def after_batch(self) -> None:
        """Move the bar."""
        self.bar.update()

    def after_fit(self) -> None:
        """Take the bar away."""
        self.bar.close()


def predict_plain(dls: DataLoaders, model: nn.Module, size: int, precision: str) -> np.ndarray:
    """Probabilities (n,) of the images of `dls.valid`, not augmented. The model's logits become
    probabilities in `precision`; it must not be trained any further."""
    model, passes = ProbabilityModel(model, size, precision), Passes(SeedBatch([0]), 1, 'score')
    learn = Learner(dls, model, loss_func=noop, cbs=passes)
    with learn.no_bar():
        return check_finite(learn.get_preds()[0], 'the held-out images')


def check_finite(pred: torch.Tensor, label: str) -> np.ndarray:
    """Predictions (n, 1) as (n,) float64. Raises: Stop where one of them is not finite."""
    pred = pred[:, 0].double().numpy()
    if not np.isfinite(pred).all():
        raise Stop(
            f'{label}: the model predicts NaN or infinity. If it ran in half precision, try '
            '--precision fp32; otherwise its weights cannot be used'
        )
    return pred
