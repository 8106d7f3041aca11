"""Predict with every trained run: its out-of-fold images and the test images.

python infer.py --n_tta 15        # mean of 15 augmented passes, the plain pass beside it
python infer.py --n_tta 0         # the plain pass alone: 16 times faster
python infer.py --images DIR --out FILE.csv     # any other images, by all runs together
"""

from functools import partial
from pathlib import Path

from lib import cli, files, locks, ranks


def main(
    *,
    home: str = '.',
    only: str | None = None,
    n_tta: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    prior: float | None = None,
    images: str | None = None,
    out: str | None = None,
    sensitivity: float = 0.95,
    workers: int | None = None,
    precision: str = 'auto',
    compile: bool = False,
) -> None:
    """Write HOME/runs/NAME/oof.csv and test.csv for every run, from its config and weights alone.

    What is finished with these flags, these weights and this folds.csv is skipped; given twice at a
    time, the command's processes share out the folds and the test images.

    Args:
        home: folder of folds.csv, of the cache of resized images, and of the runs.
        only: names of runs, with commas between, instead of all.
        n_tta: passes of test-time augmentation, each a new draw of the run's own augmentation.
        batch_size: images a step.
        seed: of what the augmentation draws.
        prior: the rate of melanomas that `prob` is for; by default that of the competition's own
            images.
        images: predict this folder of images, or this one image, instead; writes --out alone.
        out: the CSV for --images: image_name, pred, prob, and class at the threshold.
        sensitivity: for --images, the share of melanomas that the threshold must find, chosen on
            the out-of-fold predictions.
        workers: processes that read images; by default one a core beside a GPU, else none.
        precision: fp32, bf16 or fp16; by default the lowest that keeps the predictions.
        compile: torch.compile the models first; takes a minute, pays for thousands of images.
    """
    cli.at_least(0, n_tta=n_tta, seed=seed)
    cli.at_least(1, batch_size=batch_size)
    cli.rate(prior=prior, sensitivity=sensitivity)
    cli.processes(workers)
    if (images is None) != (out is None):
        raise cli.Stop('--images DIR and --out FILE.csv go together')
    folds_path, runs = Path(home, 'folds.csv'), files.runs(Path(home), only)

    # here, not above: --help and a misspelt flag need none of it, and it takes seconds
    from lib import learner, loaders, model, tables

    ranks.start()
    learner.resolve(precision, loaders.default_device())
    if compile:
        model.check_compiler()
    if images is not None and ranks.WORLD > 1:
        raise cli.Stop('--images runs in one process; start it without a launcher')
    if images is not None:
        drawn = {'n_tta': n_tta, 'seed': seed, 'batch_size': batch_size}
        how = {'workers': workers, 'compile': compile}
        return predict_images(runs, Path(images), Path(out), prior, sensitivity, drawn, how)
    table = tables.read_folds(folds_path)
    folds = sorted(table.fold.dropna().astype(int).unique())
    ready = ranks.first_does(lambda: [run for run in runs if is_ready(run, folds, folds_path)])
    if not ready:
        raise cli.Stop('no run is trained in all folds; the commands above train what is missing')
    for run in ready:
        plan = {'n_tta': n_tta, 'seed': seed, 'batch_size': batch_size}
        plan['weights_sha256'] = files.weight_hashes(run, folds)
        plan['folds_sha256'] = files.read_config(run)['folds_sha256']
        plan['precision'] = ranks.first_does(partial(begun_in, run, plan, precision))
        if ranks.first_does(partial(finished, run, plan)):
            print(f'{run} is finished with these weights and flags')
        else:
            make(run, Path(home), table, folds, plan, workers, compile)
        ranks.first_does(partial(summarize, run, table, folds, plan, prior))


def make(run: Path, home: Path, table, folds: list[int], plan: dict, workers, compile) -> None:
    """Have the images cached and the precision found, then predict what nobody else is at."""
    from lib import images, model

    config = files.read_config(run)
    model.about(config['arch'])  # before what another plan has made is deleted
    used = table[~table.image_name.isin(files.skipped(run))].copy()
    used['cached'] = ranks.first_does(partial(images.cache, used, home, config['size']))
    if plan['precision'] == 'auto':
        plan['precision'] = find_precision(run, used, folds[0], plan['batch_size'], workers)
    with locks.Lock(run / '.lock') as lock:
        ranks.first_does(partial(begin, run, plan, lock))
        predict_run(run, used, folds, plan, workers, compile)


def is_ready(run: Path, folds: list[int], folds_path: Path) -> bool:
    """Whether all folds are trained; says so if not. Raises: Stop if on another folds.csv."""
    if files.read_config(run)['folds_sha256'] != files.sha256(folds_path):
        raise cli.Stop(
            f'{run} was trained on another {folds_path}, so its held-out images are not these; '
            'bring that file back, or name the other runs with --only'
        )
    missing = files.unfinished(run, folds)
    if missing:
        print(f'passed over {files.to_train(run, folds)}')
    return not missing


def begun_in(run: Path, plan: dict, precision: str) -> str:
    """`precision`, but what 'auto' was found to be if the rest of the plan was begun before."""
    path = run / 'infer.json'
    saved = files.read_json(path) if path.exists() else {}
    same = saved == plan | {'precision': saved.get('precision')}
    return saved['precision'] if precision == 'auto' and same else precision


TEST_LOCK = '.test.lock'  # of a run's test pass; its folds have locks of their own


def finished(run: Path, plan: dict) -> bool:
    """Whether just what `plan` says is predicted already."""
    made = [run / 'infer.json', run / 'oof.csv', run / 'test.csv']
    return all(p.exists() for p in made) and files.read_json(made[0]) == plan


def begin(run: Path, plan: dict, lock: locks.Lock) -> None:
    """Make infer.json say what is being done, and delete what was predicted in another way.

    `lock` is the run's, shared by all who predict by one plan, and needed alone to change it.
    Raises: Stop where others predict by another one.
    """
    path = run / 'infer.json'
    alone = lock.take()
    if not alone:
        lock.take(shared=True, wait=True)  # the others share it, but while one changes the plan
    same = path.exists() and files.read_json(path) == plan
    if not same and not alone:
        raise cli.Stop(
            f'{run} is being predicted with other flags or weights by {lock.holder()}; wait until '
            'that has ended, then type this again'
        )
    if alone:
        files.sweep(run, alone=True)
    if not same:
        for p in [run / 'oof.csv', run / 'test.csv', *run.glob('fold*/tta_oof.csv')]:
            p.unlink(missing_ok=True)
        files.write_json(path, plan)
    lock.take(shared=True)


def find_precision(run: Path, table, fold: int, batch_size: int, workers: int | None) -> str:
    """The lowest precision that keeps the predictions of one of the run's models."""
    from lib import model
    from lib.augment import recipe
    from lib.predict import lowest

    config = files.read_config(run)
    size, tfms = config['size'], recipe(config['mean'], config['std'])
    net = model.load(config['arch'], size, run / f'fold{fold}' / model.WEIGHTS)
    return lowest(net, size, table.cached, tfms, batch_size, workers)


def predict_run(run: Path, table, folds: list, plan: dict, workers, compile: bool) -> None:
    """Write each fold's tta_oof.csv, then test.csv, the mean over folds, then oof.csv.

    What another process is at is left to it.
    """
    import pandas as pd

    from lib.tables import OOF_COLUMNS, read_csv

    labelled = table[table.split == 'train'].astype({'fold': int, 'target': int})
    test, passed = table[table.split == 'test'], f'{plan["n_tta"]} + 1 passes'
    parts = {files.fold_lock(run, k): (k, run / f'fold{k}' / 'tta_oof.csv') for k in folds}
    parts[run / TEST_LOCK] = None, run / 'test.csv'

    def missing() -> list[Path]:
        return [lock for lock, (_, path) in parts.items() if not path.exists()]

    def pool() -> None:
        if not missing():
            oofs = [read_csv(run / f'fold{k}' / 'tta_oof.csv') for k in folds]  # digits as text
            files.write_csv(run / 'oof.csv', pd.concat(oofs))

    # what another process has finished meanwhile is no more
    free = (lock for lock in locks.share(missing()) if lock in missing())
    for lock in ranks.each(free):
        k, path = parts[lock]
        ranks.first_does(partial(files.sweep, path.parent, alone=k is not None))
        if k is not None:
            rows = labelled[labelled.fold == k]
            print(f'{run}: {len(rows)} images, {passed}, fold {k}', flush=True)
            pred = passes(run, rows, [k], plan, f'fold {k}', workers, compile)
            files.write_csv(path, rows[OOF_COLUMNS].join(pred))
        else:
            print(f'{run}: {len(test)} test images, {passed}, all folds', flush=True)
            pred = passes(run, test, folds, plan, 'test', workers, compile)
            files.write_csv(path, test[['image_name']].join(pred))
    ranks.first_does(pool)


def passes(run: Path, rows, folds: list, plan: dict, label: str, workers, compile: bool):
    """`pred` and `pred_plain` for the images `rows.cached`, the mean of these folds' models.

    Returns: two columns with the index of `rows`.
    """
    import pandas as pd

    from lib import model
    from lib.augment import recipe
    from lib.predict import predict

    config = files.read_config(run)
    tfms = recipe(config['mean'], config['std'], config.get('cutout', False))
    nets = []
    for k in folds:
        net = model.load(config['arch'], config['size'], run / f'fold{k}' / model.WEIGHTS)
        net = model.for_inference(net, config['size'], plan['precision'])
        nets.append(model.compile(net) if compile else net)
    drawn = plan['batch_size'], plan['n_tta'], plan['seed']
    pred, plain = predict(nets, rows.cached, tfms, *drawn, workers, label)
    return pd.DataFrame({'pred': pred, 'pred_plain': plain}, index=rows.index)


def summarize(run: Path, table, folds: list[int], plan: dict, prior: float | None) -> None:
    """Add `prob` to oof.csv and test.csv; print what the predictions are worth: scores.json.

    Where another process is at a part, say so instead.
    """
    from lib import probability, score
    from lib.tables import read_csv

    if not finished(run, plan):
        units = [files.fold_lock(run, k) for k in folds] + [run / TEST_LOCK]
        whose = ''.join(map(locks.at_work, units)) or ' (another process was)'
        print(f'{run}: not all is predicted yet{whose}; the same command ends it later')
        return
    n_tta = plan['n_tta']
    made = {'oof.csv': read_csv(run / 'oof.csv')}
    if (table.split == 'test').any():
        made['test.csv'] = read_csv(run / 'test.csv')
    columns = ['pred_plain', 'pred'] if n_tta else ['pred_plain']
    scored = table.merge(made['oof.csv'][['image_name', 'pred', 'pred_plain']], on='image_name')
    scored = scored.astype({'pred': float, 'pred_plain': float, 'fold': int, 'target': int})
    odds = probability.trained_odds_of([run], scored.target)
    to = probability.rate(scored) if prior is None else prior
    for name, rows in made.items():
        prob = probability.shift(rows.pred.to_numpy(dtype=float), to, odds)
        if 'prob' not in rows or (rows.prob.to_numpy(dtype=float) != prob).any():
            files.write_csv(run / name, rows.assign(prob=prob))
    over = f'95 % interval over {score.drawn(scored)}'
    print(f'{run}: out of fold [{over}]; prob is for a rate {to:.4g}')
    found = {column: score.summary(scored, column) for column in columns}
    print(score.lines(found))
    if n_tta:
        both = [scored.pred, scored.pred_plain]
        found['tta'] = score.compare(scored.target, both, scored.group, base=1)[2][0]
        print(f'{n_tta} TTA passes change the AUC by {found["tta"]}')
    files.write_json(run / 'scores.json', found)


def predict_images(
    runs: list[Path], folder: Path, out: Path, prior: float | None, sensitivity: float,
    drawn: dict, how: dict,
) -> None:  # fmt: skip
    """Write `out` for the images in `folder`: the mean of the runs, each the mean of its folds."""
    import tempfile

    import numpy as np
    import pandas as pd

    from lib import images, predictions, probability

    table = images.table_of(folder)
    oofs = predictions.read_oofs(runs, None)
    for run in runs:
        made = files.inferred(run, folds_of(run))
        if made != drawn['n_tta']:
            raise cli.Stop(
                f'{run} has out-of-fold predictions of {made} TTA passes, and a threshold holds '
                f'for as many: add --n_tta {made}'
            )
    preds = []
    for run in runs:
        with tempfile.TemporaryDirectory() as home:  # no cache of images that come once
            table['cached'] = images.cache(table, Path(home), files.read_config(run)['size'])
            saved = files.read_json(run / 'infer.json')
            plan = {'precision': saved.get('precision', 'fp32')} | drawn  # as out of fold
            preds.append(passes(run, table, folds_of(run), plan, run.name, **how).pred)

    rows, oof = oofs.rows, oofs.preds.mean(1)
    own, named = probability.population(rows)
    at = probability.threshold(rows.target[own].to_numpy(), oof[own], sensitivity)
    odds = probability.trained_odds_of(runs, rows.target, np.full(len(runs), 1 / len(runs)))
    pred = np.mean(preds, axis=0)
    prob = probability.shift(pred, probability.rate(rows) if prior is None else prior, odds)
    called = np.where(pred >= at, 'melanoma', 'benign')
    found = pd.DataFrame(
        {'image_name': table.image_name, 'pred': pred, 'prob': prob, 'class': called}
    )
    files.write_csv(out, found)
    print(
        f'{out}: {len(found)} images, {(called == "melanoma").sum()} called melanoma at pred '
        f'{at:.4f}, which finds {sensitivity:.0%} of the melanomas out of fold ({named}). '
        'This is no diagnosis'
    )


def folds_of(run: Path) -> list[int]:
    """The folds that a run has weights of."""
    return sorted(int(path.parent.name[4:]) for path in run.glob('fold*/model.safetensors'))


if __name__ == '__main__':
    cli.run(main)
