"""The tasks of internvl-nano: classification, retrieval and captions of scenes that training never drew.

The tasks know a model only through :class:`Model`, so that the PyTorch model and every engine of every
precision answer the same questions. All data follow from ``seed``, in separate random streams.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays import Array
from .captions import Language, caption, class_prompts
from .render import Image8, render
from .scenes import ALL_COMBINATIONS, Kind, Scene, sample_scene

MODES = ("InternVL-C", "InternVL-G")
_STREAM = 0x7E57
_CLASSIFY, RETRIEVE, _CAPTION = 0, 1, 2


class Model(Protocol):
    """The model interface of the tasks. Images are uint8 [B, H, W, 3]; embeddings need not be normalised."""

    def encode_image(self, images: Image8, mode: str) -> Array:
        """Embeddings [B, E] of ``images``; ``mode`` is ``InternVL-C`` or ``InternVL-G``."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Array:
        """Embeddings [B, E] of captions (given without the ``summarize:`` prefix, which belongs to them)."""
        ...

    def caption(self, images: Image8, lang: Language) -> list[str]:
        """One caption for each image, in ``lang``."""
        ...


class BothHeads:
    """``encode_image`` for :class:`Model` from a function that gives the embeddings of both modes at once.

    The tasks need embeddings of the same images in each mode; they are cached, so that an image runs through
    the model once.
    """

    def __init__(self, embed: Callable[[Image8], dict[str, Array]]) -> None:
        self._embed = embed
        self._seen: dict[bytes, dict[str, Array]] = {}

    def encode_image(self, images: Image8, mode: str) -> Array:
        """Embeddings [B, E] of ``images`` in ``mode``."""
        key = hashlib.sha256(images.tobytes()).digest()
        if key not in self._seen:
            self._seen[key] = self._embed(images)
        return self._seen[key][mode]


@dataclass(frozen=True)
class Score:
    """``correct`` of ``total`` answers, the share, and its Wilson 95% interval."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """``correct / total``; 0 without questions."""
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval at 95% (Wilson 1927): honest near 0 and 1 too. (0, 1) for no answers."""
        n, p, z = self.total, self.accuracy, 1.959963984540054
        if not n:
            return 0.0, 1.0
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding at p = 0, 1

    def to_json(self) -> dict[str, float | int]:
        """Plain data: correct, total, accuracy, low, high."""
        low, high = self.interval
        return {**asdict(self), "accuracy": self.accuracy, "low": low, "high": high}


@dataclass(frozen=True)
class TaskScore:
    """All questions of a task, and apart those about attribute combinations that were never trained on."""

    all: Score
    novel: Score

    def to_json(self) -> dict[str, Any]:
        """The fields of ``all``, with ``novel`` added."""
        return {**self.all.to_json(), "novel": self.novel.to_json()}


def evaluate(
    model: Model,
    n_classify: int = 1000,
    n_retrieve: int = 200,
    n_caption: int = 500,
    seed: int = 0,
    *,
    n_galleries: int = 5,
    n_caption_zh: int = 100,
    modes: Sequence[str] = MODES,
    batch: int = 64,
    progress: Callable[[str], None] = lambda task: None,
) -> dict[str, Any]:
    """All tasks: ``{mode: {classify, text_to_image, image_to_text}, "caption": {en, zh}, "settings": ...}``.

    Retrieval searches each of ``n_galleries`` galleries of ``n_retrieve`` scenes; a single one could not
    resolve a loss of a point. Tasks of size 0 are left out. ``progress`` gets a task's name before it runs.
    """
    result: dict[str, Any] = {}
    for mode in modes:
        scores: dict[str, Any] = {}
        if n_classify:
            progress(f"classify {mode}")
            scores["classify"] = classify(model, mode, n_classify, seed, batch).to_json()
        if n_retrieve and n_galleries:
            progress(f"retrieve {mode}")
            t2i, i2t = retrieve(model, mode, n_retrieve, seed, n_galleries, batch)
            scores["text_to_image"], scores["image_to_text"] = t2i.to_json(), i2t.to_json()
        result[mode] = scores
    captions: dict[str, Any] = {}
    sizes: tuple[tuple[Language, int], ...] = (("en", n_caption), ("zh", n_caption_zh))
    for lang, n in sizes:
        if n:
            progress(f"caption {lang}")
            captions[lang] = describe(model, lang, n, seed, batch).to_json()
    if captions:
        result["caption"] = captions
    result["settings"] = {
        "seed": seed,
        "classes": len(ALL_COMBINATIONS),
        "n_classify": n_classify,
        "n_retrieve": n_retrieve,
        "n_galleries": n_galleries,
        "n_caption": n_caption,
        "n_caption_zh": n_caption_zh,
    }
    return result


def classify(model: Model, mode: str, n: int, seed: int = 0, batch: int = 64) -> TaskScore:
    """Zero-shot classification of ``n`` single shapes into all 32 (shape, colour) classes.

    A class is the mean of its prompts' normalised embeddings, normalised again.
    """
    prompts = [class_prompts(shape, color) for shape, color in ALL_COMBINATIONS]
    flat = [text for texts in prompts for text in texts]
    embeds = _texts(model, flat, batch).reshape(len(prompts), len(prompts[0]), -1)
    classes = _normalised(embeds.mean(1))
    scenes = eval_scenes(_CLASSIFY, n, seed, kind="single")
    images = _images(model, mode, scenes, batch)
    labels = [ALL_COMBINATIONS.index((s.objects[0].shape, s.objects[0].color)) for s in scenes]
    right = best(images @ classes.T, np.array(labels))
    return _score(right, scenes)


def retrieve(
    model: Model, mode: str, n: int = 200, seed: int = 0, galleries: int = 1, batch: int = 64
) -> tuple[TaskScore, TaskScore]:
    """Recall@1 of text to image and image to text among ``n`` scenes with distinct captions."""
    hits: tuple[list[Array], list[Array]] = ([], [])
    all_scenes: list[Scene] = []
    for gallery in range(galleries):
        scenes = eval_scenes(RETRIEVE, n, seed, part=gallery, distinct=True)
        similarity = (
            _texts(model, [caption(s) for s in scenes], batch) @ _images(model, mode, scenes, batch).T
        )
        hits[0].append(best(similarity, np.arange(n)))
        hits[1].append(best(similarity.T, np.arange(n)))
        all_scenes.extend(scenes)
    return _score(np.concatenate(hits[0]), all_scenes), _score(np.concatenate(hits[1]), all_scenes)


def describe(model: Model, lang: Language, n: int, seed: int = 0, batch: int = 64) -> TaskScore:
    """Captions that equal the canonical one (white space around them aside)."""
    scenes = eval_scenes(_CAPTION, n, seed)
    right: list[bool] = []
    for part in _parts(scenes, batch):
        said = model.caption(np.stack([render(s) for s in part]), lang)
        right += [a.strip() == caption(s, lang) for a, s in zip(said, part, strict=True)]
    return _score(np.array(right, dtype=bool), scenes)


def eval_scenes(
    task: int, n: int, seed: int, *, kind: Kind | None = None, part: int = 0, distinct: bool = False
) -> list[Scene]:
    """The first ``n`` held-out scenes of a task's own random stream; ``distinct``: no two mean the same."""
    rng = np.random.default_rng([_STREAM, task, seed, part])
    scenes: list[Scene] = []
    seen = set()
    while len(scenes) < n:
        scene = sample_scene(rng, "heldout", kind)
        if distinct and scene.meaning in seen:
            continue
        seen.add(scene.meaning)
        scenes.append(scene)
    return scenes


def best(similarity: Array, labels: Array) -> Array:
    """Whether row i is highest at ``labels[i]``, and nowhere else: bool [rows].

    A tie counts as wrong, and so does NaN: a model that says the same of everything must not score.
    """
    rows = np.arange(len(labels))
    own = similarity[rows, labels]
    rest = similarity.copy()
    rest[rows, labels] = -np.inf
    right: Array = own > rest.max(1)
    return right


def _score(right: Array, scenes: Sequence[Scene]) -> TaskScore:
    novel = np.array([s.novel for s in scenes], dtype=bool)
    return TaskScore(
        Score(int(right.sum()), len(scenes)), Score(int((right & novel).sum()), int(novel.sum()))
    )


def _images(model: Model, mode: str, scenes: Sequence[Scene], batch: int) -> Array:
    parts = (np.stack([render(s) for s in part]) for part in _parts(scenes, batch))
    return _normalised(np.concatenate([model.encode_image(images, mode) for images in parts]))


def _texts(model: Model, texts: Sequence[str], batch: int) -> Array:
    return _normalised(np.concatenate([model.encode_text(part) for part in _parts(texts, batch)]))


def _parts(items: Sequence[Any], batch: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + batch] for i in range(0, len(items), batch))


def _normalised(embeds: Array) -> Array:
    wide = np.asarray(embeds, np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)  # type: ignore[no-any-return]
