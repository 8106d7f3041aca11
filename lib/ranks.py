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
following = False  # True where this process trains beside the first, which alone prints and writes


@contextmanager
def visible() -> Iterator[None]:
    """A block in which torch, fastai and accelerate see the launcher's processes."""
    os.environ |= {'RANK': str(RANK), 'WORLD_SIZE': str(WORLD)}
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
    backend = 'nccl' if torch.cuda.is_available() else 'gloo'
    with visible():  # the others wait while the first one works, which may take hours
        torch.distributed.init_process_group(backend, timeout=timedelta(days=7))
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
