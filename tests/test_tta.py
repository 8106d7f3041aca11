"""The TTA is fastai's, and means a plain loop over passes whose draws can be repeated."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Learner, PILImage, Pipeline, TensorImage, image2tensor

import infer
from lib import data, model, parts, runs, speed, tta
from lib.augment import batch_tfms
from lib.callbacks import seed_all
from lib.cli import Stop

STATS = ((0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope='module')
def rows(noise):
    """Seven images: two batches of three and an odd last one."""
    return noise[:7]


@pytest.fixture
def net():
    return make()


def make(seed=0):
    torch.manual_seed(seed)
    net = model.create('test_resnet', 64)
    torch.nn.init.normal_(net.fc.weight, std=1.0)  # so that predictions differ
    return net.eval()


def predict(net, rows, n_tta, seed=0, cutout=True, batch_size=3, workers=0, precision='fp32'):
    """The mean of the passes and the plain one, as infer.py has them: (n,) each."""
    dls = data.prediction_dls(rows, batch_tfms(*STATS, cutout), batch_size, workers)
    learn = tta.predictor(dls, net, precision, tta.SeedBatch([seed]), n_tta)
    preds = learn.tta(n=n_tta, beta=None)[0] if n_tta else learn.get_preds()[:1] * 2
    return [pred[:, 0].double().numpy() for pred in preds]


def by_hand(net, rows, n_tta, seeds=(0,), cutout=True, batch_size=3, stats=STATS):
    """The same without fastai's Learner, DataLoader and tta: a loop over passes and batches."""
    x = torch.stack([image2tensor(PILImage.create(path)) for path in rows.cached])
    ready, passes = model.ProbabilityModel(net, batch_size), []
    for number in range(n_tta + 1):
        tfms = Pipeline(batch_tfms(*stats, cutout), split_idx=0 if number < n_tta else 1)
        preds = []
        for k, batch in enumerate(x.split(batch_size)):
            seed_all(*seeds, number, k)
            with torch.no_grad():
                preds.append(ready(tfms(TensorImage(batch)))[:, 0])
        passes.append(torch.Tensor(torch.cat(preds)))
    plain = passes.pop()
    mean = torch.stack(passes).mean(0) if passes else plain
    return [pred.double().numpy() for pred in (mean, plain)]


@pytest.mark.parametrize(
    ('n_tta', 'cutout', 'workers'), [(0, False, 0), (1, True, 0), (3, True, 0), (3, False, 2)]
)
def test_fastais_tta_is_a_plain_loop_over_seeded_passes_bit_for_bit(
    net, rows, n_tta, cutout, workers
):
    ours = predict(net, rows, n_tta, cutout=cutout, workers=workers)
    witness = by_hand(net, rows, n_tta, cutout=cutout)
    assert [pred.tolist() for pred in ours] == [pred.tolist() for pred in witness]
    assert ours[0].shape == ours[1].shape == (7,)
    assert ours[1].std() > 0.01  # the images are told apart at all
    assert (np.abs(ours[0] - ours[1]).max() > 1e-3) == (n_tta > 0)


@pytest.mark.parametrize('n_tta', [0, 2])
def test_what_infer_py_runs_is_learner_tta_with_both_results_kept_apart(home, n_tta, monkeypatch):
    calls, its_own = [], Learner.tta

    def spy(self, **options):
        calls.append(options)
        return its_own(self, **options)

    monkeypatch.setattr(Learner, 'tta', spy)
    run = runs.find_runs(home, 'twin')[0]
    table = parts.read_csv(home / 'folds.csv').astype({'fold': float, 'target': float})
    paths = [home / 'cache' / '64' / 'competition' / f'{name}.jpg' for name in table.image_name]
    part = parts.list_parts(run, table.assign(cached=paths), [0, 1])[3]
    settings = parts.Settings(n_tta, seed=0, batch_size=32, precision='auto')
    ours = infer.predict(part, settings, precision='fp32', workers=None, compile=False)
    assert calls == [{'n': 2, 'beta': None}] * bool(n_tta)
    net = speed.fuse_batch_norms(model.load('test_resnet', 64, run.fold(1) / runs.WEIGHTS), 64)
    stats = [run.config['mean'], run.config['std']]
    witness = by_hand(net, part.rows, n_tta, [0, *part.seeds], batch_size=12, stats=stats)
    assert [pred.tolist() for pred in ours] == [pred.tolist() for pred in witness]
    if n_tta:  # and that is what the run of the whole script left
        saved = pd.read_csv(run.fold(1) / 'tta_test.csv')
        assert [saved[c].tolist() for c in parts.PREDS] == [pred.tolist() for pred in ours]


def test_the_seed_and_the_batch_number_decide_the_draw(net, rows):
    (first, plain), (again, _), (other, plain2) = (predict(net, rows, 2, s) for s in (0, 0, 1))
    assert (first == again).all() and (plain == plain2).all()
    assert np.abs(first - other).max() > 1e-4
    same = predict(net, rows.iloc[[0] * 6], 1)[0]  # one image in both batches, drawn anew in each
    assert np.abs(same[:3] - same[3:]).max() > 1e-4
    assert np.abs(predict(net, rows, 1)[0] - first).max() > 1e-4  # and in each pass


def test_half_precision_keeps_the_predictions_and_their_order(rows):
    half, single = predict(make(), rows, 2, precision='bf16'), predict(make(), rows, 2)
    assert 0 < np.abs(half[0] - single[0]).max() < 0.02
    assert len(set(half[1])) == 7  # logits of 8 bits would make ties
    assert (np.argsort(half[0]) == np.argsort(single[0])).all()


@pytest.mark.parametrize('bias', [float('nan'), float('inf')])
def test_a_prediction_that_is_not_finite_stops_and_names_the_precision_to_type(net, rows, bias):
    torch.nn.init.constant_(net.fc.bias, bias)
    pred = torch.tensor(predict(net, rows, 1)[0])[:, None]
    with pytest.raises(Stop, match=r'runs/a: the model predicts NaN or infinity.*--precision fp32'):
        tta.check_finite(pred, 'runs/a')
    good = tta.check_finite(torch.tensor([[0.25], [1.0]]), '')
    assert good.dtype == np.float64 and good.tolist() == [0.25, 1]
