"""Train one architecture, one fold at a time. The same command continues an interrupted run.
The README's small run: 11 minutes of one CPU core per fold, AUC .879 [.865, .892] without TTA.

python train.py --size 512 --cutout           # efficientnet_b5, five folds
python train.py --lr_find                     # suggest learning rates by a range test on one fold
"""

from pathlib import Path

import lib  # imports its modules when they are first used, so that --help is quick
from lib import cli


def main(
    *,
    home: str = '.',  # folder of folds.csv, of the cache of resized images, and of the runs
    name: str | None = None,  # the run's name; by default the flags that differ from their defaults
    arch: str = 'efficientnet_b5',  # any timm classifier
    pretrained: bool = True,  # start from ImageNet weights; --nopretrained starts from random ones
    weights: str | None = None,  # a local safetensors file of ImageNet weights, instead of fetching
    size: int = 512,  # side of the square images, in pixels
    cutout: bool = False,  # erase a random rectangle in every second training image
    epochs: int = 20,  # each shows all melanomas, and --neg_ratio times as many benign images
    batch_size: int = 8,  # images per batch, counted over all processes of a launcher
    accumulate: int = 1,  # batches per optimizer step (gradient accumulation)
    lr_min: float = 5e-6,  # learning rate at the start and the end of one-cycle
    lr_max: float = 2e-4,  # learning rate at its peak, after a quarter of the steps
    wd: float = 0.1,  # AdamW's weight decay
    neg_ratio: float = 1.0,  # benign images for each melanoma, drawn anew each epoch; 0 takes all
    seed: int = 0,  # of all random numbers; another seed trains another model to blend
    fold: int | None = None,  # train this fold only, so that folds can be spread over machines
    lr_find: bool = False,  # only run the LR range test: suggest --lr_min and --lr_max, and draw it
    workers: int | None = None,  # processes that read images; default: 0 on CPU, else up to 8
    precision: str = 'auto',  # fp32, bf16 or fp16; by default bf16 or fp16 on a GPU, else fp32
    skip_bad: bool = False,  # leave images that cannot be read out of training and scoring
    log: str | None = None,  # tensorboard or wandb: follow the run there, too
) -> None:
    """Train on HOME/folds.csv into HOME/runs/NAME; several such processes share the folds."""
    flags, defaults = dict(locals()), main.__kwdefaults__
    lib.config.check(flags)
    home, weights = Path(home), weights and Path(weights)
    precision = lib.speed.training_precision(precision, lib.devices.choose_device())
    table = lib.tables.read_labelled(home / 'folds.csv')  # refused if a patient is in two folds
    folds = sorted(table.fold.unique().tolist())
    wanted = lib.config.choose_folds(fold, folds)
    run, config = lib.config.make_run(home, flags, defaults, lib.model.describe_arch(arch), wanted)
    if lr_find or run.unfinished(wanted):
        lib.model.create(arch, size, pretrained, weights)  # fail now if there are no such weights
        skip_bad = skip_bad and not run.has_begun  # which images are left out is decided once
        table, config['skipped'] = lib.images.prepare(table, home, size, run.skipped, skip_bad)
        lib.splits.check_classes(table.target, table.fold)
    if lr_find:
        return find_rates(run, wanted[0], table, config, weights, workers, precision)
    run.begin(config, defaults)  # writes config.json, or compares it
    for k in run.claim(wanted):  # unfinished folds, each locked while it is trained
        train_fold(run, k, table, config, weights, workers, precision, log)
    if run.unfinished(folds):
        return print(run.describe_unfinished(folds))
    oof = run.read_oof(folds)[['image_name', 'pred_plain']]
    lib.summary.report_run(run, table.merge(oof, on='image_name'), ['pred_plain'])
    lib.follow.Follow(log, run).end()


def make_learner(k: int, table, config: dict, weights, workers, precision: str):
    """Fold k's Learner, and its callbacks: each epoch's benign images, and each epoch's seeds."""
    lib.callbacks.seed_all(config['seed'], k)  # the same start, whatever ran before
    net = lib.model.create(config['arch'], config['size'], config['pretrained'], weights)
    tfms = lib.augment.batch_tfms(config['mean'], config['std'], config['cutout'])
    options = {flag: config[flag] for flag in ('batch_size', 'neg_ratio', 'seed')}
    dls, downsample = lib.data.training_dls(table, k, tfms, **options, workers=workers)
    learn = lib.learner.create_learner(dls, net, config['wd'], precision, config['accumulate'])
    return learn, [downsample, lib.callbacks.SeedEpoch(config['seed'], k)]


def train_fold(run, k: int, table, config: dict, weights, workers, precision: str, log) -> None:
    """Train on the other folds, and score this one."""
    folder = run.fold(k)
    learn, cbs = make_learner(k, table, config, weights, workers, precision)
    device, n = learn.dls.device, learn.dls.train.n
    print(f'{folder}: {n} images an epoch, on {lib.devices.describe(device)} in {precision}')
    batch = learn.dls.train.one_batch()
    lib.pictures.draw_batch(folder / 'batch.png', *batch, config['mean'], config['std'])
    history = lib.callbacks.History(folder / 'history.csv', k)
    resume = lib.callbacks.Resume(folder / 'state.pt', k, history)  # saves, and continues there
    follow = lib.follow.Follow(log, run, k, history)
    cbs += [lib.callbacks.StopOnNaN(k), history, follow, resume]
    div = config['lr_max'] / config['lr_min']
    with lib.learner.distributed(learn):  # in all processes of a launcher, if there is one
        learn.fit_one_cycle(config['epochs'], config['lr_max'], div=div, div_final=div, cbs=cbs)
    lib.model.save(learn.model, folder / lib.model.WEIGHTS)
    lib.pictures.draw_history(folder / 'history.png', history.rows)

    # Score the last epoch. Choosing the best epoch on this fold would overstate its AUC.
    held_out = table[table.fold == k]
    tfms = lib.augment.batch_tfms(config['mean'], config['std'])
    dls = lib.data.prediction_dls(held_out, tfms, 4 * config['batch_size'], workers)
    scoring = 'fp32' if precision == 'fp32' else lib.speed.inference_precision('auto', device)
    used = {'precision': precision, 'scoring_precision': scoring}
    net = lib.speed.fuse_batch_norms(learn.model, config['size'])
    predictor = lib.tta.predictor(dls, net, scoring, label='score')
    pred = lib.tta.check_finite(predictor.get_preds()[0], str(folder))
    about = lib.config.describe_environment(lib.devices.describe(device))
    run.finish(k, held_out, pred, about | used | {'seconds': history.seconds})
    follow.end()


def find_rates(run, k: int, table, config: dict, weights, workers, precision: str) -> None:
    """Suggest the learning rates by a range test, and draw it; the model is thrown away."""
    learn, cbs = make_learner(k, table, config, weights, workers, precision)
    n = 100 * config['accumulate']
    learn.add_cbs(cbs).lr_find(num_it=n, stop_div=False, show_plot=False, suggest_funcs=None)
    lrs, losses = lib.learner.read_range_test(learn.recorder, n)
    lr_min, lr_max = lib.learner.suggest_rates(lrs, losses)
    path = run.fold(k) / 'lr_find.png'
    lib.pictures.draw_range_test(path, lrs, losses, lr_min, lr_max)
    print(f'suggested: --lr_min {lr_min:.1e} (roughly) --lr_max {lr_max:.1e}; see {path}')


if __name__ == '__main__':
    cli.run(main)
