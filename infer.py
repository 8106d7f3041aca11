"""Let every trained run predict its held-out images and the test images.

python infer.py --n_tta 15        # 15 passes; the README's small run: AUC .901 [.889, .912]
python infer.py --n_tta 0         # the plain pass alone: 16 times faster
python infer.py --images DIR --out FILE.csv     # any other images, by all runs together
python infer.py --images DIR --out FILE.csv --labels TABLE.csv     # and how good that is
"""

from pathlib import Path

from lib import cli  # before fastai, whose import warns of what no user can change

# isort: split
import numpy as np
from fastai.vision.all import Learner, noop

from lib import calibration, data, devices, files, locks, model, summary, tables
from lib.augment import batch_tfms
from lib.export import write_exports
from lib.external import predict_and_score
from lib.heat import check_runs, draw_run
from lib.parts import (
    Part,
    Settings,
    claim,
    join_table,
    list_parts,
    pool,
    read_prior,
    read_settings,
    save,
)
from lib.runs import choose_finished, find_runs
from lib.tta import Passes, SeedBatch, check_finite


def main(
    *,
    home: str = '.',  # folder of folds.csv, of the cache of resized images, and of the runs
    only: str | None = None,  # names of runs, with commas between, instead of all
    n_tta: int = 15,  # passes of test-time augmentation, each augmented anew as in training
    batch_size: int = 32,  # images per batch
    seed: int = 0,  # of the random augmentation
    prior: float | None = None,  # malignant images' rate for prob; default: as in the labelled ones
    images: str | None = None,  # predict this folder of images, or this one image, instead
    out: str | None = None,  # the new CSV of --images: image_name, pred, prob
    labels: str | None = None,  # a table of image_name and target of --images, to score them
    target: str | None = None,  # the column of the target in --labels, where it is not `target`
    positive: str | None = None,  # words that are a target of 1, with commas, if targets are words
    negative: str | None = None,  # words that are 0, and drop all others; default: nevus and so on
    export: str | None = None,  # write each run's models for timm, and a card, to this folder
    workers: int | None = None,  # processes that read images; default: 0 on CPU, else up to 16
    precision: str = 'auto',  # fp32, bf16 or fp16; by default fp16 on CUDA, else fp32
    heat: int = 0,  # draw class activation maps of this many highest and lowest pred of each class
    compile: bool = False,  # torch.compile the models first; worth it for thousands of images
) -> None:
    """Write HOME/runs/NAME/oof.csv and test.csv for every run; what is made already is skipped."""
    cli.check_within(0, n_tta=n_tta, seed=seed, heat=heat)
    cli.check_within(1, batch_size=batch_size)
    cli.check_within(0.0001, 0.9999, prior=prior)
    cli.check_within(0, 256, workers=workers)
    if (images is None) != (out is None) or sum(map(bool, (images, export, heat))) > 1:
        raise cli.Stop('--images needs --out; --images, --export and --heat exclude each other')
    if (labels and not images) or ((target or positive or negative) and not labels):
        raise cli.Stop('--labels needs --images; --target, --positive and --negative need --labels')
    if out:
        files.check_new(Path(out))
    runs, settings = find_runs(Path(home), only), Settings(n_tta, seed, batch_size, precision)
    if export:
        return write_exports(Path(home), runs, Path(export), prior)
    precision = devices.choose_precision(precision, devices.choose_device(), training=False)

    def predict(part: Part) -> tuple[np.ndarray, np.ndarray]:
        """The mean of the augmented passes and the plain pass, (n,) each, of the fold's model."""
        print(f'{part}, {n_tta} augmented passes and a plain one', flush=True)
        config, draws = part.run.config, SeedBatch([seed, *part.seeds])  # by run, fold, pass, batch
        tfms = [draws, *batch_tfms(config['mean'], config['std'], config['cutout'])]
        dls = data.prediction_dls(part.readable, tfms, batch_size, workers)
        net = model.load(config['arch'], config['size'], part.weights)
        net = model.ProbabilityModel(net, config['size'], precision)
        if compile:
            net.compile()
        # the loss is never called; if it had an activation, fastai would apply a second sigmoid
        learn = Learner(dls, net, loss_func=noop, cbs=Passes(draws, n_tta + 1, f'fold {part.k}'))
        with learn.no_bar():
            # beta None returns both, the mean of the passes and the plain pass, unmixed
            preds = learn.tta(n=n_tta, beta=None)[0] if n_tta else [learn.get_preds()[0]] * 2
        return tuple(check_finite(pred, str(part)) for pred in preds)

    if images:
        words = tables.Labels(target, cli.split(positive), cli.split(negative))
        where = Path(images), Path(out)
        return predict_and_score(runs, *where, n_tta, prior, predict, labels, words)
    if heat:
        check_runs(runs)
    table = tables.read_folds(Path(home, 'folds.csv'))
    for run in choose_finished(runs, table):
        parts = list_parts(run, table)  # each fold's held-out images, and the test images for each
        made = read_settings(parts, settings) if heat else settings  # to draw, any will do
        for part in claim(parts, made):  # each locked while it is predicted
            part.write(*predict(part), settings, precision)
        rate = read_prior(run) if heat and prior is None else prior
        is_known = (run.folder / 'scores.json').exists()  # then the plain pass's scores are printed
        with locks.held(run.lock):
            if (pooled := pool(parts, made)) is None:
                continue  # another process predicts the rest
            oof = join_table(table, pooled['oof'])
            fitted = calibration.calibrate(oof, rate)
            for rows in pooled.values():  # oof: all folds together; test: the mean of them
                rows['prob'] = fitted.curve(rows.pred.to_numpy())
            save(parts, pooled, made, rate)
        print(f'{run}: {fitted.sentence}')
        columns = ['pred_plain', 'pred'] if made.n_tta else ['pred_plain']
        summary.report_run(run, oof, columns, is_known)
        if heat:
            draw_run(run, oof, heat)


if __name__ == '__main__':
    cli.run(main)
