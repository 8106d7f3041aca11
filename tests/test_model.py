"""A timm model with one Linear layer; its statistics; weights that fit or are refused."""

import ast

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT
from torch import nn

from lib import model
from lib.cli import Stop

ARCH = 'test_resnet'


def body(net) -> dict:
    return {k: v for k, v in net.state_dict().items() if not k.startswith('fc.')}


def test_one_linear_layer_sits_on_the_pooled_features():
    net = model.create('efficientnet_b0', 64).eval()
    assert isinstance(net.classifier, nn.Linear) and net.classifier.out_features == 1
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = net.forward_features(x).mean((2, 3))
        assert torch.allclose(net(x), net.classifier(pooled), atol=1e-5)


def test_statistics_are_the_models_own_pretrained_or_not():
    assert model.about('tf_efficientnet_lite0')['mean'] == [0.5, 0.5, 0.5]
    about = model.about('efficientnet_b5')
    assert about['mean'] == [0.485, 0.456, 0.406] and about['std'] == [0.229, 0.224, 0.225]
    assert about['tag'] == 'sw_in12k_ft_in1k'
    assert model.about('efficientnet_b5.sw_in12k')['tag'] == 'sw_in12k'


def test_an_unknown_architecture_is_refused_with_near_names():
    with pytest.raises(Stop, match='efficientnet_b5'):
        model.about('eficientnet_b5')
    with pytest.raises(Stop, match='nope'):
        model.about('efficientnet_b5.nope')


def test_local_weights_fill_the_body_and_leave_the_head_new(tmp_path):
    other = timm.create_model(ARCH)  # a thousand classes, as the files on the hub
    safetensors.torch.save_file(other.state_dict(), tmp_path / 'w.safetensors')
    net = model.create(ARCH, 64, weights=tmp_path / 'w.safetensors')
    assert net.fc.out_features == 1
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in body(net).items())


def test_weights_of_another_architecture_are_refused_with_the_names(shared):
    path = shared / 'weights' / 'tf_efficientnet_lite0.safetensors'
    model.create('tf_efficientnet_lite0', 64, weights=path)
    with pytest.raises(Stop, match=r'(?s)64 of 358 tensors.*se\.conv'):
        model.create('efficientnet_b0', 64, weights=path)  # timm itself would take it


def test_a_file_that_is_no_safetensors_is_refused_unread(tmp_path):
    torch.save({'fc.weight': torch.zeros(1)}, tmp_path / 'w.pth')
    with pytest.raises(Stop, match='no safetensors file'):
        model.create(ARCH, 64, weights=tmp_path / 'w.pth')
    with pytest.raises(Stop, match='there is no file'):
        model.create(ARCH, 64, weights=tmp_path / 'absent')


def test_without_a_hub_the_error_names_both_ways_out():
    with pytest.raises(Stop, match=r'--weights FILE.*--nopretrained'):
        model.create('resnet18', 64, pretrained=True)  # conftest keeps the hub out of reach


def test_what_is_saved_is_loaded_and_nothing_else(tmp_path):
    net = model.create(ARCH, 64).to(memory_format=torch.channels_last)
    model.save(net, tmp_path / 'model.safetensors')
    again = model.load(ARCH, 64, tmp_path / 'model.safetensors')
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    with pytest.raises(Stop, match='does not hold the weights of resnet18'):
        model.load('resnet18', 64, tmp_path / 'model.safetensors')


def test_a_transformer_takes_the_size_that_is_asked_for():
    net = model.create('test_vit', 96)
    assert net(torch.zeros(1, 3, 96, 96)).shape == (1, 1)


def trained_like(arch):
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


def norms(net) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


@pytest.mark.parametrize('arch', ['test_resnet', 'efficientnet_b0', 'mobilenetv3_small_050'])
def test_for_inference_all_normalization_is_folded_and_the_features_stay(arch):
    net, x = trained_like(arch), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = net(x), net.forward_features(x)
        fast = model.for_inference(net, 64)
        assert norms(net) > 0 and norms(fast) == 0
        atol = 1e-4 * float(features.abs().max())
        assert torch.allclose(fast.forward_features(x), features, atol=atol)
        assert torch.allclose(fast(x), logits, atol=1e-4)


def test_a_normalization_of_what_something_else_reads_too_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 1)

        def forward_features(self, x):
            x = self.conv(x)
            return self.bn(x) + x

        def forward(self, x):
            return self.fc(self.forward_features(x).mean((2, 3)))

        def get_classifier(self):
            return self.fc

    torch.manual_seed(0)
    net = Both().eval()
    nn.init.normal_(net.bn.running_mean)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = net(x)
        assert torch.allclose(model.for_inference(net, 8)(x), before, atol=1e-5)


def test_in_half_precision_the_last_layer_alone_is_single():
    fast = model.for_inference(trained_like('efficientnet_b0'), 64, 'bf16')
    assert fast.conv_stem.weight.dtype == torch.bfloat16
    assert fast.classifier.weight.dtype == torch.float32
    x = torch.randn(2, 3, 64, 64).bfloat16()
    with torch.no_grad():
        assert fast(x).dtype == torch.float32


def test_compiling_without_a_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(Stop, match='compiler, and there is no no-such-compiler'):
        model.check_compiler()


UNPICKLERS = {
    'pickle', 'cPickle', 'dill', 'joblib', 'shelve', 'cloudpickle', 'marshal', 'load_learner',
    'read_pickle', 'eval', 'exec', 'unsafe_load', 'allow_pickle', 'jit', 'hub',
}  # fmt: skip


def unpickles(source: str) -> list[str]:
    """What in a source could run code that a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, field, None) for field in ('id', 'attr', 'module', 'arg')]
        if isinstance(node, ast.Attribute) and node.attr == 'eval':  # a model's, of no text
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.name for alias in node.names]
        words = {word for name in names if isinstance(name, str) for word in name.split('.')}
        found += sorted(words & UNPICKLERS)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ('torch.load', 'load'):
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if flags.get('weights_only') != 'True':
                found.append(ast.unparse(node))
    return found


def test_no_source_unpickles_what_could_run_code():
    sources = [*ROOT.glob('*.py'), *ROOT.glob('lib/*.py')]
    assert len(sources) > 15
    for path in sources:
        assert not unpickles(path.read_text()), path


@pytest.mark.parametrize(
    'source',
    [
        'import pickle',
        'from fastai.vision.all import load_learner',
        'import pandas as pd; pd.read_pickle(p)',
        'torch.load(p)',
        'torch.load(p, weights_only=False)',
        'np.load(p, allow_pickle=True)',
        'eval(text)',
    ],
)
def test_the_search_for_unpickling_finds_it(source):
    assert unpickles(source)
