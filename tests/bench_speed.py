"""How fast this project is beside a plain loop of the public solutions. Run by hand:

python tests/bench_speed.py                                  # generated images, random weights
python tests/bench_speed.py --data DATA --weights FILE       # the epoch on real data (lite0)

Plain: timm, NCHW, fp32, eager, PIL's full decode, one pass at a time, validation on the whole fold.
Each side runs in a process of its own, the two in turn; the figure is the median of the ratios,
with the least and the most beside it. Nothing else should run meanwhile.

Measured with real data on two cores of a shared and busy machine, three repeats, medians of the
ratios: the cache 8.6 [8.6, 8.8] (by both cores against one), TTA 4.8 [3.4, 6.7], the step 2.3
[1.0, 2.4]. The epoch was not measured on real data; in small it was 1.6 [1.5, 1.7].
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fastai.vision.all as fastai  # noqa: E402
import kornia.augmentation as K  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torch.nn.functional import binary_cross_entropy_with_logits  # noqa: E402

import lib  # noqa: E402
from lib import cli  # noqa: E402

STATS = ((0.5,) * 3, (0.5,) * 3)
LITE0 = 'tf_efficientnet_lite0'


def main(
    *,
    data: str | None = None,  # Kaggle's layout, for the epoch; by default --demo's lesions
    weights: str | None = None,  # ImageNet weights of tf_efficientnet_lite0, for the epoch
    arch: str = 'efficientnet_b5',  # the architecture of TTA and of the training step
    size: int = 512,  # side of its images, in pixels
    batch_size: int = 4,  # its images a batch
    precision: str = 'bf16',  # in which this project predicts and makes the step
    rows: int = 2000,  # labelled images of the epoch, drawn at random
    repeats: int = 5,  # how often each side is timed
    only: str = 'prepare,tta,step,epoch',  # names of rows, with commas between
) -> None:
    """Time this project beside the plain loop, and print a row for each piece of work."""
    table = {
        'prepare': (prepare_plainly, prepare, 'JPEGs of 24 megapixels to the cache, all cores'),
        'tta': (predict_plainly, predict, f'{arch}, 3 + 1 passes in {precision}'),
        'step': (step_plainly, step, f'{arch}, a training step in {precision}'),
        'epoch': (epoch_plainly, epoch, f'{LITE0} at 160 px, an epoch, monitored, in fp32'),
    }
    print(f'{size} px, batches of {batch_size}, {torch.get_num_threads()} threads')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = (folder, data, weights, arch, size, batch_size, precision, rows)
        draw_images(folder, size, batch_size)
        for name in only.split(','):
            plain, ours, what = table[name]
            sides = [start(make, options) for make in (plain, ours)]
            seconds = [[ask(side) for side in sides] for _ in range(repeats)]
            ratios = [a / b for a, b in seconds]
            plain_s, ours_s = (statistics.median(s) for s in zip(*seconds, strict=True))
            print(
                f'{name}: {statistics.median(ratios):.2f} times as fast '
                f'[{min(ratios):.2f}, {max(ratios):.2f}]; {plain_s:.2f} s, {ours_s:.2f} s; {what}',
                flush=True,
            )
            for side in sides:
                side.send(None)


def start(make: Callable, options: tuple):
    """A process that makes the work ready, does it once untimed, and waits to be asked."""
    context = get_context('spawn')
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(make, options, theirs)).start()
    return ours


def ask(side) -> float:
    """The seconds of one repetition of a side's work."""
    side.send('again')
    return side.recv()


def _serve(make: Callable, options: tuple, pipe) -> None:
    work = make(*options)
    work()
    while pipe.recv():
        begin = time.perf_counter()
        work()
        pipe.send(time.perf_counter() - begin)


def draw_images(folder: Path, size: int, n: int) -> None:
    """Three JPEGs as of a camera (a lesion, fine grain; 2 to 3 MB), and n squares of `size`."""
    rng = np.random.default_rng(0)
    (folder / 'large').mkdir()
    (folder / 'squares').mkdir()
    for i in range(3):
        image = Image.fromarray(lib.demo.draw(rng, i % 2)).resize((6000, 4000))
        grain = Image.effect_noise(image.size, 12).filter(ImageFilter.GaussianBlur(1.2))
        image = Image.blend(image, grain.convert('RGB'), 0.15)
        image.save(folder / 'large' / f'{i}.jpg', quality=90)
    for i in range(n):
        square = Image.fromarray(lib.demo.draw(rng, i % 2)).resize((size, size))
        square.save(folder / 'squares' / f'{i}.jpg', quality=95)


# ---- the plain loops


def prepare_plainly(folder, data, weights, arch, size, *_) -> Callable:
    def work() -> None:
        for path in sorted((folder / 'large').iterdir()):
            image = Image.open(path).convert('RGB')
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image.resize((size, size), Image.Resampling.LANCZOS).save(folder / 'plain.jpg')

    return work


def predict_plainly(folder, data, weights, arch, *_) -> Callable:
    net, paths = timm.create_model(arch, num_classes=1).eval(), list((folder / 'squares').iterdir())

    @torch.no_grad()
    def work() -> None:
        for k in range(4):
            x = read_plainly(paths)
            net((AUGMENT(x) if k < 3 else x) * 2 - 1).sigmoid()

    return work


def step_plainly(folder, data, weights, arch, *_) -> Callable:
    net, paths = timm.create_model(arch, num_classes=1), list((folder / 'squares').iterdir())
    return lambda: train_plainly(net, torch.optim.AdamW(net.parameters()), paths, range(len(paths)))


def epoch_plainly(folder, data, weights, *options) -> Callable:
    table = read_table(folder, data, options[-1])
    net = create_lite0(weights)
    optimizer, epochs = torch.optim.AdamW(net.parameters(), 1e-3), iter(range(10**6))
    train, valid = table[table.fold != 0], table[table.fold == 0]

    def work() -> None:
        positive = train[train.target == 1]
        benign = train[train.target == 0].sample(len(positive), random_state=next(epochs))
        rows = pd.concat([positive, benign]).sample(frac=1, random_state=0)
        for i in range(0, len(rows), 32):
            batch = rows[i : i + 32]
            train_plainly(net.train(), optimizer, batch.cached, batch.target)
        with torch.no_grad():
            for i in range(0, len(valid), 32):
                net.eval()(read_plainly(valid.cached[i : i + 32]) * 2 - 1)

    return work


AUGMENT = torch.nn.Sequential(
    K.RandomAffine(degrees=180, translate=(0.02, 0.02), p=1.0),
    K.RandomHorizontalFlip(p=0.5),
    K.ColorJiggle(brightness=0.1, contrast=(0.8, 1.2), saturation=(0.7, 1.3), p=1.0),
)


def read_plainly(paths) -> torch.Tensor:
    """(B, 3, H, W) float in 0..1."""
    arrays = [np.asarray(Image.open(path).convert('RGB')) for path in paths]
    return torch.stack([torch.tensor(a).permute(2, 0, 1) for a in arrays]).float() / 255


def train_plainly(net, optimizer, paths, targets) -> None:
    optimizer.zero_grad()
    logits = net(AUGMENT(read_plainly(paths)) * 2 - 1)[:, 0]
    binary_cross_entropy_with_logits(logits, torch.tensor(list(targets)).float() % 2).backward()
    optimizer.step()


# ---- this project


def prepare(folder, data, weights, arch, size, *_) -> Callable:
    paths = sorted((folder / 'large').iterdir())
    table = pd.DataFrame({'path': paths, 'image_name': [p.stem for p in paths], 'source': 'a'})

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as home:
            lib.images.cache(table, Path(home), size)

    return work


def predict(folder, data, weights, arch, size, batch_size, precision, _) -> Callable:
    rows = pd.DataFrame({'cached': sorted((folder / 'squares').iterdir())})
    net = lib.speed.fuse_batch_norms(lib.model.create(arch, size), size)
    dls = lib.data.prediction_dls(rows, lib.augment.batch_tfms(*STATS), batch_size)
    learn = lib.tta.predictor(dls, net, precision)
    return lambda: learn.tta(n=3, beta=None)


def step(folder, data, weights, arch, size, batch_size, precision, _) -> Callable:
    table = pd.DataFrame({'cached': sorted((folder / 'squares').iterdir()) * 2})
    table['fold'], table['target'] = [0] * batch_size + [1] * batch_size, [0, 1] * batch_size
    net = lib.model.create(arch, size)
    dls, _ = lib.data.training_dls(table, 0, lib.augment.batch_tfms(*STATS), batch_size, 1, 0)
    learn = lib.learner.create_learner(dls, net, 0.1, precision)
    return lambda: learn.fit(1, 1e-4, cbs=[NoValidation()])  # an epoch of one batch


class NoValidation(fastai.Callback):
    """Leaves the training step alone."""

    def before_validate(self) -> None:
        raise fastai.CancelValidException


def epoch(folder, data, weights, *options) -> Callable:
    table = read_table(folder, data, options[-1])
    dls, downsample = lib.data.training_dls(table, 0, lib.augment.batch_tfms(*STATS), 32, 1, 0)
    learn = lib.learner.create_learner(dls, create_lite0(weights), 0.1)
    return lambda: learn.fit(1, 1e-3, cbs=[downsample])


# ---- what both sides read


def read_table(folder: Path, data: str | None, n: int) -> pd.DataFrame:
    """`n` labelled images, with the paths of their squares of 160 pixels."""
    home = folder / 'home'
    with lib.locks.held(folder / '.lock'):
        if not (home / 'folds.csv').exists():
            import folds

            folds.main(data=str(data or lib.demo.make(folder / 'demo')), home=str(home))
        table = lib.tables.read_labelled(home / 'folds.csv')
        table = table.sample(min(n, len(table)), random_state=0).reset_index(drop=True)
        return table.assign(cached=lib.images.cache(table, home, 160))


def create_lite0(weights: str | None):
    """The small model, from ImageNet weights where there are some."""
    return lib.model.create(LITE0, 160, weights=Path(weights) if weights else None)


if __name__ == '__main__':
    cli.run(main)
