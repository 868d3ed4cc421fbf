"""Files of users read whole, up to a size."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

MAX_FILE_BYTES = 1 << 29


def read_bytes(path: Path) -> bytes:
    """The bytes of a file of at most 512 MiB; InputError otherwise."""
    if not path.is_file():
        raise InputError(f"Cannot read {path}.", "There is no such file.", "Check the path.")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{path} is refused.",
                f"It is larger than {MAX_FILE_BYTES >> 20} MiB.",
                "Leave it out, or store it smaller.",
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"Cannot read {path}.", error.strerror or str(error), "Make it readable, or leave it out."
        ) from error
