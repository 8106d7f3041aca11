"""The processes of one command, as `accelerate launch` or `torch.distributed.run` start them.

They tell each process its place by the environment: RANK of WORLD_SIZE, LOCAL_RANK on its machine.
Without a launcher there is one process, and nothing here does anything.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

RANK = int(os.environ.get('RANK', 0))
WORLD = int(os.environ.get('WORLD_SIZE', 1))
SILENT = RANK > 0 or None  # tqdm's `disable`: a bar in a terminal only, and of rank 0 alone


def start() -> None:
    """Meet the other processes; each takes the GPU of its local number, if there are GPUs."""
    if WORLD == 1:
        return
    import torch  # here, not above: it takes a second, and one process needs none of it

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    # the others wait while the first one fills a cache, which may take hours
    patience = timedelta(days=7)
    torch.distributed.init_process_group('nccl' if cuda else 'gloo', timeout=patience)
    atexit.register(torch.distributed.destroy_process_group)


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of the ranks, on all ranks."""
    if WORLD == 1:
        return [value]
    import torch

    values = [None] * WORLD
    torch.distributed.all_gather_object(values, value)
    return values


def first_does(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on all ranks; the others wait for it and do nothing."""
    return gather(work() if RANK == 0 else None)[0]


def each(items: Iterable[Any]) -> Iterator[Any]:
    """What rank 0 takes out of `items`, one after the other, on all ranks; None is never among it.

    The next one is taken when rank 0 has done its part of the work on the last.
    """
    iterator = iter(items)
    while (item := first_does(lambda: next(iterator, None))) is not None:
        yield item
