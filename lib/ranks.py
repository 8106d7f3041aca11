"""The processes of one launcher, which train one fold together.

`accelerate launch` and `torch.distributed.run` set RANK and WORLD_SIZE for each process. Both are
removed from the environment here, since fastai gathers predictions over all processes wherever it
sees them. They are set again inside of `visible`.
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
LOCAL_WORLD = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # the processes on this machine
following = False  # whether this process leaves printing and writing to the first one


@contextmanager
def visible() -> Iterator[None]:
    """A block in which torch, fastai and accelerate see the launcher's processes.

    The run's own precision must not be overridden by the one that `accelerate config` has saved.
    """
    os.environ |= {'RANK': str(RANK), 'WORLD_SIZE': str(WORLD), 'ACCELERATE_MIXED_PRECISION': 'no'}
    try:
        yield
    finally:
        del os.environ['RANK'], os.environ['WORLD_SIZE']


def join() -> None:
    """Connect to the launcher's other processes. From here on only the first prints and writes."""
    global following
    if WORLD == 1:
        return
    import torch  # it takes a second to import, and a process by itself does not need it

    if torch.distributed.is_initialized():
        return
    backend, device = 'gloo', None
    if torch.cuda.is_available():  # gloo for objects, since NCCL keeps a core and the GPU busy
        backend, device = 'cpu:gloo,cuda:nccl', torch.device('cuda', torch.cuda.current_device())
    with visible():  # the other processes may have to wait for the first one for hours
        week = timedelta(days=7)
        torch.distributed.init_process_group(backend, timeout=week, device_id=device)
    atexit.register(torch.distributed.destroy_process_group)
    if RANK == 0:
        print(f'{WORLD} processes train each fold together')
    else:
        following, sys.stdout = True, open(os.devnull, 'w')  # noqa: SIM115, open to the end


def together(items: Iterable[Any]) -> Iterator[Any]:
    """The items that the first process takes from `items`, in all processes of the launcher.

    The first process takes the next item, and the others get it when all are done with the last.
    No item may be None.
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
