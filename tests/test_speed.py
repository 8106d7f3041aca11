"""Precision is a rule by device and a flag; nothing is timed or tried."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib import model, speed
from lib.cli import Stop

CPU, CUDA = torch.device('cpu'), torch.device('cuda:0')


@pytest.mark.parametrize(
    ('device', 'has_bf16', 'training', 'inference', 'known'),
    [
        (CPU, True, 'fp32', 'fp32', {'fp32', 'bf16'}),
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
    rules = {speed.training_precision: training, speed.inference_precision: inference}
    for choose, best in rules.items():
        assert choose('auto', device) == best
        assert all(choose(precision, device) == precision for precision in known)
        for precision in {'fp16', 'bf16', 'half', ''} - known:
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
    speed.compile(net)
    assert calls == [{'dynamic': False}]


def test_memory_is_kept_by_glibc_and_elsewhere_nothing_is_asked_for(monkeypatch):
    asked = {}
    library = SimpleNamespace(mallopt=asked.__setitem__)
    monkeypatch.setattr(speed.ctypes, 'CDLL', lambda name: library)
    for platform, options in (('darwin', set()), ('linux', {-1, -2, -3})):  # malloc.h's numbers
        monkeypatch.setattr(speed.sys, 'platform', platform)
        speed.ready_memory(CPU)
        assert set(asked) == options


def trained_like(arch: str) -> nn.Module:
    """A model whose batch normalizations do something."""
    torch.manual_seed(0)
    net = model.create(arch, 64)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


def norms(net: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


@pytest.mark.parametrize('arch', ['test_resnet', 'efficientnet_b0', 'mobilenetv3_small_050'])
def test_all_normalizations_are_folded_and_the_features_stay(arch):
    net, x = trained_like(arch), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = net(x), net.forward_features(x)
        folded = speed.fuse_batch_norms(net, 64)
        assert norms(net) > 0 and norms(folded) == 0
        atol = 1e-4 * float(features.abs().max())
        assert torch.allclose(folded.forward_features(x), features, atol=atol)
        assert torch.allclose(folded(x), logits, atol=1e-4)


def test_a_normalization_of_what_something_else_reads_too_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward_features(self, x):
            x = self.conv(x)
            return self.bn(x) + x

    torch.manual_seed(0)
    net = Both().eval()
    nn.init.normal_(net.bn.running_mean)
    assert speed.fuse_batch_norms(net, 8) is net
