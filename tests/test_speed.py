"""Precision is a rule by device and a flag; nothing is timed or tried."""

import pytest
import torch

from lib import speed
from lib.cli import Stop

CPU, CUDA = torch.device('cpu'), torch.device('cuda:0')


@pytest.mark.parametrize(
    ('device', 'has_bf16', 'training', 'inference'),
    [
        (CPU, True, 'fp32', 'fp32'),
        (CUDA, True, 'bf16', 'fp16'),
        (CUDA, False, 'fp16', 'fp16'),
        (torch.device('mps'), True, 'fp32', 'fp32'),
    ],
)
def test_the_precision_is_a_rule_by_device(device, has_bf16, training, inference, monkeypatch):
    def is_supported(including_emulation):
        assert not including_emulation  # emulated, it would be slower than fp32
        return has_bf16

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_supported)
    assert speed.training_precision('auto', device) == training
    assert speed.inference_precision('auto', device) == inference


@pytest.mark.parametrize(
    ('device', 'has_bf16', 'known'),
    [
        (CPU, True, {'fp32', 'bf16'}),
        (CUDA, True, {'fp32', 'fp16', 'bf16'}),
        (CUDA, False, {'fp32', 'fp16'}),
        (torch.device('mps'), True, {'fp32'}),
    ],
)
def test_the_precision_that_is_asked_for_is_taken_or_refused_with_what_there_is(
    device, has_bf16, known, monkeypatch
):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has_bf16)
    for choose in (speed.training_precision, speed.inference_precision):
        for precision in ('fp32', 'fp16', 'bf16', 'half', ''):
            if precision in known:
                assert choose(precision, device) == precision
                continue
            with pytest.raises(Stop, match=rf'\({device.type}\) may be auto, fp32') as refused:
                choose(precision, device)
            assert all(name in str(refused.value) for name in known)
            assert str(refused.value).endswith(f'not {precision}')


def test_compiling_is_in_place_and_without_a_compiler_it_is_one_sentence(monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    net = torch.nn.Linear(2, 1)
    with pytest.raises(Stop, match='compiler, and there is no no-such-compiler'):
        speed.compile(net)
    monkeypatch.setenv('CXX', 'true')
    calls = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **options: calls.append(options))
    assert speed.compile(net) is net and calls == [{'dynamic': False}]


def test_memory_is_kept_by_glibc_and_elsewhere_nothing_is_asked_for(monkeypatch):
    class Library:
        def __init__(self, name):
            self.asked = asked

        def mallopt(self, option, value):
            self.asked[option] = value

    asked = {}
    monkeypatch.setattr(speed.ctypes, 'CDLL', Library)
    monkeypatch.setattr(speed.sys, 'platform', 'darwin')
    speed.keep_memory()
    assert not asked
    monkeypatch.setattr(speed.sys, 'platform', 'linux')
    speed.keep_memory()
    assert asked == {-3: 32 << 20, -1: (2 << 30) - 1, -2: 256 << 20}  # malloc.h's numbers
