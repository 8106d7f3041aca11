"""The Linear head starts as torch's own do, whatever timm makes of it."""

import math

import pytest
import timm
import torch
from torch import nn

from lib import augment, data, images, model
from lib.cli import Stop

ARCHS = [
    'efficientnet_b5',
    'resnet18',
    'convnext_atto',
    'deit_tiny_distilled_patch16_224',  # two heads
    'crossvit_9_240',  # one for each of two scales
    'repvit_m0_9',  # two, each within a module of its own
    'caformer_s18',  # the last layer of a small network
]


def scale(head: nn.Linear) -> float:
    """1 where the weights have the standard deviation of torch's own start."""
    return float(head.weight.detach().std()) * math.sqrt(3 * head.in_features)


@pytest.mark.parametrize('arch', ARCHS)
def test_the_head_of_every_architecture_starts_as_torchs_own(arch):
    torch.manual_seed(0)
    size = 240 if arch.startswith('crossvit') else 64 if arch.startswith('eff') else 224
    net = model.create(arch, size)
    heads = model.get_heads(net)
    assert len(heads) == (2 if arch.startswith(('deit', 'crossvit', 'repvit')) else 1)
    assert all(0.8 < scale(head) < 1.25 for head in heads), list(map(scale, heads))
    with torch.no_grad():
        assert net.eval()(torch.zeros(1, 3, size, size)).shape == (1, 1)


def test_a_model_without_a_classifier_and_a_name_that_is_none_are_refused():
    with pytest.raises(Stop, match='test_resnet has no classifier'):
        model.get_heads(timm.create_model('test_resnet', num_classes=0))
    with pytest.raises(Stop, match=r"no architecture 'xeption'; near it: .*xception"):
        model.describe_arch('xeption')


def test_with_imagenet_weights_the_logits_of_real_images_start_small(shared, tmp_path):
    """With timm's own start their standard deviation is 10, and the first loss 2.3."""
    torch.manual_seed(0)
    arch, path = 'tf_efficientnet_lite0', shared / 'weights' / 'tf_efficientnet_lite0.safetensors'
    net = model.create(arch, 160, weights=path).eval()
    assert 0.8 < scale(net.classifier) < 1.25
    rows = images.list_images(shared / 'data' / 'cc0').head(32)
    rows['cached'] = images.cache(rows, tmp_path, 160)
    about = model.describe_arch(arch)
    dls = data.prediction_dls(rows, augment.batch_tfms(about['mean'], about['std']), 32)
    with torch.no_grad():
        logits = net(dls.valid.one_batch()[0].as_subclass(torch.Tensor))
    assert 0.01 < float(logits.std()) < 1
