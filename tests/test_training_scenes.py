"""Scenes: what a caption says of a picture is true of its pixels, and the splits are kept apart."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from skimage.measure import label, regionprops

from ivl_export.training.scenes import (
    ALL_COMBINATIONS,
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    Obj,
    Scene,
    Split,
    layout,
    render,
    sample_scene,
)


def scenes(n: int, split: Split, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(n)]


def regions(scene: Scene, color: str) -> list[Any]:
    """Connected regions of the picture whose pixels are near ``color``."""
    distance = np.linalg.norm(render(scene).astype(float) - COLORS[color], axis=-1)
    labels = label(distance < 55.0, connectivity=2)  # type: ignore[no-untyped-call]
    return [r for r in regionprops(labels) if r.area >= 60]  # type: ignore[no-untyped-call]


def test_held_out_combinations_never_occur_in_train() -> None:
    for scene in scenes(4000, "train"):
        assert not scene.novel
        assert not {(o.shape, o.color) for o in scene.objects} & set(HELD_OUT)


def test_held_out_split_shows_every_combination_and_many_held_out_ones() -> None:
    drawn = scenes(4000, "heldout")
    assert 0.33 < np.mean([s.novel for s in drawn]) < 0.5
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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_show_as_many_shapes_of_the_color_as_the_scene_says(shape: str, size: str) -> None:
    for i, color in enumerate(COLORS):
        for count in (1, 2, 3):
            scene = Scene((Obj(shape, color, size, count),), None, BACKGROUNDS[i % 4], 100 * i + count)
            found = regions(scene, color)
            assert len(found) == count, (color, count)
            low, high = (17, 34) if size == "small" else (29, 54)
            for region in found:
                top, left, bottom, right = region.bbox
                assert low <= max(bottom - top, right - left) <= high


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
    big = Obj("star", "red", "large", 3)
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
        ((Obj("star", "mauve", "small"),), None, "noise"),
        ((Obj("star", "red", "huge"),), None, "noise"),
        ((Obj("star", "red", "small", 4),), None, "noise"),
        ((Obj("star", "red", "small", 0),), None, "noise"),
        ((Obj("star", "red", "small"),), "above", "noise"),
        ((Obj("star", "red", "small"),), None, "sky"),
        ((Obj("star", "red", "small"), Obj("ring", "blue", "small")), None, "noise"),
        ((Obj("star", "red", "small"), Obj("ring", "blue", "small")), "inside", "noise"),
        ((Obj("star", "red", "small", 2), Obj("ring", "blue", "small")), "above", "noise"),
        ((Obj("ring", "blue", "small"), Obj("star", "red", "small")), "above", "noise"),
        ((Obj("star", "red", "small"), Obj("star", "red", "large")), "above", "noise"),
    ],
)
def test_impossible_scenes_are_refused(
    objects: tuple[Obj, ...], relation: str | None, background: str
) -> None:
    with pytest.raises(ValueError):
        Scene(objects, relation, background, 0)
