"""Predictions of several runs to one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib.cli import Stop
from lib.tables import read_csv


def aligned(path: Path, rows: pd.DataFrame, same: Sequence[str] = ()) -> np.ndarray:
    """The column `pred` of a run's oof.csv or test.csv, in the order of `rows`: (n,) in 0..1.

    `rows` are those of folds.csv that the file must hold, each once, in any order; the columns
    `same` must agree too. Raises: Stop that names the file and says what differs.
    """
    table = read_csv(path, ['image_name', 'pred', *same])
    if not table.image_name.is_unique:
        twice = table.image_name[table.image_name.duplicated()].iloc[0]
        raise Stop(f'{path} holds {twice} more than once')
    if other := set(table.image_name) ^ set(rows.image_name):
        raise Stop(
            f'{path} is of other images than folds.csv: {len(other)} are in one of them only, '
            f'such as {min(other)}'
        )
    table = table.set_index('image_name').loc[rows.image_name]
    for column in same:
        differs = (
            pd.to_numeric(table[column], errors='coerce').to_numpy() != rows[column].to_numpy()
        )
        if differs.any():
            name = rows.image_name[differs].iloc[0]
            raise Stop(
                f'{path} has another {column} than folds.csv for {differs.sum()} images, such as '
                f'{name}; it belongs to another folds.csv'
            )
    pred = pd.to_numeric(table.pred, errors='coerce').to_numpy(dtype=float)
    if not ((pred >= 0) & (pred <= 1)).all():  # NaN is neither
        wrong = rows.image_name[~((pred >= 0) & (pred <= 1))].iloc[0]
        raise Stop(f'{path}: the prediction for {wrong} is not between 0 and 1')
    return pred


def mean(preds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The plain mean of the runs' predictions: (n,)."""
    return np.mean(list(preds.values()), axis=0)
