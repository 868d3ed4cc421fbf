"""Every component graph against its torch module, in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ivl_export.bundle.spec import ComponentSpec, TensorSpec
from ivl_export.dtypes import COMPUTE, dtype_of
from ivl_export.errors import BuildError, CapabilityError, UsageError
from ivl_export.export import trace
from ivl_export.export.binding import bind, save_graph, unbound
from ivl_export.export.blocks import SCOPES, repeat_blocks
from ivl_export.export.graph import finish, retype
from ivl_export.export.trace import export_component
from ivl_export.export.weight_store import open_store
from ivl_export.export.weights import write_store
from ivl_export.models import InternVLConfig, QLlamaConfig, VisionConfig, load_model
from ivl_export.models.checkpoint import Checkpoint, load_state, open_checkpoint
from ivl_export.models.internvl import InternVLModel
from ivl_export.models.registry import component_module, component_of, component_spec, expected_shapes
from ivl_export.runtime.captions import generate_tokens
from ivl_export.sampling import StopCriteria
from ivl_export.tests.components import COMPONENTS, OPTIONAL
from ivl_export.tests.numbers import FEATURES, near

pytestmark = pytest.mark.numeric

GOLDENS = Path(__file__).parents[1] / "goldens" / "tiny"
Array = np.ndarray[Any, Any]

# Odd widths, a head count that is not a power of two, both kinds of QLLaMA layer, a qkv bias.
EVERY = (*COMPONENTS, *OPTIONAL)
SMALL = InternVLConfig(
    VisionConfig(60, 2, 5, 128, 56, 14, qkv_bias=True),
    QLlamaConfig(48, 2, 3, 72, 91),
    clip_embed_dim=20,
    attn_pool_num_heads=4,
    num_query_token=5,
)


@dataclass(frozen=True)
class Built:
    """Graphs of a checkpoint in a bundle's layout; each is traced on first use."""

    root: Path
    checkpoint: Checkpoint
    stored: str
    sessions: dict[str, onnxruntime.InferenceSession] = field(default_factory=dict)

    def path(self, name: str, dtype: str = "fp32") -> Path:
        path = self.root / "onnx" / f"{name}.{dtype}.onnx"
        if not path.exists():
            model = export_component(name, self.checkpoint, dtype)
            store = self.root / "onnx" / "weights" / f"{name}.safetensors"
            if not store.exists():
                write_store(self.checkpoint, unbound(model), store, self.stored)
            bind(model, open_store(store), path.parent)
            save_graph(model, path)
        return path

    def spec(self, name: str) -> ComponentSpec:
        return component_spec(name, self.checkpoint.config)

    def run(self, name: str, inputs: dict[str, Array]) -> dict[str, Array]:
        if name not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            self.sessions[name] = onnxruntime.InferenceSession(
                self.path(name), options, providers=["CPUExecutionProvider"]
            )
        session = self.sessions[name]
        spec = self.spec(name)
        spec.check(inputs)
        return dict(zip((t.name for t in spec.outputs), session.run(None, inputs), strict=True))

    @cached_property
    def model(self) -> InternVLModel:
        return load_model(self.checkpoint)


def random_checkpoint(config: InternVLConfig, folder: Path, dtype: torch.dtype, c_only: bool = False) -> Path:
    torch.manual_seed(0)
    tensors = {
        k: torch.randn(s) * 0.3 for k, s in expected_shapes(replace(config, contrastive_only=c_only)).items()
    }
    tensors = {
        k: (t + 1 if "norm" in k and k.endswith("weight") else t).to(dtype) for k, t in tensors.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_published()))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("small")
    checkpoint = open_checkpoint(random_checkpoint(SMALL, root / "checkpoint", torch.bfloat16))
    return Built(root, checkpoint, "bf16")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("tiny"), open_checkpoint(GOLDENS), "fp32")


def reference(graphs: Built, name: str) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """The component's torch module in fp32, as a function of named arrays."""
    checkpoint, spec = graphs.checkpoint, graphs.spec(name)
    with torch.device("meta"):
        module = component_module(name, checkpoint.config)
    load_state(module, checkpoint, torch.float32)

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(inputs[t.name]) for t in spec.inputs))
        return {t.name: o.numpy() for t, o in zip(spec.outputs, outputs, strict=True)}

    return run


def random_inputs(
    spec: ComponentSpec, config: InternVLConfig, sizes: dict[str, int], seed: int
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)

    def make(tensor: TensorSpec) -> Array:
        shape = [d if isinstance(d, int) else sizes[d] for d in tensor.shape]
        if tensor.name == "input_ids":
            return rng.integers(1, config.qllama.vocab_size, shape)
        if tensor.name == "lengths":
            return rng.integers(1, sizes["text"] + 1, shape)
        if tensor.name == "positions":
            return rng.integers(0, 60, shape)
        if tensor.name == "attention_mask":
            mask = rng.integers(0, 2, shape)
            mask[:, : config.num_query_token] = 1  # the queries are always visible
            return mask
        return rng.standard_normal(shape).astype(np.float32)

    return {t.name: make(t) for t in spec.inputs}


def close(got: dict[str, Array], want: dict[str, Array]) -> None:
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].shape == array.shape, name
        near(got[name], array, FEATURES)


@pytest.mark.parametrize("name", EVERY)
def test_graph_equals_module_at_any_size(small: Built, name: str) -> None:
    spec, torch_run = small.spec(name), reference(small, name)

    @settings(max_examples=12, deadline=None)
    @given(
        batch=st.integers(1, 5),
        text=st.integers(1, 9),
        past=st.integers(5, 14),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(batch: int, text: int, past: int, seed: int) -> None:
        sizes = {"batch": batch, "text": text, "past": past, "total": past + text}
        inputs = random_inputs(spec, SMALL, sizes, seed)
        close(small.run(name, inputs), torch_run(inputs))

    check()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", sorted(COMPUTE))
def test_graph_is_valid_small_and_named(small: Built, name: str, dtype: str) -> None:
    path = small.path(name, dtype)
    onnx.checker.check_model(str(path), full_check=True)
    raw = path.read_bytes()
    assert len(raw) < 200_000
    assert b"/" + b"models/component_modules.py" not in raw, "source paths of the machine that traced it"
    model = ir.load(path)
    spec, graph = small.spec(name), model.graph
    kind = dtype_of(dtype).onnx
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            assert value.name == tensor.name
            assert value.dtype is not None
            assert value.dtype.name == (kind if tensor.dtype == "float" else "INT64")
            assert value.shape is not None
            assert tuple(d if isinstance(d, int) else d.value for d in value.shape) == tensor.shape
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    assert all(names)
    assert all(v.shape is not None and v.dtype is not None for node in graph for v in node.outputs)


@pytest.mark.parametrize("name", EVERY)
def test_layers_are_named_after_their_weights(small: Built, name: str) -> None:
    model = export_component(name, small.checkpoint)
    graph = model.graph
    with torch.device("meta"):
        module = component_module(name, SMALL)
    assert set(unbound(model)) == set(module.state_dict()), (
        "every weight of the module, under its published key"
    )
    products = {node.name: node for node in graph if node.op_type == "MatMul"}
    linears = {n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    linears |= {"text_projection"} if name == "qllama_text" else set()
    assert set(products) == linears
    for layer, node in products.items():
        value = node.inputs[1]
        assert value is not None
        if layer != "text_projection":
            transpose = value.producer()
            assert transpose is not None
            assert transpose.op_type == "Transpose"
            value = transpose.inputs[0]
            assert value is not None
        assert value.name in (layer, f"{layer}.weight")
    assert not any(node.op_type in ("Gemm", "Softmax") for node in graph)
    attention = [node.name for node in graph if node.op_type == "Attention"]
    assert all(str(n).endswith(("attn/Attention", "cross_attn/Attention")) for n in attention)
    constants = [v.const_value for v in graph.initializers.values() if v.const_value is not None]
    assert sum(c.nbytes for c in constants) < 20_000


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("qllama_query", 4), ("qllama_step", 2)])
def test_repeated_blocks_equal_traced_ones(name: str, layers: int) -> None:
    """Node for node: names, operators, attributes, wiring and shapes."""
    config = replace(SMALL, qllama=replace(SMALL.qllama, num_hidden_layers=layers))
    spec = component_spec(name, config)

    def nodes(model: ir.Model) -> list[Any]:
        model = model.clone()
        finish(model, spec)
        producers = {v: f"{n.name}:{i}" for n in model.graph for i, v in enumerate(n.outputs)}

        def source(node: ir.Node, value: ir.Value | None) -> Any:
            if value is None:
                return None
            if value in producers:
                return producers[value]
            constant = value.const_value
            if constant is not None:
                return str(constant.dtype), constant.numpy().tolist()
            # the length of the past is read from any of its tensors
            return str(value.name).split(".")[0] if node.op_type == "Shape" else value.name

        return [
            (
                n.name,
                n.op_type,
                [source(n, v) for v in n.inputs],
                {k: a.value for k, a in n.attributes.items()},
                [(str(v.dtype), str(v.shape)) for v in n.outputs],
            )
            for n in model.graph
        ]

    repeated = trace.repeated_graph(name, config)
    assert nodes(repeated) == nodes(trace.traced_graph(name, config))


def test_stacks_that_are_no_whole_number_of_periods_are_traced_whole() -> None:
    config = replace(SMALL, cross_attention_frequency=3)
    assert component_of("qllama_query", config).period(config) == (config, 1)
    short, times = component_of("qllama_text", config).period(config)
    assert isinstance(short, InternVLConfig)
    assert (short.qllama.num_hidden_layers, times) == (1, 2)


def test_blocks_that_form_no_chain_are_refused() -> None:
    model = trace.traced_graph("qllama_text", component_of("qllama_text", SMALL).period(SMALL)[0])
    with pytest.raises(BuildError, match="no blocks under nothing"):
        repeat_blocks(model.graph, "nothing", 2, 0, 0)
    inner = next(n for n in model.graph if "layers.0" in n.metadata_props.get(SCOPES, ""))
    model.graph.append(ir.node("Identity", [inner.outputs[0]], name="outside"))
    with pytest.raises(BuildError, match="do not form one chain"):
        repeat_blocks(model.graph, "qllama.model.layers", 2, 0, 0)


@pytest.mark.slow
def test_compute_types_share_one_structure(small: Built) -> None:
    def nodes(dtype: str) -> list[str]:
        graph = export_component("qllama_text", small.checkpoint, dtype).graph
        return sorted(str(n.name) for n in graph if n.op_type != "Cast")

    assert nodes("fp32") == nodes("bf16") == nodes("fp16")
    for dtype in ("fp32", "bf16"):  # one trace serves both: neither may change it
        graph = export_component("qllama_text", small.checkpoint, dtype).graph
        assert {
            str(graph.initializers[k].dtype) for k in small.checkpoint.tensors if k in graph.initializers
        } == {dtype_of(dtype).onnx}


def test_bf16_graphs_compute_rotary_tables_in_fp32(small: Built) -> None:
    graph = export_component("qllama_step", small.checkpoint, "bf16").graph
    trigonometric = [node for node in graph if node.op_type in ("Sin", "Cos")]
    assert len(trigonometric) == 2
    assert {str(node.outputs[0].dtype) for node in trigonometric} == {"FLOAT"}


def test_fp32_graphs_cast_16_bit_weights_once(small: Built) -> None:
    graph = ir.load(small.path("qllama_text")).graph
    casts = [node for node in graph if node.op_type == "Cast" and str(node.name).endswith("/Cast")]
    weights = [v for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert {v.dtype for v in weights} == {ir.DataType.BFLOAT16}
    assert {n.inputs[0].name for n in casts if n.inputs[0] in weights} == {v.name for v in weights}
    bf16 = ir.load(small.path("qllama_text", "bf16")).graph
    assert not any(n.op_type == "Cast" and n.inputs[0] in bf16.initializers.values() for n in bf16)


def test_fp16_graphs_run(small: Built) -> None:
    spec = small.spec("vision")
    pixels = random_inputs(spec, SMALL, {"batch": 2}, 0)["pixel_values"]
    session = onnxruntime.InferenceSession(small.path("vision", "fp16"), providers=["CPUExecutionProvider"])
    got = session.run(None, {"pixel_values": pixels.astype(np.float16)})[1].astype(np.float32)
    want = reference(small, "vision")({"pixel_values": pixels})["image_embed"]
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_padding_does_not_change_a_text(small: Built) -> None:
    ids = np.array([[1, 7, 30, 2], [1, 9, 2, 0]])
    lengths = np.array([4, 3])
    got = small.run("qllama_text", {"input_ids": np.pad(ids, ((0, 0), (0, 5))), "lengths": lengths})
    want = small.model.encode_text(torch.from_numpy(ids)).detach().numpy()
    near(got["text_embed"], want, FEATURES)


def chain(graphs: Built, pixels: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    vision = graphs.run("vision", {"pixel_values": pixels})
    return vision, graphs.run("qllama_query", {"tokens": vision["tokens"]})


@pytest.mark.slow
def test_chain_equals_the_goldens(tiny: Built) -> None:
    want = load_file(GOLDENS / "contrastive.safetensors")
    vision, queries = chain(tiny, want["pixel_values"].numpy())
    near(vision["image_embed"], want["C_image_embeds"], FEATURES)
    near(queries["query_hidden"], want["get_image_features_queries"], FEATURES)

    def unit(x: Array) -> Array:
        scaled: Array = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return scaled

    both = unit(vision["image_embed"]) + unit(queries["query_embed"])
    near(both, want["G_image_embeds"], FEATURES)
    ids = want["input_ids"].numpy()
    whole = [i for i, row in enumerate(ids) if (row[: (row > 0).sum()] > 0).all()]  # row 3 has an id 0 inside
    assert len(whole) == 3
    text = tiny.run("qllama_text", {"input_ids": ids[whole], "lengths": (ids[whole] > 0).sum(1)})
    near(text["text_embed"], want["C_text_embeds"][whole], FEATURES)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["nopad", "leftpad", "rightpad"])
def test_captions_equal_the_goldens(tiny: Built, padding: str) -> None:
    want = load_file(GOLDENS / "generate.safetensors")
    tokens = json.loads((GOLDENS / "generate.json").read_text())[padding]["new_tokens"]
    _, queries = chain(tiny, want["pixel_values"].numpy())
    spec, q = tiny.spec("qllama_step"), tiny.checkpoint.config.qllama
    got = generate_tokens(
        lambda inputs: tiny.run("qllama_step", inputs),
        spec,
        queries,
        want[f"{padding}_input_ids"].numpy(),
        want[f"{padding}_attention_mask"].numpy(),
        StopCriteria(q.eos_token_id, q.pad_token_id, len(tokens[0]), 0),
    )
    assert got.tolist() == tokens


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_equal_the_models(small: Built, beams: int) -> None:
    pixels = np.random.default_rng(1).standard_normal((3, 3, 56, 56)).astype(np.float32)
    ids = np.array([[1, 5, 8, 20], [0, 1, 5, 6], [1, 40, 41, 42]])
    mask = (ids > 0).astype(np.int64)
    images, prompt, seen = (torch.from_numpy(x) for x in (pixels, ids, mask))
    want = small.model.generate(images, prompt, seen, max_new_tokens=12, num_beams=beams)
    _, queries = chain(small, pixels)
    q = SMALL.qllama
    got = generate_tokens(
        lambda inputs: small.run("qllama_step", inputs),
        small.spec("qllama_step"),
        queries,
        ids,
        mask,
        StopCriteria(q.eos_token_id, q.pad_token_id, 12, 0),
        beams,
    )
    assert got.tolist() == want.tolist()


@pytest.mark.slow
def test_older_checkpoints_have_two_components(tmp_path: Path) -> None:
    config = InternVLConfig(
        VisionConfig(24, 1, 2, 20, 28, 14), QLlamaConfig(16, 1, 2, 24, 30), 12, 2, cross_attention_frequency=1
    )
    folder = random_checkpoint(config, tmp_path / "c", torch.float32, c_only=True)
    torch.save(load_file(folder / "model.safetensors"), folder / "internvl_c.pth")
    older = open_checkpoint(folder / "internvl_c.pth")
    assert older.components == ("vision", "qllama_text")
    build = Built(tmp_path, older, "fp32")
    inputs = random_inputs(build.spec("qllama_text"), config, {"batch": 2, "text": 4}, 0)
    close(build.run("qllama_text", inputs), reference(build, "qllama_text")(inputs))
    with pytest.raises(CapabilityError, match="qllama_step cannot be made"):
        export_component("qllama_step", older)


def test_graphs_can_use_the_checkpoint_itself(tmp_path: Path) -> None:
    config = replace(SMALL, qllama=replace(SMALL.qllama, num_hidden_layers=1))
    checkpoint = open_checkpoint(random_checkpoint(config, tmp_path, torch.bfloat16))
    model = export_component("qllama_text", checkpoint, "fp32")
    bind(model, checkpoint.tensors, tmp_path)
    save_graph(model, tmp_path / "qllama_text.onnx")
    build = Built(tmp_path, checkpoint, "")
    session = onnxruntime.InferenceSession(tmp_path / "qllama_text.onnx", providers=["CPUExecutionProvider"])
    inputs = random_inputs(build.spec("qllama_text"), config, {"batch": 2, "text": 4}, 0)
    close({"text_embed": session.run(None, inputs)[0]}, reference(build, "qllama_text")(inputs))

    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BuildError, match="does not say at which byte"):
        bind(export_component("qllama_text", checkpoint), open_checkpoint(tmp_path).tensors, tmp_path)


def test_full_size_components_use_every_published_tensor() -> None:
    used: set[str] = set()
    with torch.device("meta"):
        for name in EVERY:
            used |= set(component_module(name, InternVLConfig()).state_dict())
    assert set(expected_shapes(InternVLConfig())) - used == {"logit_scale"}


@pytest.mark.slow
def test_no_qk_norm(tmp_path: Path) -> None:
    config = InternVLConfig(
        VisionConfig(48, 2, 3, 20, 28, 14, qk_normalization=False), QLlamaConfig(16, 2, 2, 24, 30), 12, 2, 3
    )
    build = Built(tmp_path, open_checkpoint(random_checkpoint(config, tmp_path, torch.float32)), "fp32")
    inputs = random_inputs(build.spec("vision"), config, {"batch": 3}, 0)
    close(build.run("vision", inputs), reference(build, "vision")(inputs))


def test_unknown_component(small: Built) -> None:
    for act in (component_spec, component_module):
        with pytest.raises(UsageError, match="Unknown component 'decoder'"):
            act("decoder", SMALL)
    with pytest.raises(ValueError, match="compute_dtype"):
        export_component("vision", small.checkpoint, "int8")


def test_step_axes_fit_together(small: Built) -> None:
    spec = small.spec("qllama_step")
    for which in ("min", "opt", "max"):
        sizes = {t.name: spec.shape(t, which) for t in spec.inputs}
        total = sizes["past_key.0"][2] + sizes["input_ids"][1]
        assert sizes["attention_mask"][1] == total
    assert spec.axis("past").min == SMALL.num_query_token


def test_a_graph_that_does_not_fit_its_spec_is_refused(small: Built) -> None:
    model = export_component("qllama_text", small.checkpoint)
    with pytest.raises(BuildError, match="does not fit its spec"):
        finish(model, small.spec("vision"))
    bf16 = ir.tensor(torch.ones(1, dtype=torch.bfloat16))
    model.graph.insert_before(model.graph[0], ir.node("Constant", [], {"value": bf16}, name="odd"))
    with pytest.raises(BuildError, match="holds a BFLOAT16 constant"):
        retype(model, "BFLOAT16", "FLOAT")
