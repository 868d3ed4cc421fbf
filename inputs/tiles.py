"""Dynamic tiling of the InternVL family from 1.5 on: an image as a grid of square tiles. No torch.

The grid of columns x rows with the nearest aspect ratio is taken, the image is stretched to it with bicubic
filtering, cut row by row, and the whole image as one tile (the thumbnail) follows where there are several.

    500 x 400, at most 12 tiles of 448: 1.25 is nearest to 5:4, which has 20 tiles, then to 4:3 (1.333)
    -> 1792 x 1344 pixels -> 12 tiles and the thumbnail
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from ..errors import CheckpointError

MAX_TILES = 40
"""The most tiles (without the thumbnail) that the family was shown to use."""


@dataclass(frozen=True)
class Tiling:
    """How an image is tiled.

    Args:
        max_tiles: the most tiles of one image, the thumbnail not counted; 1 to :data:`MAX_TILES`.
        min_tiles: the fewest.
        thumbnail: whether the whole image follows as one more tile where there are several.
    """

    max_tiles: int = 12
    min_tiles: int = 1
    thumbnail: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles <= MAX_TILES:
            raise ValueError(
                f"{self.min_tiles} to {self.max_tiles} tiles; 1 <= min <= max <= {MAX_TILES} is needed"
            )

    def grid(self, width: int, height: int, size: int) -> tuple[int, int]:
        """(columns, rows) for an image of ``width`` x ``height`` pixels and tiles of ``size`` pixels."""
        return nearest_grid(width, height, size, self.min_tiles, self.max_tiles)

    def count(self, width: int, height: int, size: int) -> int:
        """Tiles of an image of ``width`` x ``height`` pixels, the thumbnail among them."""
        columns, rows = self.grid(width, height, size)
        return columns * rows + (self.thumbnail and columns * rows > 1)

    @property
    def most(self) -> int:
        """The most tiles of an image, the thumbnail among them."""
        return self.max_tiles + (self.thumbnail and self.max_tiles > 1)

    def limited(self, max_tiles: int) -> Tiling:
        """The same with another upper limit; the lower one gives way."""
        return Tiling(max_tiles, min(self.min_tiles, max_tiles), self.thumbnail)

    @classmethod
    def of_chat_config(cls, config: Mapping[str, Any], source: str = "config.json") -> Tiling | None:
        """The tiling of a checkpoint in OpenGVLab's layout; None: one direct resize (``dynamic_image_size``).

        Missing keys have the defaults of the published class: no tiling, no thumbnail, 1 to 6 tiles.

        Raises:
            CheckpointError: a value of another type, or limits that cannot be.
        """
        dynamic, thumbnail = (config.get(key) or False for key in ("dynamic_image_size", "use_thumbnail"))
        least, most = (
            default if (value := config.get(key)) is None else value
            for key, default in (("min_dynamic_patch", 1), ("max_dynamic_patch", 6))
        )
        if type(dynamic) is not bool or type(thumbnail) is not bool or {type(least), type(most)} != {int}:
            raise CheckpointError(
                f"The tiling in {source} cannot be read.",
                f"dynamic_image_size {dynamic!r}, use_thumbnail {thumbnail!r}, min_dynamic_patch {least!r}, "
                f"max_dynamic_patch {most!r}.",
                "Take the file that was published with the checkpoint.",
            )
        try:
            return cls(most, least, thumbnail) if dynamic else None
        except ValueError as error:
            raise CheckpointError(f"The tiling in {source} cannot be used.", f"{error}.") from error


@lru_cache(maxsize=256)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of ``min_tiles`` to ``max_tiles`` tiles, by tiles, then columns."""
    sides = range(1, max_tiles + 1)
    every = [(w, h) for w in sides for h in sides if min_tiles <= w * h <= max_tiles]
    return tuple(sorted(every, key=lambda grid: grid[0] * grid[1]))


def nearest_grid(width: int, height: int, size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """The grid whose columns / rows is nearest to ``width / height``, in double precision as published.

    Of two that are equally near the later one wins, if the image has more than half of its pixels.
    """
    ratio, area = width / height, width * height
    nearest, best = float("inf"), (1, 1)
    for columns, rows in grids(min_tiles, max_tiles):
        distance = abs(ratio - columns / rows)
        if distance < nearest or (distance == nearest and area > 0.5 * size * size * columns * rows):
            nearest, best = distance, (columns, rows)
    return best


def tiles_of(image: Image.Image, size: int, tiling: Tiling) -> list[Image.Image]:
    """``image`` (RGB: bicubic on palettes would be nearest) as squares of ``size`` pixels, row by row."""
    if image.mode != "RGB":
        raise ValueError(f"tiles are cut of RGB images, this one is {image.mode}")
    columns, rows = tiling.grid(*image.size, size)
    whole = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    if columns * rows == 1:
        return [whole]
    tiles = [
        whole.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(rows)
        for x in range(columns)
    ]
    if tiling.thumbnail:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles
