"""The floor: what is scored without a pixel."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from lib import score, shortcuts, splits


def table(n=1200, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    patient = rng.integers(n // 4, size=n)
    target = (rng.random(n) < 0.1).astype(int)
    return pd.DataFrame(
        {
            'patient_id': [f'p{p}' for p in patient],
            'group': [f'p{p}' for p in patient],
            'fold': patient % 5,
            'target': target,
            'source': 'competition',
            'sex': rng.choice(['male', 'female', None], size=n),
            'age_approx': rng.choice([30.0, 50.0, np.nan], size=n),
            'width': np.where(target & (rng.random(n) < 0.7), 6000, 640),
            'height': 480,
        }
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


def test_a_table_that_knows_nothing_is_no_crash():
    rows = table()[['target', 'fold', 'source']].assign(group=range(1200))
    pred, seen = shortcuts.predict(rows)
    assert seen == [] and np.ptp(pred) == 0
    floor = {'pooled': score.measure(rows.assign(pred=pred), 'pred'), 'seen': seen}
    assert '0.5000' in shortcuts.describe(floor) and 'nothing' in shortcuts.describe(floor)
    nothing = {'pooled': {'note': 'one class only'}, 'seen': seen}
    assert 'one class only' in shortcuts.describe(nothing)


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
    assert 'the shortcut floor, AUC' in (home / '0.log').read_text()


@pytest.mark.parametrize('missing', ['width', 'sex', 'patient_id'])
def test_columns_may_be_missing(missing):
    pred, _ = shortcuts.predict(table().drop(columns=missing))
    assert np.isfinite(pred).all()
