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
    """What `table` knows without a pixel, named for people: the columns that vary.

    Age is in years, native width and height in pixels; a group stands in for an unknown patient.
    """
    patient = table.get('patient_id', table.group).fillna(table.group)
    columns = pd.DataFrame({'images per patient': patient.groupby(patient).transform('size')})
    table = table.reindex(columns=[*NUMBERS, *CATEGORIES])  # what is missing is empty
    for column, label in NUMBERS.items():
        columns[label] = pd.to_numeric(table[column]).astype(float)
    for column, label in CATEGORIES.items():
        common = table[column].value_counts().index[:MAX_CATEGORIES]
        columns[label] = table[column].where(table[column].isin(common)).astype('category')
    return columns.loc[:, columns.nunique(dropna=False) > 1]


def predict(table: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Out-of-fold scores, (n,) in 0..1, of a small boosted model of `features`, and their names.

    `table`: labelled rows with target, fold and group; a group is in one fold only.
    """
    seen = features(table)
    pred = np.full(len(table), float(table.target.mean()))
    for k in table.fold.unique():
        held_out = (table.fold == k).to_numpy()
        if seen.empty or table.target[~held_out].nunique() < 2:
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
    """What the floor is and means, from what `measure` returned or its JSON: a sentence."""
    if 'auc' not in floor['pooled']:
        return f'the shortcut floor is not known: {floor["pooled"]["note"]}'
    auc = str(Estimate(*floor['pooled']['auc']))
    for source, figures in floor.get('sources', {}).items():
        if 'auc' in figures:
            auc += f'; within {source} {Estimate(*figures["auc"])}'
    return (
        f'the shortcut floor, AUC {auc}: a model of {", ".join(floor["seen"]) or "nothing"}, '
        'without a pixel. An image model that is no better may have learnt no more than the '
        'patient and the camera'
    )
