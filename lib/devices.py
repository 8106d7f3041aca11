"""The device that this process computes on, the precision it computes in, and its memory."""

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import warnings

import torch
from fastai.vision.all import default_device

from lib import ranks
from lib.cli import Stop


def choose_device() -> torch.device:
    """The first CUDA GPU, or under a launcher that of this process's local number; without one what
    fastai chooses: Apple's GPU, or the CPU.

    Raises: Stop where a launcher has started more processes than there are GPUs, or where this
    torch has no code for the card, which a trial shows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns of such a card in many lines
        if torch.cuda.is_available():
            if 1 < ranks.LOCAL_WORLD > (n := torch.cuda.device_count()):
                raise Stop(
                    f'{ranks.LOCAL_WORLD} processes of a launcher need a GPU each, and there are '
                    f'{n} here; start it with --nproc_per_node {n}, or without a launcher'
                )
            torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
            try:
                torch.zeros(1, device='cuda').add(1).item()
            except RuntimeError as e:
                raise Stop(
                    f'torch {torch.__version__} cannot use {torch.cuda.get_device_name()} '
                    f'({str(e).splitlines()[0]}). Install the torch and torchvision of '
                    'requirements.txt for an older CUDA (https://pytorch.org/get-started/locally), '
                    'or put CUDA_VISIBLE_DEVICES= before the command to compute on the CPU'
                ) from None
    return default_device()


def describe(device: torch.device) -> str:
    """A device's name for people: 'Tesla T4 (cuda:0)', 'cpu', 'mps:0'; beside a card that torch
    does not see, as with a driver that is too old, a hint that there is one."""
    if device.type == 'cuda':
        return f'{torch.cuda.get_device_name(device)} ({device})'
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')  # by the user
    if device.type == 'cpu' and not hidden and shutil.which('nvidia-smi'):
        found = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True)
        if 'GPU 0' in found.stdout:
            return 'cpu (there is an NVIDIA card; torch finds none: its driver may be too old)'
    return str(device)


def choose_precision(precision: str, device: torch.device, training: bool) -> str:
    """The precision to train or predict in; 'auto' is fp32, except on CUDA.

    There training is in bf16, or fp16 on cards without it. Prediction is in fp16 and not in bf16,
    which has three bits less and changes the features of a small model by ten times as much.
    Raises: Stop where the device does not compute in `precision`.
    """
    known, best = ['fp32'], 'fp32'
    if device.type == 'cuda':
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        known += ['fp16', *(['bf16'] if has_bf16 else [])]
        best = 'bf16' if training and has_bf16 else 'fp16'
    elif device.type == 'cpu' and not training:
        known += ['bf16']
    if precision not in ('auto', *known):
        options = ', '.join(known)
        raise Stop(f'--precision here ({device.type}) may be auto, {options}, not {precision}')
    return best if precision == 'auto' else precision


def scoring_precision(precision: str, device: torch.device) -> str:
    """The precision to score a model in that was trained in `precision`."""
    return 'fp32' if precision == 'fp32' else choose_precision('auto', device, training=False)


def ready_memory() -> None:
    """Free the memory of an earlier Learner, which is a cycle that Python has to collect.

    On the CPU, glibc would return large tensors to the system after each use, and the page faults
    of getting them back take a third of a training step; so up to 2 GB are kept for the next one.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == 'linux':
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', lambda *option: None)
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
        mallopt(m_trim_threshold, (2 << 30) - 1)
        mallopt(m_top_pad, 256 << 20)
