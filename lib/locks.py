"""Locks by which several processes share out pieces of work."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What file systems without locks answer
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
told = False  # whether a line has said that this file system has no locks


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[bool]:
    """A block that one process at a time may enter. Yields: False where another is in it, if this
    one does not `wait`.

    The kernel drops the lock, a POSIX record lock on the file `path`, when the process ends in
    whatever way: a dead process never blocks another, while one that is only stopped or slow keeps
    it. Forked workers do not inherit it. A process must not enter a block that it is in, since
    leaving either drops the lock. Where a file system has no locks, and on Windows, a line says so
    once, and every process enters.
    """
    global told
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, is_mine = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, 'Windows has no such locks')
        fcntl.lockf(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        is_mine = e.errno in NO_LOCKS
        if not is_mine and e.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        if is_mine and not told:
            print(f'{path} cannot be locked ({e.strerror}): start no second process here')
            told = True
    try:
        yield is_mine
    finally:
        os.close(fd)


def claim(of_lock: dict[Path, Any], is_done: Callable[[Any], bool]) -> Iterator[Any]:
    """The pieces of work that are not done and that no other process works on, one by one.

    `of_lock`: the piece of work of each lock file, which is locked while the body of the caller's
    loop runs. After each piece those that other processes hold are tried again; where only such
    pieces are left it ends, without waiting.
    """
    mine = set()
    while True:
        for path, piece in of_lock.items():
            if path not in mine and not is_done(piece):
                with held(path, wait=False) as is_mine:
                    if is_mine and not is_done(piece):  # it may have been done meanwhile
                        mine.add(path)
                        yield piece
                        break
        else:
            return
