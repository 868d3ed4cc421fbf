"""Dynamic tiling against the published implementation: grids, pixels of tiles, thumbnails."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivl_export.errors import CheckpointError
from ivl_export.inputs.tiles import MAX_TILES, Tiling, grids, tiles_of

GOLDENS = Path(__file__).parents[1] / "goldens" / "family"
PUBLISHED: dict[str, Any] = json.loads((GOLDENS / "preprocess.json").read_text(encoding="utf-8"))
SIDE = st.integers(1, 5000)


def formula(name: str) -> Image.Image:
    """The pictures of the goldens."""
    width, height = {"A": (100, 60), "B": (45, 150)}[name]
    y, x = np.mgrid[:height, :width]
    channels = {
        "A": (7 * x + 13 * y, x * x + 3 * y, x * y + 17),
        "B": (x * x * y + 5, 11 * x + y * y, 255 - ((3 * x + 2 * y) % 256)),
    }[name]
    return Image.fromarray(np.stack([c % 256 for c in channels], -1).astype(np.uint8))


def test_grids_equal_the_published_ones() -> None:
    size = PUBLISHED["image_size_for_grids"]
    for case in PUBLISHED["grids"]:
        tiling, (width, height) = Tiling(case["max_tiles"]), (case["width"], case["height"])
        assert tiling.grid(width, height, size) == (case["grid_cols"], case["grid_rows"]), case
        assert tiling.count(width, height, size) == case["tiles_with_thumbnail"], case


@pytest.mark.parametrize("image", PUBLISHED["images"], ids=lambda image: image["name"])
def test_tiles_equal_the_published_bytes(image: dict[str, Any]) -> None:
    picture = formula(image["name"])
    assert hashlib.sha256(picture.tobytes()).hexdigest() == image["rgb_sha256"]
    for case in image["cases"]:
        tiles = tiles_of(picture, case["tile_size"], Tiling(case["max_tiles"]))
        stacked = np.stack([np.asarray(tile) for tile in tiles])
        assert hashlib.sha256(stacked.tobytes()).hexdigest() == case["u8_sha256"]


@given(SIDE, SIDE, st.integers(1, MAX_TILES), st.integers(1, MAX_TILES), st.booleans())
@pytest.mark.slow
def test_any_size_has_a_grid_within_the_limits(
    width: int, height: int, one: int, other: int, thumbnail: bool
) -> None:
    tiling = Tiling(max(one, other), min(one, other), thumbnail)
    columns, rows = tiling.grid(width, height, 448)
    assert tiling.min_tiles <= columns * rows <= tiling.max_tiles
    nearest = min(abs(width / height - w / h) for w, h in grids(tiling.min_tiles, tiling.max_tiles))
    assert abs(width / height - columns / rows) == nearest
    count = tiling.count(width, height, 448)
    assert count == columns * rows + (thumbnail and columns * rows > 1)
    assert count <= tiling.most


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_tiles_cover_the_stretched_picture(width: int, height: int, limit: int) -> None:
    picture, tiling = formula("A").crop((0, 0, width, height)), Tiling(limit)
    tiles = tiles_of(picture, 16, tiling)
    columns, rows = tiling.grid(width, height, 16)
    assert len(tiles) == tiling.count(width, height, 16)
    assert {tile.size for tile in tiles} == {(16, 16)}
    whole = Image.new("RGB", (16 * columns, 16 * rows))
    for number in range(columns * rows):
        whole.paste(tiles[number], (number % columns * 16, number // columns * 16))
    stretched = picture.resize(whole.size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(whole), np.asarray(stretched))


def test_a_lower_limit_also_lowers_the_fewest() -> None:
    assert Tiling(12, 4).limited(2) == Tiling(2, 2)
    assert Tiling(12).limited(1).most == 1


@pytest.mark.parametrize("limits", [(0, 0), (3, 4), (41, 1), (4, 0)])
def test_limits_that_cannot_be(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="tiles"):
        Tiling(*limits)


def test_palettes_are_refused() -> None:
    with pytest.raises(ValueError, match="P"):
        tiles_of(Image.new("P", (8, 8)), 4, Tiling())


def test_tiling_of_published_configs() -> None:
    published = {"dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1}
    assert Tiling.of_chat_config({**published, "max_dynamic_patch": 12}) == Tiling(12, 1, True)
    assert Tiling.of_chat_config({**published, "max_dynamic_patch": None}) == Tiling(6, 1, True)
    assert Tiling.of_chat_config({"dynamic_image_size": True}) == Tiling(6, 1, False)
    assert Tiling.of_chat_config({}) is Tiling.of_chat_config({"dynamic_image_size": False}) is None


@pytest.mark.parametrize(
    "change",
    [{"max_dynamic_patch": "12"}, {"max_dynamic_patch": 0}, {"use_thumbnail": 1}, {"min_dynamic_patch": 9}],
)
def test_tiling_that_cannot_be_read_is_a_checkpoint_error(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="tiling"):
        Tiling.of_chat_config({"dynamic_image_size": True, **change})
