"""Training batches drawn on the fly: batch ``i`` is a pure function of (seed, i), so resuming is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .captions import Language, caption
from .render import SIZE, Image8, render
from .scenes import PAIRS, Scene, Split, near_copy, sample_scene

# Keeps the random streams of the splits apart, for all seeds.
_STREAM: dict[Split, int] = {"train": 0x7A1, "heldout": 0xE7A}


@dataclass(frozen=True)
class Batch:
    """``images`` uint8 [B, 112, 112, 3] and one caption each, in ``languages[i]``."""

    images: Image8
    captions: list[str]
    languages: list[Language]
    scenes: list[Scene]


def batch_scenes(
    seed: int,
    index: int,
    split: Split,
    batch: int,
    lang_mix: float = 0.25,
    near: float = 0.0,
    pairs: float = PAIRS,
) -> tuple[list[Scene], list[Language]]:
    """Scenes and caption languages of batch ``index``; a share of ``lang_mix`` is Chinese.

    A share of ``pairs`` are pairs; a share of ``near`` are near copies of the scene before them
    (:func:`.scenes.near_copy`).
    No two scenes of a batch mean the same (unless 32 draws find nothing new): equal captions would be false
    negatives of the contrastive loss.
    """
    rng = np.random.default_rng([_STREAM[split], seed, index])
    scenes: list[Scene] = []
    seen = set()
    for _ in range(batch):
        copy = bool(scenes) and near > 0 and rng.random() < near
        for _ in range(32):
            scene = near_copy(rng, scenes[-1]) if copy else sample_scene(rng, split, pairs=pairs)
            if scene.meaning not in seen:
                break
        seen.add(scene.meaning)
        scenes.append(scene)
    languages: list[Language] = ["zh" if u < lang_mix else "en" for u in rng.random(batch)]
    return scenes, languages


def make_batch(
    seed: int,
    index: int,
    split: Split,
    batch: int,
    lang_mix: float = 0.25,
    size: int = SIZE,
    near: float = 0.0,
    pairs: float = PAIRS,
) -> Batch:
    """Batch ``index``, rendered."""
    scenes, languages = batch_scenes(seed, index, split, batch, lang_mix, near, pairs)
    images = np.stack([render(scene, size) for scene in scenes])
    captions = [caption(scene, lang) for scene, lang in zip(scenes, languages, strict=True)]
    return Batch(images, captions, languages, scenes)


def batches(
    seed: int, split: Split, batch: int, lang_mix: float = 0.25, start: int = 0, size: int = SIZE
) -> Iterator[Batch]:
    """Endless batches from index ``start`` on."""
    while True:
        yield make_batch(seed, start, split, batch, lang_mix, size)
        start += 1
