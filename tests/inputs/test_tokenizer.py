"""Tokenizers: ids and texts of the published ones, texts that spell special tokens, streams, bad files."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_export.errors import CheckpointError, InputError
from ivl_export.inputs import tokenizer
from ivl_export.inputs.tokenizer import (
    AddedToken,
    FastTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    pad_ids,
    tokenizer_files,
)
from ivl_export.models.shipped import nano_folder

GOLDENS = Path(__file__).parents[1] / "goldens" / "family" / "tokenizers"
TOKENIZER = SentencePieceTokenizer(nano_folder() / "tokenizer.model")
QWEN, INTERNLM = load_tokenizer(GOLDENS / "qwen2_mini"), load_tokenizer(GOLDENS / "internlm2_mini")
MORE = [AddedToken(512, "<|end|>", lstrip=True, rstrip=True), AddedToken(513, "<think>", special=False)]
ADDED = SentencePieceTokenizer(TOKENIZER.model, MORE, legacy=False)
EVERY = {"nano": TOKENIZER, "qwen": QWEN, "internlm": INTERNLM, "added": ADDED}


@pytest.fixture
def qwen_vocab(tmp_path: Path) -> Path:
    """Qwen's files as the OpenGVLab layout has them: no tokenizer.json."""
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
        shutil.copy(GOLDENS / "qwen2_mini" / name, tmp_path)
    return tmp_path


# --- the published tokenizers ---


def check_expected(own: Tokenizer, expected: dict[str, Any]) -> None:
    cases = zip(expected["texts"], expected["ids"], expected["decoded_skip_special"], strict=True)
    for text, ids, shown in cases:
        assert [*own.prefix, *own.encode_parts(own.markup(text))] == ids, text
        assert own.decode(ids, until_eos=False) == shown


@pytest.mark.parametrize("name", ["qwen2_mini", "internlm2_mini"])
def test_ids_and_texts_equal_the_reference(name: str) -> None:
    expected = json.loads((GOLDENS / name / "expected.json").read_text(encoding="utf-8"))
    check_expected(load_tokenizer(GOLDENS / name), expected)


def test_vocabulary_and_merges_equal_the_reference(qwen_vocab: Path) -> None:
    expected = json.loads((GOLDENS / "qwen2_mini" / "expected.json").read_text(encoding="utf-8"))
    own = load_tokenizer(qwen_vocab)
    check_expected(own, expected)
    assert (len(own), own.eos, own.prefix) == (432, 422, ())
    assert tokenizer_files(qwen_vocab)[:2] == ("vocab.json", "merges.txt")


def test_special_tokens_have_the_ids_of_their_files() -> None:
    added = json.loads((GOLDENS / "internlm2_mini" / "added_tokens.json").read_text())
    assert {content: INTERNLM.special(content) for content in added} == added
    assert (INTERNLM.prefix, INTERNLM.eos, len(INTERNLM)) == ((1,), 2, 535)
    with pytest.raises(CheckpointError, match="another model"):
        QWEN.special("<|return|>")


@pytest.mark.parametrize("name", ["qwen2_mini", "internlm2_mini"])
def test_a_tokenizer_carries_its_files(name: str, tmp_path: Path) -> None:
    own = load_tokenizer(GOLDENS / name)
    for file, content in own.files.items():
        (tmp_path / file).write_bytes(content)
    again = load_tokenizer(tmp_path)
    assert again.digest == own.digest
    assert again.specials == own.specials
    assert again.encode("the red boat") == own.encode("the red boat")
    assert own.digest != TOKENIZER.digest


def test_letters_that_a_model_lacks_become_its_unknown_token() -> None:
    unknown = AddedToken(0, "<unk>")
    own = SentencePieceTokenizer(TOKENIZER.model, [unknown])
    assert own.encode("a ring") == TOKENIZER.encode("a ring")


# --- text is text ---

SPELLED = st.lists(
    st.one_of(
        st.sampled_from([*QWEN.specials, *INTERNLM.specials, "<think>", "<|im_", "IMG_CONTEXT>"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", list(EVERY))
@settings(max_examples=150)
@given(text=SPELLED)
def test_no_text_gives_a_special_token(name: str, text: str) -> None:
    own = EVERY[name]
    ids = own.encode(text)
    assert not {*own.specials.values()} & {*ids}
    assert all(0 < i < len(own) or name == "qwen" for i in ids)
    plain = text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    assert own.decode(ids) == (unicodedata.normalize("NFC", text) if name == "qwen" else plain)


def test_a_piece_with_the_id_of_a_special_token_is_not_used() -> None:
    piece = "ring"
    number = TOKENIZER.encode(piece)
    assert len(number) == 1
    own = SentencePieceTokenizer(TOKENIZER.model, [AddedToken(number[0], "<|im_end|>")])
    ids = own.encode(f"a {piece}")
    assert number[0] not in ids
    assert own.markup("a<|im_end|>b") == ["a", number[0], "b"]


def test_added_tokens_that_are_not_special_are_found_in_texts() -> None:
    assert 513 in ADDED.encode("so <think> it over")
    assert ADDED.decode(ADDED.encode("so <think> it over")) == "so <think> it over"


def test_a_token_takes_adjacent_white_space() -> None:
    assert ADDED.encode_parts([512, " \n a star"]) == ADDED.encode_parts([512, "a star"])
    assert ADDED.encode_parts(["x ", 512]) == ADDED.encode_parts(["x", 512])


def test_texts_that_meet_are_encoded_as_one() -> None:
    assert QWEN.encode_parts(["the re", "d boat"]) == QWEN.encode("the red boat")


def test_only_the_first_text_has_the_models_space_where_the_files_say_so() -> None:
    own = SentencePieceTokenizer(TOKENIZER.model, [AddedToken(512, "<|end|>")], legacy=False)
    ids = own.encode_parts(["a star", 512, "a star"])
    first, second = ids[: ids.index(512)], ids[ids.index(512) + 1 :]
    assert first == TOKENIZER.encode("a star")
    assert second != first
    assert b"".join(map(own.piece, second)) == b"a star"


# --- streams ---


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EVERY))
@settings(max_examples=100)
@given(data=st.data())
def test_pieces_of_a_stream_are_whole_characters_of_the_text(name: str, data: st.DataObject) -> None:
    own = EVERY[name]
    ids = data.draw(st.lists(st.integers(-1, len(own) + 1), max_size=30))
    pieces = list(own.stream(ids))
    assert "".join(pieces) == own.decode(ids)
    assert "" not in pieces


@pytest.mark.parametrize("name", list(EVERY))
@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_character_of_several_tokens_comes_whole(name: str, text: str) -> None:
    own = EVERY[name]
    seen = "".join(own.stream(own.encode(text)))
    assert seen == own.decode(own.encode(text))
    assert seen.count("\N{REPLACEMENT CHARACTER}") == text.count("\N{REPLACEMENT CHARACTER}")


# --- other models' tokenizers, bad files ---


def test_a_tokenizer_of_another_model_is_detected_by_its_size() -> None:
    check_vocabulary(QWEN, 432)
    check_vocabulary(QWEN, 480)  # tables are padded
    for size in (431, 92553):
        with pytest.raises(CheckpointError, match="not of this model"):
            check_vocabulary(QWEN, size)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", '{"a": 0}'),
        ("merges.txt", "a b c"),
        ("merges.txt", "\xff"),
        ("added_tokens.json", '{"<img>": "x"}'),
        ("added_tokens.json", '{"<img>": -1}'),
        ("added_tokens.json", "{"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": 7}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|none|>"}'),
    ],
)
def test_damaged_files_are_checkpoint_errors(qwen_vocab: Path, file: str, content: str) -> None:
    (qwen_vocab / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError):
        load_tokenizer(qwen_vocab)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_tokenizer_json_never_raises_anything_else(data: st.DataObject) -> None:
    text = (GOLDENS / "qwen2_mini" / "tokenizer.json").read_text(encoding="utf-8")
    start = data.draw(st.integers(0, len(text) - 1))
    cut = text[:start] + data.draw(st.text(max_size=3)) + text[start + data.draw(st.integers(0, 40)) :]
    try:
        own = FastTokenizer(cut, "tokenizer.json")
    except CheckpointError:
        return
    assert own.encode("a b") is not None


# --- InternVL-C and G ---

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode_prompt(text)
    assert ids[0] == TOKENIZER.bos
    assert all(0 < i < len(TOKENIZER) for i in ids)  # id 0 would be masked inside the text
    assert TOKENIZER.eos not in ids
    assert TOKENIZER.decode([*ids, TOKENIZER.eos, 0, 0]) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_contrastive_rows_are_bos_text_eos_padding(texts: list[str]) -> None:
    ids, lengths = TOKENIZER.encode_contrastive(texts)
    assert ids.dtype == lengths.dtype == np.int64
    assert ids.shape[1] in tokenizer.BUCKETS
    assert not any(b >= lengths.max() for b in tokenizer.BUCKETS if b < ids.shape[1])
    for row, length, text in zip(ids, lengths, texts, strict=True):
        whole = TOKENIZER.encode_prompt("summarize:" + text)
        assert row[0] == 1
        assert row[length - 1] == 2
        assert (row[:length] > 0).all()
        assert not row[length:].any()
        assert row[: length - 1].tolist() == whole[: 80 - 1]


def test_long_texts_are_cut_and_keep_their_eos() -> None:
    text = "a large red star above a small blue ring " * 40
    ids, lengths = TOKENIZER.encode_contrastive([text, "a"], max_length=20, buckets=(16,))
    assert ids.shape == (2, 20)
    assert lengths.tolist()[0] == 20
    assert (ids[0, 0], ids[0, -1]) == (1, 2)
    assert TOKENIZER.encode_contrastive([text])[0].shape == (1, 80)


def test_short_texts_get_the_smallest_bucket() -> None:
    assert TOKENIZER.encode_contrastive(["a"])[0].shape == (1, 16)
    assert TOKENIZER.encode_contrastive(["a"], buckets=())[0].shape == (1, 80)
    assert TOKENIZER.encode_contrastive(["a", "a small ring " * 7])[0].shape == (2, 32)


def test_special_tokens_written_in_a_text_are_text() -> None:
    ids = TOKENIZER.encode_prompt("<s>a</s><unk><0x41>")
    assert ids.count(1) == 1
    assert 2 not in ids
    assert TOKENIZER.decode(ids) == "<s>a</s><unk><0x41>"


def test_decode_ignores_padding_unknown_ids_and_what_follows_eos() -> None:
    ids = TOKENIZER.encode_prompt("a red star")
    assert TOKENIZER.decode([0, *ids, 99999, -4, 2, *ids]) == "a red star"
    assert TOKENIZER.decode(np.array(ids)) == "a red star"
    assert TOKENIZER.decode([]) == ""


def test_invalid_unicode_is_an_input_error() -> None:
    with pytest.raises(InputError, match="ud800"):
        TOKENIZER.encode_prompt("a \ud800")


def test_captions_too_long_for_every_bucket_are_input_errors() -> None:
    with pytest.raises(InputError, match="tokens"):
        TOKENIZER.encode_captions(["English caption:"], ["x y " * 200])
    with pytest.raises(InputError, match="17 tokens"):
        pad_ids([[1] * 17], (8, 16))


def test_a_caption_that_merges_with_its_prompt_is_an_input_error() -> None:
    with pytest.raises(InputError, match="merge"):
        TOKENIZER.encode_captions(["English cap"], ["tion"])


def test_tokenizers_that_cannot_be_read_are_checkpoint_errors(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        SentencePieceTokenizer(file)
    file.write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        SentencePieceTokenizer(file)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError):
        SentencePieceTokenizer(file)


def test_tokenizer_reads_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(TOKENIZER.model)
    assert SentencePieceTokenizer(file).encode_prompt("a star") == TOKENIZER.encode_prompt("a star")
