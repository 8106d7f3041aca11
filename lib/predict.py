"""The plain pass and test-time augmentation: fastai's `Learner.tta` in meaning, on its own path."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import Pipeline, TensorImage, Transform, default_device
from torch import nn
from tqdm import tqdm

from lib import ranks
from lib.callbacks import seed_all
from lib.cli import Stop
from lib.learner import keep_memory, resolve
from lib.loaders import loader
from lib.model import for_inference


@torch.inference_mode()
def predict(
    nets: Sequence[nn.Module],
    paths: Sequence[Path],
    tfms: list[Transform],
    batch_size: int,
    n_tta: int = 0,
    seed: int = 0,
    workers: int | None = None,
    label: str = 'predict',
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of melanoma for the images in `paths`: the mean of `nets`, in their order.

    An image is read once for all passes, and each augmented batch is shared by all nets, which
    come from `model.for_inference`. Under a launcher the processes share out whole batches.

    Returns: the plain mean of `n_tta` passes under the training augmentation, and the pass
    without; (n,) float in 0..1 both, and equal if `n_tta` is 0. What is drawn depends on (seed,
    pass, batch number), so on the batch size too. Raises: Stop where a prediction is not finite.
    """
    paths, full = list(paths), min(batch_size, len(paths))
    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    mine = range(ranks.RANK, len(batches), ranks.WORLD)
    rows = [path for number in mine for path in batches[number]]
    # fastai makes no loader of nothing: of no test images, of a process without a batch
    dl = loader(rows, [0] * len(rows), [], batch_size, workers=workers) if rows else []
    device = default_device()
    if device.type == 'cpu':
        keep_memory()
    nets = [net.to(device) for net in nets]
    augment, plainly = Pipeline(tfms, split_idx=0), Pipeline(tfms, split_idx=1)
    done = {}
    with tqdm(total=(n_tta + 1) * len(mine), desc=label, leave=False, disable=ranks.SILENT) as bar:
        for number, (images, _) in zip(mine, dl, strict=True):  # (B, 3, H, W) uint8
            passes = []
            for k in range(n_tta):
                seed_all(seed, k, number)
                passes.append(_mean(nets, augment(images), full))
                bar.update()
            plain = _mean(nets, plainly(images), full)
            bar.update()
            mean = torch.stack(passes).mean(0) if passes else plain
            done[number] = torch.stack([mean, plain]).cpu()  # (2, B)
    done = {number: pred for part in ranks.gather(done) for number, pred in part.items()}
    if not done:  # a table without test images
        return np.empty(0), np.empty(0)
    mean, plain = torch.cat([done[number] for number in range(len(batches))], 1).double().numpy()
    if not np.isfinite(mean + plain).all():
        raise Stop(f'{label}: the model predicts NaN or infinity; its weights are of no use')
    return mean, plain


def lowest(
    net: nn.Module,
    size: int,
    paths: Sequence[Path],
    tfms: list[Transform],
    batch_size: int,
    workers: int | None = None,
) -> str:
    """The lowest precision that keeps the predictions of `net`: 'fp16', 'bf16' or 'fp32'.

    fp16 is tried on CUDA; bf16, which has three bits less, on a CPU with instructions for it. It
    has to move no probability by .01 or more in a plain pass over 64 images spread over `paths`.
    """
    device = default_device()
    half = 'fp16' if device.type == 'cuda' else resolve('auto', device)
    if half == 'fp32' or not len(paths):
        return 'fp32'
    sample, preds = list(paths)[:: -(-len(paths) // 64)], []
    for precision in ('fp32', half):
        ready = for_inference(copy.deepcopy(net), size, precision)
        try:
            preds.append(predict([ready], sample, tfms, batch_size, workers=workers)[1])
        except Stop:  # not finite
            return 'fp32'
    return half if np.abs(preds[0] - preds[1]).max() < 0.01 else 'fp32'


def _mean(nets: list[nn.Module], x: TensorImage, full: int) -> torch.Tensor:
    """The mean of the nets' probabilities for `x`, (B, 3, H, W) float, normalized: (B,)."""
    n, x = len(x), x.as_subclass(torch.Tensor).to(next(nets[0].parameters()).dtype)
    if n < full:  # the last batch is filled up: a compiled net would be compiled for it again
        x = torch.cat([x, x.new_zeros(full - n, *x.shape[1:])])
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.stack([net(x)[:n, 0].sigmoid() for net in nets]).mean(0)
