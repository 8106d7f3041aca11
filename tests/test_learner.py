"""The schedule, the optimizer, the epoch's line and the range test, against outside witnesses."""

import contextlib
import json
import pickle
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Malicious
from fastai.vision.all import Callback, DataLoaders, OptimWrapper
from sklearn.metrics import roc_auc_score

import train
from lib import data, model, ranks
from lib.augment import Augment, batch_tfms
from lib.callbacks import Accumulate, History, Resume, SeedEpoch
from lib.cli import Stop
from lib.learner import create_learner, read_range_test, suggest_rates
from lib.runs import Run

CONFIG = {
    **{k: v for k, v in train.main.__kwdefaults__.items() if k not in ('weights', 'lr_find')},
    **{'arch': 'test_resnet', 'pretrained': False, 'size': 64, 'mean': [0.5] * 3, 'std': [0.5] * 3},
    **{'batch_size': 4, 'neg_ratio': 0.5},
}


def make(noise, precision='fp32', workers=0, **flags):
    """train.py's Learner of fold 0, and the callback that chooses the images of an epoch."""
    learn, (downsample, _) = train.make_learner(0, noise, CONFIG | flags, None, workers, precision)
    return learn, downsample


class Cut(Callback):
    """Ctrl-C in the second step of an epoch."""

    def __init__(self, epoch):
        self.at = epoch

    def before_step(self):
        if (self.epoch, self.iter) == (self.at, 1):
            raise KeyboardInterrupt


def fit(noise, folder, epochs=3, workers=0, cut=None, precision='fp32'):
    """Four steps an epoch of fold 0, up to the end or the cut; the Learner and its Resume."""
    learn, downsample = make(noise, precision, workers, seed=7)
    history = History(folder / 'history.csv', 0)
    resume = Resume(folder / 'state.pt', 0, history)
    resume.rest = 0  # epochs are so short here that a save would not pay for each
    cbs = [downsample, SeedEpoch(0, 0), history, resume]
    try:
        learn.fit_one_cycle(epochs, 1e-2, cbs=cbs + ([] if cut is None else [Cut(cut)]))
    except KeyboardInterrupt:
        assert cut is not None
    return learn, resume


class Record(Callback):
    """Keep each step's rate as the optimizer had it, and the epoch's predictions."""

    def before_fit(self):
        self.rates, self.n_batches = [], len(self.dls.train)

    def before_step(self):
        self.rates.append(self.opt.opt.param_groups[0]['lr'])

    def before_validate(self):
        self.logits, self.truths = [], []

    def after_batch(self):
        if not self.training:
            self.logits.append(self.pred.detach())
            self.truths.append(self.y)


def test_the_schedule_of_train_py_is_torchs_one_cycle_to_within_one_step(
    noise, tmp_path, monkeypatch
):
    record, its_own = Record(), train.make_learner

    def recorded(*args):
        learn, callbacks = its_own(*args)
        return learn, [*callbacks, record]

    monkeypatch.setattr(train, 'make_learner', recorded)
    (low, high), epochs, run = (5e-6, 2e-4), 8, Run(tmp_path / 'runs' / 'r')
    config = CONFIG | {'epochs': epochs, 'lr_min': low, 'lr_max': high}
    train.train_fold(run, 0, noise, config, None, 0, 'bf16', None)
    n, div = len(record.rates), high / low
    assert n == epochs * record.n_batches == 32
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=high)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, high, total_steps=n, pct_start=0.25, div_factor=div, final_div_factor=1
    )
    witness = []
    for _ in range(n):
        witness.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        theirs.step()
    ours, witness = np.array(record.rates), np.array(witness)
    assert ours[0] == pytest.approx(low) == witness[0]
    assert ours.max() == pytest.approx(high) == witness.max()
    for i, lr in enumerate(ours):  # between torch's rates of the step before and the step after
        around = witness[max(0, i - 1) : i + 2]
        assert around.min() - 1e-9 <= lr <= around.max() + 1e-9
    assert ours[-1] < 2 * low + 0.02 * high  # and back

    about = json.loads((run.fold(0) / 'run.json').read_text())
    assert (about['precision'], about['scoring_precision']) == ('bf16', 'fp32')  # on the CPU
    assert len(run.read_oof([0])) == (noise.fold == 0).sum()  # all of it, not what was monitored


def test_the_optimizer_is_adamw_with_its_decay_on_every_parameter(noise):
    learn, downsample = make(noise)
    learn.fit_one_cycle(1, 1e-4, cbs=[downsample])
    assert isinstance(learn.opt.opt, torch.optim.AdamW)
    groups = learn.opt.opt.param_groups
    assert all(g['weight_decay'] == 0.1 and g['eps'] == 1e-8 for g in groups)
    assert sum(len(g['params']) for g in groups) == len(list(learn.model.parameters()))


def test_the_epochs_line_is_scikit_learns_auc_and_the_history_holds_every_epoch(
    noise, tmp_path, capsys
):
    learn, downsample = make(noise, neg_ratio=0)  # all images: the most rows to monitor
    record, history = Record(), History(tmp_path / 'history.csv', fold=3)
    learn.fit_one_cycle(3, 1e-3, cbs=[downsample, record, history])
    auc = roc_auc_score(torch.cat(record.truths), torch.cat(record.logits)[:, 0])
    table = pd.read_csv(tmp_path / 'history.csv')
    assert table.epoch.tolist() == [1, 2, 3]
    assert table.auc.iloc[-1] == pytest.approx(auc) and 0 < auc < 1
    assert len(learn.recorder.values) == 3
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) == 3 and f'auc {auc:.4f}' in lines[-1] and 'epoch  3/3' in lines[-1]
    assert '\r' not in out and '█' not in out  # no bar in a log file


def test_a_run_depends_on_its_seed_and_not_on_its_workers(noise):
    finals = []
    for seed, workers in ((0, 0), (0, 2), (1, 0)):
        learn, downsample = make(noise, seed=seed, workers=workers)
        learn.fit_one_cycle(2, 1e-3, cbs=[downsample, SeedEpoch(seed, fold=0)])
        finals.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])


def test_each_epoch_and_each_fold_draws_its_own():
    def draw(seed, fold, epoch):
        loader = SimpleNamespace(rng=None)
        callback = SeedEpoch(seed, fold)
        callback.learn = SimpleNamespace(epoch=epoch, dls=SimpleNamespace(train=loader))
        callback.before_epoch()
        return torch.rand(1).item(), np.random.rand(), loader.rng.random()

    draws = [draw(*each) for each in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert draw(0, 0, 0) == draws[0]
    for of_generator in zip(*draws, strict=True):
        assert len(set(of_generator)) == 4


def test_accumulated_batches_step_as_one_large_batch_does_and_the_last_group_too(noise):
    """A model without batch normalization, no augmentation; 13 images: groups of 4, 4, 4 and 1."""
    paths, targets = noise.cached[:13], noise.target[:13]
    tfms = batch_tfms(CONFIG['mean'], CONFIG['std'])
    plain = [tfm for tfm in tfms if not isinstance(tfm, Augment)]
    finals, steps = [], []
    for batch_size, accumulate in ((4, 1), (2, 2), (4, 2)):
        dl = data.loader(paths, targets, plain, batch_size)  # in order
        torch.manual_seed(0)
        net = model.create('test_vit', 64)
        learn = create_learner(DataLoaders(dl, dl), net, accumulate=accumulate)
        # AdamW would make whole steps of what differs by rounding alone
        learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
        record = Record()
        record.order = 50  # before_step comes this far where a step is made
        learn.fit(2, 0.1, cbs=[record])
        finals.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
        steps.append(len(record.rates))
    assert steps == [8, 8, 4]
    assert torch.allclose(finals[0], finals[1], atol=1e-6)
    assert not torch.allclose(finals[0], finals[2], atol=1e-4)
    learn, _ = make(noise, accumulate=3)
    assert [cb.n for cb in learn.cbs if isinstance(cb, Accumulate)] == [3]


def test_in_bf16_the_cpu_computes_in_half_and_keeps_single_weights(noise):
    learn, downsample = make(noise, precision='bf16')
    seen = set()
    conv = next(m for m in learn.model.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_hook(lambda m, x, out: seen.add((learn.training, out.dtype)))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*CUDA.*')  # nothing that a user could act on
        learn.fit_one_cycle(1, 1e-3, cbs=[downsample])
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())
    assert not torch.is_autocast_enabled('cpu')
    assert np.isfinite(learn.recorder.values[-1]).all()


def test_the_range_test_runs_to_its_end_and_puts_the_weights_back(
    noise, tmp_path, monkeypatch, capsys
):
    made, before = [], {}
    its_own = train.make_learner

    def kept(*args):  # four steps an epoch: a miscounted epoch would end the test early
        made.append(its_own(*args))
        before.update({k: v.clone() for k, v in made[0][0].model.state_dict().items()})
        return made[0]

    monkeypatch.setattr(train, 'make_learner', kept)
    run = Run(tmp_path)
    train.find_rates(run, 0, noise, CONFIG | {'accumulate': 2}, None, 0, 'fp32')
    (learn, _), n = made[0], 200  # batches: 100 steps of the optimizer
    rates = learn.recorder.lrs
    assert len(rates) == n and rates[0] == pytest.approx(1e-7) and rates[-1] > 5
    lrs, losses = read_range_test(learn.recorder, n)
    assert len(lrs) == len(losses) <= n and np.isfinite(losses).all()
    lr_min, lr_max = suggest_rates(lrs, losses)
    assert f'--lr_min {lr_min:.1e} (roughly) --lr_max {lr_max:.1e}' in capsys.readouterr().out
    assert (run.fold(0) / 'lr_find.png').exists()
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_a_range_test_is_read_up_to_the_first_loss_that_is_not_finite():
    class Recorder:
        lrs, losses = [1e-7, 1e-6, 1e-5], [torch.tensor(0.7), torch.tensor(float('inf')), 0.6]

    lrs, losses = read_range_test(Recorder, 3)
    assert lrs.tolist() == [1e-7] and losses == pytest.approx([0.7])
    with pytest.raises(RuntimeError, match='made 3 of 100 steps'):
        read_range_test(Recorder, 100)


def test_the_suggestion_is_read_off_where_the_loss_falls_and_where_it_is_lowest():
    lrs = np.logspace(-7, 1, 81)
    for start, end in ((-4, -2), (-5, -4.5), (-1.2, -0.9)):  # gentle, and steep at either end
        losses = np.interp(np.log10(lrs), [-7, start, end, 1], [0.7, 0.7, 0.3, 9])
        lr_min, lr_max = suggest_rates(lrs, losses)
        tenth = 10 ** (start + 0.1 * (end - start))  # where a tenth of the fall is made
        assert lr_max == pytest.approx(10 ** (end - 1))
        assert lr_min == pytest.approx(min(tenth, lr_max), rel=0.3)
    for hopeless in (np.linspace(0.7, 9, 81), np.empty(0)):
        with pytest.raises(Stop, match='falls no further'):
            suggest_rates(lrs[: len(hopeless)], hopeless)


def test_nothing_is_suggested_on_noise_and_a_true_fall_is_found_through_it():
    """100 steps of batch noise .15, smoothed as fastai does; before, 76 % of noise was read."""
    rng, lrs = np.random.default_rng(0), np.logspace(-7, 1, 100)

    def smooth(losses):
        value, out = 0.0, []
        for k, loss in enumerate(losses):
            value = 0.98 * value + 0.02 * loss
            out.append(value / (1 - 0.98 ** (k + 1)))
        return np.array(out)

    def share(curve):
        suggested = 0
        for _ in range(200):
            with contextlib.suppress(Stop):
                suggest_rates(lrs, smooth(curve + rng.normal(0, 0.15, 100)))
                suggested += 1
        return suggested / 200

    true = np.interp(np.log10(lrs), [-7, -5, -2, -1, 1], [0.7, 0.7, 0.3, 0.35, 9])
    assert share(np.full(100, 0.69)) < 0.3
    assert share(true) > 0.9


def test_a_training_cut_off_twice_ends_as_if_it_never_was(noise, tmp_path):
    whole, _ = fit(noise, tmp_path / 'whole', epochs=4)
    _, first = fit(noise, tmp_path / 'cut', epochs=4, workers=2, cut=1)
    assert (first.resumed, first.done) == (0, 1)
    _, second = fit(noise, tmp_path / 'cut', epochs=4, cut=3)
    assert (second.resumed, second.done) == (1, 3)
    learn, _ = fit(noise, tmp_path / 'cut', epochs=4, workers=2)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, learn.model.state_dict()[key]), key
    a, b = (pd.read_csv(tmp_path / d / 'history.csv') for d in ('whole', 'cut'))
    assert a.epoch.tolist() == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(a.drop(columns='seconds'), b.drop(columns='seconds'))


def test_a_training_begun_in_half_precision_goes_on_in_single(noise, tmp_path):
    fit(noise, tmp_path, cut=1, precision='bf16')
    learn, resume = fit(noise, tmp_path)
    assert resume.resumed == 1 and {p.dtype for p in learn.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(('following', 'kept'), [(False, [1, 4]), (True, [])])
def test_a_state_is_saved_where_saving_costs_little_and_after_the_last_epoch(
    noise, tmp_path, monkeypatch, following, kept
):
    monkeypatch.setattr(ranks, 'following', following)  # a launcher's first process saves
    learn, downsample = make(noise, seed=7)
    history = History(tmp_path / 'history.csv', 0)
    resume = Resume(tmp_path / 'state.pt', 0, history)
    resume.rest, saves = 1e9, []
    resume._keep = saves.append
    learn.fit_one_cycle(4, 1e-2, cbs=[downsample, SeedEpoch(0, 0), history, resume])
    assert saves == kept  # the first tells what a save costs
    assert len(history.rows) == 4 and (tmp_path / 'state.pt').exists() != following


def test_a_state_that_is_broken_or_a_strangers_is_refused_and_runs_no_code(noise, tmp_path):
    fit(noise, tmp_path, epochs=2, cut=1)
    path = tmp_path / 'state.pt'
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    marker = tmp_path / 'code ran'
    torch.save({**state, 'rows': Malicious(marker)}, tmp_path / 'zip.pt')
    first = next(iter(state['model']))
    torch.save({**state, 'model': {**state['model'], first: torch.zeros(1)}}, tmp_path / 'net.pt')
    bad = {
        'zip': (tmp_path / 'zip.pt').read_bytes(),
        'pickle': pickle.dumps(Malicious(marker)),
        'half': whole[: len(whole) // 2],
        'empty': b'',
        'text': b'no state',
        'another model': (tmp_path / 'net.pt').read_bytes(),
    }
    for name, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(Stop, match=r'state\.pt is not a state of this training .*; delete it'):
            fit(noise, tmp_path, epochs=2)
        assert not marker.exists(), name
        assert path.read_bytes() == content
    path.write_bytes(whole)
    for name, wrong in (('of fold 3', {'fold': 3}), ('5 epochs', {'epochs': 5})):
        torch.save({**state, **wrong}, path)
        with pytest.raises(Stop, match=name):
            fit(noise, tmp_path, epochs=2)
    pickle.loads(bad['pickle'])
    assert marker.exists()  # the witness works
