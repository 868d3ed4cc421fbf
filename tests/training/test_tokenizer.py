"""The nano tokenizer: reproducible bytes, LLaMA's special ids, one token a word."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from ivl_export.inputs.tokenizer import CAPTION_PROMPT, SentencePieceTokenizer, Tokenizer
from ivl_export.synthetic.captions import LANGUAGES, Language, caption, words
from ivl_export.synthetic.scenes import sample_scene
from ivl_export.training.tokenizer import VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer(train_tokenizer())


def test_training_is_reproducible_in_another_process() -> None:
    script = (
        "import hashlib; from ivl_export.training.tokenizer import train_tokenizer;"
        "print(hashlib.sha256(train_tokenizer()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "123"},
    )
    assert other.stdout.strip() == hashlib.sha256(train_tokenizer()).hexdigest()


def test_sizes_and_special_ids(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.prefix, tokenizer.eos) == ((1,), 2)
    assert tokenizer.encode_prompt("") == [1]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_caption_has_one_token_a_word_and_fits_the_first_bucket(
    tokenizer: Tokenizer, lang: Language
) -> None:
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng, "heldout") for _ in range(400)]
    texts = [caption(s, lang) for s in scenes]
    ids, lengths, prompts = tokenizer.encode_captions([CAPTION_PROMPT[lang]] * len(texts), texts)
    assert ids.shape == (400, 16)
    for scene, length, prompt in zip(scenes, lengths, prompts, strict=True):
        assert length == prompt + len(words(scene, lang)) + 1
    assert tokenizer.encode_contrastive(texts)[0].shape == (400, 16)


def test_captions_train_with_the_prompt_that_inference_starts_from(tokenizer: Tokenizer) -> None:
    texts = ["a small red ring", "一个红色的小圆环"]
    ids, lengths, prompts = tokenizer.encode_captions(list(CAPTION_PROMPT.values()), texts)
    for row, length, prompt, start, text in zip(
        ids, lengths, prompts, CAPTION_PROMPT.values(), texts, strict=True
    ):
        assert row[:prompt].tolist() == tokenizer.encode_prompt(start)
        assert row[length - 1] == tokenizer.eos
        assert not row[length:].any()
        assert tokenizer.decode(row[prompt:]) == text
