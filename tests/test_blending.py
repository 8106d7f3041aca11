"""Predictions are matched by name, and what does not belong together is refused by name."""

import numpy as np
import pandas as pd
import pytest

from lib import blending
from lib.cli import Stop

ROWS = pd.DataFrame({'image_name': list('abcd'), 'target': [0, 1, 0, 1], 'fold': [0, 0, 1, 1]})


def write(path, **changes):
    table = ROWS.assign(pred=[0.1, 0.9, 0.2, 0.7]).assign(**changes)
    table.sample(frac=1, random_state=0).to_csv(path, index=False)  # in any order
    return path


def test_shuffled_rows_come_in_the_order_asked_for(tmp_path):
    pred = blending.aligned(write(tmp_path / 'oof.csv'), ROWS, ('target', 'fold'))
    assert pred.tolist() == [0.1, 0.9, 0.2, 0.7]


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'image_name': list('abcx')}, '2 are in one of them only'),
        ({'image_name': list('abca')}, 'a more than once'),
        ({'target': [0, 1, 0, 0]}, 'another target .* d;'),
        ({'fold': [0, 0, 1, 0]}, 'another fold'),
        ({'pred': [0.1, np.nan, 0, 1]}, 'for b is not between'),
        ({'pred': [0.1, 1.1, 0, 1]}, 'for b is not between'),
        ({'pred': [0.1, np.inf, 0, 1]}, 'for b is not between'),
        ({'pred': ['0.1', 'high', '0', '1']}, 'for b is not between'),
    ],
)
def test_what_differs_from_folds_csv_is_refused_by_name(changes, says, tmp_path):
    path = write(tmp_path / 'oof.csv', **changes)
    with pytest.raises(Stop, match=says) as stopped:
        blending.aligned(path, ROWS, ('target', 'fold'))
    assert str(path) in str(stopped.value)


def test_the_mean_is_plain():
    preds = {'a': np.array([0.0, 1.0]), 'b': np.array([0.5, 0.0])}
    assert blending.mean(preds).tolist() == [0.25, 0.5]
