"""Let every trained run predict its held-out images and the test images.

python infer.py --n_tta 15        # 15 passes; the README's small run: AUC .901 [.888, .912]
python infer.py --n_tta 0         # the plain pass alone: 16 times faster
python infer.py --images DIR --out FILE.csv     # any other images, by all runs together
"""

import tempfile
from pathlib import Path

from lib import cli  # before fastai, whose import warns of what no user can change

# isort: split
import numpy as np
import pandas as pd
from fastai.vision.all import Learner, noop

from lib import calibration, data, devices, files, locks, model, summary, tables
from lib.augment import batch_tfms
from lib.export import write_exports
from lib.heat import check_runs, draw_run
from lib.images import list_images
from lib.parts import Part, Settings, cache_images, claim, join_table, keep, list_parts, pool, save
from lib.runs import Run, choose_finished, find_runs
from lib.tta import Passes, SeedBatch, check_finite


def main(
    *,
    home: str = '.',  # folder of folds.csv, of the cache of resized images, and of the runs
    only: str | None = None,  # names of runs, with commas between, instead of all
    n_tta: int = 15,  # passes of test-time augmentation, each augmented anew as in training
    batch_size: int = 32,  # images per batch
    seed: int = 0,  # of the random augmentation
    prior: float | None = None,  # rate of malignant images that prob is for; default: their own
    images: str | None = None,  # predict this folder of images, or this one image, instead
    out: str | None = None,  # the new CSV of --images: image_name, pred, prob (of the plain pass)
    export: str | None = None,  # write each predicted run to this folder, for timm, with its card
    workers: int | None = None,  # processes that read images; default: 0 on CPU, else up to 8
    precision: str = 'auto',  # fp32, bf16 or fp16; by default fp16 on CUDA, else fp32
    heat: int = 0,  # draw class activation maps of this many images of highest and of lowest pred
    compile: bool = False,  # torch.compile the models first; worth it for thousands of images
) -> None:
    """Write HOME/runs/NAME/oof.csv and test.csv for every run; what is made already is skipped."""
    cli.check_within(0, n_tta=n_tta, seed=seed, heat=heat)
    cli.check_within(1, batch_size=batch_size)
    cli.check_within(0.0001, 0.9999, prior=prior)
    cli.check_within(0, 256, workers=workers)
    if (images is None) != (out is None) or sum(map(bool, (images, export, heat))) > 1:
        raise cli.Stop('--images needs --out; --images, --export and --heat exclude each other')
    runs, settings = find_runs(Path(home), only), Settings(n_tta, seed, batch_size, precision)
    if export:
        return write_exports(Path(home), runs, Path(export), prior)
    precision = devices.choose_precision(precision, devices.choose_device(), training=False)

    def predict(part: Part) -> tuple[np.ndarray, np.ndarray]:
        """The mean of the augmented passes and the plain pass, (n,) each, of the fold's model."""
        print(f'{part}, {n_tta} augmented passes and a plain one', flush=True)
        run, draws = part.run.config, SeedBatch([seed, *part.seeds])  # by run, fold, pass, batch
        tfms = [draws, *batch_tfms(run['mean'], run['std'], run['cutout'])]  # those of training
        dls = data.prediction_dls(part.readable, tfms, batch_size, workers)
        net = model.load(run['arch'], run['size'], part.weights)
        net = model.ProbabilityModel(net, run['size'], precision)
        if compile:
            net.compile()
        # the loss is never called; if it had an activation, fastai would apply a second sigmoid
        learn = Learner(dls, net, loss_func=noop, cbs=Passes(draws, n_tta + 1, f'fold {part.k}'))
        with learn.no_bar():
            # beta None returns both, the mean of the passes and the plain pass, unmixed
            preds = learn.tta(n=n_tta, beta=None)[0] if n_tta else [learn.get_preds()[0]] * 2
        return tuple(check_finite(pred, str(part)) for pred in preds)

    if images:
        return predict_images(runs, Path(images), Path(out), prior, predict)
    if heat:
        check_runs(runs)
    table = tables.read_folds(Path(home, 'folds.csv'))
    for run in choose_finished(runs, table):
        parts = list_parts(run, table)  # each fold's held-out images, and the test images for each
        made = keep(parts, settings) if heat else settings  # to draw, any predictions will do
        for part in claim(parts, made):  # each locked while it is predicted
            part.write(*predict(part), made, precision)
        with locks.held(run.lock):
            if (pooled := pool(parts, made)) is None:
                continue  # another process predicts the rest
            oof = join_table(table, pooled['oof'])
            fitted = calibration.calibrate(oof, prior)
            for rows in pooled.values():  # oof: all folds together; test: the mean of them
                rows['prob'] = fitted.curve(rows.pred.to_numpy())
            save(parts, pooled, made)
        print(f'{run}: prob: {fitted.sentence}')
        summary.report_run(run, oof, ['pred_plain', 'pred'] if made.n_tta else ['pred_plain'])
        if heat:
            draw_run(run, oof, heat)


def predict_images(runs: list[Run], folder: Path, out: Path, prior, predict) -> None:
    """Write `out` for the images of `folder`: the mean of the runs, each the mean of its folds."""
    files.check_new(out)
    if not (runs := [run for run in runs if run.trained_folds]):
        raise cli.Stop('no run has a trained fold yet; type the train.py command again')
    table, of_runs = list_images(folder), []
    for run in runs:
        run.warn_of_code()
        oof = run.read_oof(run.trained_folds)  # train.py's, of the plain pass
        fitted = calibration.calibrate(oof.assign(pred=oof.pred_plain), prior)
        print(f'{run} has {len(run.trained_folds)} trained folds; prob: {fitted.sentence}')
        parts = [Part(run, k, 'other', table) for k in run.trained_folds]
        with tempfile.TemporaryDirectory() as home:
            parts = cache_images(parts, Path(home))
            pred, plain = np.mean([predict(part) for part in parts], axis=0)
        names = parts[0].readable.image_name
        of_runs.append(pd.DataFrame({'pred': pred, 'prob': fitted.curve(plain)}, names))
    means = sum(of_runs) / len(of_runs)
    files.write_csv(out, means.reindex(table.image_name).reset_index())
    print(f'{out}: {len(table)} images. This is no diagnosis')


if __name__ == '__main__':
    cli.run(main)
