"""The mean of the runs' predictions, as a submission.

python blend.py                   # every run under runs/
python blend.py --only a,b        # these two
"""

from pathlib import Path

from lib import cli, files


def main(*, home: str = '.', only: str | None = None) -> None:
    """Average the runs' TTA predictions into HOME/submission.csv and print the AUC of each.

    Args:
        home: folder of folds.csv and of the runs that infer.py has predicted with.
        only: names of runs, with commas between, instead of all.
    """
    runs = files.runs(Path(home), only)

    # here, not above: --help and a misspelt flag need none of it, and it takes seconds
    from lib import blending, score, tables

    table = tables.read_folds(Path(home, 'folds.csv'))
    labelled = table[table.split == 'train'].reset_index(drop=True)
    test = table[table.split == 'test'].reset_index(drop=True)
    if test.empty:
        raise cli.Stop(f'{home}/folds.csv has no test rows, so there is nothing to submit')
    folds = sorted(labelled.fold.astype(int).unique())
    oofs, tests = {}, {}
    for run in runs:
        check_inferred(run, folds, home)
        oofs[run.name] = blending.aligned(run / 'oof.csv', labelled, ('target', 'fold'))
        tests[run.name] = blending.aligned(run / 'test.csv', test)

    labelled['blend'] = blending.mean(oofs)
    print('pooled out-of-fold AUC [95 % interval over patients or lesions]')
    width = max(map(len, oofs))
    for name, pred in oofs.items():
        print(f'{name:<{width}}  {score.describe(labelled.assign(pred=pred), "pred")}')
    print(score.table(labelled, ['blend']))
    submission = test[['image_name']].assign(target=blending.mean(tests))
    files.write_csv(Path(home, 'submission.csv'), submission)
    print(f'{Path(home, "submission.csv")}: {len(submission)} rows, the mean of {len(runs)} runs')


def check_inferred(run: Path, folds: list[int], home: str) -> None:
    """Raises: Stop with the command to type where infer.py has not seen the run's weights."""
    if files.unfinished(run, folds):
        raise cli.Stop(files.to_train(run, folds))
    made = [run / 'infer.json', run / 'oof.csv', run / 'test.csv']
    missing = [path.name for path in made if not path.exists()]
    if not missing:
        plan = files.read_json(run / 'infer.json')
        if plan.get('weights_sha256') == files.weight_hashes(run, folds):
            print(f'{run}: mean of {plan.get("n_tta")} TTA passes')
            return
    why = f'has no {", ".join(missing)}' if missing else 'was trained again since infer.py ran'
    raise cli.Stop(f'{run} {why}: python infer.py --home {home} --only {run.name}')


if __name__ == '__main__':
    cli.run(main)
