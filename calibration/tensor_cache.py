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
    """``pixel_values`` by the hash of image and settings. A cache that cannot be written costs only time.

    Args:
        folder: one file each.
        limit: about the most bytes stored.
    """

    folder: Path
    limit: int = LIMIT

    def get(self, digest: str, settings: ImageSettings, make: Callable[[], Array]) -> Array:
        """``make()`` for the image whose content has ``digest``, or the cached array: [N, 3, S, S]."""
        from PIL import __version__ as pillow

        parts = [digest, settings.to_json(), settings.size, pillow, np.__version__]
        key = sha256_json(parts)
        path = self.folder / f"{key}.npy"
        shape = (3, settings.size, settings.size)
        try:
            cached: Array = np.load(path, allow_pickle=False)
            if cached.ndim == 4 and cached.shape[1:] == shape and cached.dtype == np.float32:
                os.utime(path)
                return cached
        except (OSError, ValueError, EOFError):
            pass  # not there yet, or damaged: made again below
        pixels = make()
        with suppress(OSError):  # a full or read-only disk
            self._keep(path, pixels)
        return pixels

    def trim(self) -> None:
        """Remove the least recently used files until the rest is within ``limit``."""
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

    def _keep(self, path: Path, pixels: Array) -> None:
        if pixels.nbytes > self.limit:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial, partial.open("wb") as file:
            np.save(file, pixels, allow_pickle=False)
