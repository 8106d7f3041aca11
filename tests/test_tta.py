"""infer.py's TTA is fastai's, and means a plain loop over passes whose draws can be repeated."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Learner, PILImage, Pipeline, TensorImage, image2tensor

from lib import model, parts, runs, tables
from lib.augment import batch_tfms
from lib.callbacks import seed_all

BATCH = 5  # images; the parts have 12 and about 30


@pytest.fixture(scope='module')
def loud(home):
    """`home` with larger weights in the last layers, so that predictions differ; not predicted."""
    loud = shutil.copytree(home, home.with_name('loud'))
    for path in loud.glob('runs/*/fold*/model.safetensors'):
        net = model.load('test_resnet', 64, path)
        torch.manual_seed(0)
        torch.nn.init.normal_(net.fc.weight, std=1.0)
        model.save(net, path)
    return loud


@pytest.fixture(scope='module')
def predict(loud, ok):
    """`predict('twin', 3, '--seed', 1)`: infer.py's parts of fold 1, by kind, from their files."""

    def run(name: str, n_tta: int, *flags: object) -> dict[str, pd.DataFrame]:
        ok(
            'infer.py',
            '--home',
            loud,
            '--only',
            name,
            '--n_tta',
            n_tta,
            '--batch_size',
            BATCH,
            *flags,
        )
        paths = {
            kind: loud / 'runs' / name / 'fold1' / f'tta_{kind}.csv' for kind in ('oof', 'test')
        }
        return {
            kind: pd.read_csv(path, index_col='image_name', **tables.EXACT)
            for kind, path in paths.items()
        }

    return run


def names(home) -> list[str]:
    """The run with Cutout, and the one without."""
    return ['twin', next(p.name for p in (home / 'runs').iterdir() if p.name != 'twin')]


def by_hand(home, name: str, n_tta: int, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """The passes over the parts of fold 1, the plain one last, without fastai's Learner, DataLoader
    and tta: a loop over passes and batches."""
    (run,), preds = runs.find_runs(home, name), {}
    cutout, stats = run.config['cutout'], (run.config['mean'], run.config['std'])
    net = model.load('test_resnet', 64, run.weights(1))
    net = model.ProbabilityModel(net, 64, 'fp32')
    for part in parts.list_parts(run, tables.read_folds(home / 'folds.csv')):
        if part.k == 1:
            folder = home / 'cache' / '64' / 'competition'
            paths = [folder / f'{image}.jpg' for image in part.rows.image_name]
            x = torch.stack([image2tensor(PILImage.create(path)) for path in paths])
            passes = []
            for number in range(n_tta + 1):
                tfms = Pipeline(batch_tfms(*stats, cutout), split_idx=int(number == n_tta))
                batches = []
                for k, batch in enumerate(x.split(BATCH)):
                    seed_all(seed, *part.seeds, number, k)
                    with torch.no_grad():
                        batches.append(net(tfms(TensorImage(batch)))[:, 0])
                passes.append(torch.Tensor(torch.cat(batches)))
            preds[part.kind] = passes
    return preds


@pytest.mark.parametrize(('which', 'n_tta', 'workers'), [(0, 0, 0), (0, 3, 0), (1, 2, 2)])
def test_what_infer_py_writes_is_a_plain_loop_over_seeded_passes_bit_for_bit(
    which, n_tta, workers, loud, predict, monkeypatch
):
    calls, its_own = [], Learner.tta

    def spy(self, **options):
        calls.append(options)
        return its_own(self, **options)

    monkeypatch.setattr(Learner, 'tta', spy)
    name = names(loud)[which]
    ours, witness = predict(name, n_tta, '--workers', workers), by_hand(loud, name, n_tta)
    assert calls == [{'n': n_tta, 'beta': None}] * 4 * bool(n_tta)  # two kinds, two folds
    for kind, rows in ours.items():
        *passes, plain = witness[kind]
        mean = torch.stack(passes).mean(0) if passes else plain
        assert rows.pred.tolist() == mean.double().tolist()
        assert rows.pred_plain.tolist() == plain.double().tolist()
        assert rows.pred_plain.std() > 0.01  # the images are told apart at all
        assert ((rows.pred - rows.pred_plain).abs().max() > 1e-3) == (n_tta > 0)


def test_more_passes_begin_with_the_same_ones_and_a_seed_draws_others(predict, monkeypatch):
    its_own, passes = Learner.get_preds, []

    def spy(self, **options):
        passes.append(its_own(self, **options))
        return passes[-1]

    monkeypatch.setattr(Learner, 'get_preds', spy)

    def of_run(n_tta: int, *flags) -> list[list[list[float]]]:
        """Of each of the four parts the preds of each pass, the plain one last."""
        passes.clear()
        predict('twin', n_tta, *flags)
        preds = [pred[:, 0].tolist() for pred, _ in passes]
        assert len(preds) == 4 * (n_tta + 1)
        return [preds[i : i + n_tta + 1] for i in range(0, len(preds), n_tta + 1)]

    one, three, other = of_run(1), of_run(3), of_run(1, '--seed', 1)
    for of_one, of_three, of_other in zip(one, three, other, strict=True):
        assert of_one[0] == of_three[0] and of_one[-1] == of_three[-1] == of_other[-1]
        assert len({*map(tuple, of_three)}) == 4  # each pass is another
        assert np.abs(np.subtract(of_one[0], of_other[0])).max() > 1e-4


def test_half_precision_keeps_the_predictions_and_their_order(predict):
    single, half = (predict('twin', 1, '--precision', p)['oof'] for p in ('fp32', 'bf16'))
    assert 0 < (half.pred - single.pred).abs().max() < 0.02
    assert half.pred_plain.is_unique  # logits of 8 bits would make ties
    assert np.corrcoef(half.pred.rank(), single.pred.rank())[0, 1] > 0.99


@pytest.mark.skipif(
    shutil.which(os.environ.get('CXX', 'c++')) is None, reason='torch.compile needs a C++ compiler'
)
def test_a_compiled_model_predicts_the_same(copy, demo, ok, monkeypatch, tmp_path):
    """One model and one image: to compile is most of this test."""
    compiled, its_own, preds = [], torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module, 'compile', lambda self: compiled.append(self) or its_own(self)
    )
    (copy / 'runs' / 'twin' / 'fold1' / 'oof.csv').unlink()
    image, out = next((demo / 'jpeg' / 'test').iterdir()), tmp_path / 'out.csv'
    for flags in ([], ['--compile']):
        this = ['infer.py', '--home', copy, '--only', 'twin', '--n_tta', 0, '--images', image]
        ok(*this, '--out', out, *flags)
        preds += [pd.read_csv(out).pred[0]]
        out.unlink()
    assert [type(net) for net in compiled] == [model.ProbabilityModel]
    assert preds[0] == pytest.approx(preds[1], abs=1e-5)
