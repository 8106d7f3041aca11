"""One table of rows holds each figure once, and print, report and JSON read it."""

import numpy as np
import pandas as pd
import pytest
from conftest import oof
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from lib import files, score, summary
from lib.runs import Run


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(score, 'N_DRAWS', 50)


def table(n=400) -> pd.DataFrame:
    """Two sources with unlike rates of malignant images."""
    rows = oof(n)
    is_a = (rows.target == 1) ^ (np.random.default_rng(1).random(n) < 0.3)
    return rows.assign(source=np.where(is_a, 'a', 'b'))


def values(rows: pd.DataFrame) -> pd.Series:
    """The AUC of each label; those of a source may be 'within' it, and a subgroup."""
    rows = rows[rows.measure == 'auc']
    return pd.Series(rows.value.to_numpy(), rows.label.str.strip())


def test_the_rows_hold_the_auc_of_all_folds_and_sources():
    oofs = table()
    rows = summary.summarize(oofs)
    auc, of = values(rows), rows.set_index('label')
    assert auc[summary.POOLED] == pytest.approx(roc_auc_score(oofs.target, oofs.pred))
    aucs = [roc_auc_score(t.target, t.pred) for _, t in oofs.groupby('fold')]
    assert auc[[f'fold {k}' for k in range(5)]].tolist() == pytest.approx(aucs)
    assert auc['AUC, mean of 5 folds'] == pytest.approx(np.mean(aucs))
    assert auc['AUC, standard deviation of 5 folds'] == pytest.approx(np.std(aucs, ddof=1))
    for source, of_source in oofs.groupby('source'):
        expected = roc_auc_score(of_source.target, of_source.pred)
        assert auc[f'AUC within {source}'] == auc[f'source: {source}'] == pytest.approx(expected)
        counts = of.loc[f'AUC within {source}', ['images', 'malignant']].tolist()
        assert counts == [len(of_source), of_source.target.sum()]
    rate = oofs.groupby('source').target.transform('mean')
    assert auc[summary.SOURCE_ALONE] == pytest.approx(roc_auc_score(oofs.target, rate))
    assert set(score.MEASURES) == set(rows[rows.kind == 'main'].measure)
    one = summary.summarize(oofs[oofs.source == 'a'])
    assert not one.label.str.contains('source|AUC within').any()


def test_every_row_is_of_the_column_that_is_asked_for():
    oofs = table()
    other = summary.summarize(oofs.assign(pred_plain=oofs.pred, pred=0.5), 'pred_plain')
    pd.testing.assert_frame_equal(other, summary.summarize(oofs))


def test_the_competitions_own_measure_comes_first():
    for source, first in (('competition', 'auc'), ('isic2024', 'pauc_80')):
        rows = summary.summarize(oof().assign(source=source))
        assert rows.measure[0] == first and (rows.measure == 'pauc_80').sum() == 1


def test_ranking_in_each_fold_undoes_a_fold_that_is_too_high():
    oofs = table()
    fewest = oofs.groupby('fold').target.sum().idxmin()
    shifted = oofs.assign(pred=oofs.pred / 4 + 0.5 * (oofs.fold == fewest))
    auc, expected = values(summary.summarize(shifted)), np.empty(len(oofs))
    for k in range(5):
        rows = (oofs.fold == k).to_numpy()
        expected[rows] = (rankdata(shifted.pred[rows]) - 0.5) / rows.sum()
    ranked = auc[summary.RANKED]
    assert ranked == pytest.approx(roc_auc_score(oofs.target, expected))
    assert auc[summary.POOLED] < ranked - 0.02


def test_small_subgroups_show_their_counts_only():
    oofs = oof(2000).assign(
        sex=lambda t: np.where(t.index < 30, 'male', 'female'),
        age_approx=lambda t: np.where(t.index % 2, 30.0, 74.0),
        anatom_site=None,
    )
    oofs.loc[5, 'age_approx'] = np.nan
    oofs.loc[:99, 'age_approx'] = 29.0
    rows = summary.summarize(oofs)
    text = summary.tabulate_subgroups(rows)
    ages = ['age: under 30', 'age: 30 to 44', 'age: 60 to 74']  # nothing is known of sites
    assert text.index.tolist() == ['sex: female', 'sex: male', *ages]
    assert text.loc['sex: male'].tolist()[0] == '30'
    assert set(text.loc['sex: male'][2:]) == {'fewer than 20 of a class', ''}
    young = oofs[oofs.age_approx == 30]
    figures = rows[rows.label == 'age: 30 to 44'].set_index('measure')
    assert figures.value.auc == pytest.approx(roc_auc_score(young.target, young.pred))
    at = np.sort(oofs.pred[oofs.target == 1])[::-1][int(np.ceil(0.9 * oofs.target.sum())) - 1]
    called = young.pred >= at  # one threshold for all
    assert figures.value.sensitivity == called[young.target == 1].mean()
    assert figures.value.specificity == 1 - called[young.target == 0].mean()
    assert (figures.low < figures.value).all() and (figures.value < figures.high).all()
    for measure, label in summary.OF_SUBGROUPS.items():
        cell = score.format_estimate(*figures.loc[measure, ['value', 'low', 'high']])
        assert text.loc['age: 30 to 44', label] == cell
    assert text.loc['age: 30 to 44', 'malignant'] == str(young.target.sum())


def test_a_subgroup_whose_malignant_images_are_of_one_patient_has_figures_and_no_intervals():
    oofs = oof(600).assign(sex='female')
    oofs.loc[oofs.target == 1, 'group'] = 'one'
    rows = summary.measure_subgroups(oofs, at=0.4).set_index('measure')
    called = oofs.pred >= 0.4
    assert rows.value.sensitivity == called[oofs.target == 1].mean() != rows.value.auc
    assert rows.value.specificity == 1 - called[oofs.target == 0].mean()
    assert np.isnan(rows.low[['auc', 'sensitivity']]).all()


def test_of_many_subgroups_the_smaller_ones_are_others():
    sites = np.minimum(np.arange(3000) // 60, 34)  # 34 of 60 images, and one of 960
    rows = summary.summarize(oof(3000).assign(anatom_site=[f's{site:02d}' for site in sites]))
    images = rows[rows.kind == 'subgroup'].groupby('label').images.first()
    assert len(images) == summary.MAX_SUBGROUPS + 1
    assert images['site: s34'] == 960 and images['site: others'] == 5 * 60


def test_the_printed_table_has_a_column_for_each_and_says_where_intervals_are_approximate():
    few, many = table(), table(3000).assign(worse=lambda t: 1 - t.pred)
    few['target'] = few.target.where(few.index < 100, 0)
    assert few.target.sum() < 100
    assert summary.FEW_NOTE in summary.format_summaries({'': summary.summarize(few)})
    rows, worse = summary.summarize(many), summary.summarize(many, 'worse')
    text = summary.tabulate({'pred': rows, 'worse': worse})
    assert list(text) == ['pred', 'worse', 'images', 'malignant']
    for column, of in (('pred', rows), ('worse', worse)):
        auc, low, high = of[of.label == summary.POOLED].iloc[0][['value', 'low', 'high']]
        assert text[column][summary.POOLED] == f'{auc:.4f} [{low:.4f}, {high:.4f}]'
    assert text.images[summary.POOLED] == '3000' and text.images[summary.RANKED] == ''
    of_a = many.target[many.source == 'a']
    counts = text.loc['AUC within a', ['images', 'malignant']]
    assert counts.tolist() == [str(len(of_a)), str(of_a.sum())]
    printed = summary.format_summaries({'pred': rows, 'worse': worse})
    assert summary.FEW_NOTE not in printed and text.pred[summary.POOLED] in printed


def test_scores_json_holds_the_rows_and_what_tta_changes(tmp_path, capsys):
    run, oofs = Run(tmp_path / 'runs' / 'a'), table()
    oofs['pred_plain'] = np.clip(oofs.pred + np.random.default_rng(0).normal(0, 0.3, 400), 0, 1)
    summary.report_run(run, oofs, ['pred_plain'])  # train.py
    assert 'average precision' in capsys.readouterr().out
    summary.report_run(run, oofs, ['pred_plain', 'pred'], is_known=True)
    saved = files.read_json(run.folder / 'scores.json')
    rows = pd.DataFrame(saved['pred_plain'])[summary.COLUMNS]
    expected = summary.summarize(oofs, 'pred_plain')
    pd.testing.assert_frame_equal(rows, expected, check_dtype=False)
    change = roc_auc_score(oofs.target, oofs.pred) - roc_auc_score(oofs.target, oofs.pred_plain)
    assert saved['tta'][0]['difference'] == pytest.approx(change) and change > 0
    by_patient = score.compare_paired(oofs.target, [oofs.pred, oofs.pred_plain], 1, oofs.group)
    assert saved['tta'][0]['difference_low'] == by_patient.difference_low[0]
    said = capsys.readouterr().out
    assert f'changes the AUC by {change:+.4f} [' in said
    assert summary.RANKED in said and 'average precision' not in said
    summary.report_run(run, oofs, ['pred_plain'])  # train.py once more
    assert files.read_json(run.folder / 'scores.json') == saved


def test_infer_py_prints_the_aucs_alone_where_train_py_has_printed_the_rest(home):
    assert 'average precision' in (home / '1.log').read_text()
    said = (home / '3.log').read_text()
    assert summary.RANKED in said and 'average precision' not in said
