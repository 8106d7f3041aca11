"""Predict with every trained run: its out-of-fold images and the test images.

python infer.py --n_tta 15        # mean of 15 augmented passes, the plain pass beside it
python infer.py --n_tta 0         # the plain pass alone: 16 times faster
"""

from pathlib import Path

from lib import cli, files


def main(
    *,
    home: str = '.',
    only: str | None = None,
    n_tta: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    workers: int | None = None,
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
        workers: processes that read images; by default one a core beside a GPU, else none.
        compile: torch.compile the models first; takes a minute, pays for thousands of images.
    """
    cli.at_least(0, n_tta=n_tta, seed=seed)
    cli.at_least(1, batch_size=batch_size)
    cli.processes(workers)
    folds_path, runs = Path(home, 'folds.csv'), files.runs(Path(home), only)

    # here, not above: --help and a misspelt flag need none of it, and it takes seconds
    import pandas as pd

    from lib import images, model, score, tables

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
        if finished(run, plan):
            print(f'{run} is finished with these weights and flags')
        else:
            model.about(config['arch'])  # before what another plan has made is deleted
            used = table[~table.image_name.isin(files.skipped(run))].copy()
            used['cached'] = images.cache(used, Path(home), config['size'])
            with files.Lock(run / '.lock') as lock:
                begin(run, plan, lock)
                predict_run(run, used, folds, n_tta, batch_size, seed, workers, compile)
        if not finished(run, plan):
            units = [files.fold_lock(run, k) for k in folds] + [run / TEST_LOCK]
            whose = ''.join(map(files.at_work, units)) or ' (another process was)'
            print(f'{run}: not all is predicted yet{whose}; the same command ends it later')
            continue
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


TEST_LOCK = '.test.lock'  # of a run's test pass; its folds have locks of their own


def finished(run: Path, plan: dict) -> bool:
    """Whether just what `plan` says is predicted already."""
    made = [run / 'infer.json', run / 'oof.csv', run / 'test.csv']
    return all(p.exists() for p in made) and files.read_json(made[0]) == plan


def begin(run: Path, plan: dict, lock: files.Lock) -> None:
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


def predict_run(
    run: Path, table, folds: list, n_tta: int, batch_size: int, seed: int, workers, compile: bool
) -> None:
    """Write each fold's tta_oof.csv, then test.csv, the mean over folds, then oof.csv."""
    import pandas as pd
    import torch
    from fastai.vision.all import DataLoaders

    from lib import model
    from lib.augment import recipe
    from lib.learner import learner
    from lib.loaders import loader
    from lib.predict import predict
    from lib.tables import OOF_COLUMNS, read_csv

    config = files.read_config(run)
    tfms = recipe(config['mean'], config['std'], config.get('cutout', False))

    def passes(rows, folds: list[int], seed: tuple[int, ...], label: str):
        """`pred` and `pred_plain` for `rows`, the mean of these folds' models: two columns."""
        paths = [run / f'fold{k}' / model.WEIGHTS for k in folds]
        nets = [model.load(config['arch'], config['size'], path) for path in paths]
        net = model.Mean(map(torch.compile, nets) if compile else nets)
        dl = loader(rows.cached, rows.target.fillna(0), tfms, batch_size, workers=workers)
        pred, plain = predict(learner(DataLoaders(dl), net), dl, n_tta, seed, label)
        return pd.DataFrame({'pred': pred, 'pred_plain': plain}, index=rows.index)

    labelled = table[table.split == 'train'].astype({'fold': int, 'target': int})
    parts = {files.fold_lock(run, k): (k, run / f'fold{k}' / 'tta_oof.csv') for k in folds}
    parts[run / TEST_LOCK] = None, run / 'test.csv'
    for lock in files.share(lock for lock, (_, path) in parts.items() if not path.exists()):
        k, path = parts[lock]
        if path.exists():  # another process was faster
            continue
        files.sweep(path.parent, alone=k is not None)
        if k is not None:
            rows = labelled[labelled.fold == k]
            print(f'{run}: {len(rows)} images, {n_tta} + 1 passes, fold {k}', flush=True)
            files.write_csv(path, rows[OOF_COLUMNS].join(passes(rows, [k], (seed, k), f'fold {k}')))
        else:
            test = table[table.split == 'test']
            print(f'{run}: {len(test)} test images, {n_tta} + 1 passes, all folds', flush=True)
            pred = passes(test, folds, (seed, len(folds)), 'test')
            files.write_csv(path, test[['image_name']].join(pred))
    if all(path.exists() for _, path in parts.values()):
        oof = pd.concat([read_csv(run / f'fold{k}' / 'tta_oof.csv') for k in folds])  # as text
        files.write_csv(run / 'oof.csv', oof)


if __name__ == '__main__':
    cli.run(main)
