"""AUC and what stands beside it, against scikit-learn and brute force."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit
from scipy.stats import rankdata, t
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from lib import score, summary
from lib.cli import Stop


def oof(n=400, groups=80, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    group = rng.integers(groups, size=n)
    target = (rng.random(n) < np.where(group % 4 == 0, 0.6, 0.05)).astype(int)
    shared = rng.normal(size=groups)[group]  # images of a patient are alike
    pred = 1 / (1 + np.exp(-(rng.normal(size=n) + target + shared)))
    return pd.DataFrame(
        {
            'group': group,
            'target': target,
            'pred': pred.round(2),  # with ties
            'worse': np.clip(pred + rng.normal(0, 0.3, n), 0, 1),
            'source': np.where(group % 3 == 0, 'a', 'b'),
            'fold': group % 5,
        }
    )


def witness(target, pred) -> dict[str, float]:
    """The measures as scikit-learn has them."""
    fpr, tpr, _ = roc_curve(target, pred, drop_intermediate=False)
    partial = roc_auc_score(1 - target, -pred, max_fpr=0.2)  # of the flipped problem, scaled
    low, high = 0.5 * 0.2**2, 0.2
    return {
        'auc': roc_auc_score(target, pred),
        'average_precision': average_precision_score(target, pred),
        'pauc_80': low + (high - low) * (partial - 0.5) / 0.5,
        'sens_at_spec_80': max(tpr[fpr <= 0.2 + 1e-12]),
        'sens_at_spec_90': max(tpr[fpr <= 0.1 + 1e-12]),
        'sens_at_spec_95': max(tpr[fpr <= 0.05 + 1e-12]),
        'spec_at_sens_95': max(1 - fpr[tpr >= 0.95 - 1e-12]),
    }


@pytest.mark.parametrize('column', ['pred', 'worse'])
def test_every_measure_is_scikit_learns(column):
    table = oof()
    figures, expected = score.measure(table, column), witness(table.target, table[column])
    assert list(expected) == list(score.MEASURES)
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value, abs=1e-12), name


def test_the_measures_of_each_draw_are_scikit_learns_on_the_repeated_rows():
    table = oof()
    draws = score.bootstrap(table.target, [table.pred, table.worse], table.group, seed=4)
    rng, names = np.random.default_rng(4), pd.factorize(table.group, sort=True)[1]
    for draw in draws[:20]:
        patients = rng.integers(len(names), size=len(names))
        rows = np.concatenate([np.flatnonzero(table.group == names[g]) for g in patients])
        for measures, column in zip(draw, ('pred', 'worse'), strict=True):
            expected = witness(table.target.to_numpy()[rows], table[column].to_numpy()[rows])
            np.testing.assert_allclose(measures, list(expected.values()), atol=1e-9)


def test_the_order_of_rows_changes_no_interval():
    one, other = (score.measure(t) for t in (oof(), oof().sample(frac=1, random_state=0)))
    assert list(map(str, one.values())) == list(map(str, other.values()))


def test_the_interval_resamples_patients_and_is_wider_than_one_of_images():
    table = oof(n=2000, groups=40)
    patients = score.measure(table, 'pred')['auc']
    images = score.measure(table.assign(group=range(len(table))), 'pred')['auc']
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
    table = oof(n=3000, groups=3000)
    error = delong(table.target.to_numpy(), table.pred.to_numpy())
    auc = score.measure(table.assign(group=range(len(table))), 'pred')['auc']
    assert (auc.high - auc.low) / 2 == pytest.approx(1.96 * error, abs=0.002)


def test_an_interval_holds_the_truth_where_melanomas_are_few():
    rng = np.random.default_rng(0)
    held = {'percentile': 0, 'logit': 0}
    for _ in range(100):  # 15 melanomas among 200 images; the true AUC is .966
        target = np.r_[np.ones(15), np.zeros(185)].astype(int)
        pred = rng.normal(size=200) + 2.58 * target
        figures, draws = score.measure_with_draws(
            pd.DataFrame({'target': target, 'pred': pred, 'group': range(200)})
        )
        low, high = score.percentile_interval(draws)
        held['percentile'] += low <= 0.966 <= high
        held['logit'] += figures['auc'].low <= 0.966 <= figures['auc'].high
        assert 0 < figures['auc'].low < figures['auc'].value <= figures['auc'].high <= 1
    assert held['logit'] >= 90 and held['logit'] > held['percentile'] + 3
    center, high = logit([figures['auc'].value, figures['auc'].high])
    spread = logit(np.clip(draws, 0, 1 - 0.5 / (15 * 185))).std()
    assert high - center == pytest.approx(t.ppf(0.975, 14) * spread)  # of 15 patients


def test_below_fifty_melanomas_the_other_intervals_are_said_to_be_approximate():
    few, many = oof(n=200), oof(n=2000)
    assert few.target.sum() < 50 < many.target.sum()
    for table, said in ((few, True), (many, False)):
        text = summary.format_summaries({'pred': summary.summarize(table)})
        assert ('below 50 melanomas' in text) == said


def test_two_runs_are_compared_paired():
    table = oof(n=1500, groups=300)
    preds = [table.worse, table.pred, table.pred]
    aucs, differences = score.compare_paired(table.target, preds, 1, table.group)
    assert [a.value for a in aucs] == [roc_auc_score(table.target, p) for p in preds]
    assert str(differences[2]) == '+0.0000 [+0.0000, +0.0000], p = 1.000'
    worse = differences[0]
    assert worse.value == aucs[0].value - aucs[1].value
    assert (worse.p < 0.05) == (worse.high < 0 or worse.low > 0)
    # paired: much narrower than the two intervals apart would have it
    apart = np.hypot(aucs[0].high - aucs[0].low, aucs[1].high - aucs[1].low)
    assert worse.high - worse.low < 0.8 * apart
    other = score.compare_paired(table.target, preds, 0, table.group)[1][1]
    assert other.value == -worse.value and other.low == pytest.approx(-worse.high)


def test_p_is_large_without_a_difference_and_small_with_one():
    rng = np.random.default_rng(0)
    target = rng.integers(2, size=2000)
    good, same, bad = (target * shift + rng.normal(size=2000) for shift in (1, 1, 0.3))
    _, differences = score.compare_paired(target, [good, same, bad], 0, np.arange(2000))
    assert differences[1].p > 0.05 and differences[2].p <= 2 / (score.N_DRAWS + 1)


def test_ranking_in_each_fold_undoes_a_fold_that_is_too_high():
    table = oof()
    fewest = table.groupby('fold').target.sum().idxmin()
    shifted = table.assign(pred=table.pred / 4 + 0.5 * (table.fold == fewest))
    summarized = summary.summarize(shifted)
    expected = np.empty(len(table))
    for k in range(5):
        rows = (table.fold == k).to_numpy()
        expected[rows] = rankdata(shifted.pred[rows]) / rows.sum()
    order = roc_auc_score(table.target, score.rank_within_folds(shifted.pred, shifted.fold))
    assert summarized['ranked']['auc'].value == pytest.approx(order)
    assert order == pytest.approx(roc_auc_score(table.target, expected), abs=0.01)
    assert summarized['pooled']['auc'].value < summarized['ranked']['auc'].value


def test_the_summary_has_folds_sources_and_the_source_alone():
    table = oof()
    summarized = summary.summarize(table)
    aucs = [roc_auc_score(t.target, t.pred) for _, t in table.groupby('fold')]
    assert [f['auc'].value for f in summarized['folds'].values()] == pytest.approx(aucs)
    mean, low, high = summarized['fold_mean']
    assert mean == pytest.approx(np.mean(aucs)) and low < mean < high
    assert summarized['fold_sd'] == pytest.approx(np.std(aucs, ddof=1))
    for source, rows in table.groupby('source'):
        auc = roc_auc_score(rows.target, rows.pred)
        assert summarized['sources'][source]['auc'].value == pytest.approx(auc)
    rate = table.groupby('source').target.transform('mean')
    assert summarized['source_alone'] == pytest.approx(roc_auc_score(table.target, rate))
    text = summary.format_summaries({'pred': summarized})
    pooled = f'{summarized["pooled"]["auc"].value:.4f}'
    assert all(word in text for word in ('within a', 'the source alone', pooled, 'mean over 5'))
    one = summary.summarize(table[table.source == 'a'])
    assert 'source' not in summary.format_summaries({'pred': one})


def test_small_subgroups_show_their_counts_only():
    table = oof(n=2000).assign(
        sex=lambda t: np.where(t.index < 30, 'male', 'female'),
        age_approx=lambda t: np.where(t.index % 2, 30.0, 74.0),
        anatom_site=None,
    )
    table.loc[5, 'age_approx'] = np.nan
    subgroups = summary.measure_subgroups(table, 'pred')
    assert list(subgroups) == ['sex', 'age', 'source']  # nothing is known of sites
    men = subgroups['sex']['male']
    assert men['images'] == 30 and 'auc' not in men and 'fewer than 20' in men['note']
    assert list(subgroups['age']) == ['30 to 44', '60 to 74', 'not known']
    young = table[table.age_approx == 30]
    assert subgroups['age']['30 to 44']['images'] == len(young)
    auc = roc_auc_score(young.target, young.pred)
    assert subgroups['age']['30 to 44']['auc'].value == pytest.approx(auc)


def test_a_score_that_is_no_number_is_refused():
    table = oof()
    table.loc[3, 'worse'] = np.nan
    with pytest.raises(Stop, match='1 of 400 scores in worse'):
        score.measure(table, 'worse')


def test_the_published_models_figures_are_the_known_ones(shared):
    path = shared / 'data' / 'predictions' / 'oof_alexanderpei_cp3.csv'
    table = pd.read_csv(path).rename(columns={'patient_id': 'group'})
    recent = table[table.source == 'ISIC20']
    for k in range(5):
        column = f'pred_ep{k}'
        assert 0.925 <= score.auc(table.target, table[column]) <= 0.9275
        assert 0.896 <= score.auc(recent.target, recent[column]) <= 0.9005
    rate = table.groupby('source').target.transform('mean')
    assert score.auc(table.target, rate) == pytest.approx(0.745, abs=0.001)
    figures, images = (
        score.measure(rows, 'pred_ep4') for rows in (recent, recent.assign(group=recent.image_name))
    )
    for name, value in witness(recent.target, recent.pred_ep4).items():
        assert figures[name].value == pytest.approx(value, abs=1e-12), name
    width = [f['auc'].high - f['auc'].low for f in (figures, images)]
    assert width[0] > width[1]
    error = delong(recent.target.to_numpy(), recent.pred_ep4.to_numpy())
    assert width[1] / 2 == pytest.approx(1.96 * error, abs=0.002)
