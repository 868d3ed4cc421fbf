"""Locks between processes that the system releases when their holder ends, however it ends."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
_INTERVAL = 0.05


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of ``path``: an existing folder, or a file (created, and left in place, if missing).

    Systems with ``flock`` lock the folder or file itself. Windows cannot open folders, so there the lock is a
    file in the temporary folder, named by the path's hash. On a file system without locks the block runs
    without one: processes are then not kept apart, and each file is still written whole.

    Args:
        path: the path to lock.
        wait: wait for another holder; False raises BlockingIOError at once.

    Raises:
        BlockingIOError: another process or thread holds the lock, and ``wait`` is False.
        OSError: the file cannot be opened or created.
    """
    handle = _open(path)
    try:
        _acquire(handle, wait)
        yield
    finally:
        os.close(handle)  # releases the lock


def _has_flock() -> bool:
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return False
    return True


def _open(path: Path) -> int:
    if not path.is_dir():
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if _has_flock():
        return os.open(path, os.O_RDONLY)
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return os.open(Path(tempfile.gettempdir()) / f"ivl-export-{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)


def _acquire(handle: int, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:
        _acquire_windows(handle, wait)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _acquire_windows(handle: int, wait: bool) -> None:
    """Lock the first byte of the file; ``msvcrt`` has no call that waits without a limit."""
    try:
        import msvcrt
    except ImportError:
        return  # a system with neither
    lock, mode = getattr(msvcrt, "locking"), getattr(msvcrt, "LK_NBLCK")  # noqa: B009 - typed on Windows only

    def is_taken() -> bool:
        try:
            lock(handle, mode, 1)
        except OSError:
            return True
        return False

    while is_taken():
        if not wait:
            raise BlockingIOError(errno.EAGAIN, "Another process holds the lock")
        time.sleep(_INTERVAL)
