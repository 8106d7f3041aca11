"""Probabilities: what moves them, what they are worth, and that ranks stay."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_curve

from lib import calibration, files, prior
from lib.cli import Stop
from lib.runs import Run


def oof(n=20000, rate=0.02, seed=0) -> pd.DataFrame:
    """Predictions of a perfect model that was trained at 1:1 on data with this rate."""
    rng = np.random.default_rng(seed)
    target = (rng.random(n) < rate).astype(int)
    x = rng.normal(size=n) + 1.5 * target
    pred = expit(1.5 * x - 1.5**2 / 2)  # the truth's odds at 1:1
    return pd.DataFrame(
        {'target': target, 'pred': pred, 'source': 'competition', 'fold': rng.integers(5, size=n)}
    )


def calibrate(table, odds, way, rate):
    """What is said of `prob`, out of fold and, as if the same images were test images, by all."""
    blend = {'odds': odds, 'no_odds': 'nobody says', 'of_ranks': False}
    blend |= {'calibrate': way, 'prior': rate}
    table, test, facts = calibration.add_prob(table, table[['pred']], blend)
    return table.prob.to_numpy(), test.prob.to_numpy(), facts


def test_the_shift_is_the_known_formula_and_keeps_ranks():
    pred = np.array([0, 1e-9, 0.2, 0.5, 0.9, 1])
    moved = prior.to_prior(pred, 0.0178, 1.0)
    added = np.log(0.0178 / (1 - 0.0178))
    assert added == pytest.approx(-4.01, abs=0.005)
    np.testing.assert_allclose(moved[1:-1], expit(logit(pred[1:-1]) + added), rtol=1e-12)
    assert moved[0] == 0 and moved[-1] == 1
    many = np.sort(np.random.default_rng(0).random(10000))
    assert (np.diff(prior.to_prior(many, 0.0178, 1.0)) > 0).all()
    # trained at the rate itself, nothing moves
    np.testing.assert_allclose(prior.to_prior(many, 0.25, 1 / 3), many)


@pytest.mark.parametrize(
    ('neg_ratio', 'odds'), [(1.0, 1), (3.0, 1 / 3), (0.5, 2), (0.0, 1 / 9), (100.0, 1 / 9)]
)
def test_the_odds_trained_at_follow_the_benign_ratio(neg_ratio, odds):
    target = np.r_[np.ones(10), np.zeros(90)]
    assert prior.trained_odds(target, neg_ratio) == pytest.approx(odds)


def test_the_shift_makes_a_good_models_predictions_probabilities():
    table = oof()
    prob, of_test, facts = calibrate(table, 1.0, None, None)
    assert facts['prior'] == table.target.mean()
    before, after = facts['before'], facts['after']
    assert after['brier'] < before['brier'] and after['ece'] < 0.1 * before['ece']
    assert after['slope'] == pytest.approx(1, abs=0.15)
    assert after['intercept'] == pytest.approx(0, abs=0.15) and before['intercept'] < -3
    assert prob.mean() == pytest.approx(table.target.mean(), rel=0.1)
    np.testing.assert_array_equal(of_test, prob)
    text = calibration.format_quality(facts)
    assert 'before' in text and 'odds of 1 ' in text


def test_odds_that_nobody_knows_follow_from_the_level():
    table = oof()
    assert prior.fit_odds(table.pred, table.target.mean()) == pytest.approx(1, rel=0.15)
    prob, _, facts = calibrate(table, None, None, 0.05)
    weight = prior.class_weights(table.target.to_numpy(), 0.05)
    assert np.average(prob, weights=weight) == pytest.approx(0.05)
    assert 'its mean is the rate 0.05, since nobody says' in calibration.describe(facts)
    with pytest.raises(Stop, match='all 0 or all 1'):
        prior.fit_odds(np.zeros(5), 0.1)


def test_platt_mends_a_bad_model_and_is_judged_out_of_fold():
    table = oof().assign(pred=lambda t: expit(3 * logit(t.pred) + 2))  # far too sure
    _, of_test, facts = calibrate(table, 1.0, 'platt', None)
    assert facts['after']['slope'] == pytest.approx(1, abs=0.3)
    assert facts['after']['ece'] < 0.005 < facts['before']['ece']
    order = np.argsort(table.pred, kind='stable')
    assert (np.diff(of_test[order]) > 0).all()  # ranks stay
    # honest: a fold's labels have no part in its own probabilities
    rows = (table.fold == 2).to_numpy()
    flipped = table.assign(target=np.where(rows, 1 - table.target, table.target))
    prob, other = (calibrate(t, 1.0, 'platt', 0.02)[0] for t in (table, flipped))
    np.testing.assert_array_equal(prob[rows], other[rows])
    assert (prob[~rows] != other[~rows]).any()
    assert 'single folds' in calibration.describe(facts)


def test_platt_is_logistic_regression_on_the_logit():
    table = oof(n=3000, rate=0.2)
    fitted = calibration.fit_platt(table.pred.to_numpy(), table.target.to_numpy(), np.ones(3000))
    x = logit(table.pred.to_numpy())[:, None]
    witness = LogisticRegression(C=1e9).fit(x, table.target).predict_proba(x)[:, 1]
    np.testing.assert_allclose(fitted(table.pred.to_numpy()), witness, atol=1e-4)
    with pytest.raises(Stop, match='lower predictions'):
        calibration.fit_platt(1 - table.pred.to_numpy(), table.target.to_numpy(), np.ones(3000))


def test_predictions_that_hardly_vary_have_the_same_slope_before_and_after_a_shift():
    # a young model: its logits vary by .05, and melanomas are a hundredth
    table = oof(n=2000, rate=0.01).assign(pred=lambda t: expit(0.05 * logit(t.pred)))
    _, _, facts = calibrate(table, 1.0, None, None)
    slope = facts['before']['slope']
    assert facts['after']['slope'] == pytest.approx(slope, rel=1e-6)  # a shift is a constant
    x = np.column_stack([logit(table.pred), np.ones(len(table))])
    witness = minimize(
        lambda b: -np.sum(log_expit(np.where(table.target, 1, -1) * (x @ b))), [15, 0]
    )
    assert slope == pytest.approx(witness.x[0], rel=1e-3) and slope > 5
    _, of_test, facts = calibrate(table, 1.0, 'platt', None)  # not refused
    assert of_test.mean() == pytest.approx(table.target.mean(), rel=1e-6)


def test_another_prior_is_weighed_in():
    table = oof(rate=0.02)
    for way in (None, 'platt'):
        prob, _, facts = calibrate(table, 1.0, way, 0.3)
        weight = prior.class_weights(table.target.to_numpy(), 0.3)
        assert np.average(table.target, weights=weight) == pytest.approx(0.3)
        assert np.average(prob, weights=weight) == pytest.approx(0.3, abs=0.02)
        assert facts['after']['intercept'] == pytest.approx(0, abs=0.15)


def test_brier_and_bins_are_scikit_learns():
    table = oof(n=5000, rate=0.3)
    prob, ones = table.pred.to_numpy(), np.ones(len(table))
    quality = calibration.measure_quality(table.target.to_numpy(), prob, ones)
    assert quality.brier == pytest.approx(brier_score_loss(table.target, prob))
    observed, predicted = calibration_curve(table.target, prob, n_bins=10, strategy='quantile')
    bins = calibration.reliability(table.target.to_numpy(), prob, ones)
    np.testing.assert_allclose(bins.observed, observed, atol=0.005)
    np.testing.assert_allclose(bins.predicted, predicted, atol=0.005)
    assert quality.ece == pytest.approx(np.mean(np.abs(observed - predicted)), abs=0.002)


def test_equal_probabilities_are_one_bin():
    target = np.r_[np.zeros(90), np.ones(10)]  # sorted: a split by rows would see 0 and 1
    quality = calibration.measure_quality(target, np.full(100, 0.1), np.ones(100))
    assert quality.ece == pytest.approx(0) and quality.slope is None


def test_a_threshold_reaches_the_sensitivity_that_is_asked_for():
    table = oof()
    target, pred = table.target.to_numpy(), table.pred.to_numpy()
    fpr, tpr, cut = roc_curve(target, pred, drop_intermediate=False)
    for wanted in (0.5, 0.8, 0.95, 0.999):
        at = calibration.threshold(target, pred, wanted)
        assert at == cut[np.argmax(tpr >= wanted)]
    rows = calibration.thresholds(target, pred, lambda p: p / 2, 0.018)
    row = next(row for row in rows if row['wanted'] == 0.95)
    assert row['prob'] == row['pred'] / 2
    assert row['sensitivity'] >= 0.95
    assert row['true_positives'] + row['false_negatives'] == pytest.approx(18)
    assert row['false_positives'] == pytest.approx(fpr[np.argmax(tpr >= 0.95)] * 982)


def test_probabilities_are_for_the_competitions_own_images():
    table = oof(n=4000, rate=0.1)
    table['source'] = np.where(table.index < 1000, 'competition', 'isic2019')
    own, population = prior.evaluation_rows(table)
    assert own.sum() == 1000 and 'competition' in population
    assert prior.melanoma_rate(table) == table.target[:1000].mean()
    few = table.assign(target=np.where(table.index < 990, 0, table.target))
    own, population = prior.evaluation_rows(few)
    assert own.all() and population.startswith('all 4000')
    # judged on all, but for the competition's rate: so weighted to it
    few.loc[few.index < 5, 'target'] = 1
    _, _, facts = calibrate(few, 1.0, None, None)
    assert 'all 4000' in facts['population'] and 'weighted to the rate' in facts['population']
    assert facts['prior'] == few.target[:1000].mean()
    _, _, platt = calibrate(few, 1.0, 'platt', None)
    assert platt['after']['intercept'] == pytest.approx(0, abs=0.2)
    with pytest.raises(Stop, match='--prior'):
        prior.melanoma_rate(table.assign(target=0))


def trained(folder, neg_ratio) -> Run:
    """A run that was trained with this many benign images for each melanoma."""
    config = {'arch': 'a', 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3, 'folds_sha256': 'x'}
    files.write_json(folder / 'config.json', config | {'neg_ratio': neg_ratio})
    return Run(folder)


def test_the_odds_of_a_blend_are_the_mean_of_its_runs(tmp_path):
    target = np.r_[np.ones(10), np.zeros(90)]
    a, b = trained(tmp_path / 'a', 1.0), trained(tmp_path / 'b', 4.0)
    c, d = Run(tmp_path / 'c'), Run(tmp_path / 'd')

    def odds(runs, weights, how='mean'):
        return prior.blend_odds(how, runs, weights, target, target[:20])['odds']

    assert odds([a], [1.0]) == 1
    assert odds([a, b], [0.5, 0.5]) == pytest.approx(0.5)
    assert odds([a, b], [0.5, 0.5], 'rank') is None
    assert odds([a, b], [2, 3], 'stack') == pytest.approx(1)  # those of the rows it was fitted on
    files.write_json(c.folder / 'blend.json', {'odds': 0.25})
    assert odds([b, c], [0.5, 0.5]) == pytest.approx(0.25)
    assert odds([a, d], [0.5, 0.5]) is None  # anybody's
    assert odds([a, d], [1.0, 0.0]) == 1  # without a part in it


def test_runs_trained_at_unlike_odds_are_moved_by_the_level_and_it_is_said(tmp_path):
    table = oof(n=100_000)
    runs = [trained(tmp_path / 'even', 1.0), trained(tmp_path / 'all', 0.0)]
    blend = prior.blend_odds('mean', runs, [0.5, 0.5], table.target, table.target)
    assert blend['odds'] is None and 'from 0.0199 to 1' in blend['no_odds']
    rate = table.target.mean()
    both = (table.pred + prior.to_prior(table.pred, rate, 1.0)) / 2  # perfect models of both kinds
    blend |= {'of_ranks': False, 'calibrate': None, 'prior': None}
    _, _, facts = calibration.add_prob(table.assign(pred=both), None, blend)
    assert facts['after']['intercept'] == pytest.approx(0, abs=0.02)
    assert blend['no_odds'] in calibration.describe(facts)
    geometric = prior.to_prior(both.to_numpy(), rate, np.sqrt(rate / (1 - rate)))
    quality = calibration.measure_quality(table.target.to_numpy(), geometric, np.ones(len(table)))
    assert abs(quality.intercept) > 0.3  # what it replaces


def test_ranks_have_no_prob_where_sources_are_mixed_since_test_images_have_another_scale(
    ok, tmp_path
):
    table = oof(n=3000, rate=0.1).assign(image_name=lambda t: [f'i{k}' for k in t.index])
    table['pred'] = table.pred * np.where(table.index < 1000, 1, 0.2)
    table['source'] = np.where(table.index < 1000, 'competition', 'isic2019')
    test = table[:500][['image_name', 'pred']]
    folder = tmp_path / 'runs' / 'theirs'
    folder.mkdir(parents=True)
    table.to_csv(folder / 'oof.csv', index=False)
    test.to_csv(folder / 'test.csv', index=False)

    out = ok('blend.py', '--home', tmp_path, '--how', 'rank', '--name', 'ranks')
    assert 'no prob: out-of-fold predictions were ranked' in out
    assert 'prob' not in pd.read_csv(tmp_path / 'report' / 'test.csv')
    assert 'no curve' in (tmp_path / 'report' / 'index.html').read_text()
    out = ok('blend.py', '--home', tmp_path, '--mix', 'ranks=.5,theirs=.5')
    assert 'no prob: out-of-fold predictions were ranked' in out  # a kept blend of ranks, too
    table[:1000].to_csv(folder / 'oof.csv', index=False)
    assert 'no prob' not in ok('blend.py', '--home', tmp_path, '--how', 'rank')  # one source
    saved = pd.read_csv(tmp_path / 'report' / 'test.csv')
    assert saved.prob.mean() == pytest.approx(0.1, abs=0.02)
