"""Locks by which several processes share out pieces of work."""

import errno
import os
import socket
import time
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


class Lock:
    """A lock for a piece of work that one process at a time may do; use it in a `with` block.

    It is a POSIX record lock on the file `path`, which stays and names the last holder. The kernel
    drops the lock when the process ends, in whatever way, so a dead process never blocks another,
    while one that is only stopped or slow keeps it. Forked workers do not inherit it. A process
    must not open a lock that it holds a second time, since closing either one drops it. Locks work
    between machines if the shared file system supports them: NFS 4, NFS 3 with lockd, Lustre
    mounted with flock, GPFS, CephFS. Where they are not supported, and on Windows, a line says so
    once, and every process gets every lock.
    """

    unsupported = False

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> 'Lock':
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def take(self, wait: bool = False, note: bool = True) -> bool:
        """Take the lock. Returns: False where another process has it; with `wait`, wait instead.

        With `note` the file then names this process.
        """
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, 'Windows has no such locks')
            fcntl.lockf(self.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if e.errno not in NO_LOCKS:
                raise
            if not Lock.unsupported:
                print(f'{self.path} cannot be locked ({e.strerror}): start no second process here')
            Lock.unsupported = True
            return True
        if note:
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f'process {os.getpid()} on {socket.gethostname()}\n'.encode(), 0)
        return True

    def holder(self) -> str:
        """The process that took the lock last, such as 'process 12 on HOST'."""
        name = os.pread(self.fd, 200, 0).decode(errors='replace').strip()
        return name if name.isprintable() and name else 'another process'


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A block that one process at a time may enter; the others wait."""
    with Lock(path) as lock:
        lock.take(wait=True)
        yield


def claim(of_lock: dict[Path, Any], is_done: Callable[[Any], bool]) -> Iterator[Any]:
    """The pieces of work that are not done and that no other process works on, one by one.

    `of_lock`: the piece of each lock. The lock is held while the body of the caller's loop runs.
    The pieces of others are tried again after each piece, and once more after a moment at the end,
    since a process that only asks who holds a lock has it for an instant.
    """
    mine, is_last_try = set(), False
    while True:
        for path, piece in of_lock.items():
            if path not in mine and not is_done(piece):
                with Lock(path) as lock:
                    if lock.take() and not is_done(piece):  # it may have been done meanwhile
                        mine.add(path)
                        yield piece
                        is_last_try = False
                        break
        else:
            if is_last_try:
                return
            time.sleep(0.1)
            is_last_try = True


def describe_holder(path: Path) -> str:
    """A note like ' (process 12 on HOST works on it)', or '' where no process holds the lock."""
    if not path.exists() or not os.access(path, os.W_OK):
        return ''
    with Lock(path) as lock:
        return '' if lock.take(note=False) else f' ({lock.holder()} works on it)'
