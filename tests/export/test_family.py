"""Components of InternVL 1.1 to 3.5: their graphs against their torch modules, and a block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ivl_export.models.checkpoint import load_state, open_checkpoint
from ivl_export.models.registry import Context, component_module, component_of, component_spec

pytestmark = pytest.mark.numeric

FAMILY = Path(__file__).parent.parent / "goldens" / "family"
FOLDERS = sorted(p.parent.name for p in FAMILY.glob("*/model.safetensors"))
SIZES = {"batch": 2, "text": 5, "past": 3, "total": 8}
TRACED = [
    pytest.param("chat_internlm2_6b", id="grouped keys, wqkv"),
    pytest.param("chat_phi3_300m", id="factors by length", marks=pytest.mark.slow),
    pytest.param("native_qwen3_6b", id="norms of heads", marks=pytest.mark.slow),
    pytest.param("native_qwen3moe_300m", id="experts", marks=pytest.mark.slow),
    pytest.param("native_gptoss_300m", id="sinks, windows, a period of 2", marks=pytest.mark.slow),
]


def feeds(name: str, folder: str, positions: int = 3) -> dict[str, Tensor]:
    """Inputs of a component; the first slot of the first row's past is hidden."""
    torch.manual_seed(0)
    out: dict[str, Tensor] = {}
    for tensor in component_spec(name, open_checkpoint(FAMILY / folder).model).inputs:
        shape = [size if isinstance(size, int) else SIZES[size] for size in tensor.shape]
        if tensor.name == "attention_mask":
            out[tensor.name] = torch.ones(shape, dtype=torch.int64)
            out[tensor.name][0, 0] = 0
        elif tensor.name == "positions":
            out[tensor.name] = torch.arange(positions, positions + 5)[None] - torch.tensor([[1], [0]])
        elif tensor.name == "input_ids":
            out[tensor.name] = torch.randint(3, 100, shape)
        else:
            out[tensor.name] = torch.randn(shape)
    return out


def module(name: str, folder: str) -> Any:
    checkpoint = open_checkpoint(FAMILY / folder)
    with torch.device("meta"):
        torch_module = component_module(name, checkpoint.model)
    load_state(torch_module, checkpoint, torch.float32)
    return torch_module


@torch.no_grad()
@pytest.mark.parametrize("folder", TRACED)
def test_graphs_equal_their_modules(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from ivl_export.export.unquantized import export_plain
    from ivl_export.profiles.cost.flops import graph_cost
    from ivl_export.profiles.cost.roofline import component_macs

    checkpoint = open_checkpoint(FAMILY / folder)
    exported = export_plain(checkpoint, tmp_path / "onnx", dtype="fp32")
    assert list(exported.graphs) == ["vision_chat", "decoder_embed", "decoder"]
    for name, path in exported.graphs.items():
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        far = 5000 if folder == "chat_phi3_300m" and name == "decoder" else 3
        for start in {3, far}:
            inputs = feeds(name, folder, start)
            got = session.run(None, {key: t.numpy() for key, t in inputs.items()})
            for value, want in zip(got, module(name, folder)(*inputs.values()), strict=True):
                np.testing.assert_allclose(value, want.numpy(), rtol=0, atol=1e-5 * float(want.abs().max()))
        cost = graph_cost(path, component_spec(name, checkpoint.model), SIZES, "fp32")
        counted = {layer.layer: layer.macs for layer in cost.layers}
        assert counted == component_macs(name, checkpoint.model, SIZES)


@torch.no_grad()
@pytest.mark.parametrize("folder", FOLDERS)
def test_block_by_block_a_component_is_its_module(folder: str) -> None:
    """As calibration runs it: entry, every block, exit."""
    config = open_checkpoint(FAMILY / folder).model
    for name in ("vision_chat", "decoder"):
        component, whole, inputs = component_of(name, config), module(name, folder), feeds(name, folder)
        past = [t for key, t in inputs.items() if key.startswith("past_")]
        plain = {key: t for key, t in inputs.items() if not key.startswith("past_")}
        x = plain.pop("input_embeds", None)
        first = Context(plain, SIZES["batch"])
        x = component.enter(config, whole, first) if x is None else x
        caches: list[Tensor] = []
        for block in range(component.depth(config)):
            pair = (past[2 * block], past[2 * block + 1]) if past else None
            x, cache = component.run_block(config, whole, block, x, Context(plain, SIZES["batch"], past=pair))
            caches += cache or ()
        outputs = [*component.leave(config, whole, x, first).values(), *caches]
        for got, want in zip(outputs, whole(*inputs.values()), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prompt_without_a_past() -> None:
    """Its mask begins with the hidden position that an engine needs; a block by itself has none."""
    folder, name = "native_gptoss_300m", "decoder"
    config, whole = open_checkpoint(FAMILY / folder).model, module("decoder", folder)
    component, inputs = component_of(name, config), feeds(name, folder, 1)
    x = inputs["input_embeds"]
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[:, 0] = 0
    arguments = {"positions": torch.arange(5)[None].repeat(2, 1), "attention_mask": mask}
    past = [torch.zeros(2, 2, 1, 16) for _ in range(8)]
    want = whole(x, arguments["positions"], mask, *past)[0]
    for block in range(4):
        x, _ = component.run_block(config, whole, block, x, Context(arguments, 2))
    got = component.leave(config, whole, x, Context(arguments, 2))["logits"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
