"""Decision thresholds and their counts, against scikit-learn's ROC curve."""

import numpy as np
from conftest import oof
from sklearn.metrics import roc_curve

from lib import thresholds


def test_a_threshold_is_the_highest_that_reaches_the_sensitivity():
    table = oof(2000).round(2)  # with ties
    target, pred = table.target.to_numpy(), table.pred.to_numpy()
    _, tpr, cut = roc_curve(target, pred, drop_intermediate=False)
    for wanted in (0.5, 0.8, 0.95, 0.999):
        assert thresholds.threshold(target, pred, wanted) == cut[np.argmax(tpr >= wanted)]


def test_the_columns_are_the_roc_curves_and_count_1000_lesions_at_the_prior():
    table = oof(2000).round(2)
    target, pred = table.target.to_numpy(), table.pred.to_numpy()
    rows = thresholds.count_at_thresholds(target, pred, lambda p: p / 2, prior=0.018)
    fpr, tpr, cut = roc_curve(target, pred, drop_intermediate=False)
    at = [np.argmax(tpr >= wanted) for wanted in rows.wanted]
    np.testing.assert_allclose(rows.sensitivity, tpr[at])
    np.testing.assert_allclose(rows.specificity, 1 - fpr[at])
    np.testing.assert_allclose(rows.prob, cut[at] / 2)
    np.testing.assert_allclose(rows.true_positives, 18 * tpr[at])
    np.testing.assert_allclose(rows.false_negatives, 18 * (1 - tpr[at]))
    np.testing.assert_allclose(rows.false_positives, 982 * fpr[at])
    text = thresholds.tabulate_thresholds(rows)
    for (label, cells), row in zip(text.iterrows(), rows.itertuples(), strict=True):
        assert label == f'{100 * row.wanted:.0f} % sensitivity wanted'
        assert cells['reached'] == f'{100 * row.sensitivity:.1f} %'
        assert cells['specificity'] == f'{100 * row.specificity:.1f} %'
        assert cells['true positives'] == f'{row.true_positives:.0f}'
        assert cells['false negatives'] == f'{row.false_negatives:.0f}'
        assert cells['false positives'] == f'{row.false_positives:.0f}'
        assert [float(cells[f'{c} at least']) for c in ('pred', 'prob')] == [row.pred, row.prob]
