"""A timm model with one Linear layer on its pooled features; weights in and out."""

import copy
import difflib
import os
import shutil
import sys
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
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lib.cli import Stop
from lib.files import atomic

WEIGHTS = 'model.safetensors'


def about(arch: str) -> dict[str, Any]:
    """What timm knows of an architecture: its pretrained `tag`, and the `mean` and `std` that
    its input is normalized with, a channel each, pretrained or not.

    Raises: Stop with the nearest names, where timm knows no such architecture.
    """
    if not timm.is_model(arch):
        near = ', '.join(difflib.get_close_matches(arch, timm.list_models(), n=3))
        raise Stop(f'timm has no architecture {arch!r}' + (f'; near it: {near}' if near else ''))
    try:
        cfg = timm.get_pretrained_cfg(arch)
    except RuntimeError as e:
        raise Stop(str(e)) from e
    return {'tag': cfg.tag, 'mean': list(cfg.mean), 'std': list(cfg.std)}


def create(
    arch: str, size: int, pretrained: bool = False, weights: Path | None = None
) -> nn.Module:
    """The model: (B, 3, size, size) float, normalized, to (B, 1) logits of melanoma.

    Its body starts with timm's ImageNet weights if `pretrained`, with those of the safetensors
    file `weights` if given, else at random; its Linear head at random always (torch's generator).

    Raises: Stop where the weights cannot be had, or are another architecture's, or timm has none of
    that name.
    """
    about(arch)  # config.json may be a stranger's, or of another timm
    cfg = timm.get_pretrained_cfg(arch)
    options = {'img_size': size} if cfg.fixed_input_size else {}  # transformers are told the size
    if weights is not None:
        model = timm.create_model(arch, num_classes=1, **options)
        _load_body(model, weights)
        return model
    try:
        if pretrained and cfg.hf_hub_id and not is_cached(cfg.hf_hub_id, WEIGHTS):
            model_info(cfg.hf_hub_id, timeout=10)  # says no at once; timm tries for a minute
        return timm.create_model(arch, pretrained=pretrained, num_classes=1, **options)
    except Exception as e:  # the hub's client raises those of whatever HTTP library it is built on
        if not pretrained:
            raise
        raise Stop(
            f'the ImageNet weights of {arch} cannot be fetched ({e}). Take local ones with '
            "--weights FILE (model.safetensors from the model's page on the Hugging Face hub), or "
            'start at random with --nopretrained'
        ) from e


def _load_body(model: nn.Module, path: Path) -> None:
    """Load all but the classifier, if every name and shape fits. timm would load what fits."""
    state = read_weights(path)
    heads = model.pretrained_cfg['classifier']
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    head = tuple(f'{name}.' for name in heads)
    found = {k: tuple(v.shape) for k, v in state.items() if not k.startswith(head)}
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith(head)}
    every = {**wanted, **found}
    if wrong := [k for k in every if found.get(k) != wanted.get(k)]:
        some = [f'{k} is {found.get(k, "absent")}, not {wanted.get(k, "there")}' for k in wrong[:3]]
        more = ' ...' if len(wrong) > 3 else ''
        raise Stop(
            f'{path} holds the weights of another architecture (or of a transformer for another '
            f'--size): {len(wrong)} of {len(every)} tensors do not fit. {"; ".join(some)}{more}'
        )
    model.load_state_dict({k: state[k] for k in found}, strict=False)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name. Raises: Stop where it is none."""
    if not path.is_file():
        raise Stop(f'there is no file {path}')
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as e:
        raise Stop(f'{path} is no safetensors file ({e}); no other kind is read, for safety') from e


def save(model: nn.Module, path: Path) -> None:
    """Write the model's weights as safetensors, all or nothing."""
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    with atomic(path) as temporary:
        temporary.write_bytes(to_bytes(tensors))  # save_file would keep it from other users


def load(arch: str, size: int, path: Path) -> nn.Module:
    """The model whose weights `save` wrote. Raises: Stop where they are another architecture's."""
    model = create(arch, size)
    state = read_weights(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise Stop(f'{path} does not hold the weights of {arch} ({str(e).splitlines()[0]})') from e
    return model


def for_inference(model: nn.Module, size: int, precision: str = 'fp32') -> nn.Module:
    """`model` made ready to predict with, in place, and never to be trained again.

    Every batch normalization that directly follows a convolution is folded into its weights;
    memory is channels-last; weights and arithmetic are in `precision`, 'fp32', 'bf16' or 'fp16',
    but for the last layer, in which half precision would make ties.

    Returns: (B, 3, size, size) of `precision` to (B, 1) float32 logits.
    """
    dtype = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
    model = _fold_batch_norms(model.eval(), size).to(dtype=dtype, memory_format=torch.channels_last)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.float().register_forward_pre_hook(lambda layer, inputs: inputs[0].float())
    return model


@torch.no_grad()
def _fold_batch_norms(model: nn.Module, size: int) -> nn.Module:
    """Find which normalization reads which convolution's output by running once, and join them."""
    pairs = []

    def mark(conv: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        output.made_by = conv

    def pair(norm: nn.Module, inputs: tuple) -> None:
        if hasattr(inputs[0], 'made_by'):
            pairs.append((inputs[0].made_by, norm))

    hooks = [m.register_forward_hook(mark) for m in _all(model, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(pair) for m in _all(model, nn.BatchNorm2d)]
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()).device)
    before = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    folded, names = copy.deepcopy(model), {m: name for name, m in model.named_modules()}
    for conv, norm in pairs:
        rest = [getattr(norm, name) for name in ('drop', 'act') if hasattr(norm, name)]
        folded.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        folded.set_submodule(names[norm], nn.Sequential(*rest))  # timm's holds the activation
    # not so where a layer runs twice, or something else reads what comes between: then as it was
    after, largest = folded.forward_features(x), float(before.abs().max())
    return folded if torch.allclose(after, before, atol=1e-3 * largest) else model


def _all(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kind)]


def compile(model: nn.Module) -> nn.Module:
    """`model`, compiled in place when it first runs; models of one architecture share the code."""
    model.compile(dynamic=False)
    return model


def check_compiler() -> None:
    """Raises: Stop where torch.compile has no C++ compiler: torch would say so in 100 lines."""
    compiler = os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')
    if not shutil.which(compiler):
        raise Stop(f'--compile needs a C++ compiler, and there is no {compiler}; leave it out')
