"""A timm model whose classifier gives one logit, and how its weights are stored."""

import copy
import difflib
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import model_info
from huggingface_hub import try_to_load_from_cache as is_cached
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lib.cli import Stop
from lib.devices import ready_memory
from lib.files import atomic
from lib.runs import WEIGHTS


def describe_arch(arch: str) -> dict[str, Any]:
    """What timm says of an architecture: the name `arch` that it has now, the `tag` of its
    pretrained weights, and the `mean` and `std`, (3,) each, with which its input is normalized,
    pretrained or not.

    Raises: Stop with the nearest names where timm has no such architecture.
    """
    try:
        cfg = timm.get_pretrained_cfg(arch)
    except RuntimeError as e:
        raise Stop(str(e)) from e
    if cfg is None and timm.is_model(
        arch
    ):  # a name of 2020, of which create_model alone knows more
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            old = timm.create_model(arch).pretrained_cfg
        return describe_arch(f'{old["architecture"]}.{old["tag"]}')
    if cfg is None:
        near = ', '.join(difflib.get_close_matches(arch, timm.list_models(), n=3))
        raise Stop(f'timm has no architecture {arch!r}' + (f'; near it: {near}' if near else ''))
    return {'arch': arch, 'tag': cfg.tag, 'mean': list(cfg.mean), 'std': list(cfg.std)}


def create(arch: str, size: int, pretrained: bool = False, weights: str | None = None) -> nn.Module:
    """A model from (B, 3, size, size) float, normalized images to (B, 1) logits of malignancy.

    If `pretrained`, its body starts with timm's ImageNet weights, or with those in the safetensors
    file `weights`; else at random. Its head starts as torch's Linear layers do: timm would start
    the single logit of an EfficientNet with weights 35 to 45 times as large, which training does
    not unlearn. Random weights come from torch's generator, those of the head last.

    Raises: Stop where timm has no such architecture, or where the weights cannot be fetched or are
    of another architecture.
    """
    ready_memory()  # of an earlier model
    # a config.json may come from a stranger or from another version of timm
    arch = describe_arch(arch)['arch']
    cfg = timm.get_pretrained_cfg(arch)
    options = {'img_size': size} if cfg.fixed_input_size else {}  # as transformers have
    fetch = pretrained and weights is None
    try:
        if fetch and cfg.hf_hub_id and not is_cached(cfg.hf_hub_id, WEIGHTS):
            model_info(cfg.hf_hub_id, timeout=10)  # fails at once; timm would try for a minute
        model = timm.create_model(arch, pretrained=fetch, num_classes=1, **options)
    except Exception as e:  # the hub's client raises the errors of its HTTP library
        if not fetch:
            raise
        raise Stop(
            f'the ImageNet weights of {arch} cannot be fetched ({e}). Take local ones with '
            "--weights FILE (model.safetensors from the model's page on the Hugging Face hub), or "
            'start at random with --nopretrained'
        ) from e
    if weights is not None:
        _load_body(model, Path(weights))
    for head in get_heads(model):
        head.reset_parameters()
    return model.to(memory_format=torch.channels_last)  # in which convolutions are fastest


def check_size(model: nn.Module, size: int) -> None:
    """Raises: Stop where the model cannot take an image of `size` x `size` pixels."""
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as e:  # of patches, windows, pooling
        arch, reason = model.pretrained_cfg['architecture'], ' '.join(str(e).split())
        raise Stop(f'{arch} cannot take images of {size} pixels a side: {reason}') from e


def _load_body(model: nn.Module, path: Path) -> None:
    """Load all weights but the classifier's. timm would silently load only the tensors that fit."""
    state, own = read_weights(path), model.state_dict()
    heads = model.pretrained_cfg['classifier']
    head = tuple(f'{name}.' for name in ([heads] if isinstance(heads, str) else heads))
    body = {k: v for k, v in state.items() if not k.startswith(head)}
    try:
        model.load_state_dict(body | {k: v for k, v in own.items() if k.startswith(head)})
    except RuntimeError as e:
        reason = ' '.join(str(e).split())[:300]
        raise Stop(f'{path} holds the weights of another architecture or size: {reason}') from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file by name. Raises: Stop where it is not such a file."""
    if not path.is_file():
        raise Stop(f'there is no file {path}')
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as e:
        raise Stop(f'{path} is not a safetensors file ({e}); other kinds could run code') from e


def save(model: nn.Module, path: Path) -> None:
    """Write the model's weights as safetensors, all or nothing."""
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    with atomic(path) as temporary:
        temporary.write_bytes(to_bytes(tensors))  # save_file would make it unreadable for others


def load(arch: str, size: int, path: Path) -> nn.Module:
    """The model whose weights `save` wrote. Raises: Stop where they are of another architecture."""
    model = create(arch, size)
    state = read_weights(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise Stop(f'{path} does not hold the weights of {arch} ({str(e).splitlines()[0]})') from e
    return model


class ProbabilityModel(nn.Module):
    """Turns a model's logits into probabilities: (B, 3, size, size) float32 to (B, 1).

    Weights and arithmetic are in `precision`: 'fp32', 'bf16' or 'fp16'. The last layer stays in
    fp32, since half precision would make ties. The model must not be trained any further.
    """

    def __init__(self, model: nn.Module, size: int, precision: str):
        super().__init__()
        dtypes = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
        self.dtype, model = dtypes[precision], fuse_batch_norms(model, size)
        self.model = model.to(dtype=self.dtype, memory_format=torch.channels_last)
        for head in get_heads(model):
            head.float().register_forward_pre_hook(lambda layer, inputs: inputs[0].float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.model(x.to(self.dtype, memory_format=torch.channels_last))
        # infinity is an overflow in half precision, which must not pass for a certain 0 or 1
        return logits.sigmoid().where(logits.isfinite(), torch.nan)


@torch.no_grad()
def fuse_batch_norms(model: nn.Module, size: int) -> nn.Module:
    """`model` in eval mode on the CPU, with each batch normalization folded into the convolution
    that its parent defines directly before it. B5 predicts a fifth faster on the CPU then, and has
    half the kernels. It is left as it is where its features of an image of noise would differ.
    """
    model = model.cpu().eval()
    fused, x = copy.deepcopy(model), torch.rand(1, 3, size, size, generator=torch.Generator())
    for parent in fused.modules():
        for (name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                rest = [getattr(norm, part) for part in ('drop', 'act') if hasattr(norm, part)]
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Sequential(*rest))  # timm's holds the activation
    features = [net.forward_features(x) for net in (model, fused)]  # lists, in several scales
    before, after = (torch.cat([part.flatten() for part in of_net]) for of_net in features)
    largest = float(before.abs().max())
    return fused if torch.allclose(after, before, atol=1e-3 * largest) else model


def get_heads(model: nn.Module) -> list[nn.Module]:
    """The layers that give a logit: the last one of a timm model's classifier, or several where the
    model is distilled or has several scales. Raises: Stop where there is none."""
    layers = getattr(model, 'get_classifier', tuple)()
    layers = layers if isinstance(layers, tuple) else (layers,)
    layers = [layer for classifier in layers for layer in classifier.modules()]
    heads = [m for m in layers if isinstance(m, nn.Linear | nn.Conv2d) and len(m.weight) == 1]
    if not heads:
        raise Stop(f'{model.pretrained_cfg["architecture"]} has no classifier; choose another')
    return heads
