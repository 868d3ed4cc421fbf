"""The chat components and an InternViT alone: graphs against their torch modules, and chained as a chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.errors import UsageError
from ivl_export.export import trace
from ivl_export.export.binding import unbound
from ivl_export.export.graph import finish
from ivl_export.export.trace import export_component
from ivl_export.export.unquantized import export_plain
from ivl_export.inputs.chat_template import IMAGE_TOKEN
from ivl_export.models import ChatConfig, InternViTConfig, QLlamaConfig, VisionConfig, load_chat
from ivl_export.models.checkpoint import Checkpoint, load_state, open_checkpoint
from ivl_export.models.layout import CHAT_TOWER, VISION
from ivl_export.models.registry import Ranges, component_module, component_spec, expected_shapes
from ivl_export.profiles.cost.flops import graph_cost
from ivl_export.profiles.cost.roofline import component_macs
from ivl_export.tests.components import CHAT_COMPONENTS

pytestmark = pytest.mark.numeric

CHAT = Path(__file__).parents[1] / "goldens" / "chat"
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(CHAT)


@pytest.fixture(scope="module")
def sessions(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, onnxruntime.InferenceSession]:
    exported = export_plain(checkpoint, tmp_path_factory.mktemp("chat") / "out", dtype="fp32")
    assert tuple(exported.graphs) == CHAT_COMPONENTS
    return {name: session(path) for name, path in exported.graphs.items()}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_torch(name: str, checkpoint: Checkpoint, inputs: dict[str, Array]) -> list[Array]:
    with torch.device("meta"):
        module = component_module(name, checkpoint.model)
    load_state(module, checkpoint, torch.float32)
    with torch.no_grad():
        return [t.numpy() for t in module(*map(torch.from_numpy, inputs.values()))]


def close(got: list[Array], want: list[Array]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(np.abs(b).max()))


def test_vision_chat_equals_module_and_published_numbers(
    checkpoint: Checkpoint, sessions: dict[str, onnxruntime.InferenceSession]
) -> None:
    golden = load_file(CHAT / "chat.safetensors")
    for batch in (1, 3):
        inputs = {"pixel_values": golden["images"][:batch].numpy()}
        got = sessions["vision_chat"].run(None, inputs)
        close(got, run_torch("vision_chat", checkpoint, inputs))
        np.testing.assert_allclose(got[0], golden["projector_out"][:batch], rtol=0, atol=2e-5)


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 4), text=st.integers(1, 9), past=st.integers(1, 14), seed=st.integers(0, 2**32 - 1)
)
def test_decoder_equals_module_at_any_size(
    checkpoint: Checkpoint,
    sessions: dict[str, onnxruntime.InferenceSession],
    batch: int,
    text: int,
    past: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    ids = {"input_ids": rng.integers(0, 180, (batch, text))}
    embeds = sessions["decoder_embed"].run(None, ids)
    close(embeds, run_torch("decoder_embed", checkpoint, ids))
    inputs = {
        "input_embeds": embeds[0],
        "positions": rng.integers(0, 500, (batch, text)),
        "attention_mask": rng.integers(0, 2, (batch, past + text)),
        **{
            f"past_{kind}.{i}": rng.standard_normal((batch, 6, past, 12)).astype(np.float32)
            for i in range(3)
            for kind in ("key", "value")
        },
    }
    component_spec("decoder", checkpoint.model).check(inputs)
    close(sessions["decoder"].run(None, inputs), run_torch("decoder", checkpoint, inputs))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_graphs_chat_as_published(sessions: dict[str, onnxruntime.InferenceSession], row: int) -> None:
    """A preallocated cache, passed whole; the mask hides unwritten positions."""
    golden = {k: v.numpy() for k, v in load_file(CHAT / "chat.safetensors").items()}
    pixels = {"pixel_values": golden["images"][row : row + 1]}
    visual = sessions["vision_chat"].run(None, pixels)[0]
    ids = golden[f"gen{row}.input_ids"][0]
    cut = int((ids == IMAGE_TOKEN).argmax())

    def embed(tokens: Array) -> Array:
        result: Array = sessions["decoder_embed"].run(None, {"input_ids": tokens[None]})[0]
        return result

    names = [f"past_{kind}.{i}" for i in range(3) for kind in ("key", "value")]
    cache = {name: np.zeros((1, 6, 64, 12), np.float32) for name in names}
    seen, tokens = 0, []
    x = np.concatenate([embed(ids[:cut]), visual, embed(ids[cut + 1 :])], 1)
    for step in range(10):
        length = x.shape[1]
        mask = np.concatenate([np.arange(64) < seen, np.ones(length, bool)])[None].astype(np.int64)
        positions = np.arange(seen, seen + length)[None]
        logits, *new = sessions["decoder"].run(
            None, {"input_embeds": x, "positions": positions, "attention_mask": mask, **cache}
        )
        np.testing.assert_allclose(logits, golden[f"gen{row}.step_logits"][:, step], rtol=0, atol=5e-5)
        for name, array in zip(names, new, strict=True):
            cache[name][:, :, seen : seen + length] = array
        seen += length
        tokens.append(int(logits.argmax()))
        x = embed(np.array(tokens[-1:]))
    assert tokens == golden[f"gen{row}.new_tokens"][0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision_chat", "decoder"])
def test_repeated_blocks_equal_traced_ones(checkpoint: Checkpoint, name: str) -> None:
    spec = component_spec(name, checkpoint.model)

    def nodes(model: ir.Model) -> list[Any]:
        model = model.clone()
        finish(model, spec)
        return [(n.name, n.op_type, [str(v.shape) for v in n.outputs]) for n in model.graph]

    repeated = trace.repeated_graph(name, checkpoint.model)
    assert nodes(repeated) == nodes(trace.traced_graph(name, checkpoint.model))


@pytest.mark.parametrize("name", CHAT_COMPONENTS)
def test_layers_are_named_after_their_weights(checkpoint: Checkpoint, name: str) -> None:
    model = export_component(name, checkpoint)
    with torch.device("meta"):
        module = component_module(name, checkpoint.model)
    assert set(unbound(model)) == set(module.state_dict())
    products = {n.name for n in model.graph if n.op_type == "MatMul"}
    assert products == {n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert not any(n.op_type == "Softmax" for n in model.graph)


def test_components_together_read_just_the_model() -> None:
    config = ChatConfig()
    with torch.device("meta"):
        used = {k for name in CHAT_COMPONENTS for k in component_module(name, config).state_dict()}
    unread = set(expected_shapes(config)) - used
    assert {k.removeprefix(f"{CHAT_TOWER}encoder.layers.")[:3] for k in unread} == {"45.", "46.", "47."}


@pytest.mark.parametrize("name", CHAT_COMPONENTS)
def test_macs_of_the_graph_are_those_of_the_configuration(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    assert isinstance(checkpoint.model, ChatConfig)
    spec, known = component_spec(name, checkpoint.model), {"batch": 2, "text": 3, "past": 4, "total": 7}
    sizes = {axis.name: known[axis.name] for axis in spec.axes}
    graph = export_plain(checkpoint, tmp_path / "out", [name], "bf16").graphs[name]
    by_name = {layer.layer: layer.macs for layer in graph_cost(graph, spec, sizes).layers}
    assert by_name == component_macs(name, checkpoint.model, sizes)


def test_axes_fit_together() -> None:
    config = ChatConfig(decoder=QLlamaConfig(16, 1, 2, 24, 30))
    spec = component_spec("decoder", config, Ranges(turn=(1, 2, 700), history=(1, 9, 800)))
    for which, total in (("min", 2), ("opt", 11), ("max", 1500)):
        assert spec.shape(spec.inputs[2], which)[1] == total
    for act in (component_spec, component_module):
        with pytest.raises(UsageError, match=r"Unknown component 'vision'.*decoder_embed"):
            act("vision", config)
        with pytest.raises(UsageError, match="Unknown component 'decoder'"):
            act("decoder", InternViTConfig())


def test_vision_tower_alone(tmp_path: Path) -> None:
    config = InternViTConfig(VisionConfig(48, 2, 3, 20, 28, 14))
    torch.manual_seed(0)
    tensors = {k.removeprefix(VISION): torch.randn(s) * 0.3 for k, s in expected_shapes(config).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_published()))
    checkpoint = open_checkpoint(tmp_path)
    exported = export_plain(checkpoint, tmp_path, dtype="fp32", zero_copy=True)
    inputs = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 28, 28), np.float32)}
    got = session(exported.graphs["vision"]).run(None, inputs)
    close(got, run_torch("vision", checkpoint, inputs))
    assert got[0].shape == (2, 5, 48)


def test_a_step_of_the_model_is_the_component(checkpoint: Checkpoint) -> None:
    """The whole model and its parts hold the same weights under the same keys."""
    state = load_chat(checkpoint).state_dict()
    with torch.device("meta"):
        parts = {k for name in CHAT_COMPONENTS for k in component_module(name, checkpoint.model).state_dict()}
    assert set(state) == parts


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_COMPONENTS)
def test_engines_build(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    """Without a GPU; the graphs' operators and dynamic shapes are what TensorRT-RTX takes."""
    pytest.importorskip("tensorrt_rtx")
    exported = export_plain(checkpoint, tmp_path / "out", [name], "bf16")
    engine = tmp_path / "engine"
    build_engine(exported.graphs[name], component_spec(name, checkpoint.model), engine, target="sm89")
    assert engine.read_bytes().startswith(b"vtrt")
