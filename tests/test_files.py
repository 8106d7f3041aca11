"""A file is whole or not there."""

import hashlib
import json
import os

import numpy as np
import pandas as pd
import pytest

from lib import files, ranks
from lib.cli import Stop


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / 'a.csv'
    files.write_text(path, 'old')
    with pytest.raises(ZeroDivisionError), files.atomic(path) as temporary:
        temporary.write_text('half')
        1 / 0  # noqa: B018
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.csv']


def test_what_a_killed_process_left_half_written_is_gone_after_the_next_try(tmp_path):
    path = tmp_path / 'deep' / 'a.csv'
    with files.atomic(path) as temporary:
        temporary.write_text('whole')
        assert temporary.parent == path.parent and not path.exists()
    temporary.write_text('a longer half, as after a kill -9')
    assert path.read_text() == 'whole'  # whoever reads sees the old file or the new one
    with open(path) as reader:
        files.write_text(path, 'new')
        assert reader.read() == 'whole'
    assert path.read_text() == 'new' and list(path.parent.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    done = []
    for name in ('fsync', 'replace'):
        its_own = getattr(os, name)
        note = lambda *args, name=name, do=its_own: done.append(name) or do(*args)  # noqa: E731
        monkeypatch.setattr(os, name, note)
    files.write_text(tmp_path / 'a.csv', 'new')
    assert done == ['fsync', 'replace']


def test_the_hash_of_a_file_is_of_all_of_it(tmp_path):
    (tmp_path / 'a').write_bytes(bytes(10**5))
    assert files.sha256(tmp_path / 'a') == hashlib.sha256(bytes(10**5)).hexdigest()


@pytest.mark.parametrize('text', ['{', '[1]', '[' * 100_000, '', '"a"', None])
def test_json_that_is_broken_is_named(text, tmp_path):
    path = tmp_path / 'config.json'
    if text is not None:
        path.write_text(text)
    with pytest.raises(Stop, match=r'config\.json'):
        files.read_json(path)


def test_json_is_pythons_own_and_what_json_has_not_is_null(tmp_path):
    path, rows = (
        tmp_path / 'a.json',
        pd.DataFrame({'auc': [0.5, np.nan]}, pd.Index([3, 4], name='k')),
    )
    data = {1: np.float32(0.5), 'b': [np.int64(2), float('nan'), np.array([1.5, np.inf])]}
    files.write_json(path, data | {'rows': rows, 'no': None, 'yes': True})
    made = json.loads(path.read_text())
    assert made.pop('rows') == [{'k': 3, 'auc': 0.5}, {'k': 4, 'auc': None}]
    assert made == {'1': 0.5, 'b': [2, None, [1.5, None]], 'no': None, 'yes': True}


def test_a_process_that_follows_another_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, 'following', True)
    files.write_text(tmp_path / 'deep' / 'a.csv', 'text')
    assert not list(tmp_path.iterdir())
