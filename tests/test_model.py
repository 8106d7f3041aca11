"""A timm model with one Linear layer; its statistics; weights that fit or are refused."""

import pytest
import safetensors.torch
import timm
import torch
from conftest import contents
from torch import nn

from lib import model
from lib.cli import Stop
from lib.runs import Run

ARCH = 'test_resnet'


def body(net) -> dict:
    return {k: v for k, v in net.state_dict().items() if not k.startswith('fc.')}


def test_statistics_are_the_models_own_pretrained_or_not():
    assert model.describe_arch('tf_efficientnet_lite0')['mean'] == [0.5, 0.5, 0.5]
    about = model.describe_arch('efficientnet_b5')
    assert about['mean'] == [0.485, 0.456, 0.406] and about['std'] == [0.229, 0.224, 0.225]
    assert about['tag'] == 'sw_in12k_ft_in1k'
    assert model.describe_arch('efficientnet_b5.sw_in12k')['tag'] == 'sw_in12k'


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('tf_efficientnet_b5_ns', 'tf_efficientnet_b5.ns_jft_in1k'),
        ('gluon_seresnext101_32x4d', 'seresnext101_32x4d.gluon_in1k'),
    ],
)
def test_a_name_of_2020_is_the_one_that_timm_maps_it_to(old, new):
    about = model.describe_arch(old)
    assert about == model.describe_arch(new) and about['arch'] == new
    assert new.split('.')[1] == about['tag']


@pytest.mark.parametrize(
    ('arch', 'size'), [('test_vit', 100), ('maxvit_tiny_tf_224', 100), ('inception_v3', 64)]
)
def test_a_size_that_an_architecture_cannot_take_is_refused_before_anything_is_written(
    arch, size, noise_home, refusal
):
    before = contents(noise_home)
    train = ['train.py', '--home', noise_home, '--nopretrained', '--name', arch]
    said = refusal(*train, '--arch', arch, '--size', size)
    assert said.startswith(f'error: {arch} cannot take images of {size} pixels a side: ')
    assert contents(noise_home) == before and not (noise_home / 'runs' / arch).exists()


def test_an_old_name_trains_under_the_new_one(noise_home, ok, monkeypatch):
    """`test_resnet` as if timm had renamed it."""
    cfg, is_model, create = timm.get_pretrained_cfg, timm.is_model, timm.create_model
    monkeypatch.setattr(timm, 'get_pretrained_cfg', lambda a: None if a == 'old' else cfg(a))
    monkeypatch.setattr(timm, 'is_model', lambda a: a == 'old' or is_model(a))
    monkeypatch.setattr(
        timm, 'create_model', lambda a, *_, **o: create(a.replace('old', ARCH), **o)
    )
    train = ['train.py', '--home', noise_home, '--arch', 'old', '--nopretrained', '--size', 64]
    said = ok(*train, '--epochs', 1, '--batch_size', 4, '--name', 'old', '--fold', 0)
    assert 'timm has renamed old to test_resnet.r160_in1k' in said
    assert Run(noise_home / 'runs' / 'old').config['arch'] == 'test_resnet.r160_in1k'


def test_local_weights_fill_the_body_and_leave_the_head_new(tmp_path):
    other = timm.create_model(ARCH)  # a thousand classes, as the files on the hub
    safetensors.torch.save_file(other.state_dict(), tmp_path / 'w.safetensors')
    net = model.create(ARCH, 64, weights=tmp_path / 'w.safetensors')
    assert net.fc.out_features == 1
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in body(net).items())


def test_weights_of_another_architecture_are_refused_with_the_names(shared):
    path = shared / 'weights' / 'tf_efficientnet_lite0.safetensors'
    model.create('tf_efficientnet_lite0', 64, weights=path)
    with pytest.raises(Stop, match=r'another architecture or size: .*se\.conv'):
        model.create('efficientnet_b0', 64, weights=path)  # timm itself would take it


@pytest.mark.parametrize('arch', [ARCH, 'test_vit'])
def test_a_model_to_predict_with_gives_the_sigmoid_of_its_logits(arch):
    torch.manual_seed(0)
    net = model.create(arch, 64).eval()
    x = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        logits = net(x)
        ready = model.ProbabilityModel(net.train(), 64, 'fp32')
        probabilities = ready(x)
    assert probabilities.shape == (5, 1)
    assert torch.allclose(probabilities, logits.sigmoid(), atol=1e-6)
    assert not any(
        m.training for m in ready.modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout)
    )


@pytest.mark.parametrize('value', [float('inf'), -float('inf'), float('nan')])
def test_an_overflow_in_half_precision_is_no_certain_prediction(value):
    net = model.create(ARCH, 64)
    nn.init.constant_(net.fc.bias, value)
    with torch.no_grad():
        pred = model.ProbabilityModel(net, 64, 'fp32')(torch.zeros(1, 3, 64, 64))
    assert pred.isnan().all()


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


@pytest.mark.parametrize(
    ('arch', 'rest'),  # the stem of test_resnet ends in a convolution of another parent
    [(ARCH, 1), ('efficientnet_b0', 0), ('mobilenetv3_small_050', 0)],
)
def test_normalizations_are_folded_into_their_convolutions_and_the_features_stay(arch, rest):
    net, x = trained_like(arch), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = net(x), net.forward_features(x)
        folded = model.fuse_batch_norms(net, 64)
        assert norms(net) > 10 and norms(folded) == rest
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
    assert model.fuse_batch_norms(net, 8) is net


@pytest.mark.parametrize(
    ('arch', 'precision', 'half'),
    [
        ('efficientnet_b0', 'bf16', torch.bfloat16),
        ('efficientnet_b0', 'fp16', torch.float16),
        ('deit_tiny_distilled_patch16_224', 'bf16', torch.bfloat16),  # two last layers
    ],
)
def test_in_half_precision_the_last_layers_alone_are_single(arch, precision, half):
    ready, seen = model.ProbabilityModel(model.create(arch, 64), 64, precision), {}

    def note(layer, inputs, out):
        seen[layer] = (inputs[0].dtype, layer.weight.dtype, out.dtype)

    for layer in ready.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    with torch.no_grad():
        out = ready(torch.randn(2, 3, 64, 64))
    heads = model.get_heads(ready.model)
    assert len(seen) > 10 and set(heads) < set(seen)
    for layer, dtypes in seen.items():
        assert dtypes == ((torch.float32 if layer in heads else half),) * 3
    assert out.dtype == torch.float32
