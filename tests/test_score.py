"""AUC and what stands beside it, against scikit-learn and brute force."""

import numpy as np
import pandas as pd
import pytest
from conftest import oof
from scipy.special import expit, logit
from scipy.stats import t
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from lib import score
from lib.cli import Stop


def table(n=400, groups=80) -> pd.DataFrame:
    """Predictions with ties, and worse ones. Images of a patient are alike, and most malignant ones
    are of every fourth patient."""
    rows, rng = oof(n), np.random.default_rng(1)
    group = rng.integers(groups, size=n)
    group -= group % 4 * (rows.target & (rng.random(n) < 0.8))
    pred = expit(logit(rows.pred) + rng.normal(size=groups)[group])
    worse = np.clip(pred + rng.normal(0, 0.3, n), 0, 1)
    return rows.assign(group=group, pred=pred.round(2), worse=worse)


def witness(target, pred) -> dict[str, float]:
    """The measures as scikit-learn has them."""
    fpr, tpr, _ = roc_curve(target, pred, drop_intermediate=False)
    partial = roc_auc_score(1 - target, -pred, max_fpr=0.2)  # of the flipped problem, scaled
    low, high = 0.5 * 0.2**2, 0.2
    sens = {f'sens_at_spec_{s}': max(tpr[fpr <= 1 - s / 100 + 1e-12]) for s in (80, 90, 95)}
    return {
        'auc': roc_auc_score(target, pred),
        'average_precision': average_precision_score(target, pred),
        'pauc_80': low + (high - low) * (partial - 0.5) / 0.5,
        **sens,
        'spec_at_sens_95': max(1 - fpr[tpr >= 0.95 - 1e-12]),
    }


@pytest.mark.parametrize('column', ['pred', 'worse'])
def test_every_measure_is_scikit_learns(column):
    rows = table()
    figures, expected = score.measure(rows, column), witness(rows.target, rows[column])
    assert list(expected) == list(score.MEASURES) == list(figures.index)
    np.testing.assert_allclose(figures.value, list(expected.values()), atol=1e-12)
    assert (figures.images == 400).all() and (figures.malignant == rows.target.sum()).all()


def test_the_measures_of_each_draw_are_scikit_learns_on_the_repeated_rows():
    rows = table()
    draws = score.bootstrap(rows.target, [rows.pred, rows.worse], rows.group, seed=4)
    rng, names = np.random.default_rng(4), pd.factorize(rows.group, sort=True)[1]
    for draw in draws[:20]:
        patients = rng.integers(len(names), size=len(names))
        drawn = rows.iloc[
            np.concatenate([np.flatnonzero(rows.group == names[g]) for g in patients])
        ]
        for measures, column in zip(draw, ('pred', 'worse'), strict=True):
            expected = witness(drawn.target.to_numpy(), drawn[column].to_numpy())
            np.testing.assert_allclose(measures, list(expected.values()), atol=1e-9)


def test_the_order_of_rows_changes_no_interval():
    one, other = (score.measure(rows) for rows in (table(), table().sample(frac=1, random_state=0)))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_intervals_hold_95_percent_of_a_thousand_draws_of_patients():
    rows = table(n=120, groups=8)  # some draws have one class only
    rows['target'] = rows.target.where(rows.group % 4 == 0, 0)  # of two patients
    draws, figures = (
        score.bootstrap(rows.target, [rows.pred], rows.group)[:, 0],
        score.measure(rows),
    )
    assert draws.shape == (1000, len(score.MEASURES)) and 0 < np.isnan(draws[:, 0]).sum() < 500
    expected = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    by_t = figures.index.isin(['auc', 'pauc_80', 'spec_at_sens_95'])
    assert by_t.sum() == 3
    np.testing.assert_allclose(figures[['low', 'high']].to_numpy()[~by_t], expected.T[~by_t])
    assert (figures.low < figures.high).all()


def test_partial_auc_and_specificity_have_students_interval_on_their_own_range():
    rows = table(n=600, groups=60)
    draws = score.bootstrap(rows.target, [rows.pred], rows.group)[:, 0]
    n_groups, figures = rows.group[rows.target == 1].nunique(), score.measure(rows)
    for column, name, top in ((2, 'pauc_80', 0.2), (6, 'spec_at_sens_95', 1)):
        assert list(score.MEASURES)[column] == name
        value, low, high = figures.loc[name, ['value', 'low', 'high']]
        width = t.ppf(0.975, n_groups - 1) * logit(draws[:, column] / top).std()
        ends = [logit(x / top) - logit(value / top) for x in (low, high)]
        assert ends == pytest.approx([-width, width]) and high < top


def test_there_is_no_interval_where_draws_cannot_tell_one():
    rows = table(n=200, groups=20)
    perfect = score.measure(rows.assign(pred=rows.target))
    assert (perfect.value == 1).sum() >= 2 and perfect.low.auc != perfect.low.auc
    one = rows.assign(target=(rows.group == 3).astype(int))
    figures = score.measure(one)
    assert figures.low.isna().all() and 'one patient' in figures.note.auc
    compared = score.compare_paired(one.target, [one.pred, one.worse], 1, one.group)
    assert compared.filter(like='_low').isna().all(axis=None) and compared.p.isna().all()


def test_the_interval_resamples_patients_and_is_wider_than_one_of_images():
    rows = table(n=2000, groups=40)
    patients = score.measure(rows).loc['auc']
    images = score.measure(rows.assign(group=range(len(rows)))).loc['auc']
    assert images.low < patients.value < images.high
    assert patients.high - patients.low > 1.1 * (images.high - images.low)


def delong(target, pred) -> float:
    """The standard error of an AUC by DeLong's structural components."""
    positive, negative = pred[target == 1], pred[target == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    return np.sqrt(
        wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    )


def test_an_interval_of_single_images_is_delongs():
    rows = table(n=3000)
    error = delong(rows.target.to_numpy(), rows.pred.to_numpy())
    auc = score.measure(rows.assign(group=range(len(rows)))).loc['auc']
    assert (auc.high - auc.low) / 2 == pytest.approx(1.96 * error, abs=0.002)


def test_an_interval_holds_the_truth_where_malignant_images_are_few(monkeypatch):
    monkeypatch.setattr(score, 'N_DRAWS', 100)
    rng, held, group = np.random.default_rng(0), np.zeros(2), np.arange(200)
    for _ in range(100):  # 15 malignant ones among 200 images; the true AUC is .966
        target = np.r_[np.ones(15), np.zeros(185)].astype(int)
        pred = rng.normal(size=200) + 2.58 * target
        value, draws = score.auc(target, pred), score.bootstrap(target, [pred], group)[:, 0, 0]
        low, high = score.logit_interval(value, draws, 15, 0.5 / (15 * 185))
        first, last = np.percentile(draws, [2.5, 97.5])
        held += low <= 0.966 <= high, first <= 0.966 <= last
        assert 0 < low < value <= high <= 1
    assert held[0] >= 90 and held[0] > held[1] + 3
    figures = score.measure(pd.DataFrame({'target': target, 'pred': pred, 'group': group})).loc[
        'auc'
    ]
    center, end = logit([value, figures.high])
    spread = logit(np.clip(draws, 0, 1 - 0.5 / (15 * 185))).std()
    assert end - center == pytest.approx(t.ppf(0.975, 14) * spread)  # of 15 patients


def test_two_runs_are_compared_paired():
    rows = table(n=1500, groups=300)
    preds = [rows.worse, rows.pred, rows.pred]
    compared = score.compare_paired(rows.target, preds, 1, rows.group)
    assert compared.auc.tolist() == [roc_auc_score(rows.target, p) for p in preds]
    intervals = score.measure(rows, 'worse').loc['auc', ['low', 'high']].tolist()
    assert compared.loc[0, ['auc_low', 'auc_high']].tolist() == pytest.approx(intervals)
    same = score.format_difference(compared.loc[2])
    assert same == '+0.0000'  # the same predictions: nothing varies
    worse = compared.loc[0]
    assert worse.difference == worse.auc - compared.auc[1] < worse.difference_high < 0
    apart = np.diff(score.bootstrap(rows.target, preds[1::-1], rows.group)[:, :, 0]).std()
    n = rows.group[rows.target == 1].nunique() - 1
    assert worse.difference_high == pytest.approx(worse.difference + t.ppf(0.975, n) * apart)
    assert worse.p == pytest.approx(2 * t.sf(-worse.difference / apart, n))
    assert score.format_difference(worse).endswith('], p < 0.001')
    # paired: much narrower than the two intervals apart would have it
    apart = np.hypot(*(compared.auc_high - compared.auc_low)[:2])
    assert worse.difference_high - worse.difference_low < 0.8 * apart
    other = score.compare_paired(rows.target, preds, 0, rows.group).loc[1]
    assert other.difference == -worse.difference
    assert other.difference_low == pytest.approx(-worse.difference_high)


def test_a_comparison_resamples_groups():
    rows = table(n=300)
    twice = pd.concat([rows, rows])  # two equal images of each patient say no more than one
    one, two = (
        score.compare_paired(t.target, [t.worse, t.pred], 1, t.image_name) for t in (rows, twice)
    )
    pd.testing.assert_frame_equal(one[:1], two[:1])


def test_without_a_difference_p_is_uniform(monkeypatch):
    monkeypatch.setattr(score, 'N_DRAWS', 50)
    rng, p = np.random.default_rng(0), []
    for _ in range(50):
        target = np.arange(100) % 2
        preds = [target + rng.normal(size=100) for _ in range(2)]
        p.append(score.compare_paired(target, preds, 0, np.arange(100)).p[1])
    assert 0.35 < np.mean(np.array(p) < 0.5) < 0.65 and np.mean(np.array(p) < 0.1) < 0.25


def test_a_score_that_is_no_number_is_refused():
    rows = table()
    rows.loc[3, 'worse'] = np.nan
    with pytest.raises(Stop, match='1 of 400 scores in worse'):
        score.measure(rows, 'worse')


def test_the_published_models_figures_are_the_known_ones(shared):
    path = shared / 'data' / 'predictions' / 'oof_alexanderpei_cp3.csv'
    rows = pd.read_csv(path).rename(columns={'patient_id': 'group'})
    recent = rows[rows.source == 'ISIC20']
    for k in range(5):
        column = f'pred_ep{k}'
        assert 0.925 <= score.auc(rows.target, rows[column]) <= 0.9275
        assert 0.896 <= score.auc(recent.target, recent[column]) <= 0.9005
    rate = rows.groupby('source').target.transform('mean')
    assert score.auc(rows.target, rate) == pytest.approx(0.745, abs=0.001)
    figures, images = (
        score.measure(of, 'pred_ep4') for of in (recent, recent.assign(group=recent.image_name))
    )
    expected = list(witness(recent.target, recent.pred_ep4).values())
    np.testing.assert_allclose(figures.value, expected, atol=1e-12)
    width = [of.high.auc - of.low.auc for of in (figures, images)]
    assert width[0] > width[1]
    error = delong(recent.target.to_numpy(), recent.pred_ep4.to_numpy())
    assert width[1] / 2 == pytest.approx(1.96 * error, abs=0.002)
