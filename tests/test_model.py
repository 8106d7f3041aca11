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
    assert model.describe_arch('tf_efficientnet_lite0')['mean'] == [0.5, 0.5, 0.5]
    about = model.describe_arch('efficientnet_b5')
    assert about['mean'] == [0.485, 0.456, 0.406] and about['std'] == [0.229, 0.224, 0.225]
    assert about['tag'] == 'sw_in12k_ft_in1k'
    assert model.describe_arch('efficientnet_b5.sw_in12k')['tag'] == 'sw_in12k'


def test_an_unknown_architecture_is_refused_with_near_names():
    with pytest.raises(Stop, match='efficientnet_b5'):
        model.describe_arch('eficientnet_b5')
    with pytest.raises(Stop, match='nope'):
        model.describe_arch('efficientnet_b5.nope')


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
    with pytest.raises(Stop, match='not a safetensors file'):
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


@pytest.mark.parametrize('arch', [ARCH, 'test_vit'])
def test_a_model_to_predict_with_gives_the_sigmoid_of_its_logits_and_fills_up_a_small_batch(arch):
    torch.manual_seed(0)
    net = model.create(arch, 64).eval()
    shapes, x = [], torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        logits = net(x)
        ready = model.ProbabilityModel(net.train(), 8)
        net.register_forward_pre_hook(lambda layer, inputs: shapes.append(inputs[0].shape))
        probabilities = ready(x)
    assert probabilities.shape == (5, 1) and shapes == [(8, 3, 64, 64)]
    assert torch.allclose(probabilities, logits.sigmoid(), atol=1e-6)
    assert not any(m.training for m in ready.model.modules())


@pytest.mark.parametrize(
    ('precision', 'dtype'), [('bf16', torch.bfloat16), ('fp16', torch.float16)]
)
def test_in_half_precision_the_last_layer_alone_is_single(precision, dtype):
    net = model.create('efficientnet_b0', 64)
    seen = {}
    for name in ('conv_stem', 'classifier'):

        def note(layer, inputs, out, name=name):
            seen[name] = (inputs[0].dtype, layer.weight.dtype, out.dtype)

        getattr(net, name).register_forward_hook(note)
    with torch.no_grad():
        out = model.ProbabilityModel(net, 2, precision)(torch.randn(2, 3, 64, 64))
    assert seen == {'conv_stem': (dtype,) * 3, 'classifier': (torch.float32,) * 3}
    assert out.dtype == torch.float32


def test_a_distilled_transformer_has_several_last_layers():
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = (nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1))

        def get_classifier(self):
            return self.one, self.two

        def forward(self, x):
            x = self.body(x.mean((2, 3))[:, [0, 1, 2, 0]])
            return (self.one(x) + self.two(x)) / 2

    net = Distilled()
    ready = model.ProbabilityModel(net, 1, 'bf16')
    assert model.get_heads(net) == (net.one, net.two)
    assert len(model.get_heads(model.create(ARCH, 64))) == 1
    dtypes = [m.weight.dtype for m in (net.body, net.one, net.two)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    assert ready(torch.randn(1, 3, 8, 8)).dtype == torch.float32


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
