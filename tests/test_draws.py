"""What TTA draws: views of its own for every run and fold, pass and batch."""

import pandas as pd
import torch
from conftest import CONFIG
from fastai.vision.all import TensorImage

from lib import files, parts, tta
from lib.runs import Run


def make_run(folder, **changes) -> Run:
    files.write_json(folder / 'config.json', CONFIG | changes)
    return Run(folder)


def draw(run: Run, k: int, seed: int = 0, n_pass: int = 0, n_batch: int = 0) -> float:
    """The first number that is drawn in a batch of a pass."""
    seed_batch = tta.SeedBatch([seed, *parts.Part(run, k, 'oof', pd.DataFrame()).seeds])
    seed_batch.n_pass, seed_batch.n_batch = n_pass, n_batch
    seed_batch(TensorImage(torch.zeros(2, 3, 4, 4)))
    assert seed_batch.n_batch == n_batch + 1
    return float(torch.rand(1))


def test_every_run_and_fold_pass_and_batch_draws_views_of_its_own(tmp_path):
    run, twin = make_run(tmp_path / 'a'), make_run(tmp_path / 'b', seed=1)
    each = [(r, k, seed, p, b) for r in (run, twin) for k in (0, 1) for seed in (0, 1)
            for p in (0, 1) for b in (0, 1)]  # fmt: skip
    draws = [draw(*one) for one in each]
    assert len(set(draws)) == 32
    # which decide no weights
    moved = make_run(tmp_path / 'c', command='python train.py --x', code_sha256='y')
    assert draws[0] == draw(run, 0) == draw(moved, 0)  # and typed again the same ones
