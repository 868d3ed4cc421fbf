"""Seeded scenes of coloured shapes, as data.

A :class:`Scene` has the contents of a caption (objects, relation) plus a background kind and a seed, which
alone decides its look (:mod:`.render`). Some (shape, colour) combinations never occur in the ``train``
split: see :data:`HELD_OUT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

Value = TypeVar("Value")
Split = Literal["train", "heldout"]
Kind = Literal["single", "group", "pair"]

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

    The second object of a pair is in the middle of the image, so a scene has exactly one description.
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
        """The meaning of a caption; scenes with equal meaning have equal captions."""
        return self.objects, self.relation


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
    details in which they differ: shapes and relations above all.
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
