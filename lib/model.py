"""A timm model whose classifier gives one logit, and how its weights are stored."""

import difflib
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

from lib.cli import Stop
from lib.files import atomic
from lib.runs import WEIGHTS


def describe_arch(arch: str) -> dict[str, Any]:
    """What timm says of an architecture: the `tag` of its pretrained weights, and the `mean` and
    `std`, (3,) each, with which its input is normalized, pretrained or not.

    Raises: Stop with the nearest names where timm has no such architecture.
    """
    try:
        cfg = timm.get_pretrained_cfg(arch)
    except RuntimeError as e:
        raise Stop(str(e)) from e
    if cfg is None:  # as for names that timm has given up
        near = ', '.join(difflib.get_close_matches(arch, timm.list_models(), n=3))
        raise Stop(f'timm has no architecture {arch!r}' + (f'; near it: {near}' if near else ''))
    return {'tag': cfg.tag, 'mean': list(cfg.mean), 'std': list(cfg.std)}


def create(
    arch: str, size: int, pretrained: bool = False, weights: Path | None = None
) -> nn.Module:
    """A model from (B, 3, size, size) float, normalized images to (B, 1) logits of melanoma.

    If `pretrained`, its body starts with timm's ImageNet weights, or with those in the safetensors
    file `weights`; else at random. Its head starts as torch's Linear layers do: timm would start
    the single logit of an EfficientNet with weights 35 to 45 times as large, which training does
    not unlearn. Random weights come from torch's generator, those of the head last.

    Raises: Stop where timm has no such architecture, or where the weights cannot be fetched or are
    of another architecture.
    """
    describe_arch(arch)  # a config.json may come from a stranger or from another version of timm
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
        _load_body(model, weights)
    for head in get_heads(model):
        head.reset_parameters()
    return model


def _load_body(model: nn.Module, path: Path) -> None:
    """Load all weights but the classifier's. timm would silently load only the tensors that fit."""
    state = read_weights(path)
    heads = model.pretrained_cfg['classifier']
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    head = tuple(f'{name}.' for name in heads)
    given = {k: tuple(v.shape) for k, v in state.items() if not k.startswith(head)}
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith(head)}
    every = {**wanted, **given}
    if wrong := [k for k in every if given.get(k) != wanted.get(k)]:
        some = [f'{k} is {given.get(k, "absent")}, not {wanted.get(k, "there")}' for k in wrong[:3]]
        more = ' ...' if len(wrong) > 3 else ''
        raise Stop(
            f'{path} holds the weights of another architecture (or of a transformer for another '
            f'--size): {len(wrong)} of {len(every)} tensors do not fit. {"; ".join(some)}{more}'
        )
    model.load_state_dict({k: state[k] for k in given}, strict=False)


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
    """Turns a model's logits into probabilities: (B, 3, H, W) float32 to (B, 1).

    Weights and arithmetic are in `precision`: 'fp32', 'bf16' or 'fp16'. The last layer stays in
    fp32, since half precision would make ties. A batch smaller than `batch_size` is filled up, so
    that a compiled model sees one shape only. The model is changed in place and must not be trained
    any further.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        precision: str = 'fp32',
        layout: torch.memory_format = torch.channels_last,
    ):
        super().__init__()
        dtypes = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
        self.batch_size, self.dtype, self.layout = batch_size, dtypes[precision], layout
        self.model = model.eval().to(dtype=self.dtype, memory_format=layout)
        for head in get_heads(model):
            head.float().register_forward_pre_hook(lambda layer, inputs: inputs[0].float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, x = len(x), x.to(self.dtype)
        if n < self.batch_size:
            x = torch.cat([x, x.new_zeros(self.batch_size - n, *x.shape[1:])])
        logits = self.model(x.contiguous(memory_format=self.layout))[:n]
        # infinity is an overflow in half precision, which must not pass for a certain 0 or 1
        return logits.sigmoid().where(logits.isfinite(), torch.nan)


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
