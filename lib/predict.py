"""The plain pass and test-time augmentation, through fastai."""

from collections.abc import Sequence

import numpy as np
import torch
from fastai.vision.all import Callback, Learner, TfmdDL
from tqdm import tqdm

from lib.cli import Stop
from lib.learner import seed_all


class Bar(Callback):
    """A bar with the time left, a tick a batch, in a terminal only."""

    def __init__(self, total: int, label: str):
        self.bar = tqdm(total=total, desc=label, leave=False, disable=None)

    def after_batch(self) -> None:
        """Move the bar."""
        self.bar.update()


def predict(
    learn: Learner, dl: TfmdDL, n_tta: int = 0, seed: Sequence[int] = (0,), label: str = 'predict'
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of melanoma for the images of `dl`, in its order.

    Returns: the plain mean of `n_tta` passes under the training augmentation, and the pass
    without; (n,) float in 0..1 both, and equal if `n_tta` is 0. The same `seed` and batch size
    draw the same augmentation. Raises: Stop where a prediction is not finite.
    """
    if not len(dl):  # a table without test images
        return np.empty(0), np.empty(0)
    seed_all(*seed)
    bar = Bar((n_tta + 1) * len(dl), label)
    with learn.added_cbs(bar), bar.bar:
        if n_tta:
            # beta=None: fastai would mix a quarter of the plain pass into the mean
            (mean, plain), _ = learn.tta(dl=dl, n=n_tta, beta=None)
        else:
            mean = plain = learn.get_preds(dl=dl)[0]
    if not torch.isfinite(mean + plain).all():
        raise Stop(f'{label}: the model predicts NaN or infinity; its weights are of no use')
    return mean.double().numpy()[:, 0], plain.double().numpy()[:, 0]
