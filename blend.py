"""Blend the runs' predictions to a submission, and say what it is worth.

python blend.py                   # the mean of every run under runs/, and report/index.html
python blend.py --only a,b        # of these two; one name: the report of one run
python blend.py --how greedy      # weights by hill climbing, judged out of fold
"""

from pathlib import Path

from lib import cli, files


def main(
    *,
    home: str = '.',
    only: str | None = None,
    how: str = 'mean',
    mix: str | None = None,
    name: str | None = None,
    calibrate: str | None = None,
    prior: float | None = None,
) -> None:
    """Blend HOME/runs/*/{oof,test}.csv into HOME/submission.csv and HOME/report/.

    Args:
        home: folder of the runs, and of folds.csv where there is one.
        only: names of runs, with commas between, instead of all.
        how: mean; rank (mean of the ranks within each run); greedy (weights by hill climbing on
            the out-of-fold AUC); stack (penalised logistic regression on logits).
        mix: weights by hand instead, as a=.5,b=.5, of the runs that it names.
        name: keep the blend as HOME/runs/NAME, so that it can be blended again.
        calibrate: platt or isotonic: fit the probabilities to the out-of-fold predictions,
            instead of moving them to the rate of melanomas.
        prior: the rate of melanomas that probabilities are for; by default that of the
            competition's own images.
    """
    cli.one_of(('mean', 'rank', 'greedy', 'stack'), how=how)
    cli.one_of(('platt', 'isotonic', None), calibrate=calibrate)
    cli.rate(prior=prior)
    if mix is not None and (only is not None or how != 'mean'):
        raise cli.Stop('--mix names its runs and their weights itself; leave --only and --how out')
    kept = files.run_folder(Path(home), name) if name is not None else None

    # here, not above: --help and a misspelt flag need none of it, and it takes seconds
    import numpy as np

    from lib import blending, probability, report, score

    weights = blending.mixed(mix) if mix is not None else None
    names = only.split(',') if only is not None else weights and list(weights)
    folders = files.predicted(Path(home), names and [word.strip() for word in names])
    names = [folder.name for folder in folders]
    if name in names:
        raise cli.Stop(f'--name {name} is one of the runs that are blended; choose another')
    config = {'how': how, 'mix': weights, 'runs': names, 'calibrate': calibrate, 'prior': prior}
    if kept:
        files.check_blend(kept, config)
    labelled, test, config['folds_sha256'] = read_folds(Path(home, 'folds.csv'))
    for folder in folders:
        # others' predictions, or ours far from where they were made, have nothing to be checked by
        if labelled is not None and (folder / 'config.json').exists():
            n_tta = files.inferred(folder, sorted(labelled.fold.unique().tolist()))
            print(f'{folder}: mean of {n_tta} TTA passes')
        files.check_kept(folder, config['folds_sha256'])
    runs = blending.read_oofs(folders, labelled)
    tests = blending.read_tests(folders, test)
    if runs is None and (blending.METHODS[how].fit or calibrate):
        raise cli.Stop('a run without oof.csv has nothing that weights or --calibrate could fit')

    by_hand = np.array([weights[n] for n in names]) if weights else None
    blended, of_tests = blending.blend(how, runs, len(names), by_hand)
    config['weights'] = dict(zip(names, blended.weights.tolist(), strict=False))
    if how == 'stack':
        config['intercept'] = float(blended.weights[-1])
    found, oof = {'blend': config}, None
    if tests is not None:
        found['test_correlations'] = score.rank_correlations(tests.to_numpy().T)
        tests = tests.index.to_frame(index=False).assign(pred=of_tests(tests.to_numpy()))
    if runs is None:
        print('no out-of-fold score, since not all of these runs have an oof.csv')
    else:
        oof = runs.rows.assign(pred=blended.oof)
        found |= judge(runs, blended, oof)
        trained_on = oof.target if labelled is None or how == 'stack' else labelled.target
        weights_of_runs = blended.weights[: len(names)]
        config['odds'] = probability.trained_odds_of(folders, trained_on, weights_of_runs, how)
        try:
            oof['prob'], of_pred, found['probability'] = probability.of_blend(
                oof, config['odds'], calibrate, prior
            )
        except cli.Stop as why:  # one class, or predictions of 0 and 1 alone: still a submission
            print(f'no prob: {why}')
        else:
            print(probability.lines(found['probability']))
            if tests is not None:
                tests['prob'] = of_pred(tests.pred.to_numpy())

    made = [Path(home, 'report'), *([kept] if kept else [])]
    files.sweep(Path(home))
    for folder in made:
        files.sweep(folder)
        blending.write(folder, oof, tests)
    if kept:
        files.write_json(kept / files.BLEND, config)
    files.write_json(Path(home, 'report', 'scores.json'), found)
    if tests is None:
        print('there are no test images, so there is nothing to submit')
    else:
        path, way = Path(home, 'submission.csv'), 'mix' if mix else how
        files.write_csv(path, tests[['image_name']].assign(target=tests.pred))
        print(f'{path}: {len(tests)} rows, the {way} of {len(names)} runs')
    print(report.write(Path(home)))


def read_folds(path: Path):
    """The labelled rows of folds.csv, its test rows, its SHA-256; None thrice without it."""
    from lib import tables

    if not path.exists():
        return None, None, None
    table = tables.read_folds(path)
    labelled = table[table.split == 'train'].astype({'fold': int, 'target': int})
    return labelled, table[table.split == 'test'], files.sha256(path)


def judge(runs, blended, oof) -> dict:
    """Print each run beside the blend, the blend's figures and the shortcut floor; return them."""
    from lib import blending, score, shortcuts

    if runs.left_out:
        print(f'{len(oof)} images that all have are scored; {runs.left_out} are not in all of them')
    found = {'runs': blending.compare(runs, blended), 'summary': score.summary(oof)}
    print(f'out-of-fold AUC [95 % interval over {oof.group.nunique()} {found["summary"]["drawn"]}]')
    print(blending.lines(found['runs']))
    print(score.lines({'blend': found['summary']}))
    if blended.naive is not None:
        found['naive'] = score.auc(oof.target, blended.naive)
        print(f'weights fitted and scored on the same images: {found["naive"]:.4f}, optimistic')
    pred, seen = shortcuts.floor(oof)
    found['floor'] = score.overall(oof.assign(pred=pred)) | {'seen': seen}
    print(shortcuts.sentence(found['floor']))
    return found


if __name__ == '__main__':
    cli.run(main)
