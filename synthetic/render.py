"""Draws a scene: the places of its shapes, and the image.

The scene's seed decides positions, rotation, colour jitter and texture, so :func:`render` is a pure function
of the scene.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .scenes import COLORS, Scene

Image8 = np.ndarray[Any, np.dtype[np.uint8]]

SIZE = 112
# Radius in pixels of a 112 px image; a shape's circumscribed circle is that times its factor, which
# evens out the areas so that "small" and "large" look alike for all shapes.
_RADIUS = {"small": (15.0, 16.0), "large": (22.0, 23.0)}
_REACH = {"square": 1.12, "triangle": 1.18, "cross": 1.12, "ring": 1.02}
_GAP = 3.0
# How far, along each axis, the second object of a pair may be from the middle of the image.
_MIDDLE = 3.0
_TRIES = 48
_JITTER = 14


@dataclass(frozen=True)
class Placement:
    """One drawn shape: centre, radius of its circumscribed circle (112 px units), radians, colour."""

    shape: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


def layout(scene: Scene) -> tuple[Placement, ...]:
    """Positions of all objects. Shapes never overlap or leave the image.

    The second object of a pair is within 9 px of the middle; the distance of the two along the relation's
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
