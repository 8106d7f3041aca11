"""The device, its precision by a rule and a flag, and the memory that is kept."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lib import devices
from lib.cli import Stop

CPU, CUDA = torch.device('cpu'), torch.device('cuda:0')
PASCAL = 'CUDA error: no kernel image is available for execution on the device\nSearch for it'


def has_card(monkeypatch, error: str | None = None) -> list[int]:
    """A torch that sees cards and computes on them, or fails; the numbers of those it is set to."""
    numbers = []

    def zeros(n, device):
        assert device == 'cuda'
        if error:
            raise RuntimeError(error)
        return torch.ones(n)

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *number: 'Tesla P100')
    monkeypatch.setattr(torch.cuda, 'set_device', numbers.append)
    monkeypatch.setattr(devices, 'default_device', lambda: torch.device('cuda', *numbers[-1:]))
    monkeypatch.setattr(devices, 'torch', SimpleNamespace(**{**vars(torch), 'zeros': zeros}))
    return numbers


@pytest.mark.parametrize(('local', 'number'), [(None, 0), ('0', 0), ('3', 3)])
def test_each_process_of_a_launcher_takes_the_card_of_its_local_number(local, number, monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    if local is not None:
        monkeypatch.setenv('LOCAL_RANK', local)
    numbers = has_card(monkeypatch)
    device = devices.choose_device()
    assert numbers == [number] and device == torch.device('cuda', number)
    assert devices.describe(device) == f'Tesla P100 (cuda:{number})'


def test_more_processes_of_a_launcher_than_cards_are_refused(monkeypatch):
    numbers = has_card(monkeypatch)
    monkeypatch.setattr(devices.ranks, 'LOCAL_WORLD', 4)
    devices.choose_device()
    monkeypatch.setattr(devices.ranks, 'LOCAL_WORLD', 5)
    with pytest.raises(Stop, match=r'5 processes .* need a GPU each, and there are 4'):
        devices.choose_device()
    assert len(numbers) == 1


def test_a_card_that_this_torch_has_no_code_for_is_told_with_what_to_do(monkeypatch):
    has_card(monkeypatch, error=PASCAL)
    with pytest.raises(Stop, match=r'cannot use Tesla P100 \(CUDA error: no kernel image') as e:
        devices.choose_device()
    assert 'older CUDA' in str(e.value) and 'CUDA_VISIBLE_DEVICES= ' in str(e.value)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    ('listed', 'chosen', 'is_told'),
    [
        ('GPU 0: Tesla T4 (UUID: GPU-1)', None, True),
        ('GPU 0: Tesla T4 (UUID: GPU-1)', '0', True),
        ('GPU 0: Tesla T4 (UUID: GPU-1)', '', False),
        ('GPU 0: Tesla T4 (UUID: GPU-1)', '-1', False),
        ('No devices found.', None, False),  # as on the login node of a cluster
        (None, None, False),
    ],
)
def test_a_card_that_torch_does_not_see_is_told_unless_it_is_hidden(
    listed, chosen, is_told, monkeypatch, tmp_path
):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if chosen is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', chosen)
    if listed is not None:
        program = tmp_path / 'nvidia-smi'
        program.write_text(f'#!/bin/sh\necho "$1 {listed}"')
        program.chmod(0o755)
    name = devices.describe(CPU)
    assert ('there is an NVIDIA card' in name and 'driver' in name) == is_told
    assert is_told or name == 'cpu'


@pytest.mark.parametrize(
    ('device', 'has_bf16', 'training', 'inference', 'known'),
    [
        (CPU, True, 'fp32', 'fp32', {'fp32', 'bf16'}),  # bf16 to predict only
        (CUDA, True, 'bf16', 'fp16', {'fp32', 'fp16', 'bf16'}),
        (CUDA, False, 'fp16', 'fp16', {'fp32', 'fp16'}),
        (torch.device('mps'), True, 'fp32', 'fp32', {'fp32'}),
    ],
)
def test_the_precision_is_a_rule_by_device_or_asked_for_and_refused_with_what_there_is(
    device, has_bf16, training, inference, known, monkeypatch
):
    def is_supported(including_emulation):
        assert not including_emulation  # emulated, it would be slower than fp32
        return has_bf16

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_supported)
    for is_training, best in ((True, training), (False, inference)):
        choose = partial(devices.choose_precision, training=is_training)
        here = known - {'bf16'} if device == CPU and is_training else known
        assert choose('auto', device) == best
        assert all(choose(precision, device) == precision for precision in here)
        for precision in {'fp16', 'bf16', 'half', ''} - here:
            with pytest.raises(Stop, match=rf'\({device.type}\) may be auto, fp32') as refused:
                choose(precision, device)
            assert all(name in str(refused.value) for name in here)
            assert str(refused.value).endswith(f'not {precision}')
    assert devices.scoring_precision('fp32', device) == 'fp32'
    assert devices.scoring_precision(training, device) == inference


def test_memory_is_kept_by_glibc_and_elsewhere_nothing_is_asked_for(monkeypatch):
    asked = {}
    library = SimpleNamespace(mallopt=asked.__setitem__)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(devices.ctypes, 'CDLL', lambda name: library)
    for platform, options in (('darwin', set()), ('linux', {-1, -2, -3})):  # malloc.h's numbers
        monkeypatch.setattr(devices.sys, 'platform', platform)
        devices.ready_memory()
        assert set(asked) == options
    monkeypatch.setattr(devices.ctypes, 'CDLL', lambda name: SimpleNamespace())
    devices.ready_memory()  # another C library has no mallopt
