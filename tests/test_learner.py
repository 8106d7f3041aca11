"""The schedule, the optimizer, the epoch's line, resuming and the range test of train.py itself,
against outside witnesses."""

import json
import pickle
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK, Malicious
from fastai.vision.all import (
    BCEWithLogitsLossFlat,
    Callback,
    DataLoaders,
    Learner,
    OptimWrapper,
    get_model,
)
from sklearn.metrics import roc_auc_score

from lib import data, model, ranks
from lib.augment import Augment, batch_tfms
from lib.callbacks import History, SeedEpoch
from lib.learner import accumulation

SLOW = ['--lr_min', 1e-4, '--lr_max', 1e-3]


class Cut(Callback):
    """Ctrl-C in the second step of an epoch."""

    def __init__(self, epoch):
        self.at = epoch

    def before_step(self):
        if (self.epoch, self.iter) == (self.at, 1):
            raise KeyboardInterrupt


class Record(Callback):
    """Keep the first weights, what torch's optimizer has in each step, and of the last epoch its
    seed and its predictions."""

    order = 50  # before_step comes this far where a step is made

    def before_fit(self):
        self.steps, self.n_batches, self.start = [], len(self.dls.train), weights(self)

    def before_step(self):
        (group,) = self.opt.opt.param_groups
        self.steps.append((group['lr'], *group['betas'], group['weight_decay']))

    def before_validate(self):
        self.logits, self.truths, self.last_seed = [], [], torch.initial_seed()

    def after_batch(self):
        if not self.training:
            self.logits.append(self.pred.detach())
            self.truths.append(self.y)


def weights(learn) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def test_rates_and_betas_of_train_py_are_torchs_one_cycle_to_within_one_step(fitted, noise):
    low, high, record = 5e-6, 2e-4, Record()
    fitted('--lr_min', low, '--lr_max', high, '--neg_ratio', 0.5, epochs=8, cbs=[record])
    ours, n = np.array(record.steps), len(record.steps)
    assert n == 8 * record.n_batches == 32
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=high)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, high, total_steps=n, pct_start=0.25, div_factor=high / low, final_div_factor=1
    )
    witness = []
    for _ in range(n):
        witness.append((optimizer.param_groups[0]['lr'], *optimizer.param_groups[0]['betas']))
        optimizer.step()
        theirs.step()
    witness = np.array(witness)
    assert (witness[:, 1].min(), witness[:, 1].max()) == pytest.approx((0.85, 0.95))
    assert ours[0, 0] == pytest.approx(low) and ours[:, 0].max() == pytest.approx(high)
    assert ours[-1, 0] < 2 * low + 0.02 * high  # and back
    assert (ours[:, 1].min(), ours[:, 1].max()) == pytest.approx((0.85, 0.95))
    for i, values in enumerate(ours):  # between torch's values of the step before and after
        around = witness[max(0, i - 1) : i + 2]
        assert (values[:3] >= around.min(0) - 1e-8).all() and (
            values[:3] <= around.max(0) + 1e-8
        ).all()


def test_the_optimizer_is_adamw_with_the_decay_that_was_asked_for_on_every_parameter(fitted):
    learn = fitted('--wd', 0.03, epochs=1, cbs=[record := Record()])
    assert isinstance(learn.opt.opt, torch.optim.AdamW)
    assert {decay for *_, decay in record.steps} == {0.03}
    (group,) = learn.opt.opt.param_groups
    assert group['eps'] == 1e-8 and len(group['params']) == len(list(learn.model.parameters()))


def test_the_epochs_line_is_scikit_learns_auc_and_the_history_holds_every_epoch(fitted, noise_home):
    learn = fitted(*SLOW, epochs=3, cbs=[record := Record()])
    auc = roc_auc_score(torch.cat(record.truths), torch.cat(record.logits)[:, 0])
    table = pd.read_csv(noise_home / 'runs' / 'r' / 'fold0' / 'history.csv')
    assert table.epoch.tolist() == [1, 2, 3] and len(learn.recorder.values) == 3
    assert table.auc.iloc[-1] == pytest.approx(auc) and 0 < auc < 1
    assert table[['train_loss', 'valid_loss']].to_numpy() == pytest.approx(
        np.array(learn.recorder.values)[:, :2]
    )
    lines = [line for line in learn.said.splitlines() if line.startswith('fold 0 epoch')]
    assert len(lines) == 1 and f'auc {auc:.4f}' in lines[0] and 'epoch  3/3' in lines[0]
    assert f'valid {table.valid_loss.iloc[-1]:#.4g}  ' in lines[-1]
    assert '\r' not in learn.said and '█' not in learn.said  # no bar in a log file
    about = json.loads((noise_home / 'runs' / 'r' / 'fold0' / 'run.json').read_text())
    assert about['seconds'] == pytest.approx(table.seconds.sum(), abs=0.1)


@pytest.mark.parametrize(
    ('train', 'valid', 'says'),
    [
        ([0.7, 0.4], [0.5, 0.6], ''),  # no worse than a coin
        ([0.7, 0.4], [0.9, 0.8], ''),
        ([0.7, 0.4], [0.6, 3e32], 'warning: the valid_loss of fold 3 ends at 3e+32, above its'),
        ([0.7, 0.8], [0.6, 0.6], 'warning: the train_loss of fold 3 ends at 0.8, above its start'),
    ],
)
def test_a_loss_that_ends_above_its_start_is_told(train, valid, says, tmp_path, capsys):
    history = History(tmp_path / 'history.csv', 3)
    history.rows = pd.DataFrame({'train_loss': train, 'valid_loss': valid}).to_dict('records')
    history.bar = mock.Mock()
    history.after_fit()
    said = capsys.readouterr().out
    assert said.startswith(says) and said.count('\n') == bool(says)


def test_a_run_depends_on_its_seed_and_not_on_its_workers(fitted):
    def train(seed, workers) -> list[torch.Tensor]:
        learn = fitted('--seed', seed, '--workers', workers, *SLOW, cbs=[record := Record()])
        drawn = torch.tensor(sorted(learn.dls.train.get_idxs()))
        return [weights(learn), record.start, torch.tensor(record.last_seed), drawn]

    for first, again, other in zip(train(0, 0), train(0, 2), train(1, 0), strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_each_epoch_each_fold_and_each_process_of_a_launcher_draws_its_own(monkeypatch):
    def draw(seed, fold, epoch):
        loader = SimpleNamespace(rng=None)
        callback = SeedEpoch(seed, fold)
        callback.learn = SimpleNamespace(epoch=epoch, dls=SimpleNamespace(train=loader))
        callback.before_epoch()
        return torch.rand(1).item(), np.random.rand(), loader.rng.random()

    draws = [draw(*each) for each in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert draw(0, 0, 0) == draws[0]
    monkeypatch.setattr(ranks, 'RANK', 1)
    for of_generator in zip(*draws, draw(0, 0, 0), strict=True):
        assert len(set(of_generator)) == 5


def test_accumulated_batches_step_as_one_large_batch_does(noise):
    """A model without batch normalization, no augmentation; 16 images: four groups of 4."""
    paths, targets, stats = noise.cached[:16], noise.target[:16], ([0.5] * 3, [0.5] * 3)
    plain = [tfm for tfm in batch_tfms(*stats) if not isinstance(tfm, Augment)]
    finals, steps = [], []
    for batch_size, accumulate in ((4, 1), (2, 2), (4, 2)):
        dl = data.loader(paths, targets, plain, batch_size)  # in order
        torch.manual_seed(0)
        learn = Learner(
            DataLoaders(dl, dl),
            model.create('test_vit', 64),
            BCEWithLogitsLossFlat(),
            # AdamW would make whole steps of what differs by rounding alone
            opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9),
            cbs=[*accumulation(batch_size, accumulate), record := Steps()],
        )
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 0.1)
        finals.append(weights(learn))
        steps.append(record.n)
    assert steps == [8, 8, 4]
    assert torch.allclose(finals[0], finals[1], atol=1e-6)
    assert not torch.allclose(finals[0], finals[2], atol=1e-4)


class Steps(Callback):
    order = 50

    def before_fit(self):
        self.n = 0

    def before_step(self):
        self.n += 1


def test_train_py_makes_a_step_of_as_many_batches_as_asked_for(fitted):
    fitted('--accumulate', 3, cbs=[record := Record()])
    assert (record.n_batches, len(record.steps)) == (6, 4)  # of 24 images, in each of two epochs


def test_the_range_test_suggests_a_tenth_of_the_best_rate(noise_home, ok, monkeypatch):
    made, find = [], Learner.lr_find

    def noted(self, **options):  # eight batches an epoch: a miscount would end it early
        made.append((self, options['num_it']))
        return find(self, **options | {'num_it': 60})

    monkeypatch.setattr(Learner, 'lr_find', noted)
    flags = ['--batch_size', 2, '--neg_ratio', 0.5, '--accumulate', 2, '--name', 'rates']
    said = ok('train.py', '--home', noise_home, *QUICK, *flags, '--lr_find')
    ((learn, n),) = made
    assert n == 200  # 100 steps of two batches; here 60 batches do
    rates, losses = learn.recorder.lrs, learn.recorder.losses
    assert 30 < len(rates) <= 60 and rates[0] == pytest.approx(1e-7)
    lr_max = rates[6 + int(np.argmin(losses[6:-5]))] / 10
    assert f'--lr_min {lr_max / 40:.1e} --lr_max {lr_max:.1e}' in said
    made = [p for p in (noise_home / 'runs' / 'rates').rglob('*') if p.is_file()]
    assert [p.name for p in made] == ['lr_find.png'] and made[0].stat().st_size > 10_000


def test_a_training_cut_off_twice_ends_as_if_it_never_was(fitted, noise_home):
    whole = fitted(*SLOW, name='whole', epochs=4)
    fitted(*SLOW, '--workers', 2, name='cut', epochs=4, cbs=[Cut(1)], status=130)
    learn = fitted(*SLOW, name='cut', epochs=4, cbs=[Cut(3)], goes_on=True, status=130)
    assert 'goes on after epoch 1 of 4' in learn.said
    learn = fitted(*SLOW, '--workers', 2, name='cut', epochs=4, goes_on=True)
    assert 'goes on after epoch 3 of 4' in learn.said
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, get_model(learn.model).state_dict()[key]), key
    a, b = (
        pd.read_csv(noise_home / 'runs' / name / 'fold0' / 'history.csv')
        for name in ('whole', 'cut')
    )
    assert a.epoch.tolist() == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(a.drop(columns='seconds'), b.drop(columns='seconds'))


def test_a_bad_state_is_refused_and_runs_no_code(fitted, noise_home, refusal, tmp_path):
    fitted(cbs=[Cut(1)], name='bad', status=130)
    this = ['train.py', '--home', noise_home, '--name', 'bad', '--fold', 0, '--batch_size', 4]
    this += ['--epochs', 2, *QUICK]
    path = noise_home / 'runs' / 'bad' / 'fold0' / 'state.pt'
    whole, marker = path.read_bytes(), tmp_path / 'code ran'
    state = torch.load(path, weights_only=True)

    def change(**values) -> bytes:
        torch.save({**state, **values}, tmp_path / 'changed.pt')
        return (tmp_path / 'changed.pt').read_bytes()

    first, pickled = next(iter(state['model'])), pickle.dumps(Malicious(marker))
    bad = [
        (change(rows=Malicious(marker)), ''),
        (pickled, ''),
        (whole[: len(whole) // 2], ''),
        (b'', ''),
        (b'no state', ''),
        (change(model={**state['model'], first: torch.zeros(1)}), 'loading state_dict'),
        (change(fold=3), 'it is of fold 3'),
        (change(epochs=5), '5 epochs'),
    ]
    for content, says in bad:
        path.write_bytes(content)
        said = refusal(*this)
        assert 'state.pt is not a state of this training' in said and 'delete it' in said
        assert says in said and not marker.exists() and path.read_bytes() == content
    pickle.loads(pickled)
    assert marker.exists()  # the witness works
