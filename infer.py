"""Predict with every trained run: its out-of-fold images and the test images.

python infer.py --n_tta 15        # mean of 15 augmented passes, the plain pass beside it
python infer.py --n_tta 0         # the plain pass alone: 16 times faster
"""

from functools import partial
from pathlib import Path

from lib import cli, files, ranks


def main(
    *,
    home: str = '.',
    only: str | None = None,
    n_tta: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    workers: int | None = None,
    precision: str = 'auto',
    compile: bool = False,
) -> None:
    """Write HOME/runs/NAME/oof.csv and test.csv for every run, from its config and weights alone.

    What is finished with these flags, these weights and this folds.csv is skipped.

    Args:
        home: folder of folds.csv, of the cache of resized images, and of the runs.
        only: names of runs, with commas between, instead of all.
        n_tta: passes of test-time augmentation, each a new draw of the run's own augmentation.
        batch_size: images a step.
        seed: of what the augmentation draws.
        workers: processes that read images; by default one a core beside a GPU, else none.
        precision: fp32, bf16 or fp16; by default the lowest that keeps the predictions.
        compile: torch.compile the models first; takes a minute, pays for thousands of images.
    """
    cli.at_least(0, n_tta=n_tta, seed=seed)
    cli.at_least(1, batch_size=batch_size)
    folds_path, runs = Path(home, 'folds.csv'), files.runs(Path(home), only)

    # here, not above: --help and a misspelt flag need none of it, and it takes seconds
    import pandas as pd

    from lib import images, learner, loaders, model, score, tables

    ranks.start()
    learner.resolve(precision, loaders.default_device())
    if compile:
        model.check_compiler()
    table = tables.read_folds(folds_path)
    folds = sorted(table.fold.dropna().astype(int).unique())
    ready = [run for run in runs if is_ready(run, folds, folds_path)]
    if not ready:
        raise cli.Stop('no run is trained in all folds; the commands above train what is missing')
    for run in ready:
        config = files.read_config(run)
        plan = {'n_tta': n_tta, 'seed': seed, 'batch_size': batch_size}
        plan['weights_sha256'] = files.weight_hashes(run, folds)
        plan['folds_sha256'] = config['folds_sha256']
        plan['precision'] = ranks.first_does(partial(begun_in, run, plan, precision))
        made = partial(images.cache, table, Path(home), config['size'])
        if plan['precision'] == 'auto':
            table['cached'] = ranks.first_does(made)
            plan['precision'] = find_precision(run, table, folds[0], batch_size, workers)
        if ranks.first_does(partial(begin, run, plan)):
            table['cached'] = ranks.first_does(made)
            predict_run(run, table, folds, plan, workers, compile)
        else:
            print(f'{run} is finished with these weights and flags')
        oof = pd.read_csv(run / 'oof.csv')
        print(f'{run}: pooled out-of-fold AUC [95 % interval over patients or lesions]')
        print(score.table(oof, ['pred_plain', 'pred'] if n_tta else ['pred_plain']))
        if n_tta:
            print(f'{n_tta} TTA passes change it by {score.difference(oof, "pred", "pred_plain")}')


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


def begin(run: Path, plan: dict) -> bool:
    """Make infer.json say what is being done; False if just that is finished already."""
    made = [run / 'oof.csv', run / 'test.csv', *run.glob('fold*/tta_oof.csv')]
    path = run / 'infer.json'
    if path.exists() and files.read_json(path) == plan:
        return not all(p.exists() for p in made[:2])
    for p in made:  # of other weights or flags
        p.unlink(missing_ok=True)
    files.write_json(path, plan)
    return True


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
    """Write each fold's tta_oof.csv, then test.csv, the mean over folds, then oof.csv."""
    import pandas as pd

    from lib import model
    from lib.augment import recipe
    from lib.predict import predict
    from lib.tables import OOF_COLUMNS, read_csv

    config = files.read_config(run)
    tfms = recipe(config['mean'], config['std'], config.get('cutout', False))
    arch, size, n_tta = config['arch'], config['size'], plan['n_tta']
    drawn = plan['batch_size'], n_tta, plan['seed']

    def passes(rows, folds: list[int], label: str):
        """`pred` and `pred_plain` for `rows`, the mean of these folds' models: two columns."""
        nets = []
        for k in folds:
            net = model.load(arch, size, run / f'fold{k}' / model.WEIGHTS)
            net = model.for_inference(net, size, plan['precision'])
            nets.append(model.compile(net) if compile else net)
        pred, plain = predict(nets, rows.cached, tfms, *drawn, workers, label)
        return pd.DataFrame({'pred': pred, 'pred_plain': plain}, index=rows.index)

    def pool() -> None:
        oof = pd.concat([read_csv(path) for path in oofs])  # digits as text
        files.write_csv(run / 'oof.csv', oof)

    oofs, test_path = [run / f'fold{k}' / 'tta_oof.csv' for k in folds], run / 'test.csv'
    done = ranks.first_does(lambda: [path for path in (*oofs, test_path) if path.exists()])
    labelled = table[table.split == 'train'].astype({'fold': int, 'target': int})
    for k, path in zip(folds, oofs, strict=True):
        if path not in done:
            rows = labelled[labelled.fold == k]
            print(f'{run}: {len(rows)} images, {n_tta} + 1 passes, fold {k}', flush=True)
            files.write_csv(path, rows[OOF_COLUMNS].join(passes(rows, [k], f'fold {k}')))
    if test_path not in done:
        test = table[table.split == 'test']
        print(f'{run}: {len(test)} test images, {n_tta} + 1 passes, all folds', flush=True)
        files.write_csv(test_path, test[['image_name']].join(passes(test, folds, 'test')))
    ranks.first_does(pool)


if __name__ == '__main__':
    cli.run(main)
