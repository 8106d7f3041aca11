"""Precision, memory and compilation, which change the speed, and results by rounding only."""

import copy
import ctypes
import gc
import os
import shutil
import sys

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lib.cli import Stop


def training_precision(precision: str, device: torch.device) -> str:
    """The precision to train in: 'auto' is bf16 on CUDA, fp16 on cards without it, fp32 elsewhere.

    Raises: Stop where the device does not compute in `precision`.
    """
    known = _precisions(device)
    best = 'bf16' if 'bf16' in known else 'fp16'
    return _checked(precision, known, best if device.type == 'cuda' else 'fp32', device)


def inference_precision(precision: str, device: torch.device) -> str:
    """The precision to predict in: 'auto' is fp16 on CUDA, fp32 elsewhere.

    It is not bf16, which has three bits less and changes the features of a small model by ten times
    as much. Raises: Stop where the device does not compute in `precision`.
    """
    best = 'fp16' if device.type == 'cuda' else 'fp32'
    return _checked(precision, _precisions(device), best, device)


def layout(device: torch.device) -> torch.memory_format:
    """The memory layout to predict in: channels-last on the CPU only. Training always uses it.

    Source, until a card has been measured: timm's tables of B5 in half precision
    (results/benchmark-*.csv of https://github.com/huggingface/pytorch-image-models), channels-last
    against not, images a second: training 114 and 94 (RTX 3090, 456 px, torch 1.12), prediction
    575 and 640 (RTX 4090, 448 px, torch 2.4). A ResNet predicts faster channels-last there, too.
    """
    return torch.contiguous_format if device.type == 'cuda' else torch.channels_last


def _precisions(device: torch.device) -> list[str]:
    if device.type == 'cuda':
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ['fp32', 'fp16', *(['bf16'] if has_bf16 else [])]
    return ['fp32', 'bf16'] if device.type == 'cpu' else ['fp32']


def _checked(precision: str, known: list[str], best: str, device: torch.device) -> str:
    if precision not in ('auto', *known):
        options = ', '.join(known)
        raise Stop(f'--precision here ({device.type}) may be auto, {options}, not {precision}')
    return best if precision == 'auto' else precision


def ready_memory(device: torch.device) -> None:
    """Free the memory of an earlier model; on the CPU, make glibc keep it for the next one.

    A Learner and its callbacks refer to each other, so the weights, gradients and moments of a fold
    (half a GB for B5) stay until Python collects such cycles. On the CPU, glibc returns large
    tensors to the system after each use, and the page faults of getting them back take a third of a
    training step; so up to 2 GB are kept for the next one.
    """
    gc.collect()
    if device.type != 'cpu':
        torch.cuda.empty_cache()
    elif sys.platform == 'linux':
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', lambda *option: None)
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
        mallopt(m_trim_threshold, (2 << 30) - 1)
        mallopt(m_top_pad, 256 << 20)


@torch.no_grad()
def fuse_batch_norms(model: nn.Module, size: int) -> nn.Module:
    """`model` in eval mode, with its batch normalizations folded into their convolutions.

    This makes prediction faster, B5 at 512 pixels by a fifth on the CPU. One pass over an image of
    noise shows which normalization reads which convolution. The model is returned unchanged where
    its features would differ, as where a layer is used twice. This runs on the CPU, since the TF32
    of a GPU would make the features differ.
    """
    pairs, model = [], model.cpu().eval()

    def mark(conv: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        output.made_by = conv

    def pair(norm: nn.Module, inputs: tuple) -> None:
        if hasattr(inputs[0], 'made_by'):
            pairs.append((inputs[0].made_by, norm))

    names = {module: name for name, module in model.named_modules()}
    hooks = [m.register_forward_hook(mark) for m in names if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(pair) for m in names if isinstance(m, _BatchNorm)]
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))

    def compute_features(model: nn.Module) -> torch.Tensor:
        features = model.forward_features(x)  # a list in models of several scales
        return torch.cat([f.flatten() for f in features])

    before = compute_features(model)
    for hook in hooks:
        hook.remove()
    folded = copy.deepcopy(model)
    for conv, norm in pairs:
        rest = [getattr(norm, name) for name in ('drop', 'act') if hasattr(norm, name)]
        folded.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        folded.set_submodule(names[norm], nn.Sequential(*rest))  # timm's holds the activation
    after, largest = compute_features(folded), float(before.abs().max())
    return folded if torch.allclose(after, before, atol=1e-3 * largest) else model


def compile(model: nn.Module) -> None:
    """Have `model` compiled when it first runs; models of one architecture share the code.

    Raises: Stop where there is no C++ compiler, which torch would say in 100 lines.
    """
    compiler = os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')
    if not shutil.which(compiler):
        raise Stop(f'--compile needs a C++ compiler, and there is no {compiler}; leave it out')
    model.compile(dynamic=False)
