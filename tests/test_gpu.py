"""What is meant for a GPU, as far as it can be seen without one; `tests/gpu.py` wants one."""

import gc
import json
import os
import weakref

import gpu
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback, TensorImage, noop

from lib import augment, callbacks, cli, data, devices, images, learner, model, ranks, speed, tta
from lib.cli import Stop
from lib.parts import DRAWS, Settings

STATS = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    return gpu.images(tmp_path, 64, 24)


def trained(table, cbs=(), epochs=1, **options):
    """A Learner after an epoch of six steps or more, without an epoch's score."""
    callbacks.seed_all(0)
    dls, draw = data.training_dls(table, 0, augment.batch_tfms(*STATS), 4, 0, 0, 0)
    learn = learner.create_learner(dls, model.create('test_resnet', 64), 0.1, **options)
    learn.fit(epochs, 1e-3, cbs=[draw, callbacks.SeedEpoch(0, 0), *cbs])
    return learn


# --- which device


def pretend(monkeypatch, capability: tuple[int, int]) -> None:
    """A card of this capability, and a torch that holds 7.5 and later."""
    arches = ['sm_75', 'sm_90a', 'compute_120']
    about = {'is_available': True, 'get_arch_list': arches, 'current_device': 0}
    about |= {'get_device_capability': capability, 'get_device_name': 'Tesla'}
    for name, value in about.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.delenv('LOCAL_RANK', raising=False)


def test_a_card_that_is_too_old_for_this_torch_is_told_so(monkeypatch):
    pretend(monkeypatch, (6, 0))
    with pytest.raises(
        Stop, match=r'Tesla has compute capability 6\.0, and 7\.5 is the least'
    ) as e:
        devices.choose_device()
    assert 'CUDA 12.6' in str(e.value) and 'CUDA_VISIBLE_DEVICES= ' in str(e.value)


@pytest.mark.parametrize('capability', [(7, 5), (8, 9), (12, 0)])
def test_a_card_that_this_torch_serves_is_taken_and_named(monkeypatch, capability):
    pretend(monkeypatch, capability)
    assert devices.choose_device() == torch.device('cuda', 0) and torch.backends.cudnn.benchmark
    assert devices.describe(devices.choose_device()) == 'Tesla (cuda:0)'


def old_driver() -> None:
    raise RuntimeError(
        'The NVIDIA driver is too old (found version 12020). Please update it at URL'
    )


@pytest.mark.parametrize('chosen', [None, '', '-1', '0'])
def test_an_old_driver_is_told_unless_the_cpu_was_chosen(monkeypatch, chosen):
    pretend(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'init', old_driver)
    monkeypatch.setattr(devices, 'glob', lambda pattern: ['/dev/nvidia0'])
    if chosen is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', chosen)
    if chosen in ('', '-1'):
        assert devices.choose_device() == torch.device('cpu')
        assert devices.describe(torch.device('cpu')) == 'cpu'
    else:
        with pytest.raises(Stop, match=r'too old \(found version 12020\)\. PyTorch'):
            devices.choose_device()


def test_without_a_card_or_without_cuda_in_torch_the_cpu_is_taken(monkeypatch):
    pretend(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'init', old_driver)
    monkeypatch.setattr(devices, 'glob', lambda pattern: [])
    monkeypatch.setattr(devices.shutil, 'which', lambda program: None)
    assert devices.choose_device() == torch.device('cpu')
    monkeypatch.setattr(devices.shutil, 'which', lambda program: '/usr/bin/nvidia-smi')
    with pytest.raises(Stop):
        devices.choose_device()
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert devices.choose_device() == torch.device('cpu')


# --- what was recorded on another device


def test_no_recorded_precision_is_used_on_another_device(table, tmp_path):
    made = {'n_tta': 2, 'seed': 0, 'batch_size': 8, 'precision': 'fp16', 'draws': DRAWS}
    assert Settings(2, 0, 8, 'auto').matches(made)  # content with it, and itself resolved anew:
    assert speed.inference_precision('auto', torch.device('cpu')) == 'fp32'
    with pytest.raises(Stop, match='may be auto, fp32, bf16, not fp16'):
        speed.inference_precision('fp16', torch.device('cpu'))
    history = callbacks.History(tmp_path / 'history.csv', 0)
    save = callbacks.Resume(tmp_path / 'state.pt', 0, history)

    class Stopped(Callback):
        order = 70

        def after_epoch(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(table, [history, save, Stopped()], epochs=2, precision='bf16')
    history = callbacks.History(tmp_path / 'history.csv', 0)
    go_on = callbacks.Resume(tmp_path / 'state.pt', 0, history)
    learn = trained(table, [history, go_on], epochs=2, precision='fp32')
    assert (go_on.resumed, len(history.rows)) == (1, 2)
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}


# --- processes


@pytest.mark.parametrize(
    'files, cores',
    [
        ({'cpu.max': '250000 100000'}, 2),
        ({'cpu.max': '50000 100000'}, 1),
        ({'cpu.max': 'max 100000'}, 16),
        ({'cpu/cpu.cfs_quota_us': '400000\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 4),
        ({'cpu/cpu.cfs_quota_us': '-1\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 16),
        ({}, 16),
    ],
)
def test_the_cores_are_those_that_a_container_may_use(monkeypatch, tmp_path, files, cores):
    (tmp_path / 'cpu').mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(images, 'CGROUP', tmp_path)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(16)), raising=False)
    assert images.n_cores() == cores


@pytest.mark.parametrize(
    'cores, local, workers', [(64, 1, 8), (4, 1, 4), (4, 2, 2), (64, 16, 4), (1, 2, 1)]
)
def test_processes_that_read_images_share_the_cores(monkeypatch, table, cores, local, workers):
    monkeypatch.setattr(data, 'n_cores', lambda: cores)
    monkeypatch.setattr(data, 'choose_device', lambda: torch.device('cuda', 0))
    monkeypatch.setattr(ranks, 'LOCAL_WORLD', local)
    assert data.loader(table.cached, None, [], 1).fake_l.num_workers == workers


def test_objects_go_by_gloo_and_tensors_by_nccl(monkeypatch):
    asked = {}
    init = 'torch.distributed.init_process_group'
    monkeypatch.setattr(init, lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr('atexit.register', noop)
    monkeypatch.setattr(ranks, 'WORLD', 2)
    ranks.join()
    assert (asked['backend'], asked['device_id']) == ('gloo', None)
    pretend(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    ranks.join()
    assert asked['backend'] == 'cpu:gloo,cuda:nccl'
    assert asked['device_id'] == torch.device('cuda', 1)


def test_what_accelerate_has_saved_does_not_override_the_precision(monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'fp16')
    with ranks.visible():
        assert os.environ['ACCELERATE_MIXED_PRECISION'] == 'no'


def test_processes_average_their_gradients_once_a_group(table):
    class Note(Callback):
        order, run_valid, flags = 50, False, []

        def after_loss(self):
            self.flags.append(self.model.require_backward_grad_sync)

    trained(table, [note := Note()], accumulate=4)
    assert note.flags == [False, False, False, True, False, True]  # six batches of four


def test_messages_name_what_mends_them():
    full = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
    assert '--accumulate 2 --batch_size 4' in cli.explain(full)
    dead = RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error.')
    assert '--shm-size' in cli.explain(dead) and '--workers' in cli.explain(dead)


# --- memory, layout, types


def test_a_fold_is_free_before_the_next(table):
    gc.disable()  # it might come by itself
    try:
        weights = weakref.ref(trained(table).model)
        assert weights() is not None, 'nothing holds it: ready_memory need not look for it'
        speed.ready_memory(torch.device('cuda', 0))
        assert weights() is None
    finally:
        gc.enable()


def test_predictions_are_the_same_in_both_layouts():
    assert speed.layout(torch.device('cuda', 0)) == torch.contiguous_format
    assert speed.layout(torch.device('cpu')) == torch.channels_last
    x, preds = torch.rand(3, 3, 64, 64), []
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        net = model.create('test_efficientnet', 64).to(memory_format=torch.channels_last)
        net = model.ProbabilityModel(net, 4, 'fp32', layout)  # as after a training
        weights = [p for p in net.parameters() if p.dim() == 4]
        assert all(p.is_contiguous(memory_format=layout) for p in weights)
        preds.append(net(x).detach())
    torch.testing.assert_close(*preds)


def test_kornia_is_handed_plain_tensors_and_fastai_its_own():
    class Type(torch.nn.Module):
        def forward(self, x):
            self.seen = type(x)
            return x + 1

    seen = Type()
    out = augment.Augment([seen], order=20)(TensorImage(torch.zeros(1, 3, 2, 2)), split_idx=0)
    assert seen.seen is torch.Tensor and type(out) is TensorImage and out.min() == 1


def test_a_batch_of_prediction_has_no_targets(table):
    dls = data.prediction_dls(table, augment.batch_tfms(*STATS), 8)
    learn = tta.predictor(dls, model.create('test_resnet', 64), n_tta=1)
    (pred, plain), targets = learn.tta(n=1, beta=None)
    assert [len(b) for b in dls.valid] == [1] * 4 and targets is None
    assert pred.shape == plain.shape == (32, 1) and (pred != plain).any()


# --- when a training is saved


class Saves(Callback):
    """How many epochs are saved at each epoch's end."""

    order = 66

    def __init__(self, resume):
        self.resume, self.done = resume, []

    def after_epoch(self):
        self.done.append(self.resume.done)


@pytest.mark.parametrize(
    'rest, following, done',
    [(0, False, [1, 2, 3, 4]), (1e9, False, [1, 1, 1, 4]), (0, True, [0, 0, 0, 0])],
)
def test_a_training_is_saved_by_the_clock(table, tmp_path, monkeypatch, rest, following, done):
    monkeypatch.setattr(ranks, 'following', following)
    history = callbacks.History(tmp_path / 'history.csv', 0)
    resume = callbacks.Resume(tmp_path / 'state.pt', 0, history)
    resume.rest, saves = rest, Saves(resume)
    trained(table, [history, resume, saves], epochs=4)
    assert saves.done == done
    assert (tmp_path / 'state.pt').exists() != following


# --- the script for a machine with a card


def test_an_infinity_costs_a_step_alone_and_batches_add_up(tmp_path):
    assert gpu.accumulation(tmp_path)['gradients apart, of 1'] < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card')
def test_without_a_card_it_says_so_in_a_sentence():
    with pytest.raises(Stop, match='no CUDA card here; --cpu'):
        gpu.main()


def test_its_parts_are_processes_of_their_own_and_go_on_after_a_failure(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:  # without what `demo` leaves, `compiled` fails
        gpu.main(cpu=True, only='compiled,environment', out=str(tmp_path / 'gpu.json'))
    report = json.loads((tmp_path / 'gpu.json').read_text())
    assert 'FAILED' in report['compiled'] and report['environment']['device'] == 'cpu'
    assert end.value.code == 1 and 'compiled FAILED' in capsys.readouterr().out
