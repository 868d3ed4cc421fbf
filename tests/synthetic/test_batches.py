"""Batches: pure functions of (seed, index), so training resumes exactly."""

from __future__ import annotations

import itertools

import numpy as np

from ivl_export.synthetic.batches import batch_scenes, batches, make_batch
from ivl_export.synthetic.captions import caption
from ivl_export.synthetic.render import render
from ivl_export.synthetic.scenes import Scene


def test_a_batch_holds_its_scenes_pictures_and_captions() -> None:
    batch = make_batch(3, 5, "train", 12)
    assert batch.images.shape == (12, 112, 112, 3)
    for i, scene in enumerate(batch.scenes):
        assert np.array_equal(batch.images[i], render(scene))
        assert batch.captions[i] == caption(scene, batch.languages[i])
        assert not scene.novel


def test_resuming_gives_the_batches_that_would_have_come() -> None:
    whole = list(itertools.islice(batches(1, "train", 4), 6))
    resumed = list(itertools.islice(batches(1, "train", 4, start=4), 2))
    for a, b in zip(whole[4:], resumed, strict=True):
        assert a.scenes == b.scenes
        assert a.captions == b.captions
        assert np.array_equal(a.images, b.images)


def test_seeds_indices_and_splits_are_independent_streams() -> None:
    drawn = [
        tuple(batch_scenes(seed, index, split, 4)[0])
        for seed in (0, 1)
        for index in (0, 1)
        for split in ("train", "heldout")
    ]
    assert len(set(drawn)) == len(drawn)


def test_captions_of_a_batch_differ_and_mix_languages() -> None:
    scenes, languages = batch_scenes(0, 0, "train", 256, lang_mix=0.25)
    assert len({s.meaning for s in scenes}) == 256
    assert 0.15 < languages.count("zh") / 256 < 0.35
    assert set(batch_scenes(0, 0, "train", 32, lang_mix=0.0)[1]) == {"en"}
    assert set(batch_scenes(0, 0, "train", 32, lang_mix=1.0)[1]) == {"zh"}


def test_near_copies_follow_their_original_and_are_not_false_negatives() -> None:
    alike: dict[float, float] = {}
    for near in (0.0, 0.5):
        adjacent = total = 0
        for index in range(40):
            scenes, languages = batch_scenes(0, index, "train", 64, near=near)
            assert len({s.meaning for s in scenes}) == 64
            assert len({caption(s) for s in scenes}) == 64
            assert len({caption(s, lang) for s, lang in zip(scenes, languages, strict=True)}) == 64
            assert not any(s.novel for s in scenes)
            total += 63
            adjacent += sum(one_word_apart(a, b) for a, b in itertools.pairwise(scenes))
        alike[near] = adjacent / total
    assert alike[0.0] < 0.05
    # Some copies differ in more words: "a" and its noun become plural.
    assert 0.25 < alike[0.5] < 0.55


def one_word_apart(a: Scene, b: Scene) -> bool:
    first, second = caption(a).split(), caption(b).split()
    return len(first) == len(second) and sum(x != y for x, y in zip(first, second, strict=True)) == 1


def test_batches_with_near_copies_are_functions_of_seed_and_index() -> None:
    first, again = (make_batch(2, 7, "train", 12, size=28, near=0.5) for _ in range(2))
    assert first.scenes == again.scenes
    assert first.captions == again.captions
    assert np.array_equal(first.images, again.images)
    assert first.scenes != batch_scenes(2, 7, "train", 12)[0]
