"""Pictures of several tiles with small text and shapes, which one tile of the whole picture does not show.

    6   KITE                                     a picture of 3 x 1 tiles: 192 x 64 pixels
                 o  o

A picture has the pixels of its tiles, 64 x 64 each; text is 16 pixels high, a shape 11. Nothing overlaps, and
no item crosses the border of two tiles. Drawing is a pure function of the picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .glyphs import DIGITS, HEIGHT, LETTERS, Mask, chinese, text_mask
from .render import Image8
from .scenes import Split

TILE = 64
SHAPE = 11
"""Side of a shape in pixels."""
SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (20, 150, 60),
    "blue": (40, 80, 225),
    "purple": (150, 50, 190),
}
Places = np.ndarray[Any, np.dtype[np.int64]]
TextKind = Literal["number", "word", "chinese"]
TEXT_KINDS: tuple[TextKind, ...] = ("number", "word", "chinese")
LONGEST = 6
"""Characters of the longest text."""
_LENGTHS: dict[TextKind, tuple[int, int]] = {"number": (2, LONGEST), "word": (3, LONGEST), "chinese": (2, 3)}
GRID = 4
"""Text and shapes are at multiples of so many pixels."""
_APART = 8
_TRIES = 40
_HELD_OUT = 8


@dataclass(frozen=True)
class Item:
    """Something drawn: ``content`` is a text, or a shape's name; ``x``, ``y`` the left upper pixel."""

    content: str
    kind: TextKind | Literal["shape"]
    rgb: tuple[int, int, int]
    x: int = 0
    y: int = 0
    color: str = ""

    def mask(self) -> Mask:
        """Its pixels, bool [H, W]."""
        return shape_masks()[self.content] if self.kind == "shape" else _mask(self.content)


@dataclass(frozen=True)
class Sign:
    """A picture of ``columns`` x ``rows`` tiles; ``seed`` decides its background."""

    columns: int
    rows: int
    items: tuple[Item, ...]
    seed: int

    def texts(self, kind: str) -> list[str]:
        """The texts of a kind, in the order in which they were placed."""
        return [item.content for item in self.items if item.kind == kind]

    def count(self, shape: str | None = None, color: str | None = None) -> int:
        """How many shapes there are: of one form, of one colour, or of both."""
        return sum(
            item.kind == "shape"
            and (shape is None or item.content == shape)
            and (color is None or item.color == color)
            for item in self.items
        )


@cache
def _mask(text: str) -> Mask:
    return text_mask(text)


@cache
def shape_masks() -> dict[str, Mask]:
    """The pixels of every shape, bool [11, 11]."""
    y, x = np.mgrid[:SHAPE, :SHAPE] - (SHAPE - 1) / 2
    edge = SHAPE / 2
    return {
        "circle": x * x + y * y <= edge * edge,
        "square": np.maximum(abs(x), abs(y)) < edge - 1,
        "triangle": (abs(x) * 2 <= y + edge) & (y < edge),
        "cross": (abs(x) < 2) | (abs(y) < 2),
    }


@cache
def words() -> tuple[str, ...]:
    """English words of 3 to 6 letters, in capitals."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="ascii")
    return tuple(word.upper() for word in text.split() if 3 <= len(word) <= 6)


def held_out(text: str) -> bool:
    """Whether training never shows ``text``: one of eight, by its checksum."""
    return zlib.crc32(text.encode()) % _HELD_OUT == 0


def sample_text(rng: np.random.Generator, kind: TextKind, split: Split) -> str:
    """A text that only ``split`` shows.

    Words are English; in training half of them are random letters. Numbers and Chinese are random characters.
    """
    low, high = _LENGTHS[kind]
    while True:
        length = int(rng.integers(low, high + 1))
        if kind == "word" and (split == "heldout" or rng.random() < 0.5):
            text = words()[int(rng.integers(len(words())))]
        else:
            alphabet: Sequence[str] = {"number": DIGITS, "word": LETTERS, "chinese": chinese()}[kind]
            text = "".join(alphabet[i] for i in rng.integers(len(alphabet), size=length))
        if held_out(text) == (split == "heldout"):
            return text


def text_item(rng: np.random.Generator, kind: TextKind, text: str) -> Item:
    """``text`` in a dark colour."""
    r, g, b = rng.integers(0, 90, 3).tolist()
    return Item(text, kind, (r, g, b))


def shape_item(rng: np.random.Generator, shape: str, color: str) -> Item:
    """A shape; its colour varies a little."""
    r, g, b = (np.array(COLORS[color]) + rng.integers(-10, 11, 3)).clip(0, 255).tolist()
    return Item(shape, "shape", (r, g, b), color=color)


def arranged(rng: np.random.Generator, columns: int, rows: int, items: Sequence[Item]) -> Sign:
    """``items`` at random places of a picture; an item for which there is no room is left out."""
    boxes: list[tuple[int, int, int, int]] = []
    placed = []
    for item in items:
        height, width = item.mask().shape
        for _ in range(_TRIES):
            column, row = int(rng.integers(columns)), int(rng.integers(rows))
            x = column * TILE + GRID * int(rng.integers((TILE - width) // GRID + 1))
            y = row * TILE + GRID * int(rng.integers((TILE - height) // GRID + 1))
            if all(
                x >= right or left >= x + width + _APART or y >= bottom or top >= y + height
                for left, top, right, bottom in boxes
            ):
                boxes.append((x, y, x + width + _APART, y + height))
                placed.append(Item(item.content, item.kind, item.rgb, x, y, item.color))
                break
    return Sign(columns, rows, tuple(placed), int(rng.integers(1 << 31)))


def draw(sign: Sign) -> Image8:
    """The picture, uint8 RGB [64 rows, 64 columns, 3]: a bright background with grain and a slope."""
    rng = np.random.default_rng([sign.seed, 0x516])
    height, width = sign.rows * TILE, sign.columns * TILE
    base = rng.integers(196, 244, 3).astype(np.float32)
    slope = rng.uniform(-10, 10, 2)
    ramp = slope[0] * np.linspace(-1, 1, height)[:, None] + slope[1] * np.linspace(-1, 1, width)[None]
    grain = np.frombuffer(rng.bytes(height * width), np.uint8).reshape(height, width) / 255.0 * 12.0 - 6.0
    pixels: Image8 = ((ramp + grain)[..., None] + base).clip(0, 255).astype(np.uint8)
    for item in sign.items:
        mask = item.mask()
        area = pixels[item.y : item.y + mask.shape[0], item.x : item.x + mask.shape[1]]
        area[mask] = item.rgb
    return pixels


# --- contents of places, as targets of the tower ---


@cache
def classes() -> tuple[str, ...]:
    """Classes of a place: nothing, every character, every shape."""
    return ("", *DIGITS, *LETTERS, *chinese(), *SHAPES)


@cache
def _class_of() -> dict[str, int]:
    return {name: index for index, name in enumerate(classes())}


def places(sign: Sign) -> Places:
    """Class of the item whose middle is in each area of 16 x 8 pixels, int64 [tiles, 4, 8, 3], row by row.

    After the class come the number of a character within its text and the number of a shape's color, both
    from 1; 0 for anything else.
    """
    table = np.zeros((sign.rows * TILE // HEIGHT, sign.columns * TILE * 2 // HEIGHT, 3), np.int64)
    for item in sign.items:
        if item.kind == "shape":
            middle = SHAPE // 2
            place = (item.y + middle) // HEIGHT, (item.x + middle) // (HEIGHT // 2)
            table[place] = _class_of()[item.content], 0, 1 + tuple(COLORS).index(item.color)
            continue
        step = item.mask().shape[1] // len(item.content)
        for index, letter in enumerate(item.content):
            x = item.x + index * step + step // 2
            place = (item.y + HEIGHT // 2) // HEIGHT, x // (HEIGHT // 2)
            table[place] = _class_of()[letter], index + 1, 0
    tiled = table.reshape(sign.rows, TILE // HEIGHT, sign.columns, -1, 3).swapaxes(1, 2)
    out: Places = tiled.reshape(sign.rows * sign.columns, TILE // HEIGHT, -1, 3)
    return out


def page(rng: np.random.Generator) -> Sign:
    """One tile full of lines of text and shapes, to train a tower on characters."""
    items, y = [], GRID * int(rng.integers(4))
    while y + HEIGHT <= TILE:
        x, misses = GRID * int(rng.integers(2)), 0
        while misses < 4:
            kind = ("number", "word", "chinese", "chinese", "chinese", "shape")[int(rng.integers(6))]
            if kind == "shape":
                item = shape_item(rng, SHAPES[int(rng.integers(4))], tuple(COLORS)[int(rng.integers(4))])
            else:
                item = text_item(rng, kind, sample_text(rng, kind, "train"))  # type: ignore[arg-type]
            width = item.mask().shape[1]
            if x + width > TILE:
                misses += 1
                continue
            top = y + GRID if kind == "shape" else y  # so its middle is in the row of the line's
            items.append(Item(item.content, item.kind, item.rgb, x, top, item.color))
            x += -(-width // GRID) * GRID + GRID * int(rng.integers(2, 4))
        y += HEIGHT + GRID * int(rng.integers(2))
    return Sign(1, 1, tuple(items), int(rng.integers(1 << 31)))
