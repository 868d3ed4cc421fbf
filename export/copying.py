"""Bytes from one file into another, as fast as the system copies them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from ..errors import CheckpointError

CALL_BYTES = 1 << 26
"""Bytes that one call copies in the system: few calls, since a thread beside a busy one waits for each."""
BLOCK_BYTES = 1 << 24
"""Bytes read and written at a time where the system does not copy."""
COPIERS = 2 if hasattr(os, "pwrite") else 1
"""Copies at a time: copying is work for the processor too, and one thread does not fill a disk."""
_NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def copy_bytes(
    source: Path, begin: int, target: FileIO, at: int, nbytes: int, progress: Callable[[int], None]
) -> None:
    """Copy ``nbytes`` from byte ``begin`` of ``source`` to byte ``at`` of ``target``.

    ``progress`` hears the size of each piece; what it raises ends the copy.

    Raises:
        CheckpointError: ``source`` cannot be read, or ends too early.
        OSError: ``target`` cannot be written.
    """
    try:
        file = FileIO(source, "r")
    except OSError as error:
        raise _unreadable(source, error) from error
    with file:
        done = 0
        while done < nbytes and (size := _in_system(file, begin + done, target, at + done, nbytes - done)):
            done += size
            progress(size)
        if done < nbytes:
            _in_blocks(file, begin + done, target, at + done, nbytes - done, progress)


def in_threads(copy: Callable[[str], None], names: Sequence[str]) -> None:
    """Call ``copy`` with each name, :data:`COPIERS` at a time; the first error ends it and is raised."""
    with ThreadPoolExecutor(COPIERS) as pool:
        try:
            for _ in pool.map(copy, names):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_all(target: FileIO, at: int, data: memoryview) -> None:
    """Write ``data`` at byte ``at``; one call may write less than it is given. OSError when it cannot."""
    if not hasattr(os, "pwrite"):  # Windows, where one thread copies
        target.seek(at)
        while data:
            data = data[target.write(data) :]
        return
    while data:
        size = os.pwrite(target.fileno(), data, at)
        data, at = data[size:], at + size


def reserve(file: FileIO, size: int) -> None:
    """Make ``file`` ``size`` bytes long on the disk, so that one too small shows now; OSError then."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    file.truncate(size)


def _in_system(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> int:
    """Bytes that one call copied; 0 where the system or these files do not do that, or it failed.

    A failure is not told from a refusal: reading and writing then says which file it is.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), min(nbytes, CALL_BYTES), begin, at)
    except OSError:
        return 0


def _in_blocks(
    source: FileIO, begin: int, target: FileIO, at: int, nbytes: int, progress: Callable[[int], None]
) -> None:
    buffer = memoryview(bytearray(min(BLOCK_BYTES, nbytes)))
    done = 0
    while done < nbytes:
        try:
            source.seek(begin + done)
            size = source.readinto(buffer[: nbytes - done])
        except OSError as error:
            raise _unreadable(Path(os.fsdecode(source.name)), error) from error
        if not size:
            name = os.fsdecode(source.name)
            raise CheckpointError(f"{name} has become shorter.", f"{nbytes - done} bytes are gone.")
        write_all(target, at + done, buffer[:size])
        done += size
        progress(size)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read.", error.strerror or str(error))
