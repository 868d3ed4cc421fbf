"""Git LFS pointers: placeholders in a repository that was cloned without its large files."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, IvlError

_HEAD = b"version https://git-lfs.github.com/spec/"
_MOST = 1024  # bytes: a pointer has three lines


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file ``path`` is a pointer; False where it cannot be read."""
    try:
        if path.stat().st_size > _MOST:
            return False
        with path.open("rb") as file:
            return file.read(len(_HEAD)) == _HEAD
    except (OSError, ValueError):
        return False


def refuse_lfs_pointer(path: Path, error: type[IvlError] = InputError) -> None:
    """Raise ``error`` if ``path`` is a pointer: where a file does not read, this says why."""
    if is_lfs_pointer(path):
        raise error(
            f"{path} is a Git LFS pointer.",
            "The repository was cloned without its large files: this file is a placeholder of one.",
            "Run 'git lfs pull' there, or download it with 'hf download'.",
        )
