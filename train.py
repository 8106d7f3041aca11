"""Train a network per fold to tell melanomas from benign lesions. Typed again, it goes on.
The README's small run (lite0, 160 px, five folds): 12 to 22 minutes of one CPU core per fold, and
an out-of-fold AUC of .878 with a 95 % interval of .863 to .891, before test-time augmentation.

python train.py --size 512 --cutout           # efficientnet_b5, five folds
python train.py --lr_find                     # suggest learning rates by a range test on one fold
"""

from pathlib import Path

from lib import cli  # before fastai, whose import warns of what no user can change

# isort: split
from fastai.vision.all import BCEWithLogitsLossFlat, Learner

from lib import config, data, devices, images, model, pictures, summary, tta
from lib.augment import batch_tfms
from lib.callbacks import History, Resume, SeedEpoch, StopOnNaN, seed_all
from lib.follow import Follow
from lib.learner import accumulation, adamw, auc, distributed, half_precision, suggest_rates
from lib.sampling import Downsample


def main(
    *,
    home: str = '.',  # folder of folds.csv, of the cache of resized images, and of the runs
    name: str | None = None,  # the run's name; by default the flags that differ from their defaults
    arch: str = 'efficientnet_b5',  # any timm classifier
    pretrained: bool = True,  # start from ImageNet weights; --nopretrained starts from random ones
    weights: str | None = None,  # a local safetensors file of ImageNet weights, instead of fetching
    size: int = 512,  # side of the square images, in pixels
    cutout: bool = False,  # erase a random rectangle in half of the training images, drawn anew
    epochs: int = 20,  # each shows all malignant images and --neg_ratio times as many benign
    batch_size: int = 8,  # images per batch, over all processes of torch.distributed.run
    accumulate: int = 1,  # batches per optimizer step (gradient accumulation)
    lr_min: float = 5e-6,  # learning rate at the start and the end of one-cycle
    lr_max: float = 2e-4,  # learning rate at its peak, after a quarter of the steps
    wd: float = 0.1,  # AdamW's weight decay
    neg_ratio: float = 1.0,  # benign images for each malignant one, drawn each epoch; 0 takes all
    seed: int = 0,  # of all random draws; another one makes another model for blend.py
    fold: int | None = None,  # train this fold only, so that folds can be spread over machines
    lr_find: bool = False,  # only run the LR range test: suggest --lr_min and --lr_max, and draw it
    workers: int | None = None,  # processes that read images; default: 0 on CPU, else up to 16
    precision: str = 'auto',  # fp32, bf16 or fp16; by default bf16 or fp16 on CUDA, else fp32
    log: str | None = None,  # tensorboard or wandb: follow the run there, too
) -> None:
    """Train the folds of HOME/folds.csv into HOME/runs/NAME. The same command in another terminal
    shares them out: each fold is locked while it is trained."""
    run, table, wanted = config.open_run(locals(), main.__kwdefaults__)  # checks flags and table
    mean, std = run.config['mean'], run.config['std']  # of pixel values, from timm's own config
    device = devices.choose_device()  # which fastai's loaders take, too
    precision = devices.choose_precision(precision, device, training=True)
    scoring = devices.scoring_precision(precision, device)
    if lr_find or run.unfinished(wanted):
        # fails now where no weights can be had, or where they cannot take such images
        model.check_size(model.create(arch, size, pretrained, weights), size)
        table['cached'] = images.cache(table, Path(home), size)

    def make_learner(k: int) -> Learner:
        """The recipe, for the model that never sees fold `k`."""
        seed_all(seed, k)  # whatever was trained before
        net = model.create(arch, size, pretrained, weights)  # a timm body and one Linear layer
        train, held_out = table[table.fold != k], table[table.fold == k]
        tfms = batch_tfms(mean, std, cutout)  # kornia, on whole batches on the device
        dls = data.training_dls(train, held_out, tfms, batch_size, workers)
        downsample = Downsample(dls.train, train.target, neg_ratio, seed, batch_size, accumulate)
        cbs = [downsample, SeedEpoch(seed, k), *half_precision(precision)]
        cbs += accumulation(dls.train.bs, accumulate)
        loss = BCEWithLogitsLossFlat()
        return Learner(dls, net, loss, opt_func=adamw, wd=wd, metrics=auc(), cbs=cbs)

    if lr_find:
        k = wanted[0]
        return suggest_rates(make_learner(k), 100 * accumulate, run.fold(k) / 'lr_find.png')
    # the unfinished ones; all processes of a launcher get the same
    for i, k in enumerate(run.claim(wanted)):
        folder, learn = run.fold(k), make_learner(k)
        run.begin()  # writes config.json, or refuses flags that it does not have
        if i == 0:
            n, where = learn.dls.train.n, devices.describe(device)
            print(f'{folder}: {n} images an epoch, on {where} in {precision}')
        pictures.draw_batch(folder / 'batch.png', *learn.dls.train.one_batch(), mean, std)
        history = History(folder / 'history.csv', k)
        resume = Resume(folder / 'state.pt', k, history)  # saves each epoch, goes on from there
        follow = Follow(log, run, k, history)
        cbs, div = [StopOnNaN(k), history, follow, resume], lr_max / lr_min
        with distributed(learn), learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs, lr_max, div=div, div_final=div, cbs=cbs)
        pictures.draw_history(folder / 'history.png', history.rows)
        model.save(learn.model, run.weights(k))

        # Score the last epoch. Choosing the best epoch on this fold would overstate its AUC.
        held_out = table[table.fold == k]
        # Without gradients larger batches fit; the transforms augment in training and TTA alone.
        dls = data.prediction_dls(held_out, batch_tfms(mean, std), 4 * batch_size, workers)
        pred = tta.predict_plain(dls, learn.model, size, scoring)
        about = config.describe_environment(device, precision, scoring)
        run.finish(k, held_out.assign(pred_plain=pred), about | {'seconds': history.seconds})
        follow.end()
    summary.report_trained(run, table)  # the pooled out-of-fold AUC, once all folds are there


if __name__ == '__main__':
    cli.run(main)
