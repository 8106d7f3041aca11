"""Predict with every trained run: its held-out images and the test images.

python infer.py --n_tta 15        # 15 passes; the README's small run: AUC .901 [.889, .912]
python infer.py --n_tta 0         # the plain pass alone: 16 times faster
python infer.py --images DIR --out FILE.csv     # any other images, by all runs together
"""

import tempfile
from pathlib import Path

import lib  # imports its modules when they are first used, so that --help is quick
from lib import cli


def main(
    *,
    home: str = '.',  # folder of folds.csv, of the cache of resized images, and of the runs
    only: str | None = None,  # names of runs, with commas between, instead of all
    n_tta: int = 15,  # passes of test-time augmentation, each augmented anew as in training
    batch_size: int = 32,  # images per batch; with --images always one
    seed: int = 0,  # of the random augmentation
    prior: float | None = None,  # rate of melanomas that prob is for; by default the competition's
    images: str | None = None,  # predict this folder of images, or this one image, instead
    out: str | None = None,  # the CSV to write for --images: image_name, pred, prob
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
    if (images is None) != (out is None) or (export and (images or heat)):
        raise cli.Stop('--images and --out go together; --export takes no --images, no --heat')
    home, runs = Path(home), lib.runs.find_runs(Path(home), only)
    lib.heat.check_runs(runs if heat else [])
    settings = lib.parts.Settings(n_tta, seed, batch_size, precision)
    if export is not None:
        return lib.export.write(home, runs, Path(export), prior)
    precision = lib.speed.inference_precision(precision, lib.devices.choose_device())
    options = {'precision': precision, 'workers': workers, 'compile': compile}
    if images is not None:
        return predict_images(runs, Path(images), Path(out), prior, heat, settings, options)

    table = lib.tables.read_folds(home / 'folds.csv')
    folds = sorted(table.fold.dropna().astype(int).unique().tolist())  # a test image has none
    for run in lib.runs.choose_finished(runs, folds, lib.tables.fingerprint(home / 'folds.csv')):
        parts = lib.parts.list_parts(run, table, folds)  # for each fold its own and the test images
        for part in lib.parts.claim(parts, settings):  # each locked while it is predicted
            print(f'{part}, {n_tta} augmented passes and a plain one', flush=True)
            part.write(*predict(part, settings, **options), settings, precision)
        pool(run, parts, table, prior, heat, settings)


def predict(part, settings, *, precision: str, workers: int | None, compile: bool):
    """The mean of the passes under the run's own augmentation, and the plain pass: (n,) each."""
    config = part.run.config
    net = lib.model.load(config['arch'], config['size'], part.weights)
    net = lib.speed.fuse_batch_norms(net, config['size'])
    tfms = lib.augment.batch_tfms(config['mean'], config['std'], config['cutout'])
    batch_size = 1 if part.kind == 'images' else settings.batch_size  # no image depends on another
    dls = lib.data.prediction_dls(part.rows, tfms, batch_size, workers)
    seed_batch = lib.tta.SeedBatch([settings.seed, *part.seeds], by_image=part.kind == 'images')
    learn = lib.tta.predictor(dls, net, precision, seed_batch, settings.n_tta, f'fold {part.k}')
    if compile:
        lib.speed.compile(learn.model.model)
    if settings.n_tta:
        (pred, plain), _ = learn.tta(n=settings.n_tta, beta=None)  # None returns both, unmixed
    else:
        pred = plain = learn.get_preds()[0]
    return lib.tta.check_finite(pred, str(part)), lib.tta.check_finite(plain, str(part))


def pool(run, parts, table, prior: float | None, heat: int, settings) -> None:
    """Write oof.csv, and test.csv as the mean over folds, with `prob`; print scores, draw maps."""
    with lib.locks.held(run.lock):
        if not all(part.is_made(settings) for part in parts):
            return print(lib.parts.describe_missing(parts))
        pooled = lib.parts.pool(parts)
        oof = lib.parts.join_table(table, pooled['oof'])
        rate = lib.prior.melanoma_rate(oof, prior)
        odds = lib.prior.run_odds(run, oof.target)
        for kind, rows in pooled.items():
            prob = lib.prior.to_prior(rows.pred.to_numpy(dtype=float), rate, odds)
            lib.files.write_csv(run.folder / f'{kind}.csv', rows.assign(prob=prob))
    print(f'{run}: prob is for a rate of {rate:.4g}')
    lib.summary.report_run(run, oof, ['pred_plain', *(['pred'] if settings.n_tta else [])])
    if heat:
        lib.heat.draw_run(run, oof, heat)


def predict_images(runs, folder: Path, out: Path, prior, heat, settings, options: dict) -> None:
    """Write `out` for the images of `folder`: the mean of the runs, each the mean of its folds."""
    lib.files.check_out(out, ['image_name', 'pred', 'prob'])
    print('\n'.join(f'{run} has {len(run.trained_folds)} trained folds' for run in runs))
    if not (runs := [run for run in runs if run.trained_folds]):
        raise cli.Stop('no run has a trained fold yet; type its train.py again')
    oof, weights = runs[0].read_oof(runs[0].trained_folds), [1 / len(runs)] * len(runs)
    rate = lib.prior.melanoma_rate(oof, prior)
    odds = lib.prior.blend_odds('mean', runs, weights, oof.target, oof.target)['odds']
    table, preds = lib.images.list_images(folder), []
    with tempfile.TemporaryDirectory() as home:
        for run in runs:
            table['cached'] = lib.images.cache(table, Path(home), run.config['size'])
            parts = [lib.parts.Part(run, k, 'images', table) for k in run.trained_folds]
            preds.append(sum(predict(part, settings, **options)[0] for part in parts) / len(parts))
    table['pred'] = sum(preds) / len(preds)
    # prob is empty where the odds that the runs were trained at differ tenfold or more
    table['prob'] = lib.prior.to_prior(table.pred, rate, odds or float('nan'))
    lib.files.write_csv(out, table[['image_name', 'pred', 'prob']])
    print(f'{out}: {len(table)} images. This is no diagnosis')
    if heat:
        lib.heat.draw_images(runs, table, out.with_name(f'{out.stem}_heat'), heat)


if __name__ == '__main__':
    cli.run(main)
