"""Blend the runs' predictions to a submission, and say what it is worth.

python blend.py                   # the mean of every run under runs/, and report/index.html
python blend.py --only a,b        # of these two; one name: the report of one run
python blend.py --how greedy      # weights by hill climbing, scored out of fold
"""

from pathlib import Path

import lib  # a module of lib is imported when it is first used: --help is quick
from lib import cli


def main(
    *,
    home: str = '.',  # folder of the runs, and of folds.csv where there is one
    only: str | None = None,  # names of runs, with commas between, instead of all
    how: str = 'mean',  # mean, rank (mean of ranks), greedy (hill climbing) or stack (logistic)
    mix: str | None = None,  # weights by hand instead, as a=.5,b=.5, of the runs that it names
    name: str | None = None,  # keep the blend as HOME/runs/NAME, so that it can be blended again
    calibrate: str | None = None,  # platt: fit prob to the out-of-fold predictions, across folds
    prior: float | None = None,  # rate of melanomas that prob is for; by default the competition's
    images: bool = True,  # show images of patients in the report; --noimages before you share it
) -> None:
    """Blend HOME/runs/*/{oof,test}.csv into HOME/submission.csv and HOME/report/."""
    cli.check_one_of(('mean', 'rank', 'greedy', 'stack'), how=how)
    cli.check_one_of(('platt', None), calibrate=calibrate)
    cli.check_within(0.0001, 0.9999, prior=prior)
    if mix is not None and (only is not None or how != 'mean'):
        raise cli.Stop('--mix names its runs and their weights itself; leave --only and --how out')
    home = Path(home)
    blend_run = lib.runs.Run(lib.runs.run_folder(home, name)) if name is not None else None
    mix_weights = lib.blending.parse_mix(mix) if mix is not None else None
    runs = lib.runs.find_runs(home, ','.join(mix_weights or ()) or only, predicted=True)
    names = [run.name for run in runs]
    record = {'how': how, 'mix': mix_weights, 'runs': names, 'calibrate': calibrate, 'prior': prior}
    if blend_run:
        lib.provenance.check_free(blend_run, record)
    table, labelled, test = lib.tables.read_split(home / 'folds.csv')  # None where it is not there
    record |= lib.provenance.check_runs(runs, table, home / 'folds.csv')

    # The runs stand side by side, matched by image name: oofs.preds and tests are (images, runs).
    oofs = lib.predictions.read_oofs(runs, labelled)
    tests = lib.predictions.read_tests(runs, test)
    lib.predictions.check_range(how, oofs, tests)
    if oofs is None and (how in lib.blending.FITTED or calibrate):
        raise cli.Stop('--how greedy, --how stack and --calibrate need an oof.csv in every run')
    record['predictions_sha256'] = lib.provenance.hash_predictions(runs)

    # A blend is a weighted sum over the runs: of their predictions, their ranks or their logits.
    weights = [mix_weights[n] for n in names] if mix_weights else [1 / len(names)] * len(names)
    oof, scores = None, {'blend': record}
    if oofs is not None:
        # A fold is blended by weights that were fitted without it, so that its score is honest.
        weights, fold_weights = lib.blending.fit(how, oofs, weights)
        oof = oofs.rows.assign(pred=lib.blending.blend_by_fold(how, oofs, fold_weights))
    if tests is not None:
        scores['test_correlations'] = lib.comparison.rank_correlations(tests.to_numpy())
        scaled = lib.blending.to_scale(how, tests.to_numpy())
        pred = lib.blending.weigh(how, scaled, weights)
        tests = tests.index.to_frame(index=False).assign(pred=pred)
    record['weights'] = dict(zip(names, weights, strict=False))
    if how == 'stack':
        record['intercept'] = weights[-1]

    if oof is None:
        so = '' if prior is None else '; --prior is ignored'
        print(f'no out-of-fold score and no prob, since not every run has an oof.csv{so}')
    else:
        scores |= score(how, oofs, oof, weights, fold_weights)
        trained_on = (oof if labelled is None else labelled).target
        record |= lib.prior.blend_odds(how, runs, weights, trained_on, oof.target)
        refit = lib.blending.leave_folds_out(how, oofs)  # None where no weights are fitted
        oof, tests, scores['probability'] = lib.calibration.add_prob(oof, tests, record, refit)
        print(lib.calibration.format_quality(scores['probability']))
    with lib.locks.held(home / '.lock'):  # two blends at once would mix their files
        save(home, blend_run, table, oof, tests, scores)
        print(lib.report.write(home, images))


def score(how: str, oofs, oof, weights, fold_weights: dict) -> dict:
    """Print each run beside the blend, the blend's figures and the shortcut floor; return them."""
    if oofs.n_not_shared:
        print(f'{len(oof)} images are scored; {oofs.n_not_shared} others are not in every run')
    summary = lib.summary.summarize(oof.assign(fold=oofs.model_folds))
    scores = {'runs': lib.comparison.compare_runs(how, oofs, weights, fold_weights)}
    scores['summary'] = summary
    print(f'out-of-fold AUC [95 % interval over {summary["resampling_unit"]}]')
    scores['best_run'] = lib.comparison.compare_with_best_run(scores['runs'])
    print(lib.comparison.format_runs(scores['runs'], scores['best_run']))
    print(lib.summary.format_summaries({'blend': summary}))
    if how in lib.blending.FITTED:
        scaled = lib.blending.to_scale(how, oofs.preds, oofs.folds)
        scores['in_sample'] = lib.score.auc(oof.target, lib.blending.weigh(how, scaled, weights))
        print(f'in-sample AUC of the fitted weights, optimistic: {scores["in_sample"]:.4f}')
    scores['floor'] = lib.shortcuts.measure(oof)
    print(lib.shortcuts.describe(scores['floor']))
    return scores


def save(home: Path, blend_run, table, oof, tests, scores: dict) -> None:
    """Write submission.csv, the tables of the report, and with --name the folder of the blend."""
    if blend_run:
        lib.provenance.keep(blend_run, scores['blend'])  # before the predictions that it explains
    for folder in (home / 'report', *([blend_run.folder] if blend_run else [])):
        lib.predictions.write(folder, oof, tests)
    lib.files.write_json(home / 'report' / 'scores.json', scores)
    path, record = home / 'submission.csv', scores['blend']
    if tests is None:
        deleted = '; the submission.csv of an earlier blend is deleted' if path.exists() else ''
        path.unlink(missing_ok=True)
        print(f'there are no test images, so there is nothing to submit{deleted}')
    else:
        lib.predictions.write_submission(path, tests, lib.tables.competition_of(table, oof))
        method = 'mix' if record['mix'] else record['how']
        print(f'{path}: {len(tests)} rows, the {method} of {len(record["runs"])} runs')


if __name__ == '__main__':
    cli.run(main)
