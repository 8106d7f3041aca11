"""A run is taken to where the images lie elsewhere, under another name, and still counts."""

import shlex
import shutil

import pandas as pd
import pytest
from conftest import QUICK


@pytest.fixture
def moved(copy, demo, tmp_path, ok):
    """A home on another machine: the images elsewhere, folds.csv made there, the runs copied."""
    shutil.copytree(demo, tmp_path / 'other' / 'place')
    home = tmp_path / 'home'
    ok('folds.py', '--data', tmp_path / 'other' / 'place', '--home', home, '--n_folds', 2)
    assert (home / 'folds.csv').read_bytes() != (copy / 'folds.csv').read_bytes()
    shutil.copytree(copy / 'runs', home / 'runs')
    return home


def test_its_predictions_count_and_its_weights_predict_where_it_is_taken(moved, ok):
    assert ok('infer.py', '--home', moved, '--n_tta', 2).count('is finished') == 2
    assert '1 augmented passes' in ok('infer.py', '--home', moved, '--n_tta', 1, '--only', 'twin')
    ok('blend.py', '--home', moved)
    assert (moved / 'submission.csv').exists()


def test_its_training_goes_on_there_and_other_rows_are_refused(moved, ok, refusal):
    train = ['train.py', '--home', moved, *QUICK, '--epochs', 1, '--seed', 1, '--cutout']
    (moved / 'runs' / 'twin' / 'fold1' / 'oof.csv').unlink()
    assert 'fold 1 epoch' in ok(*train, '--name', 'twin')
    table = pd.read_csv(moved / 'folds.csv')
    table.loc[table.group == table.group[0], 'fold'] = 1 - table.fold[0]
    table.to_csv(moved / 'folds.csv', index=False)
    for command in (['infer.py', '--home', moved], ['blend.py', '--home', moved]):
        assert 'another' in refusal(*command) and 'folds.csv' in refusal(*command)
    assert 'another' in refusal(*train, '--name', 'twin')


def test_other_test_images_alone_are_predicted_anew(moved, ok, refusal):
    """As in a notebook that is run again on the hidden images of a competition."""
    data, home = moved.parent / 'other' / 'place', moved
    for name in ('test.csv', 'sample_submission.csv'):
        rows = pd.read_csv(data / name)
        rows[rows.image_name != rows.image_name.min()].to_csv(data / name, index=False)
    before = pd.read_csv(home / 'runs' / 'twin' / 'test.csv').set_index('image_name').pred_plain
    shutil.rmtree(home / 'cache', ignore_errors=True)
    ok('folds.py', '--data', data, '--home', home, '--n_folds', 2)
    assert 'for other images' in refusal('blend.py', '--home', home, '--only', 'twin')
    out = ok('infer.py', '--home', home, '--n_tta', 2, '--only', 'twin')
    assert '11 images to resize' in out  # none of those that are predicted already
    assert out.count('augmented passes') == 2 and 'oof images' not in out
    after = pd.read_csv(home / 'runs' / 'twin' / 'test.csv').set_index('image_name').pred_plain
    assert after.to_numpy() == pytest.approx(before[after.index].to_numpy(), abs=1e-6)
    ok('blend.py', '--home', home, '--only', 'twin')
    assert set(pd.read_csv(home / 'submission.csv').image_name) == {*after.index} < {*before.index}


def test_what_is_suggested_names_the_run_where_it_is_now(moved, ok, script):
    (moved / 'runs' / 'twin').rename(moved / 'runs' / 'renamed')
    (moved / 'runs' / 'renamed' / 'fold1' / 'oof.csv').unlink()
    said = script('infer.py', '--home', moved, '--only', 'renamed').stdout
    command = said.split('type: ')[1].splitlines()[0]
    words = shlex.split(command)
    assert words[words.index('--home') + 1] == str(moved)
    assert words[words.index('--name') + 1] == 'renamed' and words.count('--name') == 1
    assert 'fold 1 epoch' in ok(*words[1:])  # and the command does what it says
