"""The record beside a part's predictions decides whether they are made; what is pooled fits it."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from lib import files, parts
from lib.cli import Stop
from lib.parts import Settings
from lib.runs import WEIGHTS, Run

SETTINGS = Settings(n_tta=2, seed=0, batch_size=8, precision='auto')
CONFIG = {'arch': 'a', 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3, 'folds_sha256': 'x'}
NAMES = ['I1', 'I2', 'I3', 'I4', '007', '008']  # the last two are test images


def table() -> pd.DataFrame:
    rows = pd.DataFrame({'image_name': NAMES, 'split': ['train'] * 4 + ['test'] * 2})
    rows = rows.assign(source='s', patient_id='p', group='p', target=[0, 1, 0, 1, None, None])
    return rows.assign(fold=[0, 0, 1, 1, None, None])


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run with the weights of two folds, whose images need no cache."""
    monkeypatch.setattr(parts, 'cache', lambda rows, home, size: rows.image_name.tolist())
    run = Run(tmp_path / 'runs' / 'r')
    files.write_json(run.folder / 'config.json', CONFIG)
    for k in (0, 1):
        files.write_text(run.fold(k) / WEIGHTS, f'weights {k}')
    return run


def of(run) -> list[parts.Part]:
    """The parts as another process sees them, which has read no weights yet."""
    return parts.list_parts(run, table(), [0, 1])


def write(part, settings=SETTINGS, precision='fp32', pred=0.25) -> None:
    n = len(part.rows)
    part.write(np.full(n, pred), np.full(n, 1 / 3), settings, precision)


def make(run, **options) -> list[parts.Part]:
    """All parts, written and pooled."""
    for part in of(run):
        write(part, **options)
    for kind, rows in parts.pool(of(run)).items():
        files.write_csv(run.folder / f'{kind}.csv', rows)
    return of(run)


def test_a_run_has_a_part_a_fold_for_its_held_out_and_for_the_test_images(run):
    made = of(run)
    assert [(part.kind, part.k) for part in made] == [
        ('oof', 0), ('oof', 1), ('test', 0), ('test', 1),
    ]  # fmt: skip
    names = [part.rows.image_name.tolist() for part in made]
    assert names == [NAMES[:2], NAMES[2:4], NAMES[4:], NAMES[4:]]
    assert len({part.lock for part in made}) == len({part.path for part in made}) == 4
    no_test = table()[:4]
    assert [part.kind for part in parts.list_parts(run, no_test, [0, 1])] == ['oof', 'oof']
    files.write_json(run.folder / 'config.json', CONFIG | {'skipped': ['I2']})
    assert of(run)[0].rows.image_name.tolist() == ['I1']


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
    settings |= {'draws': parts.DRAWS}
    assert record == settings | {'weights_sha256': files.sha256(run.fold(0) / WEIGHTS)}


def test_a_part_of_other_settings_is_made_anew_and_any_precision_will_do_with_auto(run):
    make(run, precision='bf16')
    others = [{'n_tta': 3}, {'seed': 1}, {'batch_size': 4}, {'precision': 'fp32'}]
    for change in ({}, {'precision': 'bf16'}, *others):
        settings = dataclasses.replace(SETTINGS, **change)
        assert {part.is_made(settings) for part in of(run)} == {change not in others}


def test_a_part_of_other_test_images_is_made_anew(run):
    make(run)
    fewer = parts.list_parts(run, table()[:-1], [0, 1])
    assert [part.is_made(SETTINGS) for part in fewer] == [True, True, False, False]


def test_a_part_of_other_weights_is_made_anew(run):
    make(run)
    (run.fold(1) / WEIGHTS).write_text('trained again')
    assert [part.is_made(SETTINGS) for part in of(run)] == [True, False, True, False]


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


def test_what_is_pooled_vanishes_when_a_part_is_made_with_other_settings(run):
    make(run)
    pooled = [run.folder / 'oof.csv', run.folder / 'test.csv']
    assert list(parts.claim(of(run), SETTINGS)) == [] and all(p.exists() for p in pooled)
    other = dataclasses.replace(SETTINGS, n_tta=3)
    for k, part in enumerate(parts.claim(of(run), other)):
        assert all(p.exists() for p in pooled) == (k == 0)  # a failure so far has lost nothing
        write(part, other, pred=0.75)
        assert not any(p.exists() for p in pooled)
    assert all(part.is_made(other) for part in of(run))
    assert {rows.pred.astype(float).max() for rows in parts.pool(of(run)).values()} == {0.75}


def test_parts_of_several_settings_are_no_run_to_blend(run):
    make(run)
    write(of(run)[0], dataclasses.replace(SETTINGS, n_tta=3))
    for kind in ('oof', 'test'):
        files.write_csv(run.folder / f'{kind}.csv', table())
    with pytest.raises(Stop, match='parts of 2 and 3 TTA passes'):
        parts.read_n_tta(of(run))


def test_what_is_missing_alone_is_claimed(run):
    make(run)
    of(run)[2].path.unlink()
    claimed = list(parts.claim(of(run), SETTINGS))
    assert [(part.kind, part.k) for part in claimed] == [('test', 0)]
    assert claimed[0].rows.cached.tolist() == NAMES[4:]


def test_pooled_are_the_held_out_rows_of_all_folds_and_the_mean_of_the_test_predictions(run):
    for part, pred in zip(of(run), (0.1, 0.2, 1 / 3, 0.7), strict=True):
        write(part, pred=pred)
    pooled = parts.pool(of(run))
    assert pooled['oof'].image_name.tolist() == NAMES[:4]
    assert pooled['oof'].pred.tolist() == ['0.1', '0.1', '0.2', '0.2']  # text: to the last bit
    assert pooled['test'].image_name.tolist() == ['007', '008']
    assert pooled['test'].pred.tolist() == [np.mean([1 / 3, 0.7])] * 2
    again = of(run)[3].rows[::-1].assign(pred=[0.9, 0.8], pred_plain=0.5)  # of another order
    files.write_csv(of(run)[3].path, again[['image_name', 'pred', 'pred_plain']])
    assert parts.pool(of(run))['test'].pred.tolist() == [np.mean([1 / 3, p]) for p in (0.8, 0.9)]
    files.write_csv(run.folder / 'oof.csv', pooled['oof'].assign(prob=0.5))
    assert parts.pool(of(run))['oof'].prob.tolist() == ['0.5'] * 4  # what is pooled is read


def test_a_home_from_before_parts_had_records_is_finished_as_it_was(run):
    """One infer.json spoke for all, and there was one tta_test.csv for no fold."""
    make(run)
    sha256 = [files.sha256(run.fold(k) / WEIGHTS) for k in (0, 1)]
    for path in [*run.folder.glob('fold*/tta_*.json'), *run.folder.glob('fold*/tta_test.csv')]:
        path.unlink()
    plan = {'n_tta': 2, 'seed': 0, 'batch_size': 8, 'precision': 'bf16', 'weights_sha256': sha256}
    files.write_json(run.folder / 'infer.json', plan)
    assert all(part.is_made(SETTINGS) for part in of(run)) and parts.read_n_tta(of(run)) == 2
    (run.fold(1) / WEIGHTS).write_text('trained again')
    assert not of(run)[1].is_made(SETTINGS)
    (run.fold(1) / WEIGHTS).write_text('weights 1')

    other = dataclasses.replace(SETTINGS, n_tta=3)
    for part in parts.claim(of(run), other):
        write(part, other)
    assert not (run.folder / 'infer.json').exists()
    assert all(part.is_made(other) for part in of(run))


def test_what_a_blend_needs_is_asked_for_by_the_command_that_makes_it(run):
    again = rf'python infer\.py --home {run.home} --only r'
    with pytest.raises(Stop, match=rf'has no oof\.csv, test\.csv: {again}'):
        parts.read_n_tta(of(run))
    make(run)
    assert parts.read_n_tta(of(run)) == 2
    (run.fold(1) / WEIGHTS).write_text('trained again')
    again += ' --n_tta 2 --seed 0 --batch_size 8'
    with pytest.raises(Stop, match=f'trained again since infer.py ran: {again}'):
        parts.read_n_tta(of(run))
