"""What is meant for a GPU, as far as it can be seen without one; `tests/gpu.py` wants one."""

import gc
import json
import os
import weakref

import gpu
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback, noop

from lib import augment, callbacks, data, devices, images, learner, model, ranks, speed
from lib.cli import Stop

STATS = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    return gpu.images(tmp_path, 64, 24)


def trained(table, cbs=(), **options):
    """A Learner after an epoch of six steps or more, without an epoch's score."""
    callbacks.seed_all(0)
    dls, draw = data.training_dls(table, 0, augment.batch_tfms(*STATS), 4, 0, 0, 0)
    learn = learner.create_learner(dls, model.create('test_resnet', 64), 0.1, **options)
    learn.fit(1, 1e-3, cbs=[draw, callbacks.SeedEpoch(0, 0), *cbs])
    return learn


# --- which device


def old_driver() -> None:
    raise RuntimeError(
        'The NVIDIA driver is too old (found version 12020). Please update it at URL'
    )


def pretend(monkeypatch, capability=None, nodes=(), program=None, built='13.0', chosen=None):
    """A torch that holds 7.5 and later, and a card of this capability; else a driver too old."""
    about = {'get_arch_list': ['sm_75', 'sm_90a', 'compute_120'], 'get_device_name': 'Tesla'}
    about |= {'is_available': capability is not None, 'current_device': 0}
    for name, value in (about | {'get_device_capability': capability}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, 'init', old_driver)
    monkeypatch.setattr(torch.version, 'cuda', built)
    monkeypatch.setattr(devices, 'glob', lambda pattern: nodes)
    command = ['false'] if program is None else ['echo', program]
    run = devices.subprocess.run
    monkeypatch.setattr(devices.subprocess, 'run', lambda _, **options: run(command, **options))
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if chosen is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', chosen)


NODE, SMI = {'nodes': ['/dev/nvidia0']}, {'program': 'GPU 0: Tesla T4 (UUID: GPU-1)'}


@pytest.mark.parametrize(
    ('here', 'name'),
    [
        ({'capability': (7, 5)}, 'Tesla (cuda:0)'),
        ({'capability': (12, 0)}, 'Tesla (cuda:0)'),
        (NODE | {'chosen': ''}, 'cpu'),
        (NODE | {'chosen': '-1'}, 'cpu'),
        (SMI | {'built': None}, 'cpu'),  # a torch without CUDA
        ({}, 'cpu'),
        ({'program': 'No devices found.'}, 'cpu'),  # as on the login node of a cluster
    ],
)
def test_a_card_that_this_torch_serves_is_taken_else_the_cpu(here, name, monkeypatch):
    pretend(monkeypatch, **here)
    assert devices.describe(devices.choose_device()) == name and torch.backends.cudnn.benchmark


@pytest.mark.parametrize('here', [{'capability': (6, 0)}, NODE, NODE | {'chosen': '0'}, SMI])
def test_a_card_that_this_torch_cannot_use_is_told_with_what_to_do(here, monkeypatch):
    pretend(monkeypatch, **here)
    with pytest.raises(Stop, match=r'version 12020\)\. PyTorch| 6\.0, and 7\.5 is the least') as e:
        devices.choose_device()
    assert 'CUDA 12.6' in str(e.value) and 'CUDA_VISIBLE_DEVICES= ' in str(e.value)


# --- processes


def test_objects_go_by_gloo_and_tensors_by_nccl(monkeypatch):
    asked = {}
    init = 'torch.distributed.init_process_group'
    monkeypatch.setattr(init, lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr('atexit.register', noop)
    monkeypatch.setattr(ranks, 'WORLD', 2)
    ranks.join()
    assert (asked['backend'], asked['device_id']) == ('gloo', None)
    pretend(monkeypatch, (8, 0))
    ranks.join()
    assert asked['backend'] == 'cpu:gloo,cuda:nccl'
    assert asked['device_id'] == torch.device('cuda', 0)


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


def test_processes_average_their_gradients_once_a_group(table):
    class Note(Callback):
        order, run_valid, flags = 50, False, []

        def after_loss(self):
            self.flags.append(self.model.require_backward_grad_sync)

    trained(table, [note := Note()], accumulate=4)
    assert note.flags == [False, False, False, True, False, True]  # six batches of four


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


# --- the script for a machine with a card


def test_an_infinity_costs_a_step_alone_and_batches_add_up(tmp_path):
    assert gpu.accumulation(tmp_path)['gradients apart, of 1'] < 1e-4


def test_its_parts_are_processes_of_their_own_and_go_on_after_a_failure(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:  # without what `demo` leaves, `compiled` fails
        gpu.main(cpu=True, only='compiled,environment', out=str(tmp_path / 'gpu.json'))
    report = json.loads((tmp_path / 'gpu.json').read_text())
    assert 'FAILED' in report['compiled'] and report['environment']['device'] == 'cpu'
    assert end.value.code == 1 and 'compiled FAILED' in capsys.readouterr().out
