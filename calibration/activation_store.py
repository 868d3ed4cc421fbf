"""Hidden states on disk, between one block and the next."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import BuildError

if TYPE_CHECKING:
    import torch

HEADROOM = 256 << 20
"""Disk that must stay free."""


class Spill:
    """fp32 arrays at fixed places in two files: the input of a block, and its output for the next.

    A block never writes into the file it reads, so one that was interrupted can run again. fp32, because
    rounding here would change every range measured in later blocks.

    Args:
        folder: holds the two files.
        name: their name.
        shapes: shape of every array.

    Raises:
        BuildError: too little disk, or it fills up while writing.
    """

    def __init__(self, folder: Path, name: str, shapes: list[tuple[int, ...]]) -> None:
        import math

        self.folder, self.shapes = folder, shapes
        self.paths = [folder / f"{name}.{side}" for side in (0, 1)]
        self.offsets, self.size = [], 0
        for shape in shapes:
            self.offsets.append(self.size)
            self.size += 4 * math.prod(shape)
        there = sum(path.stat().st_blocks * 512 for path in self.paths if path.is_file())
        free = shutil.disk_usage(folder).free
        if free + there < 2 * self.size + HEADROOM:
            raise BuildError(
                "There is not enough disk space for the activations between blocks.",
                f"{2 * self.size / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free.",
                "Free some, or calibrate on fewer samples.",
            )
        self._files: dict[int, BinaryIO] = {}

    def whole(self, side: int) -> bool:
        """Whether file ``side`` is there in full."""
        return self.paths[side].is_file() and self.paths[side].stat().st_size == self.size

    def read(self, side: int, index: int) -> torch.Tensor:
        """Array ``index`` from file ``side``."""
        import torch

        out = torch.empty(self.shapes[index])
        file = self._file(side)
        file.seek(self.offsets[index])
        if file.readinto(out.numpy().data.cast("B")) != out.nbytes:  # type: ignore[attr-defined]
            raise BuildError(f"{self.paths[side]} is cut off.", fix="Run the build again.")
        return out

    def write(self, side: int, index: int, x: torch.Tensor) -> None:
        """Put array ``index`` into file ``side``."""
        file = self._file(side)
        try:
            file.seek(self.offsets[index])
            file.write(x.float().cpu().contiguous().numpy().data.cast("B"))
        except OSError as error:
            raise BuildError(f"Cannot write {self.paths[side]}.", error.strerror or str(error)) from error

    def sync(self, side: int) -> None:
        """Everything written to file ``side`` is on the disk."""
        file = self._file(side)
        file.flush()
        os.fsync(file.fileno())

    def remove(self, side: int) -> None:
        """Delete file ``side``."""
        if file := self._files.pop(side, None):
            file.close()
        self.paths[side].unlink(missing_ok=True)

    def close(self) -> None:
        """Close both files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, side: int) -> BinaryIO:
        if side not in self._files:
            path = self.paths[side]
            path.touch()
            self._files[side] = path.open("r+b")
        return self._files[side]
