"""A chat model whose tower has queries, from its checkpoint to engines and answers. One build in all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivl_export.bundle import Bundle
from ivl_export.cli import main
from ivl_export.inputs.chat_template import Turn, encode
from ivl_export.models import load_chat
from ivl_export.models.chat import InternVLChatModel
from ivl_export.runtime import InternVLChat
from ivl_export.runtime.torch_tower import VisionTower
from ivl_export.tests.components import QUERY_CHAT_COMPONENTS

pytestmark = [pytest.mark.slow, pytest.mark.numeric]

pytest.importorskip("tensorrt_rtx")
QUESTIONS = ("what is this?", "two red rings", "and")


@pytest.fixture(scope="module")
def report(query_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """FP8, with attention, in two parts; TensorRT-RTX engines for one target."""
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IVL_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("built") / "bundle"
        args = ["build", "--model", str(query_chat), "--precision", "fp8-attention", "--split", "2"]
        with redirect_stdout(said):
            assert main([*args, "--targets", "sm89", "--out", str(out), "--json"]) == 0
    receipt: dict[str, Any] = json.loads(said.getvalue())
    return {**receipt, "root": out}


@pytest.fixture(scope="module")
def plain(query_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that quantises nothing, for ONNX Runtime alone."""
    out = tmp_path_factory.mktemp("plain") / "bundle"
    args = ["build", "--model", str(query_chat), "--precision", "bf16", "--backend", "onnxruntime"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setenv("IVL_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert main([*args, "--out", str(out), "--json"]) == 0
    return out


@pytest.fixture(scope="module")
def model(plain: Path) -> Iterator[InternVLChat]:
    with InternVLChat.load(plain, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(query_chat: Path) -> InternVLChatModel:
    return load_chat(query_chat)


def picture(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)


def test_every_product_and_attention_is_proven(report: dict[str, Any]) -> None:
    root = report["root"]
    kernels = json.loads((root / "receipts" / "verification.json").read_text())["tensorrt-rtx-sm89"]
    assert set(kernels) == set(QUERY_CHAT_COMPONENTS)
    # InternViT: qkv, proj, fc1, fc2; LLaMA: q, k, v, o, gate, up, down; one layer of two cross-attends.
    products = {"vision_chat": 3 * 4, "query_chat": 2 * 7 + 4, "decoder_embed": 0, "decoder": 2 * 7}
    # Those that see 32 keys: all of InternViT's 37 tokens, of the queries the cross-attention only.
    attentions = {"vision_chat": 3, "query_chat": 1, "decoder_embed": 0, "decoder": 0}
    for name, proof in kernels.items():
        fused = [layer for layer in proof["promised"] if layer.endswith("softmax")]
        assert len(fused) == attentions[name], name
        assert len(proof["promised"]) == products[name] + attentions[name], name
        assert not proof.get("fallbacks")
    cross = "model.vision_tower.vision_tower.qllama.model.layers.0.cross_attn"
    assert any(layer.startswith(cross) for layer in kernels["query_chat"]["promised"])
    manifest = Bundle.open(root, verify="hash").manifest
    parts = {name: len(component.parts) for name, component in manifest.components.items()}
    assert parts == {"vision_chat": 2, "query_chat": 2, "decoder_embed": 0, "decoder": 2}


def test_fp8_engines_stay_near_fp32(report: dict[str, Any]) -> None:
    """Made-up weights are harder than trained ones: nothing in them is redundant."""
    accuracy = json.loads((report["root"] / "receipts" / "accuracy.json").read_text())
    for outputs in accuracy["chained"].values():
        for metrics in outputs.values():
            assert metrics["cosine"] > 0.97


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_quantised_engines_answer(report: dict[str, Any], reference: InternVLChatModel, backend: str) -> None:
    with InternVLChat.load(report["root"], backend, threads=1) as loaded:
        visual = np.stack(loaded.encode_images([picture(), picture(1)])[0])
        (pixels,) = loaded.pixel_batches([picture(), picture(1)])
        with torch.no_grad():
            want = reference.visual_embeds(torch.from_numpy(pixels)).numpy()
        assert visual.shape == want.shape == (2, 6 + 36, 128)
        for rows in (slice(0, 6), slice(6, None)):
            a, b = visual[:, rows].ravel(), want[:, rows].ravel()
            assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.97
        assert isinstance(loaded.chat([picture()]).ask(QUESTIONS[0], 4), str)


@pytest.mark.parametrize("turns", [1, 3])
def test_the_runtime_says_what_the_torch_model_says(
    model: InternVLChat, reference: InternVLChatModel, turns: int
) -> None:
    """Token for token, with earlier turns in the prompt; each answer also out of the cache of the last."""
    chat = model.chat([picture()])
    (pixels,) = model.pixel_batches([picture()])
    history: list[Turn] = []
    for question in QUESTIONS[:turns]:
        turn = Turn(question, None, 0 if history else 1)
        ids = torch.tensor([encode([*history, turn], model.tokenizer).ids])
        new = reference.generate(torch.from_numpy(pixels), ids, torch.ones_like(ids), 6)[0].tolist()
        eos = model.tokenizer.eos
        want = model.tokenizer.decode(new[: new.index(eos)] if eos in new else new).strip()
        assert chat.ask(question, 6) == want
        history.append(Turn(question, want, turn.images))
    assert chat.history == tuple(history)
    assert model.chat([picture()], history[:-1]).ask(QUESTIONS[turns - 1], 6) == history[-1].answer


def test_both_images_of_one_conversation_are_seen(model: InternVLChat) -> None:
    one, two = (model.chat([picture(), picture(seed)]) for seed in (1, 2))
    assert one.ask("what", 6) == model.chat([picture(), picture(1)]).ask("what", 6)
    visual = model.encode_images([picture(), picture(1)])[0]
    assert np.abs(visual[0] - visual[1]).max() > 1e-2
    assert two.ask("what", 6) is not None


def test_the_tower_as_a_torch_module(plain: Path, model: InternVLChat, reference: InternVLChatModel) -> None:
    tower = VisionTower.load(plain, "onnxruntime", threads=1)
    (pixels,) = model.pixel_batches([picture()])
    with torch.no_grad():
        want = reference.visual_embeds(torch.from_numpy(pixels))
    got = tower(torch.from_numpy(pixels))
    assert got.shape == want.shape == (1, tower.num_tokens, tower.hidden_size)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    tower.close()
