"""Where a model looks: signed class activation maps of single images, and one measure of them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lib import augment, data, files, images, locks, model, pictures, score, speed
from lib.cli import Stop
from lib.runs import WEIGHTS, Run

N_MEASURED = 300  # images of each class that are measured, at most; one a patient or lesion


def check_runs(runs: Sequence[Run]) -> None:
    """Raises: Stop where the features of one of `runs` are no maps, as a transformer's are not."""
    for run in runs:
        net = model.create(run.config['arch'], run.config['size']).eval()
        features = net.forward_features(torch.zeros(1, 3, *[run.config['size']] * 2))
        shape = getattr(features, 'shape', ())  # in models of several scales a list
        if len(shape) != 4 or shape[1] != net.num_features:
            why = 'has tokens or several scales, and --heat needs one map for each feature'
            raise Stop(f'{run}: {run.config["arch"]} {why}; leave it out, or name others by --only')


def activation_map(net: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What speaks for melanoma (above 0) and against it, in images: (B, 3, H, W) to (B, h, w).

    The features are weighted by the logit's gradient. Of a `net`, in eval mode, that ends in global
    average pooling and one Linear layer this is the exact class activation map: its mean and the
    bias are the logit. It stays signed, since a ReLU would empty it for many benign images.
    Source: https://arxiv.org/abs/1512.04150, https://arxiv.org/abs/1610.02391

    Returns: the maps, in logits, and the logits of the images, (B,).
    """
    with torch.no_grad():
        features = net.forward_features(x)
    logits = net.forward_head(features.requires_grad_())
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    return (gradient.sum((2, 3), keepdim=True) * features).sum(1).detach(), logits.detach()[:, 0]


def compute_maps(
    run: Run, folds: Sequence[int], rows: pd.DataFrame, random: bool = False
) -> list[np.ndarray]:
    """The maps (n, h, w) and logits (n,) of the images `rows.cached`, not augmented, in fp32.

    They are the mean of the models of `folds`, or of as many with `random` weights.
    """
    arch, size, results = run.config['arch'], run.config['size'], []
    tfms = augment.batch_tfms(run.config['mean'], run.config['std'])
    dl = data.prediction_dls(rows, tfms, batch_size=16, workers=0).valid
    for k in folds:
        torch.manual_seed(k)
        net = model.create(arch, size) if random else model.load(arch, size, run.fold(k) / WEIGHTS)
        net = net.eval().to(dl.device, memory_format=speed.layout(dl.device))
        batches = [activation_map(net, x.as_subclass(torch.Tensor)) for (x,) in dl]
        results.append([torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True)])
    return [np.mean(of_nets, axis=0) for of_nets in zip(*results, strict=True)]


def select(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """The `n` highest and `n` lowest `pred` of each class, or of all where there is no target."""
    by = rows.get('target', rows.source)  # a folder of images is one source
    ends = (rows.sort_values('pred', ascending=low, kind='stable') for low in (False, True))
    return pd.concat([end.groupby(by).head(n) for end in ends]).drop_duplicates('image_name')


def is_central(maps: np.ndarray) -> np.ndarray:
    """Whether maps (n, h, w) are highest in the central square of half the image's side: (n,).
    Bilinear enlargement leaves the highest point at the centre of the highest cell."""
    n, h, w = maps.shape
    y, x = np.unravel_index(maps.reshape(n, h * w).argmax(1), (h, w))
    return (abs((y + 0.5) / h - 0.5) < 0.25) & (abs((x + 0.5) / w - 0.5) < 0.25)


def measure(target: pd.Series, maps: np.ndarray, by_random: np.ndarray) -> dict:
    """How often the maps (n, h, w), and those `by_random` weights, are highest in the middle."""
    chance, central = is_central(np.eye(maps[0].size).reshape(-1, *maps[0].shape)).mean(), {}
    for value, name in ((1, 'melanomas'), (0, 'benign images')):
        nets, of = {'model': maps, 'random_weights': by_random}, (target == value).to_numpy()
        hits = {net: is_central(of_net[of]) for net, of_net in nets.items()}
        central[name] = {net: score.estimate_share(hit) for net, hit in hits.items()}
        central[name]['images'] = int(of.sum())
    texts = '{model} of {images} {name} (with random weights in {random_weights})'
    words = (
        'a map is highest in the central quarter of the image in a share of '
        f'{" and ".join(texts.format(name=name, **each) for name, each in central.items())}; '
        f'{chance:.4f} of the cells lie there. Where lesions are centred, this proves little'
    )
    if not chance:  # as of 2 x 2 cells
        words = 'the maps have too few cells to say how often they are highest in the middle'
    return {'central': central, 'central_cells': chance, 'measured': words}


def draw_run(run: Run, oof: pd.DataFrame, n: int) -> None:
    """Draw what `select` takes of the run's predictions `oof` to runs/NAME/heat/, and measure.

    A map is by the model of the image's fold, which has not seen the patient. heat.json is written
    last, and deleted with the predictions that it belongs to.
    """
    path = run.folder / 'heat' / 'heat.json'
    with locks.held(path.with_name('.lock')):
        if not path.exists() or files.read_json(path)['n'] != n:
            path.unlink(missing_ok=True)
            shuffled = oof.sample(frac=1, random_state=0).drop_duplicates(['group', 'target'])
            chosen, sample = select(oof, n), shuffled.groupby('target').head(N_MEASURED)
            rows = pd.concat([chosen, sample]).drop_duplicates('image_name').sort_values('fold')
            rows['cached'] = images.cache(rows, run.home, run.config['size'])
            folds = [([k], part) for k, part in rows.groupby('fold')]
            trained = [compute_maps(run, *f) for f in folds]
            maps, rows['logit'] = map(np.concatenate, zip(*trained, strict=True))
            by_random = np.concatenate([compute_maps(run, *f, random=True)[0] for f in folds])
            shown, measured = (rows.image_name.isin(r.image_name) for r in (chosen, sample))
            facts = pictures.draw_heat_maps(path.parent, rows[shown], maps[shown]) | {'n': n}
            facts |= measure(rows.target[measured], maps[measured], by_random[measured])
            files.write_json(path, facts)
        facts = files.read_json(path)
        print(f'{path.parent}: {facts["pictures"]} images, {facts["legend"]}; {facts["measured"]}')


def draw_images(runs: Sequence[Run], table: pd.DataFrame, folder: Path, n: int) -> None:
    """Draw what `select` takes of `table` (image_name, path, source, pred) to FOLDER/RUN, by each
    run: the mean of the maps by the models of its folds."""
    rows = select(table, n)
    for run in runs:
        with tempfile.TemporaryDirectory() as home:
            rows['cached'] = images.cache(rows, Path(home), run.config['size'])
            maps, rows['logit'] = compute_maps(run, run.trained_folds, rows)
            facts = pictures.draw_heat_maps(folder / run.name, rows, maps)
        print(f'{folder / run.name}: {facts["pictures"]} images, {facts["legend"]}')
