"""What a CUDA card has to keep: it runs where there is one, and is skipped elsewhere.

Whatever compares bits is tested on the CPU, which all other tests see alone.
"""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK
from fastai.vision.all import Callback, Learner

TRAIN = [*QUICK, '--epochs', 3, '--lr_max', 5e-3, '--batch_size', 4, '--neg_ratio', 4]


@pytest.fixture
def home(demo, ok, tmp_path):
    ok('folds.py', '--data', demo, '--home', tmp_path, '--n_folds', 2)
    return tmp_path


def about(home, name: str, k: int = 0) -> dict:
    """What run.json says of a fold."""
    return json.loads((home / 'runs' / name / f'fold{k}' / 'run.json').read_text())


def predicted(home, name: str, part: str = 'fold0/oof.csv', column: str = 'pred_plain'):
    """A column of a run's predictions, by image."""
    table = pd.read_csv(home / 'runs' / name / part, index_col='image_name')
    return table[column].sort_index()


def is_near(one, two) -> bool:
    """Whether predictions agree as well as half precision lets them, and are no constant."""
    return np.abs(one - two).max() < 0.01 and one.std() > 0.003


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_it_trains_and_predicts_as_the_cpu_does(card, precision, home, ok, monkeypatch):
    if precision == 'bf16' and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip('this card computes no bf16')
    said = ok('train.py', '--home', home, *TRAIN, '--name', 'a', '--precision', precision)
    assert f'(cuda:0) in {precision}' in said and torch.cuda.get_device_name() in said
    assert about(home, 'a')['precision'] == precision
    history = pd.read_csv(home / 'runs' / 'a' / 'fold0' / 'history.csv')
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    ok('infer.py', '--home', home, '--n_tta', 2)
    on_card = predicted(home, 'a', 'oof.csv')
    assert is_near(predicted(home, 'a'), on_card[predicted(home, 'a').index])
    ok('blend.py', '--home', home)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    ok('infer.py', '--home', home, '--n_tta', 2, '--precision', 'fp32', '--batch_size', 31)
    assert is_near(predicted(home, 'a', 'oof.csv'), on_card)


def test_what_it_began_goes_on_there_and_on_a_cpu(card, home, ok, script, monkeypatch):
    fit = Learner.fit_one_cycle

    class Cut(Callback):
        def before_step(self):
            if (self.epoch, self.iter) == (2, 0):
                raise KeyboardInterrupt

    def cut(self, *args, **options):
        return fit(self, *args, **options | {'cbs': [*options['cbs'], Cut()]})

    train = ['train.py', '--home', home, *TRAIN, '--fold', 0]
    whole = ok(*train, '--name', 'whole') and predicted(home, 'whole')
    for name in ('card', 'cpu'):
        with monkeypatch.context() as patch:
            patch.setattr(Learner, 'fit_one_cycle', cut)
            assert script(*train, '--name', name).returncode == 130
    assert 'goes on after epoch 2 of 3' in ok(*train, '--name', 'card')
    assert is_near(whole, predicted(home, 'card'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'goes on after epoch 2 of 3' in ok(*train, '--name', 'cpu')
    assert (about(home, 'cpu')['device'], about(home, 'cpu')['precision']) == ('cpu', 'fp32')
    assert np.abs(whole - predicted(home, 'cpu')).max() < 0.1


def test_an_infinity_in_fp16_costs_one_step_of_several_batches(card, fitted):
    class Spoil(Callback):
        """An infinity in the first step's gradient; the scale and the weights after each step."""

        order = 11  # just after MixedPrecision

        def before_fit(self):
            self.scales, self.weights = [], [self.first()]

        def after_backward(self):
            if self.epoch == 0 and self.iter == 1:
                next(self.model.parameters()).grad[:] = float('inf')

        def after_step(self):
            self.scales.append(self.scaler.get_scale())
            self.weights.append(self.first())

        def first(self):
            return next(self.model.parameters()).detach().clone()

    flags = ['--precision', 'fp16', '--accumulate', 2, '--neg_ratio', 0.5]
    learn = fitted(*flags, epochs=2, cbs=[spoil := Spoil()])
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert spoil.scales[0] == 2.0**15  # half of the first one
    assert torch.equal(*spoil.weights[:2]) and not torch.equal(*spoil.weights[-2:])


def count_waits(work) -> int:
    """How often the CPU waits for the card while it does `work`."""
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            work()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing' in str(w.message) for w in said)


@pytest.mark.parametrize(('precision', 'most'), [('fp32', 3), ('bf16', 3), ('fp16', 5)])
def test_a_training_step_waits_no_oftener_than_it_must(card, precision, most, fitted):
    """Two waits bring a batch there, one its loss back; fp16's scaler waits twice."""

    class Steps(Callback):
        order = 99

        def before_batch(self):
            self.begun = getattr(self, 'begun', 0) + self.training

    fit, waits = Learner._do_epoch_train, []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Learner, '_do_epoch_train', lambda self: waits.append(count_waits(lambda: fit(self)))
        )
        fitted('--precision', precision, '--workers', 0, epochs=2, cbs=[steps := Steps()])
    assert waits[-1] <= (most + 0.5) * steps.begun / 2, (waits, steps.begun)


def test_a_batch_of_prediction_waits_twice(card, home, ok, monkeypatch):
    """Once to bring the images there, once to bring the predictions back."""
    ok('train.py', '--home', home, *TRAIN, '--name', 'a')
    its_own, waits = Learner.get_preds, []

    def counted(self, **options):
        preds = []
        waits.append((count_waits(lambda: preds.append(its_own(self, **options))), len(self.dl)))
        return preds[0]

    monkeypatch.setattr(Learner, 'get_preds', counted)
    ok('infer.py', '--home', home, '--n_tta', 2, '--batch_size', 8, '--workers', 0)
    n, n_batches = waits[-1]
    assert n <= 2.5 * n_batches, waits


def test_compiled_models_predict_the_same(card, home, ok):
    ok('train.py', '--home', home, *TRAIN, '--name', 'a')
    ok('infer.py', '--home', home, '--n_tta', 1)
    eager = predicted(home, 'a', 'oof.csv', 'pred')
    ok('infer.py', '--home', home, '--n_tta', 1, '--batch_size', 31, '--compile')
    assert is_near(eager, predicted(home, 'a', 'oof.csv', 'pred'))


def test_the_range_test_heat_maps_and_other_images_work_there(card, home, demo, ok):
    ok('train.py', '--home', home, *TRAIN, '--name', 'a')
    assert 'suggested: ' in ok('train.py', '--home', home, *TRAIN, '--name', 'b', '--lr_find')
    ok('infer.py', '--home', home, '--n_tta', 1, '--heat', 1)
    assert len(list((home / 'runs' / 'a' / 'heat').glob('*.jpg'))) >= 1
    out = home / 'out.csv'
    images = demo / 'jpeg' / 'test'
    ok('infer.py', '--home', home, '--n_tta', 1, '--images', images, '--out', out)
    assert pd.read_csv(out).pred.between(0, 1).all()
