"""The device that this process computes on: a GPU that this torch can use, or the CPU."""

import os
import re
import subprocess
import warnings
from glob import glob

import torch
from fastai.vision.all import default_device

from lib.cli import Stop


def choose_device() -> torch.device:
    """The first GPU, or under a launcher that of this process's local number; else the CPU.

    This also lets cuDNN time its algorithms. Raises: Stop where there is an NVIDIA card that this
    torch cannot use, unless the user has chosen the CPU. Without this check a training would run on
    the CPU for days, or end in a traceback.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns of such a card in many lines
        if torch.cuda.is_available() and 'LOCAL_RANK' in os.environ:
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        reason = _why_unusable()
    if reason is not None:
        raise Stop(
            f'there is an NVIDIA card that torch {torch.__version__} cannot use: {reason}. '
            "PyTorch's own wheels for CUDA 12.6 serve drivers from 525 on and compute capabilities "
            'of 5.0 to 9.0: install torch and torchvision of the versions in requirements.txt as '
            'https://pytorch.org/get-started/locally says for CUDA 12.6. To compute on the CPU '
            'instead, put CUDA_VISIBLE_DEVICES= before the command'
        )
    torch.backends.cudnn.benchmark = True  # batches are whole, so each shape is timed only once
    return default_device()


def _why_unusable() -> str | None:
    """Why torch cannot use the card. None where it can, or has no card, or none is wanted."""
    if torch.version.cuda is None or os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1'):
        return None
    if torch.cuda.is_available():
        oldest = min(int(re.search(r'\d+', arch)[0]) for arch in torch.cuda.get_arch_list())
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < divmod(oldest, 10):
            needed = '.'.join(map(str, divmod(oldest, 10)))
            card = torch.cuda.get_device_name()
            return f'{card} has compute capability {major}.{minor}, and {needed} is the least'
    elif glob('/dev/nvidia[0-9]*') or _nvidia_smi_lists_a_card():
        try:
            torch.cuda.init()
        except RuntimeError as e:
            return str(e).split('. ')[0]
    return None


def _nvidia_smi_lists_a_card() -> bool:
    """Whether NVIDIA's own program finds a card; on WSL there is no file in /dev for it."""
    try:
        found = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return 'GPU 0' in found.stdout


def describe(device: torch.device) -> str:
    """A device's name for people: 'Tesla T4 (cuda:0)', 'cpu', 'mps:0'."""
    is_cuda = device.type == 'cuda'
    return f'{torch.cuda.get_device_name(device)} ({device})' if is_cuda else str(device)
