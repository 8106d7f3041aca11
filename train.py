"""Train one model, a fold after the other, by the recipe.

python train.py --size 512 --cutout           # efficientnet_b5, five folds
python train.py --arch resnet18 --size 224    # a quick baseline
python train.py --lr_find                     # the range test; trains nothing
"""

import time
from pathlib import Path

from lib import cli, files


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
    lr_min: float = 5e-6,
    lr_max: float = 2e-4,
    wd: float = 0.1,
    neg_ratio: float = 1.0,
    seed: int = 0,
    fold: int | None = None,
    lr_find: bool = False,
    workers: int | None = None,
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
        batch_size: images a step; the fewer, the less memory.
        lr_min: learning rate at the start and the end of one-cycle.
        lr_max: learning rate at its peak, after a quarter of the steps.
        wd: AdamW's weight decay.
        neg_ratio: benign images an epoch for each melanoma, others each epoch; 0 takes all.
        seed: of everything drawn at random; another seed trains a twin.
        fold: train this fold only, so that folds can be spread over machines.
        lr_find: only suggest --lr_min and --lr_max by a range test on the first fold, and draw it.
        workers: processes that read images; by default one a core beside a GPU, else none.
        skip_bad: train without the images that cannot be read, and score without them.
    """
    flags = {k: v for k, v in locals().items() if k in DEFAULTS}
    cli.at_least(64, size=size)
    cli.at_least(1, epochs=epochs, batch_size=batch_size)
    cli.at_least(0, lr_min=lr_min, lr_max=lr_max, wd=wd, neg_ratio=neg_ratio, seed=seed)
    if not 0 < lr_min <= lr_max < 10:
        raise cli.Stop(f'expected 0 < --lr_min <= --lr_max < 10, found {lr_min} and {lr_max}')
    if size > files.MAX_SIZE:
        raise cli.Stop(f'--size must be {files.MAX_SIZE} or less, not {size}')
    cli.processes(workers)
    if weights is not None and not pretrained:
        raise cli.Stop('--weights and --nopretrained contradict each other; leave one out')

    if name:
        files.run_folder(Path(home), name)  # refused now, if it is no folder name

    # here, not above: --help and a misspelt flag need none of it, and it takes seconds
    from lib import model, splits, tables

    table_path, start = Path(home, 'folds.csv'), weights and Path(weights)
    table = tables.read_folds(table_path)
    table = table[table.split == 'train'].reset_index(drop=True)
    table = table.astype({'fold': int, 'target': int})
    splits.check(table.group, table.fold)
    splits.check_classes(table.target, table.fold)
    folds = sorted(table.fold.unique().tolist())
    if fold is not None and fold not in folds:
        raise cli.Stop(f'--fold {fold} is not in folds.csv, which has {folds[0]} to {folds[-1]}')

    config = flags | model.about(arch) | {'folds_sha256': files.sha256(table_path)}
    if start:
        config |= {'weights': start.name, 'weights_sha256': files.sha256(start)}
    name = name or files.run_name({k: config[k] for k in DEFAULTS}, DEFAULTS)
    run = files.run_folder(Path(home), name)
    wanted = folds if fold is None else [fold]
    todo = files.unfinished(run, wanted)
    if todo or lr_find:
        model.create(arch, size, pretrained, start)  # weights that cannot be had end it here
    if skipped := files.skipped(run):
        config['skipped'] = skipped
    if not lr_find:
        files.check_same(run, config, DEFAULTS)
    if todo or lr_find:
        table, skipped = with_images(table, run, Path(home), size, skip_bad)
    if lr_find:
        return find_rates(run / f'fold{folds[0]}', folds[0], table, config, start, workers)
    typed = flags | {'home': home, 'name': name, 'skip_bad': skip_bad}
    config['command'] = cli.command('train.py', typed, main.__kwdefaults__)
    files.claim_run(run, config | ({'skipped': skipped} if skipped else {}), DEFAULTS)

    for k in wanted:
        if k not in todo:
            print(f'{run}: fold {k} is finished')
            (run / f'fold{k}' / 'state.pt').unlink(missing_ok=True)  # of a kill at the very end
    locks = {files.fold_lock(run, k): k for k in todo}
    for lock in files.share(locks):
        if files.unfinished(run, [locks[lock]]):  # else another process was faster
            train_fold(lock.parent, locks[lock], table, config, start, workers)
    if files.unfinished(run, folds):
        print(files.to_train(run, folds))
    else:
        summarize(run, folds)


# Flags that change no result; --skip_bad does by the list of images that it leaves in config.json
PLACES = ('home', 'name', 'fold', 'lr_find', 'workers', 'skip_bad')
DEFAULTS = {flag: value for flag, value in main.__kwdefaults__.items() if flag not in PLACES}


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


def prepare(fold: int, table, config: dict, start: Path | None, workers: int | None):
    """The fold's Learner, from the same weights whatever ran before, and its callbacks."""
    from lib import model
    from lib.augment import recipe
    from lib.learner import SeedEpoch, for_fold, seed_all

    seed_all(config['seed'], fold)
    learn, sampler = for_fold(
        table.cached.to_numpy(),
        table.target.to_numpy(),
        (table.fold == fold).to_numpy(),
        model.create(config['arch'], config['size'], config['pretrained'], start),
        recipe(config['mean'], config['std'], config['cutout']),
        **{k: config[k] for k in ('batch_size', 'neg_ratio', 'wd', 'seed')},
        workers=workers,
    )
    return learn, [sampler, SeedEpoch(config['seed'], fold)]


def train_fold(folder: Path, fold: int, table, config: dict, start, workers) -> None:
    """Train on the other folds and score this one: weights, history.csv, run.json, oof.csv."""
    from lib import model
    from lib.learner import History, Resume, StopOnNaN, precision
    from lib.loaders import loader
    from lib.predict import predict
    from lib.tables import OOF_COLUMNS

    clock = time.perf_counter()
    files.sweep(folder, alone=True)
    learn, cbs = prepare(fold, table, config, start, workers)
    device = learn.dls.device
    print(f'{folder}: {learn.dls.train.n} images an epoch, on {device} in {precision(device)}')
    about = files.environment(str(device)) | {'precision': precision(device)}
    if not (folder / 'run.json').exists():  # for a fold that is killed; the end writes it anew
        files.write_json(folder / 'run.json', about)
    div = config['lr_max'] / config['lr_min']
    history, resume = History(folder / 'history.csv', fold), Resume(folder / 'state.pt', fold)
    cbs += [StopOnNaN(fold), history, resume]
    try:
        learn.fit_one_cycle(config['epochs'], config['lr_max'], div=div, div_final=div, cbs=cbs)
    except KeyboardInterrupt:
        kept = f'{resume.done} of {config["epochs"]} epochs of {folder}, and what was finished'
        raise KeyboardInterrupt(kept) from None
    model.save(learn.model, folder / model.WEIGHTS)

    # the last epoch's weights, and the whole fold once: the best epoch on it would flatter
    oof = table[table.fold == fold]
    tfms = list(learn.dls.valid.after_batch.fs)
    dl = loader(oof.cached, oof.target, tfms, 4 * config['batch_size'], workers=workers)
    oof = oof[OOF_COLUMNS].assign(pred_plain=predict(learn, dl, label='score')[1])
    before = sum(row['seconds'] for row in history.rows[: resume.found])
    seconds = round(time.perf_counter() - clock + before, 1)
    files.write_json(folder / 'run.json', about | {'seconds': seconds})
    files.write_csv(folder / 'oof.csv', oof)  # its existence means finished
    resume.path.unlink(missing_ok=True)


def find_rates(folder: Path, fold: int, table, config: dict, start, workers) -> None:
    """Print and draw the range test of a fold; the model is thrown away."""
    from lib.learner import range_test, suggest
    from lib.report import draw_range_test

    learn, cbs = prepare(fold, table, config, start, workers)
    lrs, losses = range_test(learn, cbs)
    lr_min, lr_max = suggest(lrs, losses)
    draw_range_test(folder / 'lr_find.png', lrs, losses, lr_min, lr_max)
    print(f'suggested: --lr_min {lr_min:.1e} --lr_max {lr_max:.1e}; {folder / "lr_find.png"}')


def summarize(run: Path, folds: list[int]) -> None:
    """Print the pooled OOF AUC."""
    import pandas as pd

    from lib import score

    oof = pd.concat([pd.read_csv(run / f'fold{k}' / 'oof.csv') for k in folds], ignore_index=True)
    print(f'{run} is trained. Pooled out-of-fold AUC [95 % interval over patients or lesions]:')
    print(score.table(oof, ['pred_plain']))


if __name__ == '__main__':
    cli.run(main)
