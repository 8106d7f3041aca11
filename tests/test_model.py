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


def test_statistics_are_the_models_own_pretrained_or_not():
    assert model.describe_arch('tf_efficientnet_lite0')['mean'] == [0.5, 0.5, 0.5]
    about = model.describe_arch('efficientnet_b5')
    assert about['mean'] == [0.485, 0.456, 0.406] and about['std'] == [0.229, 0.224, 0.225]
    assert about['tag'] == 'sw_in12k_ft_in1k'
    assert model.describe_arch('efficientnet_b5.sw_in12k')['tag'] == 'sw_in12k'


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
    ('arch', 'precision', 'half'),
    [
        ('efficientnet_b0', 'bf16', torch.bfloat16),
        ('efficientnet_b0', 'fp16', torch.float16),
        ('deit_tiny_distilled_patch16_224', 'bf16', torch.bfloat16),  # two last layers
    ],
)
def test_in_half_precision_the_last_layers_alone_are_single(arch, precision, half):
    net, seen = model.create(arch, 64), {}

    def note(layer, inputs, out):
        seen[layer] = (inputs[0].dtype, layer.weight.dtype, out.dtype)

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    with torch.no_grad():
        out = model.ProbabilityModel(net, 2, precision)(torch.randn(2, 3, 64, 64))
    heads = model.get_heads(net)
    assert len(seen) > 10 and set(heads) < set(seen)
    for layer, dtypes in seen.items():
        assert dtypes == ((torch.float32 if layer in heads else half),) * 3
    assert out.dtype == torch.float32


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
