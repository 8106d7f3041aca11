"""The record beside a part's predictions decides whether they are made; what is pooled fits it."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from conftest import CONFIG

from lib import files, parts
from lib.cli import Stop
from lib.parts import Settings
from lib.runs import WEIGHTS, Run

SETTINGS = Settings(n_tta=2, seed=0, batch_size=8, precision='auto')
NAMES = ['I1', 'I2', 'I3', 'I4', '007', '008']  # the last two are test images


def table() -> pd.DataFrame:
    rows = pd.DataFrame({'image_name': NAMES, 'split': ['train'] * 4 + ['test'] * 2})
    rows = rows.assign(source='s', patient_id='p', group='p', target=[0, 1, 0, 1, None, None])
    return rows.assign(fold=[0, 0, 1, 1, None, None])


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run with the weights of two folds, whose images need no cache."""
    monkeypatch.setattr(parts, 'cache', lambda rows, home, size, may_fail: [*rows.image_name])
    run = Run(tmp_path / 'runs' / 'r')
    files.write_json(run.folder / 'config.json', CONFIG)
    for k in (0, 1):
        files.write_text(run.fold(k) / WEIGHTS, f'weights {k}')
        files.write_text(run.fold(k) / 'oof.csv', 'of train.py')
    return run


def of(run) -> list[parts.Part]:
    """The parts as another process sees them, which has read no weights yet."""
    return parts.list_parts(run, table())


def write(part, settings=SETTINGS, precision='fp32', pred=0.25, unread=()) -> None:
    cached = part.rows.image_name.where(~part.rows.image_name.isin(unread))
    part = dataclasses.replace(part, rows=part.rows.assign(cached=cached))
    n = len(part.rows) - len(unread)
    part.write(np.full(n, pred), np.full(n, 1 / 3), settings, precision)


def make(run, settings=SETTINGS, **options) -> list[parts.Part]:
    """All parts, written and pooled."""
    for part in of(run):
        write(part, settings, **options)
    parts.save(of(run), parts.pool(of(run), settings), settings, None)
    return of(run)


def test_a_run_has_a_part_a_fold_for_its_held_out_and_for_the_test_images(run):
    made = of(run)
    assert [(part.kind, part.k) for part in made] == [
        ('oof', 0), ('oof', 1), ('test', 0), ('test', 1),
    ]  # fmt: skip
    names = [part.rows.image_name.tolist() for part in made]
    assert names == [NAMES[:2], NAMES[2:4], NAMES[4:], NAMES[4:]]
    assert len({part.path for part in made}) == 4
    no_test = table()[:4]
    assert [part.kind for part in parts.list_parts(run, no_test)] == ['oof', 'oof']


def test_a_part_is_its_rows_with_both_predictions_and_a_record_of_how_they_were_made(run):
    oof, *_, test = of(run)
    write(oof, precision='bf16')
    write(test)
    columns = 'image_name patient_id group source fold target pred pred_plain'
    assert pd.read_csv(oof.path).columns.tolist() == columns.split()
    saved = pd.read_csv(test.path, dtype={'image_name': str})
    assert saved.columns.tolist() == ['image_name', 'pred', 'pred_plain']
    assert saved.image_name.tolist() == ['007', '008'] and saved.pred_plain.tolist() == [1 / 3] * 2
    record = json.loads((run.fold(0) / 'tta_oof.json').read_text())
    settings = {'n_tta': 2, 'seed': 0, 'batch_size': 8, 'precision': 'bf16'}
    assert record == settings | {'weights_sha256': files.sha256(run.weights(0))}


def test_a_part_of_other_settings_is_made_anew_and_any_precision_will_do_with_auto(run):
    make(run, precision='bf16')
    others = [{'n_tta': 3}, {'seed': 1}, {'batch_size': 4}, {'precision': 'fp32'}]
    for change in ({}, {'precision': 'bf16'}, *others):
        settings = dataclasses.replace(SETTINGS, **change)
        assert {part.is_made(settings) for part in of(run)} == {change not in others}


def test_a_part_of_other_weights_is_made_anew(run):
    make(run)
    run.weights(1).write_text('trained again')
    assert [part.is_made(SETTINGS) for part in of(run)] == [True, False, True, False]


def test_weights_that_are_exchanged_while_they_predict_are_not_those_of_the_record(run):
    for part in parts.claim(of(run), SETTINGS):
        part.weights.write_text('trained again')  # after they were loaded
        part.write(np.ones(2), np.ones(2), SETTINGS, 'fp32')
        assert not of(run)[0].is_made(SETTINGS)
        break


def test_a_part_of_other_test_images_is_made_anew(run):
    make(run)
    fewer = parts.list_parts(run, table()[:-1])
    assert [part.is_made(SETTINGS) for part in fewer] == [True, True, False, False]


@pytest.mark.parametrize('at', ['write_json', 'write_csv'])
def test_a_part_that_was_cut_off_while_it_was_written_is_not_taken_for_made(at, run, monkeypatch):
    make(run)

    def cut(*args):
        raise KeyboardInterrupt

    other = dataclasses.replace(SETTINGS, n_tta=9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, at, cut)
        write(of(run)[0], other)
    assert not of(run)[0].is_made(other)
    make(run)
    of(run)[0].path.with_suffix('.json').unlink()  # as the sentence on a broken one says
    assert [part.is_made(SETTINGS) for part in of(run)] == [False, True, True, True]


def test_what_is_pooled_stays_until_all_of_its_successors_are_made(run, capsys):
    make(run)
    pooled = [run.folder / name for name in ('oof.csv', 'test.csv', 'oof.json')]
    before = [path.read_bytes() for path in pooled]
    assert list(parts.claim(of(run), SETTINGS)) == []
    other = dataclasses.replace(SETTINGS, n_tta=3, batch_size=4)
    capsys.readouterr()
    claimed = parts.claim(of(run), other)
    for part in claimed:
        write(part, other, pred=0.75)
        if part.k == 1:
            claimed.close()  # as Ctrl-C does
    assert capsys.readouterr().out == (
        f'{run}: predictions will be replaced, since --n_tta was 2 and is 3; '
        '--batch_size was 8 and is 4\n'
    )
    assert before == [path.read_bytes() for path in pooled]
    assert parts.read_n_tta(of(run)) == 2  # and a blend takes them
    for part in parts.claim(of(run), other):
        write(part, other, pred=0.75)
    parts.save(of(run), parts.pool(of(run), other), other, None)
    assert parts.read_n_tta(of(run)) == 3
    assert [pd.read_csv(path).pred.max() for path in pooled[:2]] == [0.75, 0.75]


@pytest.mark.parametrize('name', ['oof.csv', 'test.csv'])
def test_pooled_files_of_two_kinds_are_not_taken_for_one(name, run, monkeypatch):
    """As a kill between two of them leaves them."""
    make(run)
    other, write_csv = dataclasses.replace(SETTINGS, n_tta=3), files.write_csv
    for part in of(run):
        write(part, other)

    def cut(path, table):
        if path.name == name:
            raise KeyboardInterrupt
        write_csv(path, table)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, 'write_csv', cut)
        parts.save(of(run), parts.pool(of(run), other), other, None)
    with pytest.raises(Stop, match=r'has no oof\.json: python infer\.py .* --n_tta 3'):
        parts.read_n_tta(of(run))


def test_a_run_keeps_its_settings_where_all_parts_have_the_same(run):
    made, other = make(run, precision='bf16'), dataclasses.replace(SETTINGS, n_tta=9)
    assert parts.read_settings(made, other) == dataclasses.replace(SETTINGS, precision='bf16')
    write(of(run)[0], dataclasses.replace(SETTINGS, n_tta=3))
    assert parts.read_settings(of(run), other) == other
    of(run)[0].path.unlink()
    assert parts.read_settings(of(run), other) == other


def test_what_is_missing_alone_is_claimed(run):
    make(run)
    of(run)[2].path.unlink()
    claimed = list(parts.claim(of(run), SETTINGS))
    assert [(part.kind, part.k) for part in claimed] == [('test', 0)]
    assert claimed[0].rows.cached.tolist() == NAMES[4:]


def test_nothing_is_pooled_while_a_part_is_missing(run, capsys):
    make(run)
    of(run)[2].path.unlink()
    assert parts.pool(of(run), SETTINGS) is None
    assert 'another process predicts the rest' in capsys.readouterr().out


def test_a_test_image_that_cannot_be_read_gets_the_median_and_a_line(run, capsys):
    test = pd.DataFrame({'image_name': [*'abcd'], 'split': 'test'})
    whole = pd.concat([table()[:4], test], ignore_index=True)
    for part in parts.list_parts(run, whole):
        unread = ['b'] if part.kind == 'test' else []
        pred = 0.25 if unread == [] else np.array([0.1, 0.2, 0.6]) + part.k / 10
        write(part, pred=pred, unread=unread)
    pooled = parts.pool(parts.list_parts(run, whole), SETTINGS)['test']
    assert pooled.image_name.tolist() == [*'abcd']
    assert pooled.pred.tolist() == pytest.approx([0.15, 0.25, 0.25, 0.65])
    assert pooled.pred_plain.tolist() == pytest.approx([1 / 3] * 4)
    said = capsys.readouterr().out
    assert '1 test images that cannot be read get the median prediction, such as b. Once' in said


def test_images_are_cached_once_and_those_with_a_label_must_be_readable(run, monkeypatch):
    calls = []

    def cache(rows, home, size, may_fail):
        calls.append((rows.image_name.tolist(), home, size, may_fail))
        return [f'{name}.jpg' for name in rows.image_name]

    monkeypatch.setattr(parts, 'cache', cache)
    cached = parts.cache_images(of(run), run.home)
    assert calls == [(NAMES[:4], run.home, 64, False), (NAMES[4:], run.home, 64, True)]
    assert [part.rows.cached.tolist() for part in cached] == [
        [f'{name}.jpg' for name in part.rows.image_name] for part in of(run)
    ]


def test_pooled_are_the_held_out_rows_of_all_folds_and_the_mean_of_the_test_predictions(run):
    for part, pred in zip(of(run), (0.1, 0.2, 1 / 3, 0.7), strict=True):
        write(part, pred=pred)
    pooled = parts.pool(of(run), SETTINGS)
    assert pooled['oof'].image_name.tolist() == NAMES[:4]
    assert pooled['oof'].pred.tolist() == [0.1, 0.1, 0.2, 0.2]  # to the last bit
    assert pooled['test'].image_name.tolist() == ['007', '008']
    assert pooled['test'].pred.tolist() == [np.mean([1 / 3, 0.7])] * 2
    again = of(run)[3].rows[::-1].assign(pred=[0.9, 0.8], pred_plain=0.5)  # of another order
    files.write_csv(of(run)[3].path, again[['image_name', 'pred', 'pred_plain']])
    assert parts.pool(of(run), SETTINGS)['test'].pred.tolist() == [
        np.mean([1 / 3, p]) for p in (0.8, 0.9)
    ]


def test_what_a_blend_needs_is_asked_for_by_the_command_that_makes_it(run):
    again = rf'python infer\.py --home {run.home} --only r'
    with pytest.raises(Stop, match=rf'has no oof\.csv, test\.csv, oof\.json: {again}'):
        parts.read_n_tta(of(run))
    make(run)
    assert parts.read_n_tta(of(run)) == 2
    again += ' --n_tta 2 --seed 0 --batch_size 8'
    fewer = parts.list_parts(run, table()[:-1])
    with pytest.raises(Stop, match=f'was predicted for other images: {again}'):
        parts.read_n_tta(fewer)
    run.weights(1).write_text('trained again')
    with pytest.raises(Stop, match=f'was predicted by other weights: {again}'):
        parts.read_n_tta(of(run))
    (run.folder / 'oof.json').unlink()  # the flags are those of the parts then
    with pytest.raises(Stop, match=rf'has no oof\.json: {again}'):
        parts.read_n_tta(of(run))
