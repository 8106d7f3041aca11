"""Predictions are matched by name, weights are judged out of fold, and others' runs take part."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import blend
from lib import blending, calibration, comparison, predictions
from lib.cli import Stop
from lib.runs import Run

ROWS = pd.DataFrame({'image_name': list('abcd'), 'target': [0, 1, 0, 1], 'fold': [0, 0, 1, 1]})


def runs_of(*folders) -> list[Run]:
    return [Run(folder) for folder in folders]


def write(folder, name='oof.csv', rows=ROWS, **changes):
    folder.mkdir(exist_ok=True)
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
    config = {'arch': 'a', 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3, 'folds_sha256': 'x'}
    (run / 'config.json').write_text(json.dumps(config))
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
    assert runs.folds.tolist() == [[0, 4], [0, 4], [1, 3]]
    with pytest.raises(Stop, match='no labelled image in common'):
        other = write(tmp_path / 'other', image_name=list('pqrs'))
        predictions.read_oofs(runs_of(ours, other), labelled)


def test_predictions_of_others_are_ranked_within_the_folds_of_their_own_models(
    tmp_path, monkeypatch
):
    monkeypatch.setattr('lib.score.N_DRAWS', 50)
    rng = np.random.default_rng(0)
    target, theirs = rng.integers(2, size=200), np.arange(200) % 2
    rows = pd.DataFrame({'image_name': [f'i{i}' for i in range(200)], 'target': target})
    table = rows.assign(group=rows.image_name, source='s', patient_id='', fold=0)
    table.loc[100:, 'fold'] = 1
    pred = 0.2 * rng.normal(target, 1) + 5 * theirs  # one of their models predicts higher
    pred = 1 / (1 + np.exp(-pred))
    run = write(tmp_path / 'theirs', rows=rows, fold=theirs, pred=pred)
    oofs = predictions.read_oofs(runs_of(run), table)
    assert oofs.rows.fold.tolist() == table.fold.tolist()  # ours, by which weights are fitted
    oof = oofs.rows.assign(pred=oofs.preds[:, 0])
    summary = blend.score('mean', oofs, oof, [1.0], {0: [1.0], 1: [1.0]})['summary']
    aucs = [roc_auc_score(target[theirs == k], pred[theirs == k]) for k in (0, 1)]
    assert summary['fold_mean'].value == pytest.approx(np.mean(aucs))
    assert summary['ranked']['auc'].value > summary['pooled']['auc'].value + 0.05
    assert summary['fold_mean'].low is not None
    oof['group'] = [f'patient {i // 2}' for i in range(200)]  # each in two of their folds
    summary = blend.score('mean', oofs, oof, [1.0], {0: [1.0], 1: [1.0]})['summary']
    assert summary['fold_mean'].low is None
    ours = write(tmp_path / 'ours', rows=rows, fold=table.fold, pred=pred)
    assert predictions.read_oofs(runs_of(run, ours), table).model_folds.tolist() == [*table.fold]


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
    assert (runs.rows.groupby('group').fold.nunique() == 1).all()
    assert (runs.folds[:, 0] == runs.rows.fold).all()


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
        (tmp_path / 'runs' / name).mkdir(parents=True)
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
    compared = comparison.compare_runs('mean', runs, *blending.fit('mean', runs, weights))
    without = [auc(runs, np.delete(runs.preds, k, 1).mean(1)) for k in range(3)]
    assert [run['auc_without'] for run in compared.values()] == pytest.approx(without)


def test_ranks_are_within_fold_for_oof_and_among_themselves_for_test():
    runs = three_runs()
    high = predictions.OofTable(runs.rows, runs.names, runs.preds.copy(), runs.folds, 0)
    high.preds[runs.rows.fold == 2] = 0.9 + high.preds[runs.rows.fold == 2] / 10
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
    model = LogisticRegression(C=blending.STACK_C).fit(x, runs.rows.target)
    of_test = blend_test('stack', runs.preds, weights)
    np.testing.assert_allclose(of_test, model.predict_proba(x)[:, 1], atol=1e-4)
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


@pytest.mark.parametrize('how', ['greedy', 'stack'])
def test_a_folds_targets_have_no_part_in_its_own_probabilities_through_fitted_weights(how):
    runs, probs = three_runs(n=1500), []
    in_fold = (runs.rows.fold == 0).to_numpy()
    shuffled = np.random.default_rng(0).permutation(runs.rows.target[in_fold])
    other = runs.take(np.full(1500, True))
    other.rows.loc[in_fold, 'target'] = shuffled
    for table in (runs, other):
        _, fold_weights = blending.fit(how, table, ())
        oof = table.rows.assign(pred=blending.blend_by_fold(how, table, fold_weights))
        blend = {'odds': None, 'no_odds': '', 'of_ranks': False, 'calibrate': 'platt', 'prior': 0.1}
        without = blending.leave_folds_out(how, table)
        probs.append(calibration.add_prob(oof, None, blend, without)[0].prob)
    np.testing.assert_array_equal(probs[0][in_fold], probs[1][in_fold])
    assert (probs[0][~in_fold] != probs[1][~in_fold]).all()
    assert blending.leave_folds_out('mean', runs) is None
    two = runs.take((runs.rows.fold < 2).to_numpy())
    with pytest.raises(Stop, match='needs three folds'):
        blending.leave_folds_out(how, two)(0)


def test_weights_by_hand_are_read_and_scaled():
    assert blending.parse_mix('a=.5, b=1.5') == {'a': 0.25, 'b': 0.75}
    tenth = blending.parse_mix(','.join(f'r{k}=.1' for k in range(10)))
    assert set(tenth.values()) == {0.1}  # as typed, though ten of them are .9999999999999999
    for wrong in ('a', 'a=', '=1', 'a=-1', 'a=x', 'a=nan', 'a=1,a=2', 'a=0', ''):
        with pytest.raises(Stop, match=r'--mix|weights'):
            blending.parse_mix(wrong)


def test_each_run_is_compared_with_the_blend_and_with_the_others():
    runs = three_runs()
    weights, fold_weights = blending.fit('mean', runs, [1 / 3] * 3)
    compared = comparison.compare_runs('mean', runs, weights, fold_weights)
    aucs = [auc(runs, p) for p in runs.preds.T]
    assert [run['auc'].value for run in compared.values()] == aucs
    of_blend = auc(runs, blending.blend_by_fold('mean', runs, fold_weights))
    differences = [run['difference'].value for run in compared.values()]
    assert differences == pytest.approx([a - of_blend for a in aucs])  # none is picked as the base
    best = comparison.compare_with_best_run(compared)
    assert best['run'] == 'abc'[np.argmax(aucs)]
    value, low, high, _ = best['difference']
    assert value == pytest.approx(of_blend - max(aucs)) and low < value < high
    assert 'conservative' in comparison.describe_best_run(best)
    assert comparison.compare_with_best_run({'a': compared['a']}) is None
    rho = comparison.rank_correlations(runs.preds)
    assert compared['a']['correlation'] == pytest.approx((rho[0, 1] + rho[0, 2]) / 2)
    text = comparison.format_runs(compared, best)
    assert f'{compared["c"]["auc_without"]:.4f}' in text and 'minus blend' in text


def test_rank_correlations_are_scipys():
    preds = three_runs().preds
    rho = comparison.rank_correlations(np.column_stack([preds[:, :2], 0 * preds[:, 0]]))
    assert rho[0, 1] == pytest.approx(spearmanr(preds[:, 0], preds[:, 1]).statistic)
    assert rho[2].tolist() == [0, 0, 1]


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
    assert len(ours) == 10982 and np.abs(ours.target - theirs).max() < 1e-15
    assert json.loads((tmp_path / 'report' / 'scores.json').read_text())['blend']['mix'] == weights


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'target': 0}, 'one class only'),
        ({'target': 1}, 'one class only'),
        ({'patient_id': 'p'}, 'single patient'),
        ({'pred': 0.5}, 'all predictions are the same'),
    ],
)
def test_what_cannot_be_scored_is_a_sentence_in_print_and_in_the_report(
    changes, says, ok, tmp_path
):
    table = pd.DataFrame(
        {
            'image_name': [f'i{k}' for k in range(60)],
            'patient_id': [f'p{k // 2}' for k in range(60)],
            'target': [0, 0, 0, 1] * 15,
            'fold': [k // 2 % 3 for k in range(60)],
            'pred': np.linspace(0.1, 0.9, 60),
        }
    ).assign(**changes)
    for run in 'ab':
        (tmp_path / 'runs' / run).mkdir(parents=True)
        table.to_csv(tmp_path / 'runs' / run / 'oof.csv', index=False)
    if 'target' in changes:
        assert 'no prob: the rate of melanomas is' in ok('blend.py', '--home', tmp_path)
    out = ok('blend.py', '--home', tmp_path, '--prior', 0.02)
    page = (tmp_path / 'report' / 'index.html').read_text()
    assert says in out and says in page and 'nan' not in out
    assert ('[no interval]' in out) == ('patient_id' in changes)
    assert not (tmp_path / 'submission.csv').exists() and 'nothing to submit' in out


def test_what_has_no_effect_is_said_and_no_old_submission_is_left(ok, tmp_path):
    for run in 'ab':
        (tmp_path / 'runs' / run).mkdir(parents=True)
        write(tmp_path / 'runs' / run, 'test.csv')
    assert '--prior is ignored' in ok('blend.py', '--home', tmp_path, '--prior', 0.02)
    assert '--prior' not in ok('blend.py', '--home', tmp_path)
    assert (tmp_path / 'submission.csv').exists()
    for run in 'ab':
        (tmp_path / 'runs' / run / 'test.csv').unlink()
        write(tmp_path / 'runs' / run)
    out = ok('blend.py', '--home', tmp_path)
    assert 'nothing to submit; the submission.csv of an earlier blend is deleted' in out
    assert not (tmp_path / 'submission.csv').exists()
    assert 'deleted' not in ok('blend.py', '--home', tmp_path)


def test_a_kept_blend_that_is_older_than_its_runs_predictions_is_named(ok, tmp_path):
    for run in 'ab':
        (tmp_path / 'runs' / run).mkdir(parents=True)
        write(tmp_path / 'runs' / run)
        write(tmp_path / 'runs' / run, 'test.csv')
    ok('blend.py', '--home', tmp_path, '--name', 'kept')
    blend = ['blend.py', '--home', tmp_path, '--only', 'a,kept']
    assert 'warning' not in ok(*blend)
    write(tmp_path / 'runs' / 'b', prob=0.1)  # another --prior of infer.py
    assert 'warning' not in ok(*blend)
    write(tmp_path / 'runs' / 'b', 'test.csv', pred=[0.2, 0.9, 0.2, 0.7])
    assert 'kept was blended before the predictions of b changed' in ok(*blend)
    ok('blend.py', '--home', tmp_path, '--name', 'kept')
    assert 'warning' not in ok(*blend)
    path = tmp_path / 'runs' / 'kept' / 'blend.json'
    old = json.loads(path.read_text())
    del old['predictions_sha256']  # as blends were kept before
    path.write_text(json.dumps(old))
    write(tmp_path / 'runs' / 'b', pred=[0.3, 0.9, 0.2, 0.7])
    assert 'warning' not in ok(*blend)


def test_names_of_any_kind_leave_table_and_report_usable(ok, tmp_path, recwarn):
    names = ['a, b', '黑色素瘤', 'x' * 100 + 'y' * 100, 'x' * 100 + 'z' * 100, 'two\nlines']
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({'image_name': range(60), 'target': [0, 0, 1] * 20})
    for name in names:
        (tmp_path / 'runs' / name).mkdir(parents=True)
        write(tmp_path / 'runs' / name, rows=rows, pred=rng.random(60))
    out = ok('blend.py', '--home', tmp_path)
    table = out[out.index('weight') :].split('\nAUC, pooled')[0].splitlines()
    assert len(table) == 1 + len(names) + 2  # header, a line a run, best run, header of the next
    assert max(map(len, table[:-2])) < 120 and 'xy' not in out
    assert len({line.split()[0] for line in table[1:6]}) == 5  # all told apart
    page = (tmp_path / 'report' / 'index.html').read_text()
    assert '黑色素瘤' in page.split('<svg')[-1]  # as text, not as boxes
    assert not [w for w in recwarn if 'Glyph' in str(w.message)]
