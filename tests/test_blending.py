"""Predictions are matched by name, weights are judged out of fold, and others' runs take part."""

import json
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from conftest import CONFIG, oof
from scipy.special import expit, logit
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lib import blending, files, predictions, score, summary
from lib.cli import Stop
from lib.runs import Run

ROWS = pd.DataFrame({'image_name': list('abcd'), 'target': [0, 1, 0, 1], 'fold': [0, 0, 1, 1]})


def runs_of(*folders) -> list[Run]:
    return [Run(folder) for folder in folders]


def write(folder, name='oof.csv', rows=ROWS, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    table = rows.assign(**{'pred': [0.1, 0.9, 0.2, 0.7], **changes})
    table.sample(frac=1, random_state=0).to_csv(folder / name, index=False)  # in any order
    return folder


@pytest.fixture
def labelled():
    """As folds.csv has them."""
    return ROWS.assign(group=list('wxyz'), source='competition', patient_id=np.nan)


def test_shuffled_rows_come_in_the_order_of_folds_csv(tmp_path, labelled):
    runs = predictions.read_oofs(runs_of(write(tmp_path / 'run')), labelled)
    assert runs.rows.image_name.tolist() == list('abcd')
    assert runs.preds[:, 0].tolist() == [0.1, 0.9, 0.2, 0.7]
    assert runs.rows.group.tolist() == list('wxyz') and runs.n_not_shared == 0


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'image_name': list('abca')}, 'a more than once'),
        ({'image_name': ['a', 'b', 'c', None]}, 'without image_name'),
        ({'target': [0, 1, 0, 0]}, 'another target .* d;'),
        ({'target': [0, 1, 0, 2]}, 'target of d is not 0 or 1'),
        ({'fold': [0, 0, 1, -1]}, 'fold of d'),
        ({'pred': [0.1, np.nan, 0, 1]}, 'for b is not a number'),
        ({'pred': [0.1, np.inf, 0, 1]}, 'for b is not a number'),
        ({'pred': ['0.1', 'high', '0', '1']}, 'for b is not a number'),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(changes, says, tmp_path, labelled):
    with pytest.raises(Stop, match=says) as stopped:
        predictions.read_oofs(runs_of(write(tmp_path / 'run', **changes)), labelled)
    assert str(tmp_path / 'run' / 'oof.csv') in str(stopped.value)


@pytest.mark.parametrize(
    ('changes', 'says'),
    [({'image_name': list('abcx')}, '2 are in one'), ({'fold': [0, 0, 1, 0]}, 'another fold')],
)
def test_a_run_trained_here_must_hold_just_the_rows_of_folds_csv(changes, says, tmp_path, labelled):
    run = write(tmp_path / 'run', **changes)
    predictions.read_oofs(runs_of(run), labelled)  # anybody's may differ
    files.write_json(run / 'config.json', CONFIG)
    with pytest.raises(Stop, match=says):
        predictions.read_oofs(runs_of(run), labelled)


def test_runs_of_others_are_scored_on_what_all_have(tmp_path, labelled):
    ours = write(tmp_path / 'ours')
    theirs = write(
        tmp_path / 'theirs', image_name=list('dxba'), target=[1, 0, 1, 0], fold=[3, 3, 4, 4]
    )
    runs = predictions.read_oofs(runs_of(ours, theirs), labelled)
    assert runs.rows.image_name.tolist() == ['a', 'b', 'd'] and runs.n_not_shared == 2
    assert runs.preds[:, 1].tolist() == [0.7, 0.2, 0.1]
    assert runs.rows.fold.tolist() == [0, 0, 1]
    assert runs.folds.tolist() == [[0, 4], [0, 4], [1, 3]]
    with pytest.raises(Stop, match=r'no labelled image .* such as c in ours, r in other, a in'):
        other = write(tmp_path / 'other', image_name=list('pqrs'))
        predictions.read_oofs(runs_of(ours, other), labelled)


def test_predictions_of_others_are_ranked_within_the_folds_of_their_own_models(
    ok, tmp_path, monkeypatch
):
    table = oof(n=200, groups=200)
    theirs = table.assign(fold=np.arange(200) % 2)  # one of their models predicts higher
    theirs['pred'] = expit(logit(theirs.pred) + 5 * theirs.fold)
    oofs = predictions.read_oofs(
        runs_of(write(tmp_path / 'runs' / 'b', rows=theirs, pred=theirs.pred)), table
    )
    assert oofs.rows.fold.tolist() == table.fold.tolist()  # ours, by which weights are fitted
    assert oofs.model_folds.tolist() == theirs.fold.tolist()

    ok('blend.py', '--home', tmp_path)
    scores = files.read_json(tmp_path / 'report' / 'scores.json')['scores']
    auc = {row['label']: row['value'] for row in scores if row['measure'] == 'auc'}
    of_fold = [roc_auc_score(rows.target, rows.pred) for _, rows in theirs.groupby('fold')]
    assert [auc['fold 0'], auc['fold 1']] == pytest.approx(of_fold)
    assert auc[summary.RANKED] > auc[summary.POOLED] + 0.05

    write(tmp_path / 'runs' / 'a', rows=table, pred=table.pred)
    oofs = predictions.read_oofs(runs_of(tmp_path / 'runs' / 'a', tmp_path / 'runs' / 'b'), table)
    assert oofs.model_folds.tolist() == table.fold.tolist()


def test_without_folds_csv_patients_are_the_groups_and_folds_are_assigned(tmp_path):
    n = 40
    table = pd.DataFrame(
        {
            'image_name': [f'i{k}' for k in range(n)],
            'target': [0, 1] * (n // 2),
            'pred': 0.5,
            'patient_id': [None if k < 4 else f'p{k // 4}' for k in range(n)],
        }
    )
    (tmp_path / 'a').mkdir()
    table.to_csv(tmp_path / 'a' / 'oof.csv', index=False)
    runs = predictions.read_oofs(runs_of(tmp_path / 'a'), None)
    assert runs.rows.group.tolist()[:5] == ['i0', 'i1', 'i2', 'i3', 'p1']
    # what one run does not know, another may
    (tmp_path / 'b').mkdir()
    table.drop(columns='patient_id').to_csv(tmp_path / 'b' / 'oof.csv', index=False)
    both = predictions.read_oofs(runs_of(tmp_path / 'b', tmp_path / 'a'), None)
    assert both.rows.group.tolist() == runs.rows.group.tolist()
    # folds that part a patient are not fitted across
    leaky = table.assign(fold=range(n)).assign(fold=lambda t: t.fold % 2)
    leaky.to_csv(tmp_path / 'b' / 'oof.csv', index=False)
    parted = predictions.read_oofs(runs_of(tmp_path / 'b'), None)
    assert (parted.rows.groupby('group').fold.nunique() == 1).all()
    assert parted.folds[:, 0].tolist() == leaky.fold.tolist()  # ranks are the model's own
    assert sorted(set(runs.rows.fold)) == [0, 1, 2, 3, 4]
    assert set(runs.model_folds) == {0}  # no score is of a fold that no model had
    assert set(parted.model_folds) == {0, 1}
    assert (runs.rows.groupby('group').fold.nunique() == 1).all()


def test_test_predictions_come_in_the_order_asked_for_to_the_last_bit(tmp_path):
    pred = [0.023192234586761395, 5e-324, 0.1 + 0.2, 1.0]
    write(tmp_path / 'a', 'test.csv', pred=pred)
    submission = write(tmp_path / 'b', 'test.csv', pred=pred) / 'test.csv'
    text = submission.read_text().replace('target', 'x').replace('pred', 'target')
    submission.write_text(text)  # as Kaggle has it
    tests = predictions.read_tests(runs_of(tmp_path / 'a', tmp_path / 'b'), ROWS)
    assert tests.index.tolist() == list('abcd')
    assert tests.a.tolist() == pred == tests.b.tolist()
    write(tmp_path / 'b', 'test.csv', image_name=list('abcx'))
    with pytest.raises(Stop, match='2 are in one of them only, such as d'):
        predictions.read_tests(runs_of(tmp_path / 'a', tmp_path / 'b'), None)
    assert predictions.read_tests(runs_of(tmp_path), None) is None
    with pytest.raises(Stop, match=r'test\.csv is missing'):
        predictions.read_tests(runs_of(tmp_path / 'a', tmp_path), None)


def test_submissions_outside_of_0_to_1_are_ranked_or_all_listed_at_once(ok, script, tmp_path):
    columns = {'fine': [0.1, 0.2, 0.3, 1.0], 'wide': [-0.68, 0.2, 0.3, 2.01], 'up': [0, 0, 0, 1.5]}
    for name, pred in columns.items():
        write(tmp_path / 'runs' / name, 'test.csv', pred=pred)
    done = script('blend.py', '--home', tmp_path)
    assert done.returncode == 1 and not (tmp_path / 'submission.csv').exists()
    for words in ('wide/test.csv: 2 of 4, which go from -0.68 to 2.01', 'up/test.csv: 1 of 4'):
        assert words in done.stderr
    assert 'fine/' not in done.stderr and '--how rank' in done.stderr and '--only' in done.stderr
    ok('blend.py', '--home', tmp_path, '--how', 'rank')
    submission = pd.read_csv(tmp_path / 'submission.csv').set_index('image_name').target
    ranks = pd.DataFrame(columns, index=list('abcd')).rank().mean(axis=1)
    assert submission.rank().equals(ranks[submission.index].rank())
    ok('blend.py', '--home', tmp_path, '--only', 'fine')


def three_runs(n=3000, seed=0) -> predictions.OofTable:
    """Two runs that know different things, and one that is the first with noise."""
    rng = np.random.default_rng(seed)
    target = (rng.random(n) < 0.1).astype(int)
    fold = rng.integers(5, size=n)
    a, b = (rng.normal(size=n) + target for _ in range(2))
    c = a + rng.normal(0, 2, size=n)
    preds = 1 / (1 + np.exp(-np.column_stack([a, b, c])))
    rows = pd.DataFrame({'target': target, 'fold': fold, 'group': range(n), 'source': 'x'})
    return predictions.OofTable(rows, list('abc'), preds, np.column_stack([fold] * 3), 0)


def auc(runs, pred):
    return roc_auc_score(runs.rows.target, pred)


def fit_and_blend(how, runs):
    """The out-of-fold blend, the weights for test images, and the blend by these weights."""
    equal = np.full(len(runs.names), 1 / len(runs.names))
    weights, fold_weights = blending.fit(how, runs, equal)
    oof = blending.blend_by_fold(how, runs, fold_weights)
    scaled = blending.to_scale(how, runs.preds, runs.folds)
    return oof, weights, blending.weigh(how, scaled, weights)


def blend_test(how, preds, weights):
    return blending.weigh(how, blending.to_scale(how, preds), weights)


def test_the_mean_is_plain():
    runs = three_runs()
    oof, weights, _ = fit_and_blend('mean', runs)
    np.testing.assert_allclose(oof, runs.preds.mean(1), atol=1e-15)
    np.testing.assert_allclose(blend_test('mean', runs.preds, weights), oof, atol=1e-15)
    assert weights.tolist() == [1 / 3] * 3


def test_ranks_are_within_fold_for_oof_and_among_themselves_for_test():
    runs = three_runs()
    runs.folds[:, 1] = np.arange(3000) % 4  # a run of others
    of_2 = runs.folds == 2
    preds = np.where(of_2, 0.9 + runs.preds / 10, runs.preds)
    high = predictions.OofTable(runs.rows, runs.names, preds, runs.folds, 0)
    a, weights, _ = fit_and_blend('rank', runs)
    np.testing.assert_allclose(a, fit_and_blend('rank', high)[0])  # a fold's level is nothing to it
    ranks = pd.DataFrame(runs.preds).rank() - 0.5
    of_test = blend_test('rank', runs.preds, weights)
    np.testing.assert_allclose(of_test, ranks.mean(axis=1) / len(ranks))


def test_the_climb_weighs_what_helps_and_leaves_out_what_does_not():
    runs = three_runs()
    target = runs.rows.target.to_numpy()
    weights = blending.greedy_weights(runs.preds, target)
    assert weights.sum() == pytest.approx(1) and weights[2] < 0.1 and min(weights[:2]) > 0.3
    best = max(auc(runs, runs.preds[:, k]) for k in range(3))
    assert auc(runs, runs.preds @ weights) > best + 0.02
    # each step is the best there is: plain hill climbing by scikit-learn takes the same
    total, counts, seen = np.zeros(len(target)), np.zeros(3), []
    for _ in range(blending.N_STEPS):
        aucs = [roc_auc_score(target, total + p) for p in runs.preds.T]
        counts[np.argmax(aucs)] += 1
        total = total + runs.preds[:, np.argmax(aucs)]
        seen.append((max(aucs), counts / counts.sum()))
    np.testing.assert_allclose(weights, max(seen, key=lambda s: s[0])[1])


def test_the_stack_is_penalised_logistic_regression_on_logits():
    runs = three_runs()
    oof, weights, _ = fit_and_blend('stack', runs)
    x = np.log(runs.preds / (1 - runs.preds))
    model = LogisticRegression(C=blending.STACK_C, tol=1e-10, max_iter=1000)
    model.fit(x, runs.rows.target)
    of_test = blend_test('stack', runs.preds, weights)
    np.testing.assert_allclose(of_test, model.predict_proba(x)[:, 1], atol=1e-5)
    assert auc(runs, oof) > max(auc(runs, runs.preds[:, k]) for k in range(3)) + 0.02
    assert np.isfinite(blend_test('stack', np.array([[0.0, 1.0, 0.5]]), weights)).all()


@pytest.mark.parametrize('how', ['greedy', 'stack'])
def test_fitted_weights_are_judged_on_folds_that_they_have_not_seen(how):
    runs = three_runs(n=600)
    rng = np.random.default_rng(1)
    runs.preds = rng.random((600, 30))  # nothing to be known
    runs.names, runs.folds = list(map(str, range(30))), np.column_stack([runs.folds[:, 0]] * 30)
    oof, _, in_sample = fit_and_blend(how, runs)
    assert auc(runs, in_sample) > 0.6  # optimistic
    assert abs(auc(runs, oof) - 0.5) < 0.07
    in_fold = (runs.rows.fold == 2).to_numpy()
    runs.rows['target'] = np.where(in_fold, 1 - runs.rows.target, runs.rows.target)
    other, _, _ = fit_and_blend(how, runs)
    np.testing.assert_array_equal(oof[in_fold], other[in_fold])
    assert (oof[~in_fold] != other[~in_fold]).any()


def test_weights_by_hand_are_read_and_scaled():
    assert blending.parse_mix('a=.5, b=1.5') == {'a': 0.25, 'b': 0.75}
    for wrong in ('a', 'a=', 'a=-1', 'a=x', 'a=nan', 'a=1,a=2', 'a=0', ''):
        with pytest.raises(Stop, match=r'--mix|weights'):
            blending.parse_mix(wrong)


def test_each_run_is_compared_with_the_blend_and_with_the_others():
    runs = three_runs(n=600)
    runs.rows['group'] //= 3
    weights, fold_weights = blending.fit('mean', runs, [0.5, 0.3, 0.2])
    blended = blending.blend_by_fold('mean', runs, fold_weights)
    compared = blending.compare_runs(runs, blended, weights)
    aucs = [auc(runs, p) for p in runs.preds.T]
    assert compared.index.tolist() == list('abc') and compared.auc.tolist() == aucs
    interval = score.measure(runs.rows.assign(pred=runs.preds[:, 0])).loc['auc', ['low', 'high']]
    assert compared.loc['a', ['auc_low', 'auc_high']].tolist() == interval.tolist()  # by patient
    of_blend = auc(runs, blended)
    assert compared.difference.tolist() == pytest.approx([a - of_blend for a in aucs])
    rho = spearmanr(runs.preds).statistic
    assert compared.correlation['a'] == pytest.approx((rho[0, 1] + rho[0, 2]) / 2)
    table = blending.tabulate_runs(compared)
    assert list(table) == ['weight', 'AUC', 'minus the blend', 'correlation']
    row, cells = compared.loc['b'], table.loc['b']
    assert cells.weight == '0.300' and cells['correlation'] == f'{row.correlation:.4f}'
    assert f'{row.auc:.4f} [{row.auc_low:.4f}, {row.auc_high:.4f}]' == cells.AUC
    assert cells['minus the blend'].startswith(
        f'{row.difference:+.4f} [{row.difference_low:+.4f}, '
    )


def test_rank_correlations_are_scipys():
    preds = three_runs().preds
    rho = blending.rank_correlations(np.column_stack([preds[:, :2], 0 * preds[:, 0]]))
    assert rho[0, 1] == rho[1, 0] == pytest.approx(spearmanr(preds[:, :2]).statistic)
    assert rho[2].tolist() == [0, 0, 1]


@pytest.fixture(scope='module')
def four(tmp_path_factory):
    """A home with runs a, b and c of others, each better than the last, and d, which is noise."""
    home, rng = tmp_path_factory.mktemp('four'), np.random.default_rng(0)
    rows = oof(n=400)
    for name, noise in zip('abcd', (2, 1.5, 1, 50), strict=True):
        pred = expit(logit(rows.pred) + rng.normal(0, noise, 400)).round(6)
        write(home / 'runs' / name, rows=rows, pred=pred)
        test = rows.head(50)[['image_name']]
        write(home / 'runs' / name, 'test.csv', test, pred=rng.uniform(0.01, 0.99, 50).round(6))
    return home


def blended(home, ok, *flags) -> tuple:
    """What blend.py prints and saves as its settings, its submission, and its oof.csv; and the
    predictions (n, 4) of the runs in the order of both."""

    def read(path, column='pred'):
        return pd.read_csv(path, index_col='image_name')[column]

    out = ok('blend.py', '--home', home, *flags)
    made = (
        read(home / 'submission.csv', 'target'),
        read(home / 'report' / 'oof.csv', ['target', 'pred']),
    )
    runs = ({n: read(home / 'runs' / n / kind) for n in 'abcd'} for kind in ('test.csv', 'oof.csv'))
    preds = [pd.DataFrame(of).loc[rows.index] for of, rows in zip(runs, made, strict=True)]
    return out, files.read_json(home / 'report' / 'scores.json')['blend'], *made, *preds


def test_what_greedy_submits_is_the_sum_by_the_weights_that_it_says(four, ok):
    out, blend, submission, rows, tests, preds = blended(four, ok, '--how', 'greedy')
    weights = pd.Series(blend['weights'])
    assert weights.sum() == pytest.approx(1) and weights.c > weights.a and weights.d < 0.1
    printed = [
        float(line.split()[1]) for line in out.splitlines() if line[:2] in ('a ', 'b ', 'c ', 'd ')
    ]
    assert printed == [round(weight, 3) for weight in weights]
    np.testing.assert_allclose(submission, tests @ weights)
    in_sample = roc_auc_score(rows.target, preds @ weights)
    assert f'optimistic: {in_sample:.4f}' in out


def test_what_the_stack_submits_is_the_logistic_sum_by_its_weights(four, ok):
    _, blend, submission, rows, tests, preds = blended(
        four, ok, '--how', 'stack', '--only', 'd,b,c,a'
    )
    weights = pd.Series(blend['weights'])
    of_runs = weights.drop('intercept')
    assert weights.index.tolist() == [*'dbca', 'intercept'] and of_runs.idxmax() == 'c'
    np.testing.assert_allclose(submission, expit(logit(tests) @ of_runs + weights.intercept))
    assert roc_auc_score(rows.target, rows.pred) > roc_auc_score(rows.target, preds.mean(axis=1))


def test_platt_gives_a_logistic_prob_of_the_mean_to_the_test_images(four, ok):
    out, blend, submission, rows, tests, _ = blended(
        four, ok, '--calibrate', 'platt', '--only', 'b,c', '--prior', 0.1
    )
    assert 'prob is pred by a logistic curve' in out and blend['calibrate'] == 'platt'
    np.testing.assert_allclose(submission, tests[['b', 'c']].mean(axis=1))
    rate = rows.target.mean()
    weight = {0: 0.9 / (1 - rate), 1: 0.1 / rate}
    model = LogisticRegression(C=1e9, tol=1e-8, class_weight=weight)
    model.fit(logit(rows[['pred']]), rows.target)
    test = pd.read_csv(four / 'report' / 'test.csv')
    expected = model.predict_proba(logit(test[['pred']]))[:, 1]
    np.testing.assert_allclose(test.prob, expected, atol=1e-5)


@pytest.mark.parametrize('how', ['greedy', 'stack', 'rank'])
def test_calibration_of_fitted_weights_or_ranks_is_refused(how, four, refusal):
    said = refusal('blend.py', '--home', four, '--how', how, '--calibrate', 'platt')
    assert f'--calibrate platt and --how {how} do not go together' in said


def test_the_third_places_own_blend_comes_out(ok, shared, tmp_path):
    folder = shared / 'data' / 'predictions' / 'masdevallia_3rd'
    models = sorted(folder.glob('submission_EfficientNet*.csv'))
    assert len(models) == 8
    weights = {path.stem.removeprefix('submission_'): 0.1 for path in models}
    weights['simple_baseline'] = 0.2
    for name in weights:
        (tmp_path / 'runs' / name).mkdir(parents=True)
        text = (folder / f'submission_{name}.csv').read_text()
        (tmp_path / 'runs' / name / 'test.csv').write_text(text)
    out = ok(
        'blend.py', '--home', tmp_path, '--mix', ','.join(f'{n}={w}' for n, w in weights.items())
    )
    assert 'no out-of-fold score' in out
    ours = pd.read_csv(tmp_path / 'submission.csv', converters={'target': float})
    theirs = pd.read_csv(folder / 'ensemble.csv', converters={'target': float})
    theirs = theirs.set_index('image_name').target[ours.image_name].to_numpy()
    assert len(ours) == 10982 and np.abs(ours.target - theirs).max() < 1e-14
    scores = json.loads((tmp_path / 'report' / 'scores.json').read_text())
    assert scores['blend']['weights'] == pytest.approx(weights)


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'target': 0}, 'one class only'),
        ({'target': 1}, 'one class only'),
        ({'patient_id': 'p'}, 'one patient has all malignant images'),
        ({'pred': 0.5}, 'all predictions are the same'),
    ],
)
def test_what_cannot_be_scored_is_a_sentence_in_print_and_in_the_report(
    changes, says, ok, tmp_path
):
    table = oof(60, 30).drop(columns='group').assign(**changes)
    for run in 'ab':
        write(tmp_path / 'runs' / run, rows=table, pred=table.pred)
    if 'target' in changes:
        out = ok('blend.py', '--home', tmp_path)
        assert 'prob is empty, since the rate of malignant images is' in out
    out = ok('blend.py', '--home', tmp_path, '--prior', 0.02)
    page = (tmp_path / 'report' / 'index.html').read_text()
    assert says in out and 'nan' not in out.replace('malignant', '')
    assert says in page
    assert '[' not in out.split('AUC, pooled')[1].splitlines()[0]  # no interval
    assert not (tmp_path / 'submission.csv').exists() and 'nothing to submit' in out


def test_no_old_submission_is_left(ok, tmp_path):
    for run in 'ab':
        write(tmp_path / 'runs' / run, 'test.csv')
    ok('blend.py', '--home', tmp_path)
    assert (tmp_path / 'submission.csv').exists()
    for run in 'ab':
        (tmp_path / 'runs' / run / 'test.csv').unlink()
        write(tmp_path / 'runs' / run)
    out = ok('blend.py', '--home', tmp_path)
    assert 'nothing to submit' in out
    assert not (tmp_path / 'submission.csv').exists()


def test_names_of_any_kind_leave_table_and_report_usable(ok, tmp_path, recwarn):
    names = ['a b', '黑色素瘤', 'x' * 100 + 'y' * 100, 'x' * 100 + 'z' * 100, 'two\nlines']
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({'image_name': range(60), 'target': [0, 0, 1] * 20})
    for name in names:
        write(tmp_path / 'runs' / name, rows=rows, pred=rng.random(60))
    out = ok('blend.py', '--home', tmp_path)
    table = out[out.index('weight') :].split('\nAUC, pooled')[0].splitlines()
    assert len(table) == 1 + len(names) + 1  # header, a line a run, header of the next
    assert max(map(len, table[:-1])) < 120 and 'xy' not in out
    assert len({line.split()[0] for line in table[1:6]}) == 5  # all told apart
    page = (tmp_path / 'report' / 'index.html').read_text()
    assert '黑色素瘤' in page
    assert not [w for w in recwarn if 'Glyph' in str(w.message)]


def test_folds_of_others_that_split_patients_are_named_before_any_score(ok, tmp_path):
    rows = oof(200, 40)
    write(tmp_path / 'runs' / 'good', rows=rows, pred=rows.pred)
    write(tmp_path / 'runs' / 'leaky', rows=rows.assign(fold=np.arange(200) % 5), pred=rows.pred)
    out = ok('blend.py', '--home', tmp_path)
    page = (tmp_path / 'report' / 'index.html').read_text()
    n = (rows.assign(fold=np.arange(200) % 5).groupby('group').fold.nunique() > 1).sum()
    says = f'warning: {n} of {rows.group.nunique()} patients or lesions, such as'
    assert says in out and out.count('fold of leaky: its score is too good') == 1
    assert 'fold of good' not in out and out.index(says) < out.index('AUC')
    assert says in page and page.index(says) < page.index('out-of-fold AUC')


def test_greedy_says_where_the_plain_mean_was_better(ok, tmp_path):
    rows = oof(400, 80)
    assert rows.target.sum() > 100
    for run in 'ab':
        write(tmp_path / 'runs' / run, rows=rows, pred=rows.pred)
    assert 'the plain mean was better' not in ok('blend.py', '--home', tmp_path, '--how', 'greedy')
    few = rows[rows.target.cumsum() < 60]
    for run in 'ab':
        write(tmp_path / 'runs' / run, rows=few, pred=few.pred)
    out = ok('blend.py', '--home', tmp_path, '--how', 'greedy')
    assert 'there are 2 runs and 59 malignant images; in simulations' in out


def test_a_blend_that_is_cut_off_leaves_no_files_of_two_blends(tmp_path, monkeypatch):
    one = pd.DataFrame({'image_name': ['a'], 'pred': [0.5]})
    predictions.write(tmp_path, one, one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['oof.csv', 'test.csv']
    monkeypatch.setattr(files, 'write_csv', mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        predictions.write(tmp_path, one, one)
    assert list(tmp_path.iterdir()) == []
