"""The shortcut floor: what can be scored without looking at a single lesion."""

from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier

from lib import summary
from lib.score import Estimate

NUMBERS = {'age_approx': 'age', 'width': 'native width', 'height': 'native height'}
CATEGORIES = {'sex': 'sex', 'anatom_site': 'site', 'source': 'source'}
MAX_CATEGORIES = 200  # of a column; scikit-learn takes 255


def features(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of `table` that see no pixel, named for people; those that vary only.

    Age in years, sex, site, source, images per patient (per group where there is no patient),
    native width and height in pixels.
    """
    patient = table.get('patient_id', table.group)
    patient = patient.fillna(table.group)
    columns = pd.DataFrame({'images per patient': patient.groupby(patient).transform('size')})
    for column, label in NUMBERS.items():
        if column in table:
            columns[label] = pd.to_numeric(table[column]).astype(float)
    for column, label in CATEGORIES.items():
        if column in table:
            common = table[column].value_counts().index[:MAX_CATEGORIES]
            columns[label] = table[column].where(table[column].isin(common)).astype('category')
    return columns.loc[:, columns.nunique(dropna=False) > 1]


def predict(table: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Out-of-fold scores of a small boosted model of `features`, and the names of what it saw.

    `table`: labelled rows with target, fold and group; a group is in one fold only. The same
    table gives the same scores: the seed is fixed. Returns: (n,) float in 0..1.
    """
    seen = features(table)
    pred = np.full(len(table), float(table.target.mean()))
    for k in table.fold.unique() if seen.shape[1] else []:
        held_out = (table.fold == k).to_numpy()
        if table.target[~held_out].nunique() < 2:
            continue
        model = HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=50, max_leaf_nodes=8, min_samples_leaf=40,
            l2_regularization=1.0, categorical_features='from_dtype', early_stopping=False,
            random_state=0,
        )  # fmt: skip
        model.fit(seen[~held_out], table.target[~held_out])
        pred[held_out] = model.predict_proba(seen[held_out])[:, 1]
    return pred, list(seen)


def measure(oof: pd.DataFrame) -> dict[str, Any]:
    """What summary.measure_overall says of the floor's scores, and the names of what it saw."""
    pred, seen = predict(oof)
    return summary.measure_overall(oof.assign(pred=pred)) | {'seen': seen}


def describe(floor: dict[str, Any]) -> str:
    """What the floor is and means: a sentence.

    `floor`: `seen`, `pooled` and, where there are several, `sources`, as `measure` has them.
    """
    pooled, sources = floor['pooled'], floor.get('sources', {})
    if 'auc' not in pooled:
        return f'the shortcut floor is not known: {pooled["note"]}'
    within = ''.join(
        f'; within {source} {Estimate(*figures["auc"])}'
        for source, figures in sources.items()
        if 'auc' in figures
    )
    seen = ', '.join(floor['seen']) or 'nothing'
    return (
        f'the shortcut floor, AUC {Estimate(*pooled["auc"])}{within}: a model of {seen}, '
        'without a pixel. An image model that is no better may have learnt no more than the '
        'patient and the camera'
    )
