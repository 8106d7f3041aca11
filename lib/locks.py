"""Pieces of work that several processes share out: who has one, and what is free."""

import errno
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What file systems without locks answer
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class Lock:
    """A piece of work that one process at a time may do, for the length of a `with` block.

    It is a POSIX record lock on the file `path`, which stays and names the last holder. The kernel
    drops it when the process ends, in whatever way, so that a dead one never blocks; a process that
    is only stopped or slow keeps it, which no heartbeat could promise. Forked workers do not
    inherit it. Between machines it holds where the shared file system keeps such locks: NFS 4,
    NFS 3 with lockd, Lustre mounted with flock, GPFS, CephFS. Where none are kept, and on Windows,
    a line says so once, and every process gets every lock.
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

    def take(self, shared: bool = False, wait: bool = False) -> bool:
        """Whether the lock is this process's now; `wait` until it is.

        Several may hold it `shared`, or one alone; taken again, it changes from one to the other.
        """
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, 'Windows has no such locks')
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.lockf(self.fd, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if e.errno not in NO_LOCKS:
                raise
            if not Lock.unsupported:
                print(f'{self.path} cannot be locked ({e.strerror}): start no second process here')
            Lock.unsupported = True
            return True
        if not shared:
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f'process {os.getpid()} on {socket.gethostname()}\n'.encode(), 0)
        return True

    def holder(self) -> str:
        """Who took it alone last, such as 'process 12 on HOST'."""
        name = os.pread(self.fd, 200, 0).decode(errors='replace').strip()
        return name if name.isprintable() and name else 'another process'


def share(paths: Iterable[Path]) -> Iterator[Path]:
    """Those of the locks `paths` that no other process has, each held while the loop's body works.

    What others have is asked for again after each piece, and left to them when nothing else is
    left. A piece may have been finished by another process meanwhile: the body has to look.
    """
    left = list(paths)
    while left:
        for path in left:
            with Lock(path) as lock:
                if lock.take():
                    yield path
                    left.remove(path)
                    break
        else:
            return


def at_work(path: Path) -> str:
    """Who holds the lock `path` alone, such as ' (process 12 on HOST is at it)'; '' if nobody."""
    if not path.exists() or not os.access(path, os.W_OK):
        return ''
    with Lock(path) as lock:
        return '' if lock.take(shared=True) else f' ({lock.holder()} is at it)'
