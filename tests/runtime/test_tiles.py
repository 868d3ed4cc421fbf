"""InternVL 1.1 to 3.5 through ONNX Runtime: the published greedy tokens, tiles, templates, headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ivl_export.bundle import seal
from ivl_export.bundle.manifest import Component, EngineFile, Manifest, Model
from ivl_export.errors import CapabilityError, InputError
from ivl_export.inputs.chat_template import AnswerTokens, ChatFormat, Turn, numbered, template_of
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models import load_chat
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.registry import component_spec, family_of, image_settings
from ivl_export.models.tiles_config import TilesConfig
from ivl_export.runtime import InternVLChat
from ivl_export.runtime.serving.chat_service import ChatService

pytestmark = pytest.mark.numeric

FAMILY = Path(__file__).parents[1] / "goldens" / "family"
SLOW = pytest.mark.slow
FOLDERS = [
    pytest.param("chat_qwen2_300m"),
    *(
        pytest.param(name, marks=SLOW)
        for name in (
            "chat_internlm2_6b", "chat_llama_6b_v1", "chat_phi3_300m", "native_gptoss_300m",
            "native_qwen3_6b", "native_qwen3moe_300m",
        )
    ),
]  # fmt: skip
SHOWN = ([0], [1, 2], [0, 1, 2])


def sealed(checkpoint_path: Path, folder: Path) -> Path:
    """A bundle of fp32 graphs, as a build in fp32 leaves it, without its receipts."""
    from ivl_export.export.unquantized import export_plain

    checkpoint = open_checkpoint(checkpoint_path)
    family, config = family_of(checkpoint.model), checkpoint.model
    exported = export_plain(checkpoint, folder / "staging" / "onnx", dtype="fp32")
    tokenizer = family.tokenizer(config, checkpoint_path)
    preprocess = folder / "staging" / "preprocess"
    preprocess.mkdir()
    image_settings(config, checkpoint_path).save(preprocess / "preprocessor_config.json")
    for name, data in tokenizer.files.items():
        (preprocess / name).write_bytes(data)
    chat = family.chat_format(config, checkpoint_path, tokenizer)
    assert chat is not None
    paths = {n: p.relative_to(folder / "staging").as_posix() for n, p in exported.graphs.items()}
    manifest = Manifest(
        model=Model("tiles", "t", {"checkpoint": "0" * 64}, config.to_published(), 0.0, 1, chat.to_json()),
        recipe="fp32",
        compute_dtype="fp32",
        rules={},
        calibration=None,
        components={n: Component(component_spec(n, config), {"fp32": p}) for n, p in paths.items()},
        engines=tuple(EngineFile(n, "onnxruntime", "cpu", p, "", 0) for n, p in paths.items()),
    )
    seal(folder / "staging", manifest, folder / "bundle")
    return folder / "bundle"


def in_short_calls(model: InternVLChat) -> None:
    """From here on a prompt goes through the decoder in several calls, with nothing of earlier prompts."""
    spec = model.components.spec("decoder")
    axes = tuple(replace(a, max=7) if a.name == "text" else a for a in spec.axes)
    model.components._specs["decoder"] = replace(spec, axes=axes)
    model.prefixes = type(model.prefixes)(0)


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_tokens_are_the_published_ones(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    inputs, outputs = (load_file(FAMILY / name / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    token = open_checkpoint(FAMILY / name).model.decoder.vocab_size - 4  # type: ignore[attr-defined]
    pixels = inputs["pixel_values"]
    with InternVLChat.load(sealed(FAMILY / name, tmp_path), threads=1) as model:
        for k, rows in enumerate(SHOWN):
            ids = inputs[f"input_ids_{k}"].astype(np.int64)
            new = model.generate(pixels[rows], ids, max_new_tokens=12, image_token_id=token)
            assert new[0].tolist() == outputs[f"greedy_{k}"].tolist()
        if "batch_input_ids" in inputs:
            batch, mask = (
                inputs[f"batch_{kind}"].astype(np.int64) for kind in ("input_ids", "attention_mask")
            )
            new = model.generate(pixels, batch, mask, 12, image_token_id=token)
            assert new.tolist() == outputs["batch_greedy"].tolist()
        with pytest.raises(InputError, match="image placeholders"):
            model.generate(pixels[:1], inputs["input_ids_1"].astype(np.int64), image_token_id=token)
        with pytest.raises(InputError, match="a token that the decoder does not have"):
            model.generate(pixels[:0], np.array([[3, 100_000]]), image_token_id=token)
        with pytest.raises(CapabilityError, match="had no tokenizer"):
            model.chat().ask("a")
        in_short_calls(model)
        new = model.generate(pixels[SHOWN[-1]], ids, max_new_tokens=12, image_token_id=token)
        assert new[0].tolist() == outputs[f"greedy_{len(SHOWN) - 1}"].tolist()


# --- a model with a tokenizer ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up model of the golden's form with the mini tokenizer of Qwen 2, and a short context."""
    from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint

    folder = tmp_path_factory.mktemp("tiles")
    sizes: Any = open_checkpoint(FAMILY / "chat_qwen2_300m").model
    make_checkpoint(folder, with_vocabulary(sizes, 440), depth=3)
    (folder / "tokenizer.model").unlink()
    data = json.loads((folder / "config.json").read_text())
    del data["system_message"]  # null would drop the system turn
    (folder / "config.json").write_text(json.dumps(data))
    for path in (FAMILY / "tokenizers" / "qwen2_mini").iterdir():
        if path.name != "expected.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def with_vocabulary(config: TilesConfig, size: int) -> TilesConfig:
    decoder = replace(
        config.decoder, vocab_size=size, max_position_embeddings=512, eos_token_ids=(420,), tied=False
    )
    return replace(config, decoder=decoder, template="internvl2_5", max_tiles=6)


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InternVLChat]:
    pytest.importorskip("onnxscript")
    bundle = sealed(checkpoint, tmp_path_factory.mktemp("bundle"))
    with InternVLChat.load(bundle, threads=1) as loaded:
        yield loaded


def picture(width: int, height: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def expected(checkpoint: Path, model: InternVLChat, images: list[Any], turns: list[Turn]) -> str:
    """The PyTorch model's answer, its prompt made by hand of the published layout's parts."""
    from ivl_export.inputs.chat_template import encode

    pixels = model.read_images(images)
    chat: ChatFormat = model.chat_format
    ids = encode(turns, model.tokenizer, chat.template, chat.images, pixels.tiles).ids
    assert ids.count(chat.images.context) == len(pixels.values) * chat.images.per_tile
    torch_model: Any = load_chat(checkpoint)
    shown = torch.from_numpy(pixels.values) if images else None
    stops = set(chat.stops(model.tokenizer))
    new = torch_model.generate(shown, torch.tensor([ids]), max_new_tokens=8)[0].tolist()
    stored = new[: next((i for i, token in enumerate(new) if token in stops), len(new))]
    return model.tokenizer.decode(stored).strip()


def test_answers_about_tiles_are_those_of_the_torch_model(checkpoint: Path, model: InternVLChat) -> None:
    wide, tall = picture(112, 56), picture(56, 170, 1)
    assert model.read_images([wide, tall]).tiles == (3, 4)
    for images, turn in (
        ([wide], Turn("what?", None, 1)),
        ([wide, tall], Turn("what?", None, 2)),
        ([], Turn("what?")),
    ):
        assert model.chat(images).ask("what?", 8) == expected(checkpoint, model, images, [turn])
    chat = model.chat([wide])
    first = chat.ask("what?", 8)
    turns = [Turn("what?", first, 1), Turn("and now?")]
    assert chat.ask("and now?", 8) == expected(checkpoint, model, [wide], turns)


def test_tiles_are_limited_for_each_image(model: InternVLChat) -> None:
    wide = picture(336, 56)
    rows = [len(v) for v in model.encode_images([wide, wide, wide], [6, 2, 1])[0]]
    assert rows == [4 * 7, 4 * 3, 4]
    assert len(model.encode_images([wide], 1)[0][0]) == 4
    numbers = numbered("what?", 2)
    assert model.chat([wide, wide], max_tiles=1).ask(numbers.question, 4) == model.chat(
        [wide, wide], max_tiles=1
    ).ask("what?", 4)


def test_a_video_is_a_tile_a_frame(checkpoint: Path, model: InternVLChat) -> None:
    frames = [picture(112, 56, seed) for seed in range(6)]
    chat = model.chat_video(frames, 3)
    assert [len(rows) for rows in chat.cache.visual] == [4, 4, 4]
    turn, _ = chat.prompt("what?")
    assert [part for part in turn.question if isinstance(part, str)][0::2][:2] == ["Frame1: ", "Frame2: "]
    assert isinstance(chat.ask("what?", 4), str)


def test_tiles_of_all_requests_go_through_the_tower_together(
    model: InternVLChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = model.components.run_device, []

    def run(name: str, inputs: Any, outputs: Any = None) -> Any:
        if name == "vision_chat":
            sizes.append(len(inputs["pixel_values"]))
        return real(name, inputs, outputs)

    pictures = [picture(112, 56, seed) for seed in range(10, 14)]
    alone = [model.encode_images([p])[0][0] for p in pictures]
    monkeypatch.setattr(model, "prefixes", type(model.prefixes)(0))
    monkeypatch.setattr(model.components, "run_device", run)
    pixels = [model.read_pixels([p]) for p in pictures]
    together = model.encode_together(pixels)
    assert sizes == [8, 4]
    for (visual, _), want in zip(together, alone, strict=True):
        np.testing.assert_allclose(visual[0], want, atol=1e-5)

    async def ask() -> list[str]:
        service = ChatService(model)
        chats = await asyncio.gather(*(service.chat([p]) for p in pictures))
        answers = [(await service.ask(chat, "what?", 4)).value for chat in chats]
        service.close()
        return answers

    sizes.clear()
    assert asyncio.run(ask()) == [model.chat([p]).ask("what?", 4) for p in pictures]


def test_a_completion_is_the_answer_and_counts_the_positions_of_tiles(model: InternVLChat) -> None:
    wide = picture(336, 56)

    async def complete(tiles: int) -> list[Any]:
        service = ChatService(model)
        turns = [Turn("what?", None, 1)]
        parts = [p async for p in service.complete(turns, [wide], max_tiles=[tiles], max_new_tokens=6)]
        service.close()
        return parts

    prompts = []
    for tiles in (1, 4):
        *pieces, end = asyncio.run(complete(tiles))
        chat = model.chat([wide], max_tiles=tiles)
        _, ids = chat.prompt("what?")
        assert "".join(pieces) == chat.ask("what?", 6)
        assert end.prompt == len(ids) - 1 + len(chat.cache.visual[0])
        assert 1 <= end.new <= 6
        prompts.append(end.prompt)
    assert prompts[0] < prompts[1]


def test_text_that_spells_a_special_token_is_text(model: InternVLChat) -> None:
    _, ids = model.chat().prompt("<IMG_CONTEXT> <|im_end|>")
    tokenizer = model.tokenizer
    plain = model.chat().prompt("a")[1]
    for special in ("<IMG_CONTEXT>", "<|im_end|>"):
        assert ids.count(tokenizer.special(special)) == plain.count(tokenizer.special(special))
    assert isinstance(model.chat().ask("<IMG_CONTEXT>", 2), str)


def test_a_prompt_longer_than_the_context_says_of_what(model: InternVLChat) -> None:
    assert model.components.spec("decoder").axis("past").max == 512
    wide = picture(336, 56)
    with pytest.raises(InputError, match=r"of 20 images 560.*fewer tiles of each \(max_tiles\)"):
        model.chat([wide] * 20).ask("what?", 8)


@pytest.fixture(scope="module")
def true_sizes(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[InternVLChat]:
    """Narrow, but with the numbers of the published models: 256 tokens of a tile of 448 pixels, 13 tiles, a
    context of 4096."""
    from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint

    pytest.importorskip("onnxscript")
    sizes = open_checkpoint(checkpoint).model
    assert isinstance(sizes, TilesConfig)
    vision = replace(sizes.vision, num_hidden_layers=1, image_size=448, patch_size=14)
    decoder = replace(sizes.decoder, num_hidden_layers=1, max_position_embeddings=4096)
    sizes = replace(sizes, vision=vision, decoder=decoder, image_size=448, max_tiles=12, select_layer=-1)
    assert sizes.num_visual == 256
    folder = tmp_path_factory.mktemp("true_sizes")
    make_checkpoint(folder, sizes, depth=1)
    (folder / "tokenizer.model").unlink()
    for path in (FAMILY / "tokenizers" / "qwen2_mini").iterdir():
        if path.name != "expected.json":
            (folder / path.name).write_bytes(path.read_bytes())
    with InternVLChat.load(sealed(folder, tmp_path_factory.mktemp("bundle")), threads=1) as loaded:
        yield loaded


@pytest.mark.slow
def test_13_tiles_where_the_context_is_4096(true_sizes: InternVLChat) -> None:
    """3,328 visual tokens leave room for a short question; the rest is refused before engines run."""
    model, photo = true_sizes, picture(1600, 1200)

    def ran() -> dict[str, int]:
        calls = {name: timing.calls for name, timing in model.timings.items()}
        return {
            name: count
            for name, count in calls.items()
            if name in model.components.bundle.manifest.components
        }

    pixels = model.read_images([photo])
    assert pixels.tiles == (13,)
    with pytest.raises(InputError, match=r"of 2 images 6656.*4096.*fewer tiles of each \(max_tiles\)"):
        model.chat([photo, photo])
    token = model.chat_format.images.context
    ids = np.array([[5] * 800 + [token] * 13 * 256])
    with pytest.raises(InputError, match=r"A prompt of 4128 positions \(of 13 images 3328\).*built for 4096"):
        model.generate(pixels.values, ids, max_new_tokens=1)
    assert ran() == {}
    assert model.generate(pixels.values, ids[:, 780:], max_new_tokens=1).shape == (1, 1)
    before = ran()
    chat = model.chat([photo])  # encodes its tiles, as generate did
    with pytest.raises(InputError, match=r"of 1 images 3328\) and 8 new tokens need a past of .*4096"):
        chat.ask("what? " * 300, 8)
    assert chat.history == ()
    assert ran() == before | {"vision_chat": 2 * before["vision_chat"]}
    assert isinstance(chat.ask("what?", 2), str)


def test_the_system_message(model: InternVLChat) -> None:
    own, none, other = (model.chat(system=text).prompt("a")[1] for text in (None, "", "be brief"))
    start = model.tokenizer.special("<|im_start|>")
    assert (own.count(start), none.count(start), other.count(start)) == (3, 2, 3)
    assert own != other


def test_embeddings_are_means(model: InternVLChat) -> None:
    wide, small = picture(112, 56), picture(56, 56)
    tiles = model.encode_tiles([wide, small])
    assert [t.shape for t in tiles] == [(3, 56), (1, 56)]
    visual = model.encode_images([wide])[0][0]
    np.testing.assert_allclose(tiles[0][1], visual[4:8].mean(0), atol=1e-6)
    np.testing.assert_allclose(model.encode_image([wide, small])[0], visual.mean(0), atol=1e-6)
    texts = model.encode_text(["what?", "a b"])
    assert texts.shape == (2, 56)
    with pytest.raises(InputError, match="empty text"):
        model.encode_text([""])


# --- headers of GPT-OSS ---


class Marks(Tokenizer):
    """Letters, and the special tokens of GPT-OSS."""

    SPECIALS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")

    def __init__(self) -> None:
        from ivl_export.inputs.tokenizer import AddedToken

        super().__init__("marks", [AddedToken(1000 + i, text) for i, text in enumerate(self.SPECIALS)])
        self.prefix, self.files, self.eos = (), {}, 1004

    def __len__(self) -> int:
        return 1005

    def piece(self, token: int) -> bytes:
        return chr(token).encode() if token < 1000 else b""

    def _ids(self, text: str, first: bool) -> list[int]:
        return list(map(ord, text))


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("<|channel|>final<|message|>a ring", "a ring"),
        ("a ring", "a ring"),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>a ring",
            "a ring",
        ),
        ("<|channel|>final", ""),
        ("<|channel|>analysis<|message|>hm", ""),
    ],
)
def test_headers_are_no_part_of_an_answer(written: str, answer: str) -> None:
    tokenizer = Marks()
    config = {"template": "internvl3_5_gpt_oss", "model_type": "internvl_chat", "ps_version": "v2"}
    template = template_of(config)
    assert template.channels
    parts = AnswerTokens(tokenizer, template)
    ids = [token for token in tokenizer.encode_parts(tokenizer.markup(written)) if parts.add(token)]
    assert tokenizer.decode(ids) == answer


def test_a_format_survives_its_json(checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).model
    family = family_of(config)
    chat = family.chat_format(config, checkpoint, family.tokenizer(config, checkpoint))
    assert chat is not None
    assert ChatFormat.from_json(json.loads(json.dumps(chat.to_json())), "here") == chat
    assert chat.template.system is not None
    data = json.loads((checkpoint / "config.json").read_text())
    assert template_of({**data, "system_message": None}).system is None, "null drops the system turn"
