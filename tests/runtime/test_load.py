"""Any bundle opens as the model that runs it, and its tokens are those of the published code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ivl_export.bundle import Bundle
from ivl_export.errors import InputError, IntegrityError, UsageError
from ivl_export.inputs.chat_template import IMAGE_TOKEN, ChatFormat
from ivl_export.runtime import InternVL, InternVLChat, load
from ivl_export.runtime.captions import pad_prompts
from ivl_export.sampling import Sampling

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = load_file(GOLDENS / "chat" / "chat.safetensors")
LENGTH = 10
VARIADIC = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


@pytest.fixture(scope="module")
def chat(chat_bundle: Path) -> Iterator[InternVLChat]:
    with load(chat_bundle, threads=1) as model:
        assert isinstance(model, InternVLChat)
        yield model


def test_the_class_follows_from_the_bundle(tiny_bundle: Path, chat: InternVLChat) -> None:
    assert type(chat) is InternVLChat
    for bundle in (tiny_bundle, str(tiny_bundle), Bundle.open(tiny_bundle)):
        with load(bundle, threads=1) as model:
            assert type(model) is InternVL
    with pytest.raises(UsageError, match=r"Unknown backend 'onnx'"):
        load(tiny_bundle, "onnx")
    with (
        pytest.raises(UsageError, match=r"no option 'cuda_graphs'"),
        load(tiny_bundle, cuda_graphs=True) as model,
    ):
        model.components.open("vision")
    with pytest.raises(IntegrityError):
        load(tiny_bundle / "onnx")


def test_signatures_are_whole() -> None:
    whole = dict(inspect.signature(load).parameters)
    for method, own in ((InternVL.load, set()), (InternVLChat.load, {"kept_bytes"})):
        by_name = dict(inspect.signature(method).parameters)
        assert not {p.kind for p in by_name.values()} & {
            inspect.Parameter.VAR_KEYWORD,
            inspect.Parameter.VAR_POSITIONAL,
        }
        assert [*by_name][1:] == [name for name in [*whole][1:] if name in own or name != "kept_bytes"]
        assert all(p.default == whole[name].default for name, p in by_name.items() if name in whole)


def test_captions(tiny_bundle: Path) -> None:
    seen = load_file(GOLDENS / "tiny" / "generate.safetensors")
    with load(tiny_bundle, threads=1) as model:
        new = model.generate(seen["pixel_values"], seen["nopad_input_ids"], max_new_tokens=12)
    assert new.dtype == np.int64
    assert new.shape == (len(seen["pixel_values"]), 12)


def test_answers(chat: InternVLChat) -> None:
    for row in range(3):
        ids, pixels = GOLDEN[f"gen{row}.input_ids"], GOLDEN["images"][row : row + 1]
        new = chat.generate(pixels, ids, max_new_tokens=LENGTH)
        assert new.dtype == np.int64
        assert new.tolist() == GOLDEN[f"gen{row}.new_tokens"].tolist()


@pytest.mark.parametrize("left", [False, True])
def test_answers_of_a_batch_with_padding(chat: InternVLChat, left: bool) -> None:
    ids, mask = pad_prompts([GOLDEN[f"gen{row}.input_ids"][0].tolist() for row in range(3)])
    if not left:
        ids, mask = (
            np.stack([np.roll(r, n) for r, n in zip(x, mask.sum(1), strict=True)]) for x in (ids, mask)
        )
    new = chat.generate(GOLDEN["images"], ids, mask, max_new_tokens=LENGTH)
    assert new.tolist() == [GOLDEN[f"gen{row}.new_tokens"][0].tolist() for row in range(3)]


def test_a_row_that_ends_is_padded(chat: InternVLChat, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOS here is a token that the first answer gives in its middle; others go on."""
    want = [GOLDEN[f"gen{row}.new_tokens"][0].tolist() for row in range(3)]
    eos = next(token for i, token in enumerate(want[0]) if i >= 2 and token not in want[0][:i])
    pad = next(token for token in range(3, 180) if all(token not in row for row in want))
    monkeypatch.setattr(chat, "chat_format", ChatFormat(eos=(eos,), pad=pad))
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in want]
    assert len(ended[0]) < LENGTH
    padded = [row + [pad] * (max(map(len, ended)) - len(row)) for row in ended]
    ids, mask = pad_prompts([GOLDEN[f"gen{row}.input_ids"][0].tolist() for row in range(3)])
    assert chat.generate(GOLDEN["images"], ids, mask, max_new_tokens=LENGTH).tolist() == padded


def test_placeholders(chat: InternVLChat) -> None:
    """One an image or one an embedding, under any id; as many as there are images."""
    row, pixels = GOLDEN["gen0.input_ids"][0], GOLDEN["images"][:1]
    want = GOLDEN["gen0.new_tokens"].tolist()
    visual = len(chat.encode_images(pixels)[0][0])
    repeats = np.where(row == IMAGE_TOKEN, visual, 1)
    for token in (IMAGE_TOKEN, 179):
        ids = np.where(row == IMAGE_TOKEN, token, row)
        for one in (ids, np.repeat(ids, repeats)):
            new = chat.generate(pixels, one[None], max_new_tokens=LENGTH, image_token_id=token)
            assert new.tolist() == want
    with pytest.raises(InputError, match=r"1 image placeholders.*2 images"):
        chat.generate(GOLDEN["images"][:2], row[None])


def test_drawn_answers_repeat(chat: InternVLChat) -> None:
    call = GOLDEN["images"][:1], GOLDEN["gen0.input_ids"], None
    drawn = [
        chat.generate(*call, max_new_tokens=LENGTH, sampling=Sampling(3.0, seed=s)).tolist()
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
