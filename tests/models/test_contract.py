"""Methods of the torch models that others rely on: names, arguments, shapes, and the published numbers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ivl_export.errors import CapabilityError, InputError
from ivl_export.inputs.chat_template import IMAGE_TOKEN
from ivl_export.models import InternViTConfig, load_chat, load_model
from ivl_export.models.chat import InternVLChatModel
from ivl_export.models.internvl import InternVLModel
from ivl_export.tests.numbers import FEATURES, HIDDEN, LOGITS, near

pytestmark = pytest.mark.numeric

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY, CHAT = GOLDENS / "tiny", GOLDENS / "chat"


@pytest.fixture(scope="module")
def model() -> InternVLModel:
    return load_model(TINY, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def chat() -> InternVLChatModel:
    return load_chat(CHAT, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(CHAT / "chat.safetensors")


def test_arguments_and_their_defaults() -> None:
    def arguments(method: Callable[..., object]) -> list[str]:
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [
            name if p.default is p.empty else f"{name}={p.default}"
            for name, p in inspect.signature(method).parameters.items()
            if p.kind is positional and name != "self"
        ]

    for load in (load_model, load_chat):
        assert arguments(load) == ["path", "dtype=torch.float32", "device=cpu"]
    assert arguments(InternVLModel.logits) == ["pixel_values", "input_ids", "mode=InternVL-C"]
    assert arguments(InternVLModel.generate)[:4] == [
        "pixel_values", "input_ids", "attention_mask", "max_new_tokens=30",
    ]  # fmt: skip
    assert arguments(InternVLChatModel.logits)[:3] == ["input_ids", "pixel_values", "image_token_id=None"]
    assert arguments(InternVLChatModel.generate) == [
        "pixel_values", "input_ids", "attention_mask=None", "max_new_tokens=12", "image_token_id=None",
    ]  # fmt: skip


@torch.no_grad()
def test_internvl(model: InternVLModel) -> None:
    seen, config = load_file(TINY / "contrastive.safetensors"), model.config
    pixels, ids = seen["pixel_values"], seen["input_ids"]
    images, texts = len(pixels), len(ids)
    queries = model.query_features(pixels)
    near(model.vision(pixels), load_file(TINY / "vision.safetensors")["last_hidden_state"], HIDDEN)
    assert queries.shape == (images, config.num_query_token, config.qllama.hidden_size)
    near(queries, seen["get_image_features_queries"], FEATURES)
    near(model.text_features(ids), seen["text_features"], FEATURES)
    assert model.encode_text(ids).shape == (texts, config.clip_embed_dim)
    for mode, head in (("InternVL-C", "C"), ("InternVL-G", "G")):
        near(model.encode_image(pixels, mode=mode), seen[f"{head}_image_embeds"], FEATURES)  # type: ignore[arg-type]
        near(model.encode_text(ids), seen[f"{head}_text_embeds"], FEATURES)
        near(model.logits(pixels, ids, mode=mode), seen[f"{head}_logits_per_image"], LOGITS)  # type: ignore[arg-type]


def test_internvl_generates(model: InternVLModel) -> None:
    seen = load_file(TINY / "generate.safetensors")
    prompt = seen["nopad_input_ids"], seen["nopad_attention_mask"]
    new = model.generate(seen["pixel_values"], *prompt, max_new_tokens=10)
    assert new.tolist() == json.loads((TINY / "generate.json").read_text())["nopad"]["new_tokens"]


@torch.no_grad()
def test_internvit_alone(model: InternVLModel, tmp_path: Path) -> None:
    """The tower of the same weights, in the layout of InternViT-6B."""
    prefix = "vision_model."
    weights = load_file(TINY / "model.safetensors")
    save_file(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)},
        tmp_path / "model.safetensors",
    )
    published = InternViTConfig(model.config.vision).to_published()
    (tmp_path / "config.json").write_text(json.dumps(published), encoding="utf-8")
    alone, pixels = load_model(tmp_path), load_file(TINY / "contrastive.safetensors")["pixel_values"]
    assert torch.equal(alone.vision(pixels), model.vision(pixels))
    with pytest.raises(CapabilityError, match=r"InternViT alone has no clip_projector"):
        alone.encode_image(pixels)
    with pytest.raises(CapabilityError, match=r"no qllama"):
        alone.encode_text(torch.ones(1, 3, dtype=torch.int64))


@torch.no_grad()
def test_chat_sees_images(chat: InternVLChatModel, golden: dict[str, Tensor]) -> None:
    state = chat.vision(golden["images"])
    near(state, golden["vit_hidden_states"][chat.config.read_blocks], HIDDEN)
    near(state[:, 1:], golden["vit_features"], HIDDEN)
    near(chat.visual_embeds(golden["images"]), golden["projector_out"], HIDDEN)
    images, visual = len(golden["images"]), chat.config.num_visual
    assert chat.visual_embeds(golden["images"]).shape == (images, visual, chat.config.decoder.hidden_size)


@torch.no_grad()
def test_chat_logits(chat: InternVLChatModel, golden: dict[str, Tensor]) -> None:
    mask, visible = golden["img.attention_mask"], golden["img.new_attention_mask"]
    got = chat.logits(golden["img.input_ids"], golden["images"], attention_mask=mask)
    length = got.shape[1]
    near(got[visible[:, :length]], golden["img.logits"][:, :length][visible[:, :length]], LOGITS)

    row, image = golden["img.input_ids"][0][mask[0].bool()], golden["images"][:1]
    of_image, vocabulary = chat.logits(row[None], image), chat.config.decoder.vocab_size
    free = next(token for token in range(3, vocabulary) if token not in row)
    repeats = torch.where(row == IMAGE_TOKEN, chat.config.num_visual, 1)
    for token in (IMAGE_TOKEN, free):
        ids = torch.where(row == IMAGE_TOKEN, token, row).repeat_interleave(repeats)[None]
        of_embeddings = chat.logits(ids, image, image_token_id=token)
        assert of_embeddings.shape == (1, ids.shape[1], vocabulary)
        assert torch.equal(of_embeddings, of_image)
    with pytest.raises(InputError, match=r"1 image placeholders.*3 images"):
        chat.logits(row[None], golden["images"])


@pytest.mark.parametrize("row", [0, 1, 2])
def test_chat_generates(chat: InternVLChatModel, golden: dict[str, Tensor], row: int) -> None:
    ids, image = golden[f"gen{row}.input_ids"], golden["images"][row : row + 1]
    want = golden[f"gen{row}.new_tokens"]
    new = chat.generate(image, ids, max_new_tokens=want.shape[1])
    assert new.dtype == torch.int64
    assert new.tolist() == want.tolist()
    # A placeholder that is a token of the vocabulary is never taken: the next best is.
    token = int(want[0, 0])
    if not (ids == token).any():
        other = ids.masked_fill(ids == IMAGE_TOKEN, token)
        chosen = chat.generate(image, other, max_new_tokens=want.shape[1], image_token_id=token)
        assert token not in chosen.tolist()[0]
        with torch.no_grad():
            ranked = chat.logits(ids, image)[0, -1].argsort(descending=True)
        assert chosen[0, 0] == next(i for i in ranked.tolist() if i != token)
