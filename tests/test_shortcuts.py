"""The floor: what is scored without a pixel."""

import numpy as np
import pandas as pd
import pytest
from conftest import oof
from sklearn.metrics import roc_auc_score

from lib import shortcuts, splits, summary


def table() -> pd.DataFrame:
    rows, rng = oof(1200, 300, rate=0.1).drop(columns='pred'), np.random.default_rng(0)
    return rows.assign(
        sex=rng.choice(['male', 'female', None], size=1200),
        age_approx=rng.choice([30.0, 50.0, np.nan], size=1200),
        width=np.where(rows.target & (rng.random(1200) < 0.7), 6000, 640),
        height=480,
    )


def test_a_camera_that_gives_melanomas_away_is_seen_in_other_patients():
    rows = table()
    pred, seen = shortcuts.predict(rows)
    assert seen == ['images per patient', 'age', 'native width', 'sex']  # what varies
    assert roc_auc_score(rows.target, pred) > 0.8
    assert roc_auc_score(rows.target, shortcuts.predict(rows.assign(width=640))[0]) < 0.65
    np.testing.assert_array_equal(pred, shortcuts.predict(rows)[0])


def test_a_row_is_scored_without_its_own_fold():
    rows = table()
    pred, _ = shortcuts.predict(rows)
    flipped = rows.assign(target=np.where(rows.fold == 3, 1 - rows.target, rows.target))
    other, _ = shortcuts.predict(flipped)
    in_fold = (rows.fold == 3).to_numpy()
    np.testing.assert_array_equal(pred[in_fold], other[in_fold])
    assert (pred[~in_fold] != other[~in_fold]).any()


def test_the_floor_is_measured_as_a_blend_is_and_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr('lib.score.N_DRAWS', 50)
    rows = table().assign(source=lambda t: np.where(t.index % 3, 'a', 'b'))
    pred, seen = shortcuts.predict(rows)
    floor, sentence = shortcuts.measure(rows)
    expected = summary.summarize(rows.assign(pred=pred), subgroups=False)
    pd.testing.assert_frame_equal(floor, expected)
    for of, label in ((rows, 'pixel: AUC'), (rows[rows.source == 'a'], 'AUC within a')):
        assert f'{label} {roc_auc_score(of.target, pred[of.index]):.4f} [' in sentence
    assert ', '.join(seen) in sentence


def test_a_table_that_knows_nothing_is_no_crash():
    rows = table()[['target', 'fold', 'source']].assign(group=range(1200))
    pred, seen = shortcuts.predict(rows)
    assert seen == [] and np.ptp(pred) == 0
    _, sentence = shortcuts.measure(rows)
    assert sentence == 'there is no shortcut floor: no metadata varies'
    assert 'one class only' in shortcuts.measure(table().assign(target=0))[1]


def test_of_many_categories_the_most_common_are_seen():
    sites = np.minimum(np.arange(1200) // 3, 300)  # 300 of three images, and one of 300
    rows = table().assign(anatom_site=[f's{site}' for site in sites])
    site = shortcuts.features(rows).site
    assert site.nunique() == shortcuts.MAX_CATEGORIES and (site == 's300').sum() == 300
    assert 'site' in shortcuts.predict(rows)[1]  # more than 255 would be refused by scikit-learn


def test_the_floor_of_the_competition_is_what_others_found(shared):
    rows = pd.read_csv(shared / 'data' / 'tables' / 'train_cdeotte.csv').rename(
        columns={'anatom_site_general_challenge': 'anatom_site'}
    )
    rows = rows.assign(source='competition', group=rows.patient_id)
    rows['fold'] = splits.assign_folds(rows, 5, 0)
    pred, seen = shortcuts.predict(rows)
    assert len(seen) == 6
    assert 0.82 <= roc_auc_score(rows.target, pred) <= 0.85


def test_folds_prints_it(home):
    assert 'the shortcut floor is of a model that sees' in (home / '0.log').read_text()


def test_where_a_patient_is_not_known_the_images_of_the_group_are_counted():
    rows = table()
    some = rows.assign(patient_id=rows.patient_id.where(rows.index % 2 == 0))
    few = rows.assign(patient_id=None)
    for known in (some, few):
        assert shortcuts.features(known)['images per patient'].notna().all()
    pd.testing.assert_frame_equal(shortcuts.features(few), shortcuts.features(rows))


@pytest.mark.parametrize('missing', ['width', 'sex', 'patient_id'])
def test_columns_may_be_missing(missing):
    pred, _ = shortcuts.predict(table().drop(columns=missing))
    assert np.isfinite(pred).all()
