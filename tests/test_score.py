"""AUC and its intervals against scikit-learn and brute force."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from lib import score


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
        }
    )


def test_the_auc_of_each_draw_is_scikit_learns_on_the_repeated_rows():
    table = oof()
    draws = score.bootstrap(table.target, [table.pred, table.worse], table.group, seed=4)
    rng, names = np.random.default_rng(4), pd.factorize(table.group, sort=True)[1]
    for draw in draws[:20]:
        drawn = rng.integers(len(names), size=len(names))
        rows = np.concatenate([np.flatnonzero(table.group == names[g]) for g in drawn])
        for auc, column in zip(draw, ('pred', 'worse'), strict=True):
            expected = roc_auc_score(table.target[rows], table[column][rows])
            assert auc == pytest.approx(expected, abs=1e-12)


def test_the_order_of_rows_changes_no_interval():
    table = oof()
    other = table.sample(frac=1, random_state=0)
    assert score.describe(table, 'pred') == score.describe(other, 'pred')


def test_the_interval_resamples_patients_and_is_wider_than_one_of_images():
    table = oof(n=2000, groups=40)
    width = {}
    for name, group in (('patients', table.group), ('images', table.index)):
        low, high = score.interval(score.bootstrap(table.target, [table.pred], group)[:, 0])
        assert low < score.auc(table.target, table.pred) < high
        width[name] = high - low
    assert width['patients'] > 1.1 * width['images']


def test_an_interval_of_single_images_is_delongs():
    table = oof(n=3000, groups=3000)
    positive = table.pred[table.target == 1].to_numpy()
    negative = table.pred[table.target == 0].to_numpy()
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    low, high = score.interval(score.bootstrap(table.target, [table.pred], table.index)[:, 0])
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, abs=0.002)


def test_a_difference_is_paired_so_that_a_run_differs_from_itself_by_nothing():
    table = oof().assign(same=lambda t: t.pred)
    assert score.difference(table, 'pred', 'same') == '+0.0000 [+0.0000, +0.0000]'
    text = score.difference(table, 'pred', 'worse')
    auc = [roc_auc_score(table.target, table[c]) for c in ('pred', 'worse')]
    assert text.startswith(f'{auc[0] - auc[1]:+.4f} [')


def test_the_table_has_every_source_and_the_source_alone():
    table = oof()
    text = score.table(table, ['pred'])
    for source, part in table.groupby('source'):
        auc = roc_auc_score(part.target, part.pred)
        assert f'{source:<13} AUC {auc:.4f}' in text
    rate = table.groupby('source').target.transform('mean')
    assert f'{roc_auc_score(table.target, rate):.4f}' in text.splitlines()[-1]
    assert 'source' not in score.table(table[table.source == 'a'], ['pred']).replace(
        'all sources', ''
    )


@pytest.mark.parametrize('target', [0, 1])
def test_one_class_is_a_sentence_and_no_number(target):
    table = oof().assign(target=target)
    assert np.isnan(score.auc(table.target, table.pred))
    assert 'one class only' in score.describe(table, 'pred')


def test_constant_scores_and_a_single_patient_are_no_crash():
    table = oof().assign(pred=0.5)
    assert 'AUC 0.5000 [0.5000, 0.5000]' in score.describe(table, 'pred')
    low, high = score.interval(score.bootstrap(table.target, [table.worse], table.group * 0)[:, 0])
    assert low == high
