"""A home made by an earlier version still counts: what is finished there is not done anew.

`tests/old_home` was made once, by commit b6b4644, and is never edited: 24 labelled and 6 test
images of the demo's kind; `runs/a`, trained in two folds and predicted with two passes;
`runs/kept`, the blend `--only a --how rank --name kept`; `runs/half`, which has a's flags and was
stopped after fold 0. Its pictures, locks and the cache are left out, as a copied home may have it.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import contents

from lib import files, tables

OLD = Path(__file__).parent / 'old_home'
FLAGS = '--arch test_efficientnet --nopretrained --size 64 --cutout --epochs 2 --batch_size 4'
FLAGS = [*FLAGS.split(), '--lr_max', 5e-3, '--precision', 'fp32']
INFER = ['--n_tta', 2, '--precision', 'fp32']


@pytest.fixture
def home(tmp_path):
    """A copy of the old home, to be worked in."""
    return shutil.copytree(OLD, tmp_path / 'home')


@pytest.fixture
def computed():
    """A list that grows with every convolution that any model computes."""
    calls = []

    def count(module: torch.nn.Module, *_: object) -> None:
        if isinstance(module, torch.nn.Conv2d):
            calls.append(module)

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    yield calls
    handle.remove()


def preds(path: Path, *columns: str) -> pd.DataFrame:
    """Columns of a table of predictions as the text in the file, by image."""
    return pd.read_csv(path, dtype=str).set_index('image_name')[list(columns)]


def test_a_finished_run_is_left_as_it_is(home, ok, computed):
    out = ok('train.py', '--home', home, '--name', 'a', *FLAGS)
    assert 'finished' in out and not computed
    for fold in ('fold0', 'fold1'):
        assert contents(home / 'runs/a' / fold) == contents(OLD / 'runs/a' / fold)


def test_finished_predictions_are_kept_to_the_last_digit(home, ok, computed):
    ok('infer.py', '--home', home, *INFER)  # half is passed over, and kept is no run
    assert not computed
    for name in ('oof.csv', 'test.csv'):
        old, new = OLD / 'runs/a' / name, home / 'runs/a' / name
        pd.testing.assert_frame_equal(
            preds(new, 'pred', 'pred_plain'), preds(old, 'pred', 'pred_plain')
        )
        prob = [preds(path, 'prob').prob.astype(float) for path in (old, new)]
        np.testing.assert_allclose(*prob, rtol=1e-9)
    assert contents(home / 'runs/kept') == contents(OLD / 'runs/kept')


def test_its_weights_predict_what_they_predicted_but_by_views_of_their_own(home, ok, computed):
    run = home / 'runs/a'
    for path in [run / 'infer.json', *run.glob('*.csv'), *run.glob('fold*/tta_*')]:
        path.unlink()
    ok('infer.py', '--home', home, *INFER)
    assert computed
    for name in ('oof.csv', 'test.csv'):
        old, new = (
            preds(h / 'runs/a' / name, 'pred', 'pred_plain').astype(float) for h in (OLD, home)
        )
        apart = (new.loc[old.index] - old).abs().max()
        assert apart.pred_plain < 1e-5 < apart.pred
    assert files.read_json(run / 'fold0/tta_oof.json')['draws'] == 2


def test_a_blend_is_kept_again_under_its_name(home, ok):
    ok('blend.py', '--home', home, '--only', 'a', '--how', 'rank', '--name', 'kept')
    for name in ('oof.csv', 'test.csv'):
        old, new = (preds(h / 'runs/kept' / name, 'pred', 'prob') for h in (OLD, home))
        np.testing.assert_allclose(new.loc[old.index].astype(float), old.astype(float), rtol=1e-9)


def test_a_run_half_trained_by_another_recipe_is_refused_with_what_to_do(home, script, computed):
    before = contents(home / 'runs/half')
    done = script('train.py', '--home', home, '--name', 'half', *FLAGS)
    assert done.returncode == 1 and 'another --name' in done.stderr and 'commit' in done.stderr
    assert contents(home / 'runs/half') == before and not computed


def test_an_old_run_goes_along_to_where_the_images_lie_elsewhere(home, ok, script, computed):
    table = pd.read_csv(home / 'folds.csv', dtype=str)
    (home / 'data').rename(home / 'elsewhere')
    moved = table.assign(path=table.path.str.replace('data/', 'elsewhere/'))
    moved.to_csv(home / 'folds.csv', index=False)
    done = script('infer.py', '--home', home, *INFER)
    assert done.returncode == 1 and 'another' in done.stderr  # the file alone cannot be known
    config = files.read_json(home / 'runs/a/config.json')
    rows = tables.hash_rows(tables.read_folds(OLD / 'folds.csv'))
    files.write_json(home / 'runs/a/config.json', config | {'table_sha256': rows})  # by folds.py
    shutil.rmtree(home / 'runs/half')
    ok('infer.py', '--home', home, *INFER)
    assert not computed
    ok('blend.py', '--home', home)


def test_one_fold_that_was_trained_again_has_all_parts_made_in_one_go(home, ok):
    weights = home / 'runs/a/fold1/model.safetensors'
    weights.write_bytes((home / 'runs/a/fold0/model.safetensors').read_bytes())
    out = ok('infer.py', '--home', home, '--only', 'a', *INFER)
    assert out.count('2 augmented passes') == 4 and (home / 'runs/a/oof.csv').exists()
