"""Batches of a stage: labels of the captions, and those left by a focus."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ivl_export.inputs.tokenizer import SentencePieceTokenizer, Tokenizer
from ivl_export.training.collate import SceneBatches, focused, relation_ids
from ivl_export.training.losses import IGNORE
from ivl_export.training.presets import Stage
from ivl_export.training.tokenizer import train_tokenizer

STAGE = Stage("one", "generative", steps=4, batch=24, lr=1e-3, matrix_lr=0.02, warmup=2, pairs=0.8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer(train_tokenizer())


def test_relation_ids_are_the_words_that_tell_relations_apart(tokenizer: Tokenizer) -> None:
    results = set(relation_ids(tokenizer).tolist())
    for text, other in (("a left of b", "a right of b"), ("a above b", "a below b"), ("左边", "右边")):
        ids, others = set(tokenizer.encode_prompt(text)), set(tokenizer.encode_prompt(other))
        assert ids ^ others
        assert ids ^ others <= results
    assert not results & set(tokenizer.encode_prompt("English caption: a small red square"))


def test_focus_hides_a_share_of_the_other_labels() -> None:
    labels = torch.randint(0, 50, (200, 20), generator=torch.Generator().manual_seed(0))
    keep = np.array([3, 7], np.int64)
    stored = (labels == 3) | (labels == 7)
    for share in (0.0, 0.5, 1.0):
        result = focused(labels, share, keep, np.random.default_rng(1))
        hidden = result == IGNORE
        assert torch.equal(result[~hidden], labels[~hidden])
        assert not bool(hidden[stored].any())
        assert abs(float(hidden[~stored].float().mean()) - share) < 0.03


def test_a_batch_is_a_function_of_seed_stage_and_index(tokenizer: Tokenizer) -> None:
    def batches(stage: Stage, seed: int = 0) -> SceneBatches:
        return SceneBatches(seed, stage, 0.25, 28, tokenizer.files["tokenizer.model"])

    whole, part = batches(STAGE)[2], batches(replace(STAGE, focus=0.9))[2]
    assert torch.equal(part.labels, batches(replace(STAGE, focus=0.9))[2].labels)
    assert torch.equal(whole.images, part.images)
    assert not torch.equal(whole.images, batches(STAGE, 1)[2].images)
    said, left = whole.labels != IGNORE, part.labels != IGNORE
    relations = torch.isin(whole.labels, torch.from_numpy(relation_ids(tokenizer)))
    assert bool(relations.any())
    assert bool(left[relations].all())
    assert 0 < int((left & ~relations).sum()) < 0.3 * int((said & ~relations).sum())
