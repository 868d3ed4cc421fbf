"""Scenes: captions are true of the pixels, and the splits are disjoint."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ivl_export.synthetic.captions import caption
from ivl_export.synthetic.render import SIZE, layout, render
from ivl_export.synthetic.scenes import (
    ALL_COMBINATIONS,
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    SIZES,
    Obj,
    Scene,
    Split,
    near_copy,
    sample_scene,
)


def scenes(n: int, split: Split, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(n)]


def regions(scene: Scene, color: str) -> list[Any]:
    """Connected regions of the picture whose pixels are near ``color``."""
    from skimage.measure import label, regionprops

    distance = np.linalg.norm(render(scene).astype(float) - COLORS[color], axis=-1)
    labels = label(distance < 55.0, connectivity=2)  # type: ignore[no-untyped-call]
    return [r for r in regionprops(labels) if r.area >= 60]  # type: ignore[no-untyped-call]


def test_held_out_combinations_never_occur_in_train() -> None:
    for scene in scenes(4000, "train"):
        assert not scene.novel
        assert not {(o.shape, o.color) for o in scene.objects} & set(HELD_OUT)


def test_held_out_split_shows_every_combination_and_many_held_out_ones() -> None:
    drawn = scenes(4000, "heldout")
    assert 0.18 < np.mean([s.novel for s in drawn]) < 0.33
    assert {(o.shape, o.color) for s in drawn for o in s.objects} == set(ALL_COMBINATIONS)


def test_every_held_out_shape_and_color_is_trained_on_in_other_combinations() -> None:
    assert 0.1 <= len(HELD_OUT) / len(ALL_COMBINATIONS) <= 0.15
    assert len({s for s, _ in HELD_OUT}) == len(HELD_OUT) == len({c for _, c in HELD_OUT})
    drawn = scenes(4000, "train")
    seen = {(o.shape, o.color) for s in drawn for o in s.objects}
    assert seen == set(ALL_COMBINATIONS) - set(HELD_OUT)
    assert {o.size for s in drawn for o in s.objects} == set(SIZES)
    assert {o.count for s in drawn for o in s.objects} == {1, 2, 3}
    assert {s.relation for s in drawn} == {None, *RELATIONS}
    assert {s.background for s in drawn} == set(BACKGROUNDS)


def changes(a: Scene, b: Scene) -> int:
    """Number of attributes in which ``a`` and ``b`` differ."""

    def attributes(scene: Scene) -> list[object]:
        return [scene.relation, *(v for o in scene.objects for v in (o.shape, o.color, o.size, o.count))]

    return sum(x != y for x, y in zip(attributes(a), attributes(b), strict=True))


def differing_words(a: Scene, b: Scene) -> list[tuple[str, str]]:
    pairs = zip(caption(a).split(), caption(b).split(), strict=True)
    return [(x, y) for x, y in pairs if x != y]


@pytest.mark.slow
def test_near_copies_differ_in_one_attribute_or_place() -> None:
    rng = np.random.default_rng(3)
    stored = 0
    changed = set()
    for scene in scenes(3000, "train"):
        copy = near_copy(rng, scene)
        if copy is scene:
            stored += 1
            continue
        assert not copy.novel
        assert copy.seed != scene.seed
        assert layout(copy) != layout(scene)
        if copy.objects == scene.objects[::-1] and copy.relation == scene.relation is not None:
            changed.add("places")
            continue
        assert changes(scene, copy) == 1
        if scene.relation != copy.relation:
            changed.add("relation")
        elif scene.relation is None and scene.objects[0].count == copy.objects[0].count:
            (word,) = differing_words(scene, copy)  # one word of the caption, for every shape
            changed.add("size" if word[0] in SIZES else "shape")
        elif scene.relation is None:
            changed.add("count")
        elif sorted(o.shape for o in scene.objects) == sorted(o.shape for o in copy.objects):
            changed.add("color")
    assert changed == {"relation", "places", "size", "shape", "count", "color"}
    assert 0 < stored < 600  # those that would show a held-out combination


def test_near_copies_are_deterministic() -> None:
    first, second = (
        [near_copy(rng, s) for s in scenes(200, "train")] for rng in map(np.random.default_rng, (4, 4))
    )
    assert first == second
    third = np.random.default_rng(5)
    assert first != [near_copy(third, s) for s in scenes(200, "train")]


def test_render_depends_on_the_scene_alone() -> None:
    for scene in scenes(20, "heldout"):
        first = render(scene)
        np.random.default_rng(5).random(100)
        assert first.shape == (SIZE, SIZE, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, render(replace(scene)))
        assert not np.array_equal(first, render(replace(scene, seed=scene.seed + 1)))


def test_equal_seeds_draw_equal_scenes() -> None:
    assert scenes(50, "train", 7) == scenes(50, "train", 7)
    assert scenes(50, "train", 7) != scenes(50, "train", 8)


def test_shapes_stay_inside_and_apart() -> None:
    for scene in scenes(1500, "heldout"):
        placed = layout(scene)
        assert len(placed) == sum(o.count for o in scene.objects)
        for i, a in enumerate(placed):
            assert a.radius <= a.x <= SIZE - a.radius
            assert a.radius <= a.y <= SIZE - a.radius
            for b in placed[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_the_second_object_of_a_pair_is_in_the_middle() -> None:
    for scene in scenes(1500, "heldout"):
        if scene.relation is not None:
            outer, middle = (math.hypot(p.x - SIZE / 2, p.y - SIZE / 2) for p in layout(scene))
            assert middle < 9 < 25 < outer


def test_share_of_pairs_is_the_requested_one() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.4, 0.8, 1.0):
        kinds = [sample_scene(rng, "train", pairs=share) for _ in range(1000)]
        assert abs(np.mean([s.relation is not None for s in kinds]) - share) < 0.05


def test_relation_is_what_the_layout_shows() -> None:
    for scene in scenes(1500, "heldout"):
        if scene.relation is None:
            continue
        a, b = layout(scene)
        dx, dy = b.x - a.x, b.y - a.y
        along, across = (dx, dy) if scene.relation in ("left of", "right of") else (dy, dx)
        if scene.relation in ("right of", "below"):
            along = -along
        assert along >= 1.75 * abs(across)
        assert along > 20


# Width or height of an upright shape, in radii of its circumscribed circle.
EXTENT = {"square": math.sqrt(2), "triangle": math.sqrt(3), "cross": 1.91, "ring": 2.0}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_show_as_many_shapes_of_the_color_and_size_as_the_scene_says(shape: str, size: str) -> None:
    for i, color in enumerate(COLORS):
        for count in (1, 2, 3):
            scene = Scene((Obj(shape, color, size, count),), None, BACKGROUNDS[i % 4], 100 * i + count)
            result = regions(scene, color)
            assert len(result) == count, (color, count)
            radii = [p.radius for p in layout(scene)]
            for region in result:
                top, left, bottom, right = region.bbox
                extent = max(bottom - top, right - left)
                assert EXTENT[shape] * min(radii) - 4 <= extent <= EXTENT[shape] * max(radii) + 4


@pytest.mark.parametrize("shape", SHAPES)
def test_large_is_clearly_larger_than_small(shape: str) -> None:
    radii: dict[str, list[float]] = {
        size: [
            layout(Scene((Obj(shape, "red", size),), None, "noise", seed))[0].radius for seed in range(100)
        ]
        for size in SIZES
    }
    assert min(radii["large"]) > 1.3 * max(radii["small"])


@pytest.mark.parametrize("size", SIZES)
def test_pixels_show_the_shape(size: str) -> None:
    for i, color in enumerate(COLORS):
        shown = {
            shape: regions(Scene((Obj(shape, color, size),), None, BACKGROUNDS[i % 4], i), color)[0]
            for shape in SHAPES
        }
        assert {shape: r.euler_number for shape, r in shown.items()} == {
            shape: 0 if shape == "ring" else 1  # 0: one hole
            for shape in SHAPES
        }
        assert shown["square"].extent > 0.85  # fills its bounding box
        assert shown["triangle"].extent < 0.65  # half of it
        assert shown["triangle"].solidity > 0.9  # and is convex
        assert shown["cross"].solidity < 0.85


def test_pixels_show_the_relation() -> None:
    rng = np.random.default_rng(1)
    checked = 0
    for _ in range(120):
        scene = sample_scene(rng, "heldout", "pair")
        first, second = scene.objects
        if first.color == second.color:
            continue
        (a,), (b,) = regions(scene, first.color), regions(scene, second.color)
        (ya, xa), (yb, xb) = a.centroid, b.centroid
        truth = {"left of": xa < xb, "right of": xa > xb, "above": ya < yb, "below": ya > yb}
        assert truth[str(scene.relation)]
        checked += 1
    assert checked > 60


def test_crowded_scenes_fall_back_to_a_valid_layout() -> None:
    big = Obj("triangle", "red", "large", 3)  # the widest shape
    for seed in range(150):
        placed = layout(Scene((big,), None, "noise", seed))
        for i, a in enumerate(placed):
            for b in placed[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_other_resolutions_show_the_same_picture() -> None:
    for scene in scenes(10, "heldout"):
        if scene.background == "noise":
            continue
        big = render(scene, 224).astype(float).reshape(112, 2, 112, 2, 3).mean((1, 3))
        assert np.abs(big - render(scene)).mean() < 8


@pytest.mark.parametrize(
    ("objects", "relation", "background"),
    [
        ((), None, "noise"),
        ((Obj("heart", "red", "small"),), None, "noise"),
        ((Obj("cross", "mauve", "small"),), None, "noise"),
        ((Obj("cross", "red", "huge"),), None, "noise"),
        ((Obj("cross", "red", "small", 4),), None, "noise"),
        ((Obj("cross", "red", "small", 0),), None, "noise"),
        ((Obj("cross", "red", "small"),), "above", "noise"),
        ((Obj("cross", "red", "small"),), None, "sky"),
        ((Obj("cross", "red", "small"), Obj("ring", "blue", "small")), None, "noise"),
        ((Obj("cross", "red", "small"), Obj("ring", "blue", "small")), "inside", "noise"),
        ((Obj("cross", "red", "small", 2), Obj("ring", "blue", "small")), "above", "noise"),
        ((Obj("cross", "red", "small"), Obj("ring", "red", "large")), "above", "noise"),
        ((Obj("cross", "red", "large"), Obj("ring", "red", "small")), "above", "noise"),
    ],
)
def test_impossible_scenes_are_refused(
    objects: tuple[Obj, ...], relation: str | None, background: str
) -> None:
    with pytest.raises(ValueError):
        Scene(objects, relation, background, 0)
