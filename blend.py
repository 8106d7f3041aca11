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

    from lib import blending, predictions, probability, score

    weights = blending.mixed(mix) if mix is not None else None
    folders = files.predicted(Path(home), ','.join(weights) if weights else only)
    names = [folder.name for folder in folders]
    if name in names:
        raise cli.Stop(f'--name {name} is one of the runs that are blended; choose another')
    config = {'how': how, 'mix': weights, 'runs': names, 'calibrate': calibrate, 'prior': prior}
    if kept:
        files.check_blend(kept, config)
    labelled, test, config['folds_sha256'] = read_folds(Path(home, 'folds.csv'))
    check(folders, labelled, config['folds_sha256'])
    runs = predictions.read_oofs(folders, labelled)
    tests = predictions.read_tests(folders, test)
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
        of_runs = blended.weights[: len(names)]
        config['odds'] = probability.trained_odds_of(folders, trained_on, of_runs, how)
        add_prob(oof, tests, found)
    save(Path(home), kept, oof, tests, found)


def read_folds(path: Path):
    """The labelled rows of folds.csv, its test rows, its SHA-256; None thrice without it."""
    from lib import tables

    if not path.exists():
        return None, None, None
    table = tables.read_folds(path)
    labelled = table[table.split == 'train'].astype({'fold': int, 'target': int})
    return labelled, table[table.split == 'test'], files.sha256(path)


def check(folders: list[Path], labelled, folds_sha256: str | None) -> None:
    """Raises: Stop where a run's predictions are not of its weights, or of another folds.csv."""
    for folder in folders:
        # others' predictions, or ours far from where they were made, have nothing to be checked by
        if labelled is not None and (folder / 'config.json').exists():
            n_tta = files.inferred(folder, sorted(labelled.fold.unique().tolist()))
            print(f'{folder}: mean of {n_tta} TTA passes')
        files.check_kept(folder, folds_sha256)


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


def add_prob(oof, tests, found: dict) -> None:
    """Add `prob` to `oof` and `tests`, and what is to be said of it to `found`."""
    from lib import probability

    blend = found['blend']
    try:
        oof['prob'], of_pred, found['probability'] = probability.of_blend(
            oof, blend['odds'], blend['calibrate'], blend['prior']
        )
    except cli.Stop as why:  # one class, or predictions of 0 and 1 alone: still a submission
        print(f'no prob: {why}')
        return
    print(probability.lines(found['probability']))
    if tests is not None:
        tests['prob'] = of_pred(tests.pred.to_numpy())


def save(home: Path, kept: Path | None, oof, tests, found: dict) -> None:
    """Write the submission, the report and what it is made from, and the run that is kept."""
    from lib import predictions, report

    for folder in (home, home / 'report', *([kept] if kept else [])):
        files.sweep(folder)
        if folder != home:
            predictions.write(folder, oof, tests)
    if kept:
        files.write_json(kept / files.BLEND, found['blend'])
    files.write_json(home / 'report' / 'scores.json', found)
    if tests is None:
        print('there are no test images, so there is nothing to submit')
    else:
        path, blend = home / 'submission.csv', found['blend']
        files.write_csv(path, tests[['image_name']].assign(target=tests.pred))
        way = 'mix' if blend['mix'] else blend['how']
        print(f'{path}: {len(tests)} rows, the {way} of {len(blend["runs"])} runs')
    print(report.write(home))


if __name__ == '__main__':
    cli.run(main)
