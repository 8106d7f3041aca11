"""The pictures of a blend: what lies on which axis, under which name."""

import numpy as np
import pandas as pd
import pytest
from conftest import oof
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from lib import figures, score, summary
from lib.calibration import calibrate


@pytest.fixture
def axes():
    return Figure().add_subplot()


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    return figures


def points(line) -> tuple[list, list]:
    return line.get_xdata().tolist(), line.get_ydata().tolist()


def test_the_roc_curve_and_its_band_have_false_positives_on_x(axes):
    table = oof(200, 40)
    target, pred, group = (table[c].to_numpy() for c in ('target', 'pred', 'group'))
    band = figures.roc_band(target, pred, group)
    figures.draw_roc(axes, target, pred, band)
    fpr, tpr, _ = roc_curve(target, pred)
    chance, curve = axes.lines
    assert points(curve) == (fpr.tolist(), tpr.tolist()) and points(chance) == ([0, 1], [0, 1])
    assert 'false positive' in axes.get_xlabel() and 'sensitivity' in axes.get_ylabel()
    (filled,) = axes.collections
    corners = filled.get_paths()[0].vertices
    at = band[50]
    assert {tuple(at[[0, 1]]), tuple(at[[0, 2]])} <= set(map(tuple, corners))


def test_the_band_holds_95_percent_of_the_curves_of_drawn_patients():
    table = oof(200, 40).reset_index()
    target, pred = table.target.to_numpy(), table.pred.to_numpy()
    rows_of, rng, curves = table.groupby('group').index.apply(list), np.random.default_rng(0), []
    for _ in range(200):
        rows = np.concatenate(rows_of.iloc[rng.integers(len(rows_of), size=len(rows_of))].tolist())
        fpr, tpr, _ = roc_curve(target[rows], pred[rows])
        curves.append(np.interp(np.linspace(0, 1, 101), fpr, tpr))
    expected = np.percentile(curves, [2.5, 97.5], axis=0)
    band = figures.roc_band(target, pred, table.group.to_numpy())
    np.testing.assert_allclose(band[1:, 1:].T, expected[:, 1:], atol=1e-9)


def test_precision_is_drawn_over_recall_and_chance_is_the_rate(axes):
    table = oof(200)
    figures.draw_precision_recall(axes, table.target, table.pred)
    precision, recall, _ = precision_recall_curve(table.target, table.pred)
    chance, curve = axes.lines
    assert points(curve) == (recall.tolist(), precision.tolist())
    assert points(chance) == ([0, 1], [table.target.mean()] * 2)
    assert 'recall' in axes.get_xlabel() and axes.get_ylabel() == 'precision'


def test_the_forest_has_each_auc_beside_its_name_from_top_to_bottom(drawn, monkeypatch):
    monkeypatch.setattr(score, 'N_DRAWS', 50)
    table = oof().assign(sex=lambda t: np.where(t.index < 150, 'male', 'female'))
    rows, bins = summary.summarize(table), calibrate(table).bins
    pictures = figures.draw_predictions(table, rows, bins)
    titles = [picture['title'].split()[0] for picture in pictures]
    assert titles == ['ROC', 'Precision-recall', 'AUC', 'Reliability']
    (axes,) = drawn[2].axes
    auc = rows[(rows.measure == 'auc') & rows.label.isin([summary.POOLED])]
    auc = pd.concat([auc, rows[(rows.measure == 'auc') & (rows.kind != 'main')]])
    names = ['all', *(f'fold {k}' for k in range(5)), 'sex: female', 'sex: male']
    ticks = dict(
        zip((t.get_text() for t in axes.get_yticklabels()), axes.get_yticks(), strict=True)
    )
    assert list(ticks) == names and axes.get_ylim()[0] < axes.get_ylim()[1]
    assert all(np.diff(list(ticks.values())) < 0)
    lines = axes.lines[:-1]
    for i, (row, y) in enumerate(zip(auc.itertuples(), ticks.values(), strict=True)):
        assert points(lines[2 * i]) == ([row.low, row.high], [y, y])
        assert points(lines[2 * i + 1]) == ([row.value], [y])
        texts = {text.get_text() for text in axes.texts if text.get_position()[1] == y}
        expected = {f'{row.images} images, {row.malignant} malignant'}
        assert texts == expected | ({'< 20 of a class'} if np.isnan(row.value) else set())
    assert axes.lines[-1].get_xdata()[0] == auc.value.iloc[0] and axes.get_xlabel() == 'AUC'
    one = table.assign(target=0)
    assert len(figures.draw_predictions(one, summary.summarize(one), pd.DataFrame())) == 1


def test_reliability_is_the_observed_over_the_predicted_rate_of_pred_and_of_prob(axes):
    bins = calibrate(oof(400)).bins
    figures.draw_reliability(axes, bins)
    chance, *lines = axes.lines
    assert points(chance) == ([0, 1], [0, 1])
    assert [line.get_label() for line in lines] == ['pred', 'prob']
    for line in lines:
        rows = bins[bins.name == line.get_label()]
        assert points(line) == (rows.predicted.tolist(), rows.observed.tolist())
    assert 'predicted' in axes.get_xlabel() and 'observed' in axes.get_ylabel()


def test_the_correlation_matrix_names_each_run_in_its_row(drawn):
    rho = np.array([[1, 0.9, 0.2], [0.9, 1, 0.4], [0.2, 0.4, 1]])
    picture = figures.draw_correlations(['a', 'b$', 'c'], rho)
    assert picture['note'] == '1: a, 2: b$, 3: c'
    (axes,) = drawn[0].axes
    assert axes.images[0].get_array().tolist() == rho.tolist()
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(j, i): f'{rho[i, j]:.2f}' for i in range(3) for j in range(3)}
    assert [t.get_text() for t in axes.get_yticklabels()] == ['1', '2', '3']
    assert [t.get_text() for t in axes.get_xticklabels()] == ['1', '2', '3']
