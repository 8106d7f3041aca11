"""The shortcut floor: the score of a small model that does not see a single pixel."""

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier

from lib import summary

NUMBERS = {'age_approx': 'age', 'width': 'native width', 'height': 'native height'}
CATEGORIES = {'sex': 'sex', 'anatom_site': 'site', 'source': 'source'}
MAX_CATEGORIES = 200  # of a column; scikit-learn takes 255


def features(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of `table` that describe an image without its pixels, with names for people.

    Age is in years, native width and height in pixels. Where the patient is unknown, the group is
    taken. Columns that do not vary are left out.
    """
    patient = table.get('patient_id', table.group).fillna(table.group)
    columns = pd.DataFrame({'images per patient': patient.groupby(patient).transform('size')})
    table = table.reindex(columns=[*NUMBERS, *CATEGORIES])  # a missing column is empty
    for column, label in NUMBERS.items():
        columns[label] = pd.to_numeric(table[column]).astype(float)
    for column, label in CATEGORIES.items():
        common = table[column].value_counts().index[:MAX_CATEGORIES]
        columns[label] = table[column].where(table[column].isin(common)).astype('category')
    return columns.loc[:, columns.nunique(dropna=False) > 1]


def predict(table: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Out-of-fold scores, (n,) in 0..1, of a small boosted model, and the names of its features.

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


def measure(oof: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The floor of labelled rows: `summary.summarize` without subgroups, and a sentence on it."""
    pred, seen = predict(oof)
    rows = summary.summarize(oof.assign(pred=pred), subgroups=False)
    if not seen:
        nothing = rows.assign(value=np.nan, low=np.nan, high=np.nan, note='no metadata varies')
        return nothing, 'there is no shortcut floor: no metadata varies'
    shown = summary.counted(rows).dropna(subset='value')  # pooled, and within each source
    if shown.empty:
        return rows, f'there is no shortcut floor: {summary.pooled_auc(rows).note}'
    labels = shown.label.replace(summary.POOLED, 'AUC')
    texts = zip(labels, summary.format_rows(shown), strict=True)
    aucs = '; '.join(f'{label} {text}' for label, text in texts)
    return rows, (
        f'the shortcut floor is of a model that sees {", ".join(seen)} and no pixel: {aucs}. '
        'An image model that is no better may have learnt no more than the patient and the camera'
    )
