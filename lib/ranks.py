"""The processes of one launcher, which train one fold together.

`accelerate launch` and `torch.distributed.run` tell each process its place by RANK and WORLD_SIZE.
Both are taken out of the environment here, since fastai would gather predictions over all
processes wherever it sees them. They are there only inside of `visible`.
"""

import atexit
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

RANK = int(os.environ.pop('RANK', 0))
WORLD = int(os.environ.pop('WORLD_SIZE', 1))
LOCAL_WORLD = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # those of them on this machine
following = False  # True where this process trains beside the first, which alone prints and writes


@contextmanager
def visible() -> Iterator[None]:
    """A block in which torch, fastai and accelerate see the launcher's processes.

    What `accelerate config` has saved as its precision would come on top of the run's own.
    """
    os.environ |= {'RANK': str(RANK), 'WORLD_SIZE': str(WORLD), 'ACCELERATE_MIXED_PRECISION': 'no'}
    try:
        yield
    finally:
        del os.environ['RANK'], os.environ['WORLD_SIZE']


def join() -> None:
    """Meet the launcher's other processes; from here on the first alone prints and writes."""
    global following
    if WORLD == 1:
        return
    import torch  # here, not above: it takes a second, and one process needs none of it

    if torch.distributed.is_initialized():
        return
    backend, device = 'gloo', None
    if torch.cuda.is_available():  # objects by gloo: NCCL waits at 100 % of a core and of a GPU
        backend, device = 'cpu:gloo,cuda:nccl', torch.device('cuda', torch.cuda.current_device())
    with visible():  # the others wait while the first one works, which may take hours
        week = timedelta(days=7)
        torch.distributed.init_process_group(backend, timeout=week, device_id=device)
    atexit.register(torch.distributed.destroy_process_group)
    if RANK == 0:
        print(f'{WORLD} processes train each fold together')
    else:
        following, sys.stdout = True, open(os.devnull, 'w')  # noqa: SIM115, open to the end


def together(items: Iterable[Any]) -> Iterator[Any]:
    """What the first process takes out of `items`, one after the other, in all of them.

    The next one is taken when all have done their part of the last. None is never among them.
    """
    iterator = iter(items)
    while True:
        box = [next(iterator, None) if RANK == 0 else None]
        if WORLD > 1:
            import torch

            boxes = [None] * WORLD
            torch.distributed.all_gather_object(boxes, box)
            box = boxes[0]
        if box[0] is None:
            return
        yield box[0]
