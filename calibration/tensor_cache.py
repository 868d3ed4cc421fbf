"""Decoded images kept between runs, so that a set is decoded once and not in every step."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import Array
from ..files.hashing import sha256_json
from ..files.write import atomic
from ..inputs.preprocess import ImageSettings

LIMIT = 4 << 30
"""Bytes kept; the entries that were used longest ago go first."""


@dataclass(frozen=True)
class TensorCache:
    """``pixel_values`` by what they were made from. A cache that cannot be written costs time only.

    Args:
        folder: where they lie, one file each.
        limit: bytes kept, about.
    """

    folder: Path
    limit: int = LIMIT

    def get(self, digest: str, settings: ImageSettings, make: Callable[[], Array]) -> Array:
        """``make()`` for the image whose content has ``digest``, or what was kept of it: [N, 3, S, S]."""
        from PIL import __version__ as pillow

        parts = [digest, settings.to_json(), settings.size, pillow, np.__version__]
        key = sha256_json(parts)
        path = self.folder / f"{key}.npy"
        shape = (3, settings.size, settings.size)
        try:
            found: Array = np.load(path, allow_pickle=False)
            if found.ndim == 4 and found.shape[1:] == shape and found.dtype == np.float32:
                os.utime(path)
                return found
        except (OSError, ValueError, EOFError):
            pass  # not there yet, or damaged: made again below
        made = make()
        with suppress(OSError):  # a full or read-only disk
            self._keep(path, made)
        return made

    def trim(self) -> None:
        """Remove what was used longest ago, until the rest is within ``limit``."""
        try:
            files = [(p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob("*.npy")]
        except OSError:
            return  # another process trims too
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _keep(self, path: Path, made: Array) -> None:
        if made.nbytes > self.limit:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial, partial.open("wb") as file:
            np.save(file, made, allow_pickle=False)
