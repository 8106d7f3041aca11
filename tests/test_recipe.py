"""What train.py's flags become: the values where they arrive, in a training by the script."""

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from fastai.vision.all import Callback

from lib import data, model, pictures


class Note(Callback):
    """Keeps which images are read in training and in scoring an epoch, in order, and the batches.

    With it, `data.PILImage.create` is to be `note.create`.
    """

    def __init__(self):
        self.begin, self.its_own, self.epochs, self.batches = [], data.PILImage.create, [], []
        self.reads = self.begin

    def create(self, path):
        self.reads.append(path.rsplit('/')[-1].split('.')[0])
        return self.its_own(path)

    def before_train(self):
        self.epochs.append({'train': [], 'valid': []})
        self.reads = self.epochs[-1]['train']

    def before_validate(self):
        self.reads = self.epochs[-1]['valid']

    def before_batch(self):
        if self.training:
            self.batches.append(self.xb[0].detach().clone())

    def after_fit(self):
        self.reads = self.end = []


@pytest.fixture
def note(monkeypatch) -> Note:
    note = Note()
    monkeypatch.setattr(data.PILImage, 'create', note.create)
    return note


def test_each_epoch_has_all_melanomas_of_other_folds_and_new_benign_images(note, noise, fitted):
    fitted('--neg_ratio', 0.5, epochs=3, cbs=[note])
    rows = noise.set_index('image_name')
    others = rows[rows.fold != 0]
    melanomas, benign = ({*others.index[others.target == k]} for k in (1, 0))
    assert (len(melanomas), len(benign)) == (10, 15)
    drawn = []
    for epoch in note.epochs:
        names = epoch['train']
        assert len(names) == len({*names}) == 16 and {*names} >= melanomas
        targets = rows.target[names].tolist()
        assert targets not in (sorted(targets), sorted(targets)[::-1])  # shuffled
        drawn.append({*names} - melanomas)
        assert drawn[-1] <= benign
    assert not drawn[0] & drawn[1] and drawn[0] | drawn[1] | drawn[2] == benign
    orders = [[name for name in epoch['train'] if name in melanomas] for epoch in note.epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_what_is_monitored_and_what_is_scored_is_the_held_out_fold(note, noise, fitted):
    # 15 images, 6 of them melanomas; a fold with more benign images is monitored in part
    learn = fitted(cbs=[note])
    held_out = noise[noise.fold == 0]
    for epoch in note.epochs:
        assert sorted(epoch['valid']) == sorted(held_out.image_name)
    # in the table's order, as oof.csv has them; fastai reads the first image once more
    assert list(dict.fromkeys(note.end)) == held_out.image_name.tolist()
    targets = torch.cat([y for _, y in learn.dls.valid])
    assert targets.tolist() == held_out.target.tolist()


def test_cutout_reaches_the_training_and_nothing_is_erased_without_it(note, fitted):
    shares = []
    for flags in ([], ['--cutout']):
        note.batches.clear()
        fitted(*flags, epochs=1, cbs=[note])
        erased = (torch.cat(note.batches) == 0).all(1)  # 0 is the mean colour, in all channels
        shares.append(erased.float().mean((1, 2)).numpy())
    assert shares[0].max() < 0.005
    assert 0.2 < (shares[1] > 0.01).mean() < 0.8 and shares[1].max() < 0.11


def test_local_weights_are_what_the_training_starts_from(fitted, tmp_path, monkeypatch):
    asked, create = [], model.create
    monkeypatch.setattr(model, 'create', lambda *args: asked.append(args) or create(*args))
    torch.manual_seed(1)
    net = timm.create_model('test_resnet')  # a thousand classes, as the files on the hub
    path = tmp_path / 'w.safetensors'
    safetensors.torch.save_file(net.state_dict(), path)
    flags = ['--arch', 'test_resnet', '--size', 64, '--weights', path]
    learn = fitted(*flags, '--lr_min', 1e-9, '--lr_max', 1e-9, epochs=1)
    theirs = dict(net.named_parameters())
    ours = {k: v for k, v in learn.model.named_parameters() if not k.startswith('fc.')}
    assert len(ours) > 10
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-7)
    assert {pretrained for _, _, pretrained, _ in asked} == {True}  # without a file, timm's


@pytest.mark.parametrize('loss', [float('inf'), float('nan')])
@pytest.mark.parametrize('phase', ['training', 'scoring'])
def test_a_loss_that_is_not_finite_stops_with_what_to_change(loss, phase, fitted):
    class Spoil(Callback):
        order = -1  # before the check

        def after_loss(self):
            if (self.epoch, self.training, self.iter) == (1, phase == 'training', 0):
                self.learn.loss = torch.tensor(loss)

    said = fitted(cbs=[Spoil()], status=1).said
    assert f'the loss is {loss} in fold 0, epoch 2, {phase} batch 1' in said
    assert 'take a smaller --lr_max' in said and '--precision fp32' in said


# The pictures of a run


def test_the_training_batch_is_drawn_as_the_model_sees_it_under_the_names_of_its_classes(fitted):
    figure = fitted('--neg_ratio', 0.5, epochs=1).figures['batch.png']
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 4 and {*titles} <= {'malignant', 'benign'}

    figures, y = [], torch.tensor([1.0, 0, 0, 1])
    x = torch.stack([torch.full((3, 8, 8), 1 - 2 * float(target)) for target in y])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, '_save', lambda figure, path: figures.append(figure))
        pictures.draw_batch(None, x, y, [0.5] * 3, [0.25] * 3)
    for axes, target in zip(figures[0].axes, y, strict=True):
        assert axes.get_title() == ('malignant' if target else 'benign')
        shown = axes.images[0].get_array()
        assert np.allclose(shown, 0.25 if target else 0.75)  # as in the file, not normalized


def test_the_curves_of_a_training_are_its_history(fitted, noise_home):
    figure = fitted(epochs=3).figures['history.png']
    table = pd.read_csv(noise_home / 'runs' / 'r' / 'fold0' / 'history.csv')
    loss, auc, lr = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in loss.lines}
    assert [name.split(',')[0] for name in drawn] == ['training', 'held out']
    np.testing.assert_allclose([*drawn.values()], [table.train_loss, table.valid_loss])
    assert 'AUC' in auc.get_ylabel() and 'rate' in lr.get_ylabel()
    np.testing.assert_allclose(auc.lines[0].get_ydata(), table.auc)
    np.testing.assert_allclose(lr.lines[0].get_ydata(), table.lr)
