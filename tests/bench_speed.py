"""How fast this project is beside a plain loop of the public solutions. Run by hand:

python tests/bench_speed.py                                  # generated images, random weights
python tests/bench_speed.py --data DATA --weights FILE       # the epoch on real data (lite0)

Plain: timm, NCHW, fp32, eager, PIL's full decode, one pass at a time. Each side runs in a process
of its own, the two in turn; the figure is the median, with the least and the most beside it.
Nothing else may run meanwhile.
"""

import contextlib
import io
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402

from lib import cli  # noqa: E402

STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE0 = 'tf_efficientnet_lite0'
Step = Callable[[], tuple[float, float]]  # does some work: (units, seconds)


def main(
    *,
    data: str | None = None,
    weights: str | None = None,
    arch: str = 'efficientnet_b5',
    size: int = 512,
    batch_size: int = 4,
    rows: int | None = None,
    repeats: int = 5,
    only: str | None = None,
    quick: bool = False,
) -> None:
    """Time this project beside the plain loop, and print a table.

    Args:
        data: Kaggle's layout, for the epoch; by default the synthetic lesions of --demo.
        weights: ImageNet weights of tf_efficientnet_lite0, for the epoch; by default none.
        arch: the architecture of the TTA and of the training step.
        size: its images' side, in pixels.
        batch_size: its images a batch.
        rows: how many of the labelled images the epoch has, drawn at random; by default all.
        repeats: how often each side is timed.
        only: names of rows, with commas between.
        quick: a small model, small images: does the benchmark itself work?
    """
    o = {'data': data, 'weights': weights, 'arch': arch, 'size': size, 'batch_size': batch_size}
    o |= {'jpegs': 3, 'large': (6000, 4000), 'rows': rows}
    if quick:
        o |= {'arch': LITE0, 'size': 128, 'large': (1200, 800), 'rows': 200}
    table = {
        'prepare': (plain_prepare, fast_prepare, 4.0, 'images a second a core, JPEGs to a cache'),
        'tta': (plain_tta, fast_tta, 3.5, 'TTA, image passes a second'),
        'tta_fp32': (plain_tta, single_tta, 3.5, 'the same, where half precision does not do'),
        'tta_compiled': (plain_tta, compiled_tta, 3.5, 'the same, compiled'),
        'folds': (plain_tta, fast_folds, 4.0, 'five folds in one go, 15 + 1 passes, passes a s'),
        'step': (plain_step, fast_step, 1.4, 'training step, images a second'),
        'epoch': (plain_epoch, fast_epoch, 1.8, 'epoch of the recipe, monitored, epochs an hour'),
    }
    if only and (wrong := set(only.split(',')) - set(table)):
        raise cli.Stop(f'--only knows {", ".join(table)}, not {", ".join(wrong)}')
    print(f'{o["arch"]} at {o["size"]} px, batches of {o["batch_size"]}; {machine()}')
    with tempfile.TemporaryDirectory() as folder:
        o['folder'] = folder
        make_jpegs(Path(folder), o)
        for name, (plain, fast, least, what) in table.items():
            if not only or name in only.split(','):
                compare(name, what, plain, fast, least, repeats, o)


def compare(name, what, plain, fast, least: float, repeats: int, o: dict) -> None:
    """Time the two sides in turn and print their line, and what either has to say."""
    sides = [Side(plain, o), Side(fast, o)]
    rates = [[], []]
    for _ in range(repeats):
        for side, rate in zip(sides, rates, strict=True):
            units, seconds = side.ask('step')
            rate.append(units / seconds)
    medians = [statistics.median(rate) for rate in rates]
    ratio = medians[1] / medians[0]
    print(f'{name}: {what}\n  {ratio:.2f} x the plain loop (at least {least})')
    for label, side, rate in zip(('plain', 'this project'), sides, rates, strict=True):
        spread = f'[{min(rate):.3g} to {max(rate):.3g}], {len(rate)} times'
        peak = side.ask('peak')
        print(f'  {label}: {statistics.median(rate):.3g} {spread}; peak {peak:.0f} MB')
    for side in sides:
        if text := side.ask('text'):
            print(f'  {text}')
        side.end()


class Side:
    """A process that makes ready, does the work once untimed, and waits to be asked."""

    def __init__(self, make: Callable, o: dict):
        context = get_context('spawn')
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_side, args=(make, o, theirs))
        self.process.start()
        theirs.close()  # so that its end is heard of
        self.ours.recv()

    def ask(self, what: str):
        """'step': (units, seconds); 'peak': resident MB so far; 'text': what it has to say."""
        self.ours.send(what)
        return self.ours.recv()

    def end(self) -> None:
        """Let the process go."""
        self.ours.send(None)
        self.process.join()


def _side(make: Callable, o: dict, pipe) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        made = make(o)
        step, text = made if isinstance(made, tuple) else (made, lambda: '')
        if 'epoch' not in make.__name__:  # that takes its time, and warms up by itself
            step()
    pipe.send('ready')
    while (what := pipe.recv()) is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            if what == 'step':
                pipe.send(step())
            elif what == 'peak':
                pipe.send(peak())
            else:
                pipe.send(text())


def peak() -> float:
    """The most memory that this process has had resident, in MB."""
    status = Path('/proc/self/status')
    if status.exists():  # Linux; getrusage's figure there holds what the parent had at the start
        line = next(x for x in status.read_text().splitlines() if x.startswith('VmHWM'))
        return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == 'darwin' else 1 << 10)


def clocked(work: Callable[[], float]) -> Step:
    """A step that does `work`, which returns its units, and is timed as a whole."""

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        units = work()
        return units, time.perf_counter() - start

    return step


def machine() -> str:
    """Cores, and the rate of a matrix product in both precisions: what any path is bounded by."""
    import torch

    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048).to(dtype)
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
        rates.append(2 * 2048**3 / statistics.median(seconds) / 1e9)
    single, half = rates
    threads = torch.get_num_threads()
    return f'{threads} threads; matrix product {single:.0f} GFLOP/s fp32, {half:.0f} bf16'


def make_jpegs(folder: Path, o: dict) -> None:
    """Large JPEGs as of a camera (lesion, fine grain; 2 to 3 MB), and squares of `size`."""
    from lib.demo import draw

    rng = np.random.default_rng(0)
    (folder / 'large').mkdir()
    (folder / 'squares').mkdir()
    width, height = o['large']
    for i in range(o['jpegs']):
        image = Image.fromarray(draw(rng, i % 2)).resize((width, height), Image.Resampling.BICUBIC)
        grain = Image.effect_noise((width, height), 12).filter(ImageFilter.GaussianBlur(1.2))
        image = Image.blend(image, grain.convert('RGB'), 0.15)
        image.save(folder / 'large' / f'{i}.jpg', quality=90)
    for i in range(o['batch_size']):
        square = Image.fromarray(draw(rng, i % 2)).resize((o['size'], o['size']))
        square.save(folder / 'squares' / f'{i}.jpg', quality=95)


# --- preparing


def plain_prepare(o: dict) -> Step:
    def work() -> int:
        paths = sorted(Path(o['folder'], 'large').iterdir())
        for path in paths:
            image = Image.open(path).convert('RGB')
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((o['size'], o['size']), Image.Resampling.LANCZOS)
            image.save(Path(o['folder'], f'plain_{path.name}'), quality=95)
        return len(paths)

    return clocked(work)


def fast_prepare(o: dict) -> Step:
    import pandas as pd

    from lib import images

    paths = sorted(Path(o['folder'], 'large').iterdir())
    table = pd.DataFrame({'path': paths, 'image_name': [p.stem for p in paths], 'source': 'a'})

    def work() -> int:
        with tempfile.TemporaryDirectory(dir=o['folder']) as home:
            images.cache(table, Path(home), o['size'])  # so few in one process: one core
        return len(table)

    return clocked(work)


# --- predicting


def plain_tta(o: dict, passes: int = 1) -> Step:
    import torch

    net = new_net(o).eval()
    augment = plain_augment()
    paths = squares(o)

    @torch.no_grad()
    def work() -> int:
        preds = []
        for k in range(passes + 1):
            x = plain_batch(paths)
            preds.append(net(normalized(augment(x) if k < passes else x)).sigmoid())
        return len(paths) * len(preds)

    return clocked(work)


def fast_tta(
    o: dict, passes: int = 3, folds: int = 1, n: int | None = None, compiled=False, precision='auto'
) -> Step:
    import torch

    from lib import model
    from lib.augment import recipe
    from lib.learner import keep_memory, resolve
    from lib.predict import predict

    keep_memory()
    precision = resolve(precision, torch.device('cpu'))
    nets = [model.for_inference(new_net(o), o['size'], precision) for _ in range(folds)]
    nets = [model.compile(net) if compiled else net for net in nets]
    paths, tfms = squares(o)[:n], recipe(*STATS)

    def work() -> int:
        predict(nets, paths, tfms, len(paths), passes)
        return len(paths) * folds * (passes + 1)

    return clocked(work)


def single_tta(o: dict) -> Step:
    return fast_tta(o, precision='fp32')


def compiled_tta(o: dict) -> tuple[Step, Callable[[], str]]:
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = str(Path(o['folder'], 'inductor'))  # a cold start
    eager, step = fast_tta(o), fast_tta(o, compiled=True)
    rates = {}
    units, first = step()
    eager()
    for name, side in (('eager', eager), ('compiled', step)):
        tries = [side() for _ in range(3)]
        rates[name] = statistics.median(n / seconds for n, seconds in tries)
    seconds = first - units / rates['compiled']
    gain = 1 / rates['eager'] - 1 / rates['compiled']
    pays = f'pays from {seconds / gain / 16:.0f} images of 16 passes' if gain > 0 else 'never pays'
    text = f'compiling took {seconds:.0f} s; eager {rates["eager"]:.3g} passes a second: it {pays}'
    return step, lambda: text


def fast_folds(o: dict) -> Step:
    return fast_tta(o, passes=15, folds=5, n=2)  # two images: 160 passes take long enough


# --- training


def plain_step(o: dict) -> Step:
    import torch

    net = new_net(o).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.1)
    x = normalized(plain_augment()(plain_batch(squares(o))))
    y = torch.arange(len(x)).float()[:, None] % 2

    def work() -> int:
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()
        optimizer.step()
        return len(x)

    return clocked(work)


def fast_step(o: dict) -> tuple[Step, Callable[[], str]]:
    import torch
    from fastai.vision.all import Callback, DataLoaders

    from lib.augment import recipe
    from lib.learner import fastest, learner
    from lib.loaders import loader

    net, paths = new_net(o), squares(o)
    precision = fastest(net, o['size'], len(paths), torch.device('cpu'))
    tfms, targets = recipe(*STATS), [i % 2 for i in range(len(paths))]
    train = loader(paths, targets, tfms, len(paths), train=True)
    learn = learner(DataLoaders(train, loader(paths[:2], targets, tfms, 2)), net, 0.1, precision)

    class Clock(Callback):
        def before_batch(self):
            self.start = time.perf_counter()

        def after_batch(self):
            if self.training:
                self.seconds = time.perf_counter() - self.start

    clock = Clock()
    learn.add_cb(clock)

    def step() -> tuple[float, float]:
        learn.fit(1, 1e-4)
        return len(paths), clock.seconds

    return step, lambda: f'trained in {precision}'


def epoch_table(o: dict):
    """The fold that is held out, (n,) bool, and the table with the paths of 160 px squares."""
    import subprocess

    from lib import images, tables

    home = Path(o['folder'], 'home')
    if not (home / 'folds.csv').exists():
        data = o['data']
        if data is None:
            from lib.demo import make

            data = make(Path(o['folder'], 'demo'))
        command = [sys.executable, str(ROOT / 'folds.py'), '--data', str(data), '--home', str(home)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    table = tables.read_folds(home / 'folds.csv')
    table = table[table.split == 'train']
    table = table.sample(o['rows'] or len(table), random_state=0).reset_index(drop=True)
    table['cached'] = images.cache(table, home, 160)
    return (table.fold == 0).to_numpy(), table.astype({'target': int})


def lite0(o: dict):
    from lib import model

    return model.create(LITE0, 160, weights=Path(o['weights']) if o['weights'] else None)


def plain_epoch(o: dict) -> Step:
    import torch
    from sklearn.metrics import roc_auc_score

    held_out, table = epoch_table(o)
    net, augment, epoch = lite0(o), plain_augment(), iter(range(10**6))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
    train, valid = table[~held_out], table[held_out]
    half = ((0.5,) * 3, (0.5,) * 3)

    def batches(rows):
        for i in range(0, len(rows), 32):
            part = rows[i : i + 32]
            yield plain_batch(part.cached), torch.tensor(part.target.to_numpy()).float()[:, None]

    def work() -> float:
        positive = train[train.target == 1]
        rows = train[train.target == 0].sample(len(positive), random_state=next(epoch))
        rows = table.loc[[*positive.index, *rows.index]].sample(frac=1, random_state=0)
        net.train()
        for x, y in batches(rows):
            optimizer.zero_grad()
            logits = net(normalized(augment(x), half))
            torch.nn.functional.binary_cross_entropy_with_logits(logits, y).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            preds = [net(normalized(x, half)).sigmoid() for x, _ in batches(valid)]
        roc_auc_score(valid.target, torch.cat(preds)[:, 0])
        return 3600

    return clocked(work)


def fast_epoch(o: dict) -> tuple[Step, Callable[[], str]]:
    import torch

    from lib.augment import recipe
    from lib.callbacks import SeedEpoch
    from lib.learner import fastest, for_fold

    held_out, table = epoch_table(o)
    net, tfms = lite0(o), recipe((0.5,) * 3, (0.5,) * 3)
    precision = fastest(net, 160, 32, torch.device('cpu'))
    arrays = table.cached.to_numpy(), table.target.to_numpy(), held_out
    options = {'batch_size': 32, 'neg_ratio': 1, 'wd': 0.1, 'seed': 0, 'precision': precision}
    learn, sampler = for_fold(*arrays, net, tfms, **options)

    def work() -> float:
        learn.fit_one_cycle(1, 1e-3, cbs=[sampler, SeedEpoch(0, 0)])
        return 3600

    def text() -> str:
        return f'trained in {precision}; ' + agreement(net, table[held_out])

    return clocked(work), text


def agreement(net, rows) -> str:
    """How the fast path's predictions differ from those of fp32, NCHW, eager, on the same draws."""
    import copy

    import torch
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    from lib import model
    from lib.augment import recipe
    from lib.callbacks import seed_all
    from lib.learner import resolve
    from lib.predict import lowest, predict

    half = ((0.5,) * 3, (0.5,) * 3)
    tfms, paths, preds = recipe(*half), list(rows.cached), {}
    chosen = lowest(net, 160, paths, tfms, 32)
    for precision in {'fp32', chosen, resolve('auto', torch.device('cpu'))}:
        fast = model.for_inference(copy.deepcopy(net), 160, precision)
        preds[precision] = predict([fast], paths, tfms, 32, n_tta=3)[0]
    net, augment, theirs = net.to(memory_format=torch.contiguous_format).eval(), plain_augment(), []
    with torch.no_grad():
        for number, i in enumerate(range(0, len(paths), 32)):
            passes = []
            for k in range(3):
                seed_all(0, k, number)
                x = normalized(augment(plain_batch(paths[i : i + 32])), half)
                passes.append(net(x).sigmoid()[:, 0])
            theirs.append(torch.stack(passes).mean(0))
    theirs = torch.cat(theirs).double().numpy()
    auc = roc_auc_score(rows.target, theirs)
    lines = [f'chosen: {chosen}; plain loop, {len(rows)} images held out, 3 passes: AUC {auc:.4f}']
    for precision, pred in preds.items():
        lines.append(
            f'{precision}: AUC {roc_auc_score(rows.target, pred):.4f}, Spearman '
            f'{spearmanr(pred, theirs)[0]:.5f}, largest difference of a probability '
            f'{np.abs(pred - theirs).max():.4f}'
        )
    return '\n  '.join(lines)


# --- what the plain loops are made of


def new_net(o: dict):
    import timm

    return timm.create_model(o['arch'], num_classes=1)


def squares(o: dict) -> list[Path]:
    return sorted(Path(o['folder'], 'squares').iterdir())


def plain_batch(paths):
    """(B, 3, H, W) float in 0..1."""
    import torch

    arrays = [np.asarray(Image.open(path).convert('RGB')) for path in paths]
    return torch.stack([torch.tensor(a).permute(2, 0, 1) for a in arrays]).float() / 255


def plain_augment():
    import kornia.augmentation as K
    import torch

    return torch.nn.Sequential(
        K.RandomAffine(degrees=180, translate=(0.02, 0.02), p=1.0),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJiggle(brightness=0.1, contrast=(0.8, 1.2), saturation=(0.7, 1.3), p=1.0),
    )


def normalized(x, stats=STATS):
    import torch

    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in stats)
    return (x - mean) / std


if __name__ == '__main__':
    cli.run(main)
