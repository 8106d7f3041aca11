"""Blend the runs' predictions into a submission, and say what it is worth.

python blend.py                   # the mean of every run under runs/, and report/index.html
python blend.py --only a,b        # of these two; one name: the report of one run
python blend.py --how greedy      # weights by hill climbing, scored out of fold
"""

from pathlib import Path

from lib import cli  # first, since it checks the versions of packages

# isort: split
from lib import (
    blending,
    calibration,
    files,
    locks,
    predictions,
    report,
    score,
    shortcuts,
    summary,
    tables,
)
from lib.parts import check_predicted
from lib.runs import choose_finished, find_runs


def main(
    *,
    home: str = '.',  # folder of the runs, and of folds.csv where there is one
    only: str | None = None,  # names of runs, with commas between, instead of all
    how: str = 'mean',  # mean, rank (mean of ranks), greedy (hill climbing) or stack (logistic)
    mix: str | None = None,  # weights by hand instead, as a=.5,b=.5, of the runs that it names
    calibrate: str | None = None,  # platt: fit prob by a logistic curve instead of a constant
    prior: float | None = None,  # malignant images' rate for prob; default: as in the labelled ones
    images: bool = True,  # show images of patients in the report; --noimages to share the page
) -> None:
    """Blend HOME/runs/*/{oof,test}.csv into HOME/submission.csv and HOME/report/."""
    flags = locals()
    cli.check_one_of(('mean', 'rank', 'greedy', 'stack'), how=how)
    cli.check_one_of(('platt', None), calibrate=calibrate)
    cli.check_within(0.0001, 0.9999, prior=prior)
    is_fitted = how in blending.FITTED  # to the out-of-fold predictions
    if mix is not None and (only is not None or how != 'mean'):
        raise cli.Stop('--mix names its runs and their weights itself; leave --only and --how out')
    if calibrate and how != 'mean':
        raise cli.Stop(f'--calibrate {calibrate} and --how {how} do not go together; leave one out')

    # The runs stand side by side, matched by image name: oofs.preds and tests are (images, runs).
    by_hand = blending.parse_mix(mix) if mix is not None else {}
    runs = find_runs(Path(home), ','.join(by_hand) or only, predicted=True)
    table, labelled, test = tables.read_split(Path(home, 'folds.csv'))  # None without the file
    runs = runs if table is None else choose_finished(runs, table)
    names = [run.name for run in runs]
    if mix and names != list(by_hand):
        raise cli.Stop('--mix names a run that is not finished; leave it out')
    check_predicted(runs, table)
    oofs = predictions.read_oofs(runs, labelled)  # None where one has no oof.csv
    tests = predictions.read_tests(runs, test)  # None where there are no test images
    predictions.check_range(how, oofs, tests)
    if oofs is None and (is_fitted or calibrate):
        raise cli.Stop('--how greedy, --how stack and --calibrate need an oof.csv in every run')

    # A blend is a weighted sum over the runs: of their predictions, their ranks or their logits.
    weights = [by_hand[name] for name in names] if mix else [1 / len(names)] * len(names)
    rho = blending.rank_correlations(tests.to_numpy() if oofs is None else oofs.preds)
    oof = scores = in_sample = None
    if oofs is not None:
        # A fold is blended by weights that were fitted without it, so that its score is honest.
        weights, fold_weights = blending.fit(how, oofs, weights)
        oof = oofs.rows.assign(pred=blending.blend_by_fold(how, oofs, fold_weights))
    if tests is not None:
        scaled = blending.to_scale(how, tests.to_numpy())
        tests = tests.index.to_frame(index=False).assign(pred=blending.weigh(how, scaled, weights))

    if oof is not None:
        if oofs.n_not_shared:
            print(f'{len(oof)} images are scored; {oofs.n_not_shared} others are not in every run')
        rows = summary.summarize(oof.assign(fold=oofs.model_folds))
        compared = blending.compare_runs(oofs, oof.pred, weights)
        blending.print_scores(runs, oof, compared, rows)
        if is_fitted:
            scaled = blending.to_scale(how, oofs.preds, oofs.folds)
            in_sample = score.auc(oof.target, blending.weigh(how, scaled, weights))
            print(f'in-sample AUC of the fitted weights, optimistic: {in_sample:.4f}')
        floor, sentence = shortcuts.measure(oof)
        print(sentence)
        if how == 'rank':
            fitted = calibration.no_probabilities(oof, calibration.RANKS)
        else:
            fitted = calibration.calibrate(oof, prior, platt=calibrate == 'platt')
        print(calibration.format_quality(fitted))
        oof = oof.assign(prob=fitted.prob)
        if tests is not None:
            tests = tests.assign(prob=fitted.curve(tests.pred.to_numpy()))
        scores = report.Scores(rows, floor, sentence, compared, fitted, in_sample)

    blend = {'command': cli.command('blend.py', flags, main.__kwdefaults__)}
    blend |= {'how': 'mix' if mix else how, 'calibrate': calibrate, 'prior': prior}
    blend['warnings'] = oofs.leaks if oofs else []
    blend['weights'] = dict(zip([*names, 'intercept'], map(float, weights), strict=False))
    with locks.held(Path(home, '.lock')):  # two blends at once would mix their files
        predictions.write(Path(home, 'report'), oof, tests)
        record = {'blend': blend} | (scores.record if scores else {})
        files.write_json(Path(home, 'report', 'scores.json'), record)
        submission = Path(home, 'submission.csv')
        if tests is None:
            was = ', and the old one is removed' if submission.exists() else ''
            print(f'there are no test images, so there is nothing to submit: no {submission}{was}')
            submission.unlink(missing_ok=True)
        else:
            predictions.write_submission(submission, tests, tables.competition_of(table, oof))
            print(f'{submission}: {len(tests)} rows, {blend["how"]} of {len(names)} run(s)')
        path = report.write(Path(home), names, blend, oof, scores, rho, images)
        print(f'{path}: the report')


if __name__ == '__main__':
    cli.run(main)
