"""FLOPs and bytes: the analytic count against the paper's, the graphs' against the analytic; Table 19."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ivl_export.bundle import Bundle
from ivl_export.errors import BuildError, IntegrityError
from ivl_export.manifest import Model
from ivl_export.models.config import InternVLConfig, QLlamaConfig, VisionConfig
from ivl_export.profiles.analytic import component_macs, towers
from ivl_export.profiles.flops import graph_cost, layer_type
from ivl_export.profiles.latency import Case
from ivl_export.profiles.measure import Measurement
from ivl_export.profiles.table19 import PAPER, Table19, table19
from ivl_export.specs import Axis, ComponentSpec, TensorSpec

if TYPE_CHECKING:
    from onnx import NodeProto

FULL_PARAMETERS = 13_834_975_747
PUBLISHED_GMAC = {224: (1537, 787), 336: (3507, 925), 448: (6370, 1118)}
PUBLISHED_TEXT_GMAC = 520


@pytest.mark.parametrize("size", list(PUBLISHED_GMAC))
def test_analytic_counts_are_the_published_ones(size: int) -> None:
    counted = towers(InternVLConfig(vision=VisionConfig(image_size=size)))
    vit, qllama = PUBLISHED_GMAC[size]
    assert counted.vit / 1e9 == pytest.approx(vit, rel=1e-3)
    assert counted.qllama_image / 1e9 == pytest.approx(qllama, rel=1e-3)
    assert counted.qllama_text / 1e9 == pytest.approx(PUBLISHED_TEXT_GMAC, rel=1e-3)


def test_analytic_counts_by_hand() -> None:
    config = InternVLConfig(
        vision=VisionConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                            image_size=4, patch_size=2),
        qllama=QLlamaConfig(hidden_size=6, num_hidden_layers=3, num_attention_heads=1, intermediate_size=5,
                            vocab_size=10),
        clip_embed_dim=7, attn_pool_num_heads=1, num_query_token=2,
    )  # fmt: skip
    vision = component_macs("vision", config, {"batch": 3})
    assert vision["vision_model.embeddings.patch_embedding"] == 3 * 4 * 12 * 4  # batch, patches, K, width
    assert vision["vision_model.encoder.layers.*.attn/Attention"] == 3 * 2 * 5 * 5 * 4
    assert vision["clip_projector.cross_attn.proj"] == 3 * 4 * 7
    step = component_macs("qllama_step", config, {"text": 2, "past": 4})
    assert step["qllama.model.layers.*.self_attn/Attention"] == 3 * 2 * 2 * 6 * 6  # 2 new see 4 + 2
    assert step["qllama.lm_head"] == 6 * 10  # of the last position only
    query = component_macs("qllama_query", config, {})
    assert query["qllama.model.layers.*.cross_attn.k_proj"] == 2 * 5 * 4 * 6  # layers 0 and 2
    with pytest.raises(KeyError):
        component_macs("decoder", config, {})


@pytest.mark.parametrize("component", ["vision", "qllama_query", "qllama_text", "qllama_step"])
def test_graphs_cost_what_the_config_says(tiny_bundle: Path, component: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec, config = bundle.spec(component), InternVLConfig.from_published(bundle.manifest.model.config)
    for which in ("min", "opt", "max"):
        sizes = {axis.name: getattr(axis, which) for axis in spec.axes}
        cost = graph_cost(bundle.graph(component, "fp32"), spec, sizes, "fp32")
        assert {layer.layer: layer.macs for layer in cost.layers} == component_macs(component, config, sizes)
        assert cost.flops == 2 * cost.macs
        boundary = {"in": spec.inputs, "out": spec.outputs}
        moved = {
            way: sum(
                np.prod(spec.shape(t, which), dtype=int) * (8 if t.dtype == "int64" else 4) for t in tensors
            )
            for way, tensors in boundary.items()
        }
        assert (cost.input_bytes, cost.output_bytes) == (moved["in"], moved["out"])


def test_weights_of_a_graph_are_read_once(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    config = InternVLConfig.from_published(bundle.manifest.model.config)
    spec, graph = bundle.spec("vision"), bundle.graph("vision", "fp32")
    one, many = (graph_cost(graph, spec, {"batch": n}) for n in (1, 16))
    v, embed = config.vision, config.clip_embed_dim
    layer = v.hidden_size * (4 * v.hidden_size + 2 * v.intermediate_size)
    matrices = sum(x.weight_bytes for x in one.layers if x.layer.startswith("vision_model.encoder."))
    assert matrices == 4 * v.num_hidden_layers * layer
    pool = 3 * v.hidden_size**2 + v.hidden_size * embed
    assert sum(x.weight_bytes for x in one.layers if "clip_projector" in x.layer) == 4 * pool
    assert one.weight_bytes == many.weight_bytes > matrices  # norms, biases, positions
    assert many.macs == 16 * one.macs
    assert many.intensity > one.intensity


def test_only_the_rows_looked_up_are_read(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    config = InternVLConfig.from_published(bundle.manifest.model.config)
    spec, graph = bundle.spec("qllama_text"), bundle.graph("qllama_text", "fp32")
    few = graph_cost(graph, spec, {"batch": 1, "text": 10})
    more = graph_cost(graph, spec, {"batch": 2, "text": 20})
    all_rows = graph_cost(graph, spec, {"batch": 128, "text": 80})
    row = 4 * config.qllama.hidden_size
    assert more.weight_bytes - few.weight_bytes == 30 * row
    assert all_rows.weight_bytes - few.weight_bytes == (config.qllama.vocab_size - 10) * row


def save(
    path: Path, nodes: list[NodeProto], weights: dict[str, tuple[str, list[int]]], out: Sequence[str | int]
) -> Path:
    """A graph with input x [batch, 3, 8, 8] or whatever its first node takes, and zero weights."""
    import onnx
    from onnx import TensorProto, helper

    item = {"FLOAT": 4, "INT8": 1}
    tensors = [
        helper.make_tensor(
            name, getattr(TensorProto, kind), dims, bytes(int(np.prod(dims)) * item[kind]), raw=True
        )
        for name, (kind, dims) in weights.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, out)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), str(path))
    return path


SPEC = ComponentSpec(
    "g",
    (TensorSpec("x", "float", ("batch", 3, 8, 8)),),
    (TensorSpec("y", "float", ("batch", 5)),),
    (Axis("batch", 1, 2, 4),),
)


def test_quantised_weights_and_activations_count_at_their_stored_size(tmp_path: Path) -> None:
    from onnx import helper

    nodes = [
        helper.make_node("Conv", ["x", "filter"], ["c"], name="conv", strides=[4, 4]),
        helper.make_node("Flatten", ["c"], ["f"], name="flat"),
        helper.make_node("QuantizeLinear", ["f", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["dw"], name="dw", axis=0),
        helper.make_node("Transpose", ["dw"], ["wt"], name="t", perm=[1, 0]),
        helper.make_node("MatMul", ["d", "wt"], ["m"], name="blocks.3.fc"),
        helper.make_node("Gemm", ["m", "v", "b"], ["y"], name="head", transB=1),
    ]
    weights = {
        "filter": ("FLOAT", [6, 3, 4, 4]), "s": ("FLOAT", []), "z": ("INT8", []), "w": ("INT8", [7, 24]),
        "ws": ("FLOAT", [7]), "v": ("FLOAT", [5, 7]), "b": ("FLOAT", [5]),
    }  # fmt: skip
    cost = graph_cost(save(tmp_path / "g.onnx", nodes, weights, ["batch", 5]), SPEC, {"batch": 2})
    conv, matmul, gemm = cost.layers
    assert (conv.layer, conv.op, conv.macs) == ("conv", "Conv", 2 * 6 * 2 * 2 * 3 * 4 * 4)
    assert (matmul.layer, matmul.macs) == ("blocks.*.fc", 2 * 24 * 7)
    assert matmul.weight_bytes == 7 * 24 + 4 * 7  # int8 and its scales
    assert matmul.activation_bytes == 2 * 24 + 4 * 2 * 7  # int8 in, fp32 out
    assert (gemm.macs, gemm.weight_bytes) == (2 * 7 * 5, 4 * (5 * 7 + 5))
    assert cost.weight_bytes == 4 * 288 + 4 + 1 + 7 * 24 + 4 * 7 + 4 * 40
    assert (cost.input_bytes, cost.output_bytes) == (4 * 2 * 192, 4 * 2 * 5)


def test_a_layer_type_has_no_numbers() -> None:
    assert layer_type("a.layers.12.attn.qkv") == "a.layers.*.attn.qkv"
    assert layer_type("a.layers.0.attn/Attention.1") == "a.layers.*.attn/Attention"
    assert layer_type("clip_projector2.cross_attn.q") == "clip_projector2.cross_attn.q"


def test_what_cannot_be_counted_is_an_error(tmp_path: Path) -> None:
    from onnx import helper

    (tmp_path / "no.onnx").write_bytes(b"\xff" * 100)
    for path in (tmp_path / "no.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(IntegrityError, match=path.name):
            graph_cost(path, SPEC, {"batch": 1})
    nodes = [helper.make_node("NonZero", ["x"], ["n"]),  # how many follows from values, not from sizes
             helper.make_node("Cast", ["n"], ["f"], to=1),
             helper.make_node("MatMul", ["w", "f"], ["y"], name="m")]  # fmt: skip
    graph = save(tmp_path / "g.onnx", nodes, {"w": ("FLOAT", [5, 4])}, [5, "found"])
    with pytest.raises(BuildError, match="size of y"):
        graph_cost(graph, SPEC, {"batch": 1})
    with pytest.raises(BuildError, match="batch"):
        graph_cost(graph, SPEC, {})
    other = ComponentSpec("other", (TensorSpec("x", "float", ("batch", 3)),), (), SPEC.axes)
    with pytest.raises(IntegrityError, match="component other"):
        graph_cost(graph, other, {"batch": 1})


def timed(name: str, batch: int, ms: float, **sizes: int) -> Case:
    samples = (int(ms * 1e6),) * 3
    measurement = Measurement(samples, (3,), 0, "stable", 1)
    return Case(name, "component", batch, {"batch": batch, **sizes}, batch, "images", "", measurement, {})


def full_model(size: int, parameters: int | None = None) -> tuple[Model, InternVLConfig]:
    config = InternVLConfig(vision=VisionConfig(image_size=size))
    tokens = (config.vision.num_tokens - 257) * 3200  # of the position embedding
    count = FULL_PARAMETERS + tokens if parameters is None else parameters
    return Model("InternVL-14B", "somewhere", {}, {}, 4.6, count), config


def test_the_papers_rows_are_the_papers() -> None:
    assert len(PAPER) == 6
    for row in PAPER:  # they add up to within its rounding
        parts = [ms for ms in (row.vit_ms, row.qllama_image_ms, row.qllama_text_ms) if ms is not None]
        assert sum(parts) == pytest.approx(row.total_ms, abs=0.11)
        assert row.total_ms is not None
        assert 1000 / row.total_ms == pytest.approx(row.pairs_per_s, rel=0.005)


def test_table_19_of_the_full_model_holds_what_was_measured() -> None:
    cases = [
        timed("vision", 1, 30.0),
        timed("vision", 8, 160.0),
        timed("qllama_query", 8, 80.0),
        timed("qllama_text", 8, 8.0, text=16),  # not the table's length
        timed("qllama_text", 8, 40.0, text=80),
        timed("qllama_text", 1, 9.0, text=80),
    ]
    table = table19(*full_model(336), cases)
    assert table.batch == 8
    filled = {(r.method, r.image_size): r for r in table.measured if r is not None}
    assert set(filled) == {("InternVL-C", 336), ("InternVL-G", 336)}
    c, g = filled["InternVL-C", 336], filled["InternVL-G", 336]
    assert (c.vit_ms, c.qllama_image_ms, c.qllama_text_ms, c.total_ms, c.pairs_per_s) == (20, None, 5, 25, 40)
    assert (g.qllama_image_ms, g.total_ms) == (10, 35)
    assert any("batch 8" in note for note in table.notes)
    for row, mine in zip(table.paper, table.measured, strict=True):
        assert mine is None or (mine.method, mine.image_size) == (row.method, row.image_size)


def test_table_19_leaves_out_what_was_not_measured() -> None:
    vision, query = timed("vision", 8, 160.0), timed("qllama_query", 8, 80.0)
    text, short = timed("qllama_text", 8, 40.0, text=80), timed("qllama_text", 8, 8.0, text=16)
    without_query = table19(*full_model(224), [vision, text])
    assert [r.method for r in without_query.measured if r] == ["InternVL-C"]
    assert any("InternVL-G is empty" in note for note in without_query.notes)

    def nothing(table: Table19) -> bool:
        return table.paper == PAPER and not any(table.measured) and table.batch is None and bool(table.notes)

    assert nothing(table19(*full_model(224), [vision, query, short]))
    assert nothing(table19(*full_model(224), [vision, query, timed("qllama_text", 1, 5.0, text=80)]))
    assert nothing(table19(*full_model(224), []))


def test_table_19_is_about_the_full_model_only() -> None:
    cases = [timed("vision", 8, 160.0), timed("qllama_text", 8, 40.0, text=80)]
    model, config = full_model(224, 383_499)
    small = InternVLConfig(vision=VisionConfig(num_hidden_layers=47))
    for table in (table19(model, config, cases), table19(full_model(224)[0], small, cases)):
        assert not any(table.measured)
        assert "13,834,975,747" in table.notes[0]
    assert any(table19(*full_model(224), cases).measured)
    contrastive = 12_620_029_697  # C alone, as internvl_c_13b_224px.pth
    assert any(table19(*full_model(224, contrastive), cases).measured)
    assert table19(*full_model(224), cases).to_json()["lines"][0]["measured"]["pairs_per_s"] == 40
