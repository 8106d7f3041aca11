"""What TTA draws: views of its own for every run and fold, and for an image alone the same ones."""

import shutil

import pandas as pd
import pytest
import torch
from fastai.vision.all import TensorImage

from lib import files, parts, tta
from lib.runs import Run

CONFIG = {
    'arch': 'test_resnet', 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3, 'seed': 0,
    'folds_sha256': 'x', 'command': 'python train.py',
}  # fmt: skip


def make_run(folder, **changes) -> Run:
    files.write_json(folder / 'config.json', CONFIG | changes)
    return Run(folder)


def draw(run: Run, k: int, seed: int = 0) -> float:
    """The first number that is drawn in the first pass over the first batch."""
    seed_batch = tta.SeedBatch([seed, *parts.Part(run, k, 'oof', pd.DataFrame()).seeds])
    seed_batch(TensorImage(torch.zeros(2, 3, 4, 4)))
    return float(torch.rand(1))


def test_every_run_and_fold_draws_views_of_its_own(tmp_path):
    run, twin = make_run(tmp_path / 'a'), make_run(tmp_path / 'b', seed=1)
    draws = [draw(r, k, seed) for r in (run, twin) for k in (0, 1) for seed in (0, 1)]
    assert len(set(draws)) == 8
    moved = make_run(tmp_path / 'c', command='x', table_sha256='y')  # which decide no weights
    assert draws[0] == draw(run, 0) == draw(moved, 0)  # and typed again the same ones


def test_an_image_is_predicted_the_same_alone_among_ten_and_twice(home, demo, ok, tmp_path):
    folder, out = tmp_path / 'images', tmp_path / 'o.csv'
    folder.mkdir()
    for path in sorted((demo / 'jpeg' / 'test').glob('*.jpg'))[:9]:
        shutil.copy(path, folder)
    shutil.copy(path, folder / 'again.jpg')

    def predict(images) -> pd.Series:
        ok('infer.py', '--home', home, '--n_tta', 3, '--images', images, '--out', out)
        return pd.read_csv(out).set_index('image_name').pred

    together, alone = predict(folder), predict(folder / path.name)
    assert len(together) == 10 and together.std() > 1e-5
    for pred in (together['again.jpg'], alone[path.name]):
        assert pred == pytest.approx(together[path.name], abs=1e-5)
