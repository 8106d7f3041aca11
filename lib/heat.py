"""Where a model looks: signed class activation maps of single images."""

import shutil
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from lib import augment, data, images, locks, model, pictures
from lib.cli import Stop
from lib.runs import Run


def check_runs(runs: Sequence[Run]) -> None:
    """Raises: Stop where the features of one of `runs` are no maps, as a transformer's are not."""
    for run in runs:
        net = model.create(run.config['arch'], run.config['size']).eval()
        features = net.forward_features(torch.zeros(1, 3, *[run.config['size']] * 2))
        shape = getattr(features, 'shape', ())  # in models of several scales a list
        if len(shape) != 4 or shape[1] != net.num_features:
            why = 'has tokens or several scales, and --heat needs one map for each feature'
            raise Stop(f'{run}: {run.config["arch"]} {why}; leave it out, or name others by --only')


def activation_map(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What speaks for malignant (above 0) and against it, in images: (B, 3, H, W) to (B, h, w).

    The features are weighted by the logit's gradient. Of a `net`, in eval mode, that ends in global
    average pooling and one Linear layer this is the exact class activation map: its mean plus the
    bias is the logit. It stays signed, since a ReLU would empty it for many benign images.
    Source: https://arxiv.org/abs/1512.04150, https://arxiv.org/abs/1610.02391
    """
    with torch.no_grad():
        features = net.forward_features(x)
    logits = net.forward_head(features.requires_grad_())
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    return (gradient.sum((2, 3), keepdim=True) * features).sum(1).detach()


def compute_maps(run: Run, k: int, rows: pd.DataFrame) -> np.ndarray:
    """The maps (n, h, w) of the images `rows.cached`, not augmented, in fp32, by fold k's model."""
    tfms = augment.batch_tfms(run.config['mean'], run.config['std'])
    dl = data.prediction_dls(rows, tfms, batch_size=16, workers=0).valid
    net = model.load(run.config['arch'], run.config['size'], run.weights(k)).eval().to(dl.device)
    batches = [activation_map(net, x.as_subclass(torch.Tensor)) for (x,) in dl]
    return torch.cat(batches).cpu().numpy()


def select(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """The `n` highest and `n` lowest `pred` of each class."""
    ends = (rows.sort_values('pred', ascending=low, kind='stable') for low in (False, True))
    return pd.concat([end.groupby('target').head(n) for end in ends]).drop_duplicates('image_name')


def draw_run(run: Run, oof: pd.DataFrame, n: int) -> None:
    """Draw what `select` takes of the run's predictions `oof` to runs/NAME/heat/, anew.

    A map is by the model of the image's fold, which has not seen the patient.
    """
    folder, rows = run.folder / 'heat', select(oof, n).sort_values('fold')
    rows['cached'] = images.cache(rows, run.home, run.config['size'])
    maps = [compute_maps(run, k, of_fold) for k, of_fold in rows.groupby('fold')]
    with locks.held(run.lock):  # another process may draw them too
        shutil.rmtree(folder, ignore_errors=True)
        print(f'{folder}: {pictures.draw_heat_maps(folder, rows, np.concatenate(maps))}')
