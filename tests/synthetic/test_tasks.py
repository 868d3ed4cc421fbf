"""Tasks: a model that knows the truth scores 1, one that knows part of it scores that part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ivl_export.arrays import Array
from ivl_export.synthetic import tasks
from ivl_export.synthetic.captions import LANGUAGES, Language, caption
from ivl_export.synthetic.render import Image8, render
from ivl_export.synthetic.scenes import HELD_OUT, Kind, Scene
from ivl_export.synthetic.tasks import Score, best, classify, describe, eval_scenes, evaluate, retrieve

SETTINGS: dict[str, Any] = {
    "n_classify": 60,
    "n_retrieve": 40,
    "n_caption": 30,
    "n_caption_zh": 10,
    "n_galleries": 2,
}


class Oracle:
    """Recognises the evaluation pictures byte by byte, and embeds a caption as its bag of words.

    ``blind`` words are unknown to it; ``noise`` is added to image embeddings.
    """

    def __init__(self, seed: int = 0, blind: Sequence[str] = (), noise: float = 0.0) -> None:
        self.blind, self.noise, self.rng = set(blind), noise, np.random.default_rng(9)
        plan: list[tuple[int, int, int, Kind | None, bool]]
        plan = [(tasks._CLASSIFY, 60, 0, "single", False)]
        plan += [(tasks.RETRIEVE, 40, part, None, True) for part in range(2)]
        plan += [(tasks._CAPTION, 30, 0, None, False)]
        self.scene: dict[bytes, Scene] = {}
        for task, n, part, kind, distinct in plan:
            for scene in eval_scenes(task, n, seed, kind=kind, part=part, distinct=distinct):
                self.scene[render(scene).tobytes()] = scene

    def encode_text(self, texts: Sequence[str]) -> Array:
        return np.stack([self.embed(text) for text in texts])

    def embed(self, text: str) -> Array:
        words = text.split()
        features = [f"{i >= len(words) // 2}{w}" for i, w in enumerate(words) if w not in self.blind]
        vector = np.zeros(4096)
        for feature in features:
            vector += np.random.default_rng(list(feature.encode())).standard_normal(4096)
        return vector

    def encode_image(self, images: Image8, mode: str) -> Array:
        assert images.dtype == np.uint8
        embeds = np.stack([self.embed(caption(self.scene[i.tobytes()])) for i in images])
        return embeds + self.noise * self.rng.standard_normal(embeds.shape)

    def caption(self, images: Image8, lang: Language) -> list[str]:
        said = []
        for image in images:
            text = caption(self.scene[image.tobytes()], lang)
            for word in self.blind:
                text = text.replace(word, "")
            said.append(f" {text}\n")
        return said


@pytest.mark.slow
def test_the_truth_scores_one() -> None:
    result = evaluate(Oracle(), **SETTINGS)
    for mode in tasks.MODES:
        for task, total in (("classify", 60), ("text_to_image", 80), ("image_to_text", 80)):
            score = result[mode][task]
            assert (score["correct"], score["total"], score["accuracy"]) == (total, total, 1.0)
            assert score["novel"]["correct"] == score["novel"]["total"] > 0.2 * total
            assert score["low"] < score["high"] == 1.0
    assert {k: v["total"] for k, v in result["caption"].items()} == {"en": 30, "zh": 10}
    assert all(v["accuracy"] == 1.0 for v in result["caption"].values())
    assert json.loads(json.dumps(result)) == result


def test_a_color_blind_model_fails_where_color_decides() -> None:
    model = Oracle(blind=("red", "orange", "yellow", "green", "blue", "purple", "white", "black"))
    result = evaluate(model, **SETTINGS, modes=("InternVL-C",))
    assert result["InternVL-C"]["classify"]["accuracy"] == 0.0  # eight classes tie
    assert result["InternVL-C"]["text_to_image"]["accuracy"] < 0.9
    assert result["caption"]["en"]["accuracy"] == 0.0
    assert result["caption"]["zh"]["accuracy"] == 1.0


def test_noise_costs_retrieval_and_classification() -> None:
    noisy = Oracle(noise=40.0)
    assert classify(noisy, "InternVL-C", 60).all.accuracy < 0.9
    t2i, i2t = retrieve(noisy, "InternVL-C", 40, galleries=2)
    assert t2i.all.accuracy < 0.9
    assert i2t.all.total == 80


def test_a_constant_model_and_nan_score_nothing() -> None:
    class Constant(Oracle):
        value = 1.0

        def encode_image(self, images: Image8, mode: str) -> Array:
            return np.full((len(images), 8), self.value)

        def encode_text(self, texts: Sequence[str]) -> Array:
            return np.ones((len(texts), 8))

    model = Constant()
    for model.value in (1.0, np.nan):
        assert classify(model, "InternVL-C", 60).all.correct == 0
        assert retrieve(model, "InternVL-C", 40)[0].all.correct == 0


def test_best_wants_the_one_highest_entry() -> None:
    similarity = np.array([[1.0, 0.5], [0.5, 0.5], [0.2, 0.1], [np.nan, 1.0]])
    assert best(similarity, np.array([0, 0, 1, 1])).tolist() == [True, False, False, False]
    assert similarity[0].tolist() == [1.0, 0.5]


def test_scores_by_combination_add_up() -> None:
    scenes = eval_scenes(tasks._CAPTION, 30, 0)

    class OnlySeen(Oracle):
        def caption(self, images: Image8, lang: Language) -> list[str]:
            shown = [self.scene[i.tobytes()] for i in images]
            return ["" if s.novel else caption(s, lang) for s in shown]

    score = describe(OnlySeen(), "en", 30)
    assert score.novel == Score(0, sum(s.novel for s in scenes))
    assert score.all == Score(30 - score.novel.total, 30)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Wilson 95% intervals as published tables give them (10/10, 0/10, 15/20 and 81/263).
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (15, 20, 0.5313, 0.8881), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert Score(correct, total).interval == pytest.approx((low, high), abs=1e-4)


def test_no_answers_say_nothing() -> None:
    assert Score(0, 0).accuracy == 0.0
    assert Score(0, 0).interval == (0.0, 1.0)


def test_evaluation_scenes_are_seeded_held_out_and_distinct() -> None:
    a = eval_scenes(tasks.RETRIEVE, 200, 0, distinct=True)
    assert a == eval_scenes(tasks.RETRIEVE, 200, 0, distinct=True)
    assert a[:50] == eval_scenes(tasks.RETRIEVE, 50, 0, distinct=True)
    others: tuple[dict[str, Any], ...] = (
        {"seed": 1},
        {"part": 1, "seed": 0},
        {"task": tasks._CAPTION, "seed": 0},
    )
    for other in others:
        assert a != eval_scenes(**{"task": tasks.RETRIEVE, "n": 200, "distinct": True, **other})
    for lang in LANGUAGES:
        assert len({caption(s, lang) for s in a}) == 200
    assert any((o.shape, o.color) in HELD_OUT for s in a for o in s.objects)


def test_sizes_of_zero_leave_tasks_out() -> None:
    result = evaluate(Oracle(), n_classify=0, n_retrieve=0, n_caption=0, n_caption_zh=0)
    assert result["InternVL-C"] == {}
    assert "caption" not in result
