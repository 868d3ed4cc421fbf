"""Captions on a real bundle beyond the published tokens: drawn tokens, pieces as they come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_export.errors import UsageError
from ivl_export.inputs.tokenizer import SentencePieceTokenizer
from ivl_export.models.shipped import nano_folder
from ivl_export.runtime import InternVL
from ivl_export.sampling import Sampling

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(tiny_bundle, threads=1) as loaded:
        yield loaded


def pictures(count: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (60, 50 + i, 3), dtype=np.uint8) for i in range(count)]


def test_drawn_captions_depend_on_their_seed_and_not_on_their_company(model: InternVL) -> None:
    images, prompts = pictures(3), ["a", "two large", "a ring"]

    def draw(seed: int) -> list[str]:
        return model.caption(images, prompts, max_new_tokens=8, sampling=Sampling(3.0, top_k=50, seed=seed))

    drawn = draw(0)
    assert drawn == draw(0)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1
    for image, prompt, text in zip(images, prompts, drawn, strict=True):
        how = Sampling(3.0, top_k=50, seed=0)
        assert model.caption([image], prompt, max_new_tokens=8, sampling=how) == [text]
    assert model.caption(images, prompts, sampling=Sampling()) == model.caption(images, prompts)


@pytest.mark.parametrize("sampling", [None, Sampling(2.0, top_p=0.9, seed=4)])
def test_a_streamed_caption_is_the_whole_one_in_pieces(model: InternVL, sampling: Sampling | None) -> None:
    image = pictures(1)[0]
    pieces = list(model.stream_caption(image, "a", 12, 6, sampling=sampling))
    assert len(pieces) > 1
    whole = model.caption([image], "a", max_new_tokens=12, min_new_tokens=6, sampling=sampling)
    assert ["".join(pieces).strip()] == whole


def test_a_stream_stops_without_a_reader(model: InternVL) -> None:
    before = model.timings.get("qllama_step")
    stream = model.stream_caption(pictures(1)[0], "a", 30, 30)
    next(stream)
    del stream
    after = model.timings["qllama_step"].calls - (before.calls if before else 0)
    assert after < 10


def test_no_character_is_given_out_before_it_is_whole() -> None:
    tokenizer = SentencePieceTokenizer((nano_folder() / "tokenizer.model").read_bytes())
    text = "红色 a 🦊 é"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text.split()), "characters in bytes"
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    cut = ids[: ids.index(tokenizer.encode("🦊")[-1])]
    assert text.startswith("".join(tokenizer.stream(cut)))
    assert tokenizer.decode(cut) == "".join(tokenizer.stream(cut))


def test_settings_that_cannot_be_right(model: InternVL) -> None:
    image = pictures(1)[0]
    with pytest.raises(UsageError, match="not sampled"):
        model.caption([image], num_beams=2, sampling=Sampling(1.0))
    with pytest.raises(UsageError, match="max_new_tokens 0"):
        model.stream_caption(image, max_new_tokens=0)
