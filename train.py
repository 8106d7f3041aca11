"""Train one model, a fold after the other, by the recipe.

python train.py --size 512 --cutout           # efficientnet_b5, five folds
python train.py --arch resnet18 --size 224    # a quick baseline
python train.py --lr_find                     # the range test; trains nothing
"""

import time
from functools import partial
from pathlib import Path

from lib import cli, files, locks, ranks


def main(
    *,
    home: str = '.',
    name: str | None = None,
    arch: str = 'efficientnet_b5',
    pretrained: bool = True,
    weights: str | None = None,
    size: int = 512,
    cutout: bool = False,
    epochs: int = 20,
    batch_size: int = 8,
    accumulate: int = 1,
    lr_min: float = 5e-6,
    lr_max: float = 2e-4,
    wd: float = 0.1,
    neg_ratio: float = 1.0,
    seed: int = 0,
    fold: int | None = None,
    lr_find: bool = False,
    workers: int | None = None,
    precision: str = 'auto',
    compile: bool = False,
    skip_bad: bool = False,
) -> None:
    """Train a model on HOME/folds.csv into HOME/runs/NAME, a folder a fold.

    The same command goes on where it stopped, at the last whole epoch; given twice at a time, its
    processes share out the folds.

    Args:
        home: folder of folds.csv, of the cache of resized images, and of the runs.
        name: the run's name; by default the flags that differ from their defaults.
        arch: any timm architecture.
        pretrained: start from ImageNet weights, fetched once; --nopretrained starts at random.
        weights: a local safetensors file of the architecture's weights instead.
        size: side of the square images, in pixels.
        cutout: erase a random rectangle of half of the training images.
        epochs: passes over the melanomas.
        batch_size: images a batch, of all processes together; the fewer, the less memory.
        accumulate: batches a step of the optimizer; 4 of 2 images train much like one of 8.
        lr_min: learning rate at the start and the end of one-cycle.
        lr_max: learning rate at its peak, after a quarter of the steps.
        wd: AdamW's weight decay.
        neg_ratio: benign images an epoch for each melanoma, others each epoch; 0 takes all.
        seed: of everything drawn at random; another seed trains a twin.
        fold: train this fold only, so that folds can be spread over machines.
        lr_find: only suggest --lr_min and --lr_max by a range test on the first fold, and draw it.
        workers: processes that read images; by default one a core beside a GPU, else none.
        precision: fp32, bf16 or fp16; by default what the device is fastest in.
        compile: torch.compile the model first; takes minutes, pays in a long training on a GPU.
        skip_bad: train without the images that cannot be read, and score without them.
    """
    flags = {k: v for k, v in locals().items() if k in DEFAULTS}
    check(flags)
    cli.processes(workers)
    if name:
        files.run_folder(Path(home), name)  # refused now, if it is no folder name

    # here, not above: --help and a misspelt flag need none of it, and it takes seconds
    from lib import learner, loaders, model

    ranks.start()
    if lr_find and ranks.WORLD > 1:
        raise cli.Stop('--lr_find runs in one process; start it without a launcher')
    device = loaders.default_device()
    if compile:
        model.check_compiler()
    best = learner.resolve(precision, device)
    how = {'workers': workers, 'compile': compile, 'train_in': best, 'predict_in': precision}
    table_path, start = Path(home, 'folds.csv'), weights and Path(weights)
    table = labelled(table_path)
    folds = sorted(table.fold.unique().tolist())
    if fold is not None and fold not in folds:
        raise cli.Stop(f'--fold {fold} is not in folds.csv, which has {folds[0]} to {folds[-1]}')
    config = flags | model.about(arch) | {'folds_sha256': files.sha256(table_path)}
    if start:
        config |= {'weights': start.name, 'weights_sha256': files.sha256(start)}
    name = name or files.run_name({k: config[k] for k in DEFAULTS}, DEFAULTS)
    run = files.run_folder(Path(home), name)
    wanted = folds if fold is None else [fold]
    todo = ranks.first_does(partial(files.unfinished, run, wanted))
    if todo or lr_find:
        net = model.create(arch, size, pretrained, start)  # weights not to be had end it here
        if precision == 'auto':
            batch = (net, size, -(-batch_size // ranks.WORLD), device)
            how['train_in'] = ranks.first_does(
                lambda: begun_in(run, device) or learner.fastest(*batch)
            )
    if skipped := ranks.first_does(partial(files.skipped, run)):
        config['skipped'] = skipped
    if not lr_find:
        files.check_same(run, config, DEFAULTS)
    if todo or lr_find:
        open_images = partial(with_images, table, run, Path(home), size, skip_bad)
        table, skipped = ranks.first_does(open_images)
    if lr_find:
        return find_rates(run / f'fold{folds[0]}', folds[0], table, config, start, how)
    typed = flags | {'home': home, 'name': name, 'skip_bad': skip_bad}
    config['command'] = cli.command('train.py', typed, main.__kwdefaults__)
    config |= {'skipped': skipped} if skipped else {}
    ranks.first_does(partial(files.claim_run, run, config, DEFAULTS))

    for k in wanted:
        if k not in todo:
            print(f'{run}: fold {k} is finished')
            (run / f'fold{k}' / 'state.pt').unlink(missing_ok=True)  # of a kill at the very end
    of_lock = {files.fold_lock(run, k): k for k in todo}
    free = (lock for lock in locks.share(of_lock) if files.unfinished(run, [of_lock[lock]]))
    for lock in ranks.each(free):  # a fold that another process has finished meanwhile is no more
        train_fold(lock.parent, of_lock[lock], table, config, start, how)
    ranks.first_does(partial(conclude, run, folds, table))


# Flags that say where and how, not what; --skip_bad changes a result by the list of images that it
# leaves in config.json
PLACES = ('home', 'name', 'fold', 'lr_find', 'workers', 'precision', 'compile', 'skip_bad')
DEFAULTS = {flag: value for flag, value in main.__kwdefaults__.items() if flag not in PLACES}


def check(flags: dict) -> None:
    """Raises: Stop where a flag is out of range, or two contradict each other."""
    cli.at_least(64, size=flags['size'])
    cli.at_least(1, **{k: flags[k] for k in ('epochs', 'batch_size', 'accumulate')})
    cli.at_least(0, **{k: flags[k] for k in ('lr_min', 'lr_max', 'wd', 'neg_ratio', 'seed')})
    low, high = flags['lr_min'], flags['lr_max']
    if not 0 < low <= high < 10:
        raise cli.Stop(f'expected 0 < --lr_min <= --lr_max < 10, found {low} and {high}')
    if flags['size'] > files.MAX_SIZE:
        raise cli.Stop(f'--size must be {files.MAX_SIZE} or less, not {flags["size"]}')
    if flags['weights'] is not None and not flags['pretrained']:
        raise cli.Stop('--weights and --nopretrained contradict each other; leave one out')


def labelled(path: Path):
    """The labelled rows of folds.csv. Raises: Stop where its folds leak, or lack a class."""
    from lib import splits, tables

    table = tables.read_folds(path)
    table = table[table.split == 'train'].reset_index(drop=True)
    table = table.astype({'fold': int, 'target': int})
    splits.check(table.group, table.fold)
    splits.check_classes(table.target, table.fold)
    return table


def begun_in(run: Path, device) -> str | None:
    """The precision that the run's folds were begun in on such a device, if one was."""
    begun = [files.read_json(path) for path in sorted(run.glob('fold*/run.json'))]
    return next((a.get('precision') for a in begun if a.get('device') == str(device)), None)


def with_images(table, run: Path, home: Path, size: int, skip_bad: bool):
    """`table` with `cached`, less the images that the run goes without, and the names of those.

    They are found when the run begins, and stay the same for all its folds and its predictions.
    """
    from lib import images, splits

    skipped, folds = files.skipped(run), set(table.fold)
    table = table[~table.image_name.isin(skipped)]
    new = not (run / 'config.json').exists()
    table = table.assign(cached=images.cache(table, home, size, skip_bad and new))
    skipped = skipped + table.image_name[table.cached.isna()].tolist()
    table = table[table.cached.notna()].reset_index(drop=True)
    if set(table.fold) != folds:
        raise cli.Stop('a fold is left without an image that can be read; mend some of them')
    splits.check_classes(table.target, table.fold)
    return table, skipped


def prepare(fold: int, table, config: dict, start: Path | None, how: dict):
    """The fold's Learner, from the same weights whatever ran before, and its callbacks."""
    from lib import model
    from lib.augment import recipe
    from lib.callbacks import SeedEpoch, seed_all
    from lib.learner import for_fold

    seed_all(config['seed'], fold)
    net = model.create(config['arch'], config['size'], config['pretrained'], start)
    learn, sampler = for_fold(
        table.cached.to_numpy(),
        table.target.to_numpy(),
        (table.fold == fold).to_numpy(),
        model.compile(net) if how['compile'] else net,
        recipe(config['mean'], config['std'], config['cutout']),
        **{k: config[k] for k in ('batch_size', 'accumulate', 'neg_ratio', 'wd', 'seed')},
        workers=how['workers'],
        precision=how['train_in'],
    )
    return learn, [sampler, SeedEpoch(config['seed'], fold)]


def train_fold(folder: Path, fold: int, table, config: dict, start, how: dict) -> None:
    """Train on the other folds and score this one: all that lies in `folder`, oof.csv last."""
    import pandas as pd
    from fastai.torch_core import to_np

    from lib import model
    from lib.callbacks import History, Resume, StopOnNaN
    from lib.learner import distributed
    from lib.pictures import draw_batch, draw_history
    from lib.predict import lowest, predict
    from lib.tables import OOF_COLUMNS

    clock = time.perf_counter()
    ranks.first_does(partial(files.sweep, folder, alone=True))
    learn, cbs = prepare(fold, table, config, start, how)
    device = learn.dls.device
    about = files.environment(str(device)) | {'processes': ranks.WORLD}
    about['precision'] = how['train_in']
    if not (folder / 'run.json').exists():  # for a fold that is killed; the end writes it anew
        files.write_json(folder / 'run.json', about)
    each = f' in {ranks.WORLD} processes' if ranks.WORLD > 1 else ''
    n, precision = learn.dls.train.n, how['train_in']
    print(f'{folder}: {n} images an epoch, on {device} in {precision}{each}')
    x, y = learn.dls.train.one_batch()
    draw_batch(folder / 'batch.png', to_np(x), to_np(y), config['mean'], config['std'])
    div = config['lr_max'] / config['lr_min']
    history, resume = History(folder / 'history.csv', fold), Resume(folder / 'state.pt', fold)
    cbs += [StopOnNaN(fold), history, resume]
    try:
        with distributed(learn):
            learn.fit_one_cycle(config['epochs'], config['lr_max'], div=div, div_final=div, cbs=cbs)
    except KeyboardInterrupt:
        kept = f'{resume.done} of {config["epochs"]} epochs of {folder}, and what was finished'
        raise KeyboardInterrupt(kept) from None
    draw_history(folder / 'history.png', pd.DataFrame(history.rows))
    model.save(learn.model, folder / model.WEIGHTS)

    # the last epoch's weights, and the whole fold once: the best epoch on it would flatter
    oof = table[table.fold == fold]
    tfms = list(learn.dls.valid.after_batch.fs)
    net, size, paths = learn.model, config['size'], oof.cached
    batch_size, workers, precision = 4 * config['batch_size'], how['workers'], how['predict_in']
    if precision == 'auto':
        precision = lowest(net, size, paths, tfms, batch_size, workers)
    net = model.for_inference(net, size, precision)
    pred = predict([net], paths, tfms, batch_size, workers=workers, label='score')[1]
    about['scored_in'] = precision
    before = sum(row['seconds'] for row in history.rows[: resume.found])
    seconds = round(time.perf_counter() - clock + before, 1)
    files.write_json(folder / 'run.json', about | {'seconds': seconds})
    files.write_csv(folder / 'oof.csv', oof[OOF_COLUMNS].assign(pred_plain=pred))  # last: finished
    ranks.first_does(partial(resume.path.unlink, missing_ok=True))


def find_rates(folder: Path, fold: int, table, config: dict, start, how: dict) -> None:
    """Print and draw the range test of a fold; the model is thrown away."""
    from lib.learner import range_test, suggest
    from lib.pictures import draw_range_test

    learn, cbs = prepare(fold, table, config, start, how)
    lrs, losses = range_test(learn, cbs, num_it=100 * config['accumulate'])
    lr_min, lr_max = suggest(lrs, losses)
    draw_range_test(folder / 'lr_find.png', lrs, losses, lr_min, lr_max)
    print(f'suggested: --lr_min {lr_min:.1e} --lr_max {lr_max:.1e}; {folder / "lr_find.png"}')


def conclude(run: Path, folds: list[int], table) -> None:
    """Print what is left to train; else what the predictions are worth, also into scores.json."""
    import pandas as pd

    from lib import score

    if files.unfinished(run, folds):
        print(files.to_train(run, folds))
        return
    paths = [run / f'fold{k}' / 'oof.csv' for k in sorted(set(table.fold))]
    oof = pd.concat([pd.read_csv(path, dtype={'image_name': str}) for path in paths])
    oof = table.merge(oof[['image_name', 'pred_plain']], on='image_name')
    found = {'pred_plain': score.summary(oof, 'pred_plain')}
    files.write_json(run / 'scores.json', found)
    print(f'{run} is trained. Out of fold [95 % interval over {score.drawn(oof)}]:')
    print(score.lines(found))


if __name__ == '__main__':
    cli.run(main)
