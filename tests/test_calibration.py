"""Probabilities: what moves them, what they are worth, and that ranks stay."""

import numpy as np
import pandas as pd
import pytest
from conftest import oof
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from lib import calibration, thresholds
from lib.calibration import calibrate
from lib.cli import Stop


def perfect(n=20000, rate=0.02) -> pd.DataFrame:
    """Predictions of a perfect model that was trained at 1:1, on data with this rate."""
    return oof(n, n, rate=rate).assign(pred=lambda t: expit(1.5 * logit(t.pred) + 0.375))


def test_the_shift_is_the_known_formula_and_keeps_ranks():
    pred = np.array([0, 1e-9, 0.2, 0.5, 0.9, 1])
    moved = calibration.to_prior(pred, 0.0178, 1.0)
    added = np.log(0.0178 / (1 - 0.0178))
    assert added == pytest.approx(-4.01, abs=0.005)
    np.testing.assert_allclose(moved[1:-1], expit(logit(pred[1:-1]) + added), rtol=1e-12)
    assert moved[0] == 0 and moved[-1] == 1
    many = np.sort(np.random.default_rng(0).random(10000))
    assert (np.diff(calibration.to_prior(many, 0.0178, 1.0)) > 0).all()
    # trained at the rate itself, nothing moves
    np.testing.assert_allclose(calibration.to_prior(many, 0.25, 1 / 3), many)


def test_the_shift_makes_a_good_models_predictions_probabilities():
    table = perfect()
    fitted = calibrate(table)
    assert fitted.prior == table.target.mean()
    before, after = (fitted.quality.loc[name] for name in ('pred', 'prob'))
    assert after.brier < before.brier and after.ece < 0.1 * before.ece
    assert after.slope == pytest.approx(1, abs=0.15)
    assert after.intercept == pytest.approx(0, abs=0.15) and before.intercept < -3
    assert fitted.prob.mean() == pytest.approx(table.target.mean())
    np.testing.assert_array_equal(fitted.curve(table.pred.to_numpy()), fitted.prob)
    assert fitted.odds == pytest.approx(1, rel=0.15)  # as it was trained
    text = calibration.tabulate_quality(fitted.quality)
    assert text['Brier score'].tolist() == [f'{row.brier:.4f}' for row in (before, after)]
    assert text['calibration slope']['prob'] == f'{after.slope:.4f}'
    assert 'with one constant' in calibration.format_quality(fitted)


def test_the_odds_follow_from_the_level():
    table = perfect()
    odds = calibration.fit_odds(table.pred, table.target.mean(), np.ones(len(table)))
    assert odds == pytest.approx(1, rel=0.15)
    fitted = calibrate(table, 0.05)
    weight = calibration.class_weights(table.target.to_numpy(), 0.05)
    assert np.average(fitted.prob, weights=weight) == pytest.approx(0.05)
    assert 'so that its mean is 0.05' in fitted.sentence
    with pytest.raises(Stop, match='too many predictions are 0 or 1'):
        calibration.fit_odds(0 * table.pred, 0.1, np.ones(len(table)))
    none = calibrate(table.assign(pred=0.0))
    assert np.isnan(none.prob).all() and 'prob is empty, since too many' in none.sentence


def test_platt_mends_a_bad_model_and_is_judged_out_of_fold():
    table = perfect().assign(pred=lambda t: expit(3 * logit(t.pred) + 2))  # far too sure
    fitted = calibrate(table, platt=True)
    before, after = (fitted.quality.loc[name] for name in ('pred', 'prob'))
    assert after.slope == pytest.approx(1, abs=0.3) and after.ece < 0.005 < before.ece
    of_test = fitted.curve(np.sort(table.pred))
    assert (np.diff(of_test) > 0).all()  # ranks stay
    # honest: a fold's labels have no part in its own probabilities
    rows = (table.fold == 2).to_numpy()
    flipped = table.assign(target=np.where(rows, 1 - table.target, table.target))
    prob, other = (calibrate(t, 0.02, platt=True).prob for t in (table, flipped))
    np.testing.assert_array_equal(prob[rows], other[rows])
    assert (prob[~rows] != other[~rows]).any()
    assert 'in each fold with the curve of the others' in fitted.sentence


def test_platt_fits_the_rows_that_are_judged_and_no_other_source():
    table = perfect(6000, 0.2).assign(source='competition')
    other = table.assign(source='isic2019', pred=lambda t: expit(4 * logit(t.pred) - 3))
    alone, both = (calibrate(t, 0.2, True) for t in (table, pd.concat([table, other])))
    np.testing.assert_allclose(both.prob[: len(table)], alone.prob)
    pred = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(both.curve(pred), alone.curve(pred))
    assert both.quality.loc['prob'].equals(alone.quality.loc['prob'])


def test_platt_is_logistic_regression_on_the_logit():
    table = perfect(3000, 0.2)
    fitted = calibration.fit_platt(table.pred.to_numpy(), table.target.to_numpy(), np.ones(3000))
    x = logit(table.pred.to_numpy())[:, None]
    witness = LogisticRegression(C=1e9).fit(x, table.target).predict_proba(x)[:, 1]
    np.testing.assert_allclose(fitted(table.pred.to_numpy()), witness, atol=1e-4)
    with pytest.raises(Stop, match='lower predictions'):
        calibration.fit_platt(1 - table.pred.to_numpy(), table.target.to_numpy(), np.ones(3000))


def test_the_constant_is_judged_on_folds_that_it_was_not_fitted_to():
    # the models of fold 0 stand two logits higher than the others: its own images would show that
    high = perfect(6000, 0.2).assign(
        pred=lambda t: expit(logit(t.pred) + np.where(t.fold == 0, 2, 0))
    )
    fitted = calibrate(high)
    rows, others = (high.fold == 0).to_numpy(), (high.fold != 0).to_numpy()
    weight, rate = np.ones(others.sum()), high.target[others].mean()
    odds = calibration.fit_odds(high.pred[others].to_numpy(), rate, weight)
    expected = calibration.to_prior(high.pred[rows].to_numpy(), rate, odds)
    across = np.empty(len(high))
    for k in range(5):
        of, rest = high.fold == k, high.fold != k
        share = high.target[rest].mean()
        level = calibration.fit_odds(high.pred[rest].to_numpy(), share, np.ones(rest.sum()))
        across[of] = calibration.to_prior(high.pred[of].to_numpy(), share, level)
    np.testing.assert_allclose(across[rows], expected)
    quality = calibration.measure_quality(high.target.to_numpy(), across, np.ones(len(high)))
    assert fitted.quality.loc['prob'].to_dict() == pytest.approx(quality)
    assert (fitted.prob == fitted.curve(high.pred.to_numpy())).all()  # one constant for all images


def test_prob_has_the_rate_of_the_judged_source_where_sources_are_mixed():
    own = perfect(8000, 0.02)
    archive = perfect(4000, 0.3).assign(source='isic2019', pred=lambda t: expit(logit(t.pred) + 1))
    both = pd.concat([own.assign(pred=expit(logit(own.pred) - 2)), archive], ignore_index=True)
    fitted = calibrate(both)
    assert fitted.prob[:8000].mean() == pytest.approx(own.target.mean())
    assert abs(fitted.quality.intercept.prob) < 0.1 and fitted.quality.intercept.pred < -0.3


def test_a_slope_far_from_1_carries_a_hint():
    sure = perfect().assign(pred=lambda t: expit(8 * logit(t.pred)))
    assert 'far from 1' in calibrate(sure).sentence
    assert 'far from 1' not in calibrate(perfect()).sentence


def test_the_slope_of_predictions_that_hardly_vary_is_that_of_logistic_regression():
    # a young model: its logits vary by .05, and melanomas are a hundredth
    table = perfect(2000, 0.01).assign(pred=lambda t: expit(0.05 * logit(t.pred)))
    slope = calibrate(table).quality.slope.pred
    x = np.column_stack([logit(table.pred), np.ones(len(table))])
    witness = minimize(
        lambda b: -np.sum(log_expit(np.where(table.target, 1, -1) * (x @ b))), [15, 0]
    )
    assert slope == pytest.approx(witness.x[0], rel=1e-3) and slope > 5
    of_test = calibrate(table, platt=True).curve(table.pred.to_numpy())  # not refused
    assert of_test.mean() == pytest.approx(table.target.mean(), rel=1e-6)


def test_another_prior_is_weighed_in():
    table = perfect()
    for platt in (False, True):
        fitted = calibrate(table, 0.3, platt)
        weight = calibration.class_weights(table.target.to_numpy(), 0.3)
        assert np.average(table.target, weights=weight) == pytest.approx(0.3)
        assert np.average(fitted.prob, weights=weight) == pytest.approx(0.3, abs=0.02)
        assert fitted.quality.intercept['prob'] == pytest.approx(0, abs=0.15)
    target = np.r_[np.zeros(10), [0, 1] * 5, np.zeros(2), np.ones(8)]  # of .2 none is malignant
    prob, weight = np.repeat([0.2, 0.5, 0.8], 10), np.repeat([3.0, 1, 1], 10)
    assert calibration.measure_quality(target, prob, weight)['ece'] == pytest.approx(0.2 * 30 / 50)


def test_brier_and_bins_are_scikit_learns():
    table = oof(5000)
    prob, ones = table.pred.to_numpy(), np.ones(len(table))
    quality = calibration.measure_quality(table.target.to_numpy(), prob, ones)
    assert quality['brier'] == pytest.approx(brier_score_loss(table.target, prob))
    observed, predicted = calibration_curve(table.target, prob, n_bins=10, strategy='quantile')
    bins = calibration.reliability(table.target.to_numpy(), prob, ones)
    np.testing.assert_allclose(bins.observed, observed, atol=0.005)
    np.testing.assert_allclose(bins.predicted, predicted, atol=0.005)
    assert quality['ece'] == pytest.approx(np.mean(np.abs(observed - predicted)), abs=0.002)


def test_equal_probabilities_are_one_bin():
    target = np.r_[np.zeros(90), np.ones(10)]  # sorted: a split by rows would see 0 and 1
    quality = calibration.measure_quality(target, np.full(100, 0.1), np.ones(100))
    assert quality['ece'] == pytest.approx(0) and quality['slope'] is None


def test_probabilities_are_for_the_competitions_own_images():
    table = perfect(4000, 0.1)
    table['source'] = np.where(table.index < 1000, 'competition', 'isic2019')
    own, population = calibration.evaluation_rows(table)
    assert own.sum() == 1000 and 'competition' in population
    assert calibration.malignant_rate(table) == table.target[:1000].mean()
    fitted, alone = calibrate(table), calibrate(table[:1000])
    pd.testing.assert_frame_equal(fitted.quality, alone.quality)
    pd.testing.assert_frame_equal(fitted.bins, alone.bins)
    own = table[:1000].target.to_numpy(), table[:1000].pred.to_numpy()
    expected = thresholds.count_at_thresholds(*own, fitted.curve, fitted.prior)
    pd.testing.assert_frame_equal(fitted.thresholds, expected)

    few = table.assign(target=np.where(table.index < 990, 0, table.target))
    own, population = calibration.evaluation_rows(few)
    assert own.all() and population.startswith('all 4000')
    # judged on all, but for the competition's rate: so weighted to it
    few.loc[few.index < 5, 'target'] = 1
    fitted = calibrate(few)
    assert 'all 4000' in fitted.sentence and 'weighted to the rate' in fitted.sentence
    assert fitted.prior == few.target[:1000].mean()
    assert calibrate(few, platt=True).quality.intercept['prob'] == pytest.approx(0, abs=0.2)
    with pytest.raises(Stop, match='--prior'):
        calibration.malignant_rate(table.assign(target=0))


def test_ranks_have_no_prob_and_it_is_said(ok, tmp_path):
    table, folder = perfect(800, 0.1), tmp_path / 'runs' / 'theirs'
    folder.mkdir(parents=True)
    table.to_csv(folder / 'oof.csv', index=False)
    table[:500][['image_name', 'pred']].to_csv(folder / 'test.csv', index=False)
    assert 'ranks are no probabilities' in ok('blend.py', '--home', tmp_path, '--how', 'rank')
    assert pd.read_csv(tmp_path / 'report' / 'test.csv').prob.isna().all()
    assert 'ranks are no probabilities' in (tmp_path / 'report' / 'index.html').read_text()
    ok('blend.py', '--home', tmp_path)
    saved = pd.read_csv(tmp_path / 'report' / 'test.csv')
    assert saved.prob.mean() == pytest.approx(0.1, abs=0.02)
