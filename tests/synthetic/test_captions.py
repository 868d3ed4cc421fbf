"""Captions: exact words, one for each meaning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ivl_export.synthetic.captions import LANGUAGES, Language, caption, class_prompts, corpus, words
from ivl_export.synthetic.scenes import ALL_COMBINATIONS, BACKGROUNDS, Obj, Scene, sample_scene

PAIR = (Obj("cross", "red", "small"), Obj("ring", "blue", "small"))


@pytest.mark.parametrize(
    ("objects", "relation", "english", "chinese"),
    [
        ((Obj("square", "red", "small"),), None, "a small red square", "一个红色的小正方形"),
        ((Obj("cross", "orange", "large", 2),), None, "two large orange crosses", "两个橙色的大十字形"),
        ((Obj("triangle", "blue", "large", 3),), None, "three large blue triangles", "三个蓝色的大三角形"),
        (
            PAIR,
            "left of",
            "a small red cross left of a small blue ring",
            "一个红色的小十字形在一个蓝色的小圆环左边",
        ),
        (
            PAIR,
            "right of",
            "a small red cross right of a small blue ring",
            "一个红色的小十字形在一个蓝色的小圆环右边",
        ),
        (
            PAIR,
            "above",
            "a small red cross above a small blue ring",
            "一个红色的小十字形在一个蓝色的小圆环上方",
        ),
        (
            PAIR,
            "below",
            "a small red cross below a small blue ring",
            "一个红色的小十字形在一个蓝色的小圆环下方",
        ),
    ],
)
def test_captions(objects: tuple[Obj, ...], relation: str | None, english: str, chinese: str) -> None:
    scene = Scene(objects, relation, "noise", 0)
    assert caption(scene) == english
    assert caption(scene, "zh") == chinese


@pytest.mark.parametrize("lang", LANGUAGES)
def test_captions_are_equal_exactly_when_the_meaning_is(lang: Language) -> None:
    rng = np.random.default_rng(0)
    meaning_of: dict[str, tuple[tuple[Obj, ...], str | None]] = {}
    for _ in range(3000):
        scene = sample_scene(rng, "heldout")
        text = caption(scene, lang)
        assert meaning_of.setdefault(text, scene.meaning) == scene.meaning
        other = BACKGROUNDS[(BACKGROUNDS.index(scene.background) + 1) % 4]
        assert caption(replace(scene, seed=1, background=other), lang) == text
    assert len(meaning_of) == len(set(meaning_of.values())) > 1000


@pytest.mark.parametrize("lang", LANGUAGES)
def test_class_prompts_are_captions_of_the_class(lang: Language) -> None:
    prompts = [p for shape, color in ALL_COMBINATIONS for p in class_prompts(shape, color, lang)]
    assert len(set(prompts)) == 2 * len(ALL_COMBINATIONS)
    for size in ("small", "large"):
        scene = Scene((Obj("ring", "green", size),), None, "noise", 0)
        assert caption(scene, lang) in class_prompts("ring", "green", lang)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_corpus_holds_every_word(lang: Language) -> None:
    known = {w for text in corpus() for w in text}
    rng = np.random.default_rng(1)
    for _ in range(500):
        assert set(words(sample_scene(rng, "heldout"), lang)) <= known
