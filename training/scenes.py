"""Seeded scenes of coloured shapes: what is in them, where it stands, and how it looks.

A :class:`Scene` says what a caption can say (objects, relation) plus a background kind and a seed; the seed
alone decides the rest (positions, rotation, colour jitter, texture), so :func:`render` is a pure function of
the scene. Some (shape, colour) combinations never occur in the ``train`` split: see :data:`HELD_OUT`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

Value = TypeVar("Value")
Split = Literal["train", "heldout"]
Kind = Literal["single", "group", "pair"]
Image8 = np.ndarray[Any, np.dtype[np.uint8]]

SIZE = 112
SHAPES = ("square", "triangle", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (246, 138, 26),
    "yellow": (246, 228, 52),
    "green": (36, 160, 66),
    "blue": (38, 82, 218),
    "purple": (142, 48, 184),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("noise", "stripes", "gradient", "checker")
MAX_COUNT = 3
PAIRS = 0.4
"""Share of scenes that show a pair."""

ALL_COMBINATIONS: tuple[tuple[str, str], ...] = tuple((s, c) for s in SHAPES for c in COLORS)
#: One colour of every shape, each colour at most once: 4 of 32 combinations that no training scene has.
HELD_OUT: tuple[tuple[str, str], ...] = tuple(
    (shape, tuple(COLORS)[(3 * i + 1) % len(COLORS)]) for i, shape in enumerate(SHAPES)
)
TRAIN_COMBINATIONS: tuple[tuple[str, str], ...] = tuple(c for c in ALL_COMBINATIONS if c not in HELD_OUT)

# Share of held-out scenes whose first draw is a held-out combination (the rest draw from all of them).
_NOVEL_SHARE = 0.1
# Radius in pixels of a 112 px image; a shape's circumscribed circle is that times its factor, which
# evens out the areas so that "small" and "large" look alike for all shapes.
_RADIUS = {"small": (15.0, 16.0), "large": (22.0, 23.0)}
_REACH = {"square": 1.12, "triangle": 1.18, "cross": 1.12, "ring": 1.02}
_GAP = 3.0
# How far, along each axis, the second object of a pair may stand from the middle of the image.
_MIDDLE = 3.0
_TRIES = 48
_JITTER = 14


@dataclass(frozen=True)
class Obj:
    """``count`` equal shapes: ``Obj("ring", "red", "small", 2)`` is two small red rings."""

    shape: str
    color: str
    size: str
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """One group of 1-3 equal shapes, or two small ones with ``objects[0] relation objects[1]``.

    The second object of a pair stands in the middle of the image, so a scene has exactly one description.
    """

    objects: tuple[Obj, ...]
    relation: str | None
    background: str
    seed: int

    def __post_init__(self) -> None:
        for obj in self.objects:
            known = obj.shape in SHAPES and obj.color in COLORS and obj.size in SIZES
            if not known or not 1 <= obj.count <= MAX_COUNT:
                raise ValueError(f"no such object: {obj}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"no such background: {self.background}")
        if len(self.objects) == 1:
            if self.relation is not None:
                raise ValueError("a relation needs two objects")
            return
        if len(self.objects) != 2 or self.relation not in RELATIONS:
            raise ValueError("a scene has one object group, or two objects and a relation")
        first, second = self.objects
        if first.count != 1 or second.count != 1:
            raise ValueError("the objects of a pair are single")
        if (first.size, second.size) != ("small", "small"):
            raise ValueError("the objects of a pair are small")

    @property
    def novel(self) -> bool:
        """Whether it shows a combination that was never trained on."""
        return any((o.shape, o.color) in HELD_OUT for o in self.objects)

    @property
    def meaning(self) -> tuple[tuple[Obj, ...], str | None]:
        """What a caption says; scenes with equal meaning have equal captions."""
        return self.objects, self.relation


@dataclass(frozen=True)
class Placement:
    """One drawn shape: centre, radius of its circumscribed circle (112 px units), radians, colour."""

    shape: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


def sample_scene(
    rng: np.random.Generator, split: Split, kind: Kind | None = None, pairs: float = PAIRS
) -> Scene:
    """Draw a scene: a share of ``pairs``; of the rest, half one shape and half two or three equal ones.

    ``kind`` says which instead. ``train`` never shows a :data:`HELD_OUT` combination; ``heldout`` shows one
    in about a quarter of its scenes.
    """
    if kind is None:
        u = rng.random()
        kind = "pair" if u < pairs else "single" if u < (1 + pairs) / 2 else "group"
    pool = TRAIN_COMBINATIONS if split == "train" else ALL_COMBINATIONS
    novel = split == "heldout" and rng.random() < _NOVEL_SHARE
    first = _sample_object(rng, HELD_OUT if novel else pool)
    relation = None
    objects: tuple[Obj, ...] = (first,)
    if kind == "group":
        count = 2 + int(rng.integers(MAX_COUNT - 1))
        objects = (Obj(first.shape, first.color, first.size, count),)
    elif kind == "pair":
        other = _sample_object(rng, pool)
        outer, middle = (first, other) if rng.random() < 0.5 else (other, first)
        objects = (replace(outer, size="small"), replace(middle, size="small"))
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return Scene(objects, relation, background, int(rng.integers(2**62)))


def near_copy(rng: np.random.Generator, scene: Scene) -> Scene:
    """A training scene that differs from ``scene`` in one attribute, or whose objects have changed places.

    ``scene`` itself where the change would make it one that is held out. Contrasting such scenes teaches the
    details that tell them apart: shapes and relations above all.
    """
    objects, relation = list(scene.objects), scene.relation
    which = int(rng.integers(len(objects)))
    obj = objects[which]
    u = rng.random()
    if relation is not None and u < 0.3:
        relation = _other(rng, RELATIONS, relation)
    elif relation is not None and u < 0.4:
        objects.reverse()
    elif u < 0.7:
        objects[which] = replace(obj, shape=_other(rng, SHAPES, obj.shape))
    elif relation is not None or u < 0.75:
        objects[which] = replace(obj, color=_other(rng, tuple(COLORS), obj.color))
    elif u < 0.87:
        objects[which] = replace(obj, size=_other(rng, SIZES, obj.size))
    else:
        objects[which] = replace(obj, count=_other(rng, range(1, MAX_COUNT + 1), obj.count))
    if any((o.shape, o.color) in HELD_OUT for o in objects):
        return scene
    return Scene(tuple(objects), relation, scene.background, int(rng.integers(2**62)))


def _other(rng: np.random.Generator, values: Sequence[Value], value: Value) -> Value:
    rest = [v for v in values if v != value]
    return rest[int(rng.integers(len(rest)))]


def _sample_object(rng: np.random.Generator, pool: tuple[tuple[str, str], ...]) -> Obj:
    shape, color = pool[int(rng.integers(len(pool)))]
    return Obj(shape, color, SIZES[int(rng.integers(len(SIZES)))])


def layout(scene: Scene) -> tuple[Placement, ...]:
    """Where everything stands. Shapes never overlap or leave the image.

    The second object of a pair stands within 9 px of the middle; the distance of the two along the relation's
    axis is at least 1.75 times the distance across it.
    """
    return _layout(scene, np.random.default_rng([scene.seed, 0]))


def _layout(scene: Scene, rng: np.random.Generator) -> tuple[Placement, ...]:
    flat = [obj for obj in scene.objects for _ in range(obj.count)]
    radii = np.empty(len(flat))
    for i, obj in enumerate(flat):
        low, high = _RADIUS[obj.size]
        radii[i] = (low + (high - low) * rng.random()) * _REACH[obj.shape]
    points = _place(rng, radii, scene.relation)
    placed = []
    for obj, radius, (x, y) in zip(flat, radii, points, strict=True):
        angle = math.radians(3.0) * (2.0 * rng.random() - 1.0)
        r, g, b = (
            min(255, max(0, c + d))
            for c, d in zip(COLORS[obj.color], rng.integers(-_JITTER, _JITTER + 1, 3).tolist(), strict=True)
        )
        placed.append(Placement(obj.shape, float(x), float(y), float(radius), angle, (r, g, b)))
    return tuple(placed)


def _place(
    rng: np.random.Generator, radii: np.ndarray[Any, Any], relation: str | None
) -> np.ndarray[Any, Any]:
    n = len(radii)
    low = radii + 1.0
    tries = low[:, None] + rng.random((_TRIES, n, 2)) * (SIZE - 2.0 * low)[:, None]
    valid = np.ones(_TRIES, dtype=bool)
    if relation is not None:
        axis, sign = _direction(relation)
        middle = SIZE / 2.0 + _MIDDLE * (2.0 * rng.random((_TRIES, 2)) - 1.0)
        # The outer object needs the room of both circles between itself and its border.
        room = low[0] + radii.sum() + _GAP
        tries[:, 1] = middle
        tries[:, 1, axis] = (
            np.maximum(middle[:, axis], room) if sign > 0 else np.minimum(middle[:, axis], SIZE - room)
        )
        delta = tries[:, 1] - tries[:, 0]
        valid &= delta[:, axis] * sign >= 1.75 * np.abs(delta[:, 1 - axis])
    for i in range(n):
        for j in range(i + 1, n):
            delta = tries[:, i] - tries[:, j]
            valid &= (delta * delta).sum(1) >= (radii[i] + radii[j] + _GAP) ** 2
    good = np.flatnonzero(valid)
    if len(good):
        return tries[good[0]]  # type: ignore[no-any-return]
    # Crowded scenes: at the border along the axis, or one shape in each quarter of the image.
    if relation is not None:
        points = tries[0]
        points[0] = points[1]
        points[0, axis] = low[0] if sign > 0 else SIZE - low[0]
        return points  # type: ignore[no-any-return]
    quarters = rng.permutation(4)[:n]
    corner = np.stack([quarters % 2, quarters // 2], 1)
    return np.where(corner == 0, low[:, None], SIZE - low[:, None])


def _direction(relation: str) -> tuple[int, int]:
    """Axis (0 x, 1 y) and the sign of second minus first along it."""
    return {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]


def render(scene: Scene, size: int = SIZE) -> Image8:
    """Draw ``scene`` as uint8 RGB [size, size, 3]."""
    placements = layout(scene)
    background = _background(np.random.default_rng([scene.seed, 1]), scene.background, size)
    image = Image.fromarray(background).resize((2 * size, 2 * size), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for placed in placements:
        _draw(draw, placed, 2.0 * size / SIZE)
    return np.asarray(image.reduce(2))


def _draw(draw: ImageDraw.ImageDraw, p: Placement, scale: float) -> None:
    x, y, r = p.x * scale, p.y * scale, p.radius * scale
    if p.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=p.rgb, width=max(1, round(0.36 * r)))
        return
    cos, sin = math.cos(p.angle) * r, math.sin(p.angle) * r
    draw.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _OUTLINES[p.shape]], fill=p.rgb)


def _cross(arm: float) -> tuple[tuple[float, float], ...]:
    a, b = arm, math.sqrt(1.0 - arm * arm)
    return (
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    )


_H = math.sqrt(0.5)
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-_H, -_H), (_H, -_H), (_H, _H), (-_H, _H)),
    "triangle": tuple(
        (math.cos(2 * math.pi * k / 3 - math.pi / 2), math.sin(2 * math.pi * k / 3 - math.pi / 2))
        for k in range(3)
    ),
    "cross": _cross(0.3),
}


def _background(rng: np.random.Generator, kind: str, size: int) -> Image8:
    """A greyish texture [size, size, 3]: mid brightness and low saturation, so that no object hides in it."""
    texture: np.ndarray[Any, Any]
    base = 128.0 + 44.0 * (rng.random() - 0.5) + 24.0 * (rng.random(3) - 0.5)
    swing = 5.0 + 9.0 * rng.random()
    x = (np.arange(size, dtype=np.float32) - size / 2) / size
    angle = 2.0 * math.pi * rng.random()
    ramp = math.cos(angle) * x[None, :] + math.sin(angle) * x[:, None]
    if kind == "gradient":
        texture = 1.6 * ramp
    elif kind == "stripes":
        texture = np.sin(2.0 * math.pi * (rng.random() + (3.0 + 7.0 * rng.random()) * ramp))
    elif kind == "checker":
        cells = np.floor((x + rng.random()) * (5.0 + 7.0 * rng.random())) % 2
        texture = (cells[None, :] != cells[:, None]) * 2.0 - 1.0
    else:
        grid = 14 + int(rng.integers(29))
        index = np.arange(size) * grid // size
        texture = (2.0 * rng.random((grid, grid)) - 1.0)[index][:, index]
    grain = (
        np.frombuffer(rng.bytes(size * size), np.uint8).reshape(size, size) * np.float32(10.0 / 255.0) - 5.0
    )
    shade = (texture * swing + grain).astype(np.float32)
    pixels = np.empty((size, size, 3), np.uint8)
    for channel in range(3):  # all values are within 60..200
        pixels[..., channel] = shade + np.float32(base[channel])
    return pixels
