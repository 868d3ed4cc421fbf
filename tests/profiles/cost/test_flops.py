"""FLOPs and bytes: the analytic count against the paper's, the graphs' against the analytic; Table 19."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ivl_export.bundle import Bundle
from ivl_export.bundle.manifest import Model
from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.errors import BuildError, IntegrityError, UsageError
from ivl_export.models.config import InternVLConfig, QLlamaConfig, VisionConfig
from ivl_export.profiles.cost.flops import graph_cost, layer_type
from ivl_export.profiles.cost.roofline import component_macs, towers
from ivl_export.profiles.cost.table19 import PAPER, Column, Row, Table19, merged
from ivl_export.profiles.cost.table19 import table19 as table19_of
from ivl_export.profiles.measure.cases import Case, Kind
from ivl_export.profiles.measure.timing import Measurement

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
    with pytest.raises(UsageError, match="decoder"):
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
    """A graph with input x [batch, 3, 8, 8] or its first node's shape, and zero weights."""
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


def timed(
    name: str, batch: int, ms: float, precision: str = "fp8", kind: Kind = "component", **sizes: int
) -> Case:
    samples = (int(ms * 1e6),) * 3
    measurement = Measurement(samples, (3,), 0, "stable", 1)
    backend = "PyTorch" if kind == "baseline" else "tensorrt"
    return Case(
        name, kind, batch, {"batch": batch, **sizes}, batch, "images", "", measurement, {}, backend, precision
    )


def baseline(name: str, batch: int, ms: float, **sizes: int) -> Case:
    return timed(name, batch, ms, "bf16", "baseline", **sizes)


def full_model(size: int, parameters: int | None = None) -> tuple[Model, InternVLConfig]:
    config = InternVLConfig(vision=VisionConfig(image_size=size))
    tokens = (config.vision.num_tokens - 257) * 3200  # of the position embedding
    count = FULL_PARAMETERS + tokens if parameters is None else parameters
    return Model("anything", "somewhere", {}, {}, 4.6, count), config


def table19(size: int, cases: Sequence[Case], machine: str = "L40S") -> Table19:
    return table19_of(*full_model(size), cases, machine)


def measured(table: Table19) -> dict[tuple[str, int, str], Row]:
    return {
        (line.method, line.image_size, column.precision): row
        for line in table.lines
        for column, row in zip(table.columns, line.measured, strict=True)
        if row is not None
    }


def ratios(table: Table19) -> dict[tuple[str, int, str], float]:
    return {
        (line.method, line.image_size, column.precision): ratio
        for line in table.lines
        for column, ratio in zip(table.columns, line.ratios, strict=True)
        if ratio is not None
    }


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
        timed("vision", 128, 1280.0),
        timed("qllama_query", 128, 640.0),
        timed("qllama_text", 128, 64.0, text=16),  # not the table's length
        timed("qllama_text", 128, 320.0, text=80),
        timed("qllama_text", 1, 9.0, text=80),
    ]
    table = table19(336, cases)
    assert table.columns == (Column("tensorrt", "fp8", "L40S", 128),)
    filled = measured(table)
    assert set(filled) == {("InternVL-C", 336, "fp8"), ("InternVL-G", 336, "fp8")}
    c, g = filled["InternVL-C", 336, "fp8"], filled["InternVL-G", 336, "fp8"]
    assert (c.vit_ms, c.qllama_image_ms, c.qllama_text_ms, c.total_ms) == (10, None, 2.5, 12.5)
    assert c.pairs_per_s == 80
    assert (g.qllama_image_ms, g.total_ms) == (5, 17.5)
    assert [line.paper for line in table.lines] == list(PAPER)
    assert not ratios(table)  # nothing to form one with, least of all the paper's A100
    rates = {(rate.image_size, rate.batch): (rate.paper, rate.measured) for rate in table.rates}
    assert rates[224, 1] == (28.0, (None,))
    assert rates[224, 128] == (64.6, (None,))
    assert rates[336, 1] == (None, (1 / 0.03,))
    assert rates[336, 128] == (None, (100.0,))


def test_the_only_ratio_is_to_the_baseline_of_the_same_run() -> None:
    parts = [timed("vision", 128, 640.0), timed("qllama_text", 128, 128.0, text=80)]
    torch = [
        baseline("vision", 128, 1280.0),
        baseline("qllama_query", 128, 640.0),
        baseline("qllama_text", 128, 256.0, text=80),
    ]
    table = table19(224, [*parts, *torch])
    assert [column.backend for column in table.columns] == ["PyTorch", "tensorrt"]
    assert ratios(table) == {
        ("InternVL-C", 224, "bf16"): 1.0,
        ("InternVL-C", 224, "fp8"): 2.0,
        ("InternVL-G", 224, "bf16"): 1.0,  # the engine had no query pass: its cell stays empty
    }
    other_batch = [baseline("vision", 8, 80.0), baseline("qllama_text", 8, 16.0, text=80)]
    assert ("InternVL-C", 224, "fp8") not in ratios(table19(224, [*parts, *other_batch]))


def test_tables_of_several_sizes_and_machines_are_one() -> None:
    parts = [timed("vision", 128, 640.0), timed("qllama_text", 128, 128.0, text=80)]
    torch = [baseline("vision", 128, 1280.0), baseline("qllama_text", 128, 256.0, text=80)]
    table = merged([table19(224, [*parts, *torch]), table19(448, parts), table19(224, parts, "T4")])
    slower = [baseline("vision", 128, 2560.0), baseline("qllama_text", 128, 512.0, text=80)]
    again = merged([table19(224, [*parts, *torch]), table19(224, [*parts, *slower])])
    assert ratios(again)["InternVL-C", 224, "fp8"] == 2.0  # of its own run, not of the other one's baseline
    assert [(c.backend, c.machine) for c in table.columns] == [
        ("PyTorch", "L40S"), ("tensorrt", "L40S"), ("tensorrt", "T4"),
    ]  # fmt: skip
    lines = {(line.method, line.image_size): line for line in table.lines}
    assert [row is not None for row in lines["InternVL-C", 224].measured] == [True, True, True]
    assert [row is not None for row in lines["InternVL-C", 448].measured] == [False, True, False]
    assert lines["InternVL-C", 224].ratios == (1.0, 2.0, None)  # the T4 had no baseline
    assert lines["InternVL-C", 448].ratios == (None, None, None)
    assert len(table.lines) == len(PAPER)


def test_table_19_leaves_out_what_was_not_measured() -> None:
    vision, query = timed("vision", 8, 160.0), timed("qllama_query", 8, 80.0)
    text, short = timed("qllama_text", 8, 40.0, text=80), timed("qllama_text", 8, 8.0, text=16)
    without_query = table19(224, [vision, text])
    assert list(measured(without_query)) == [("InternVL-C", 224, "fp8")]
    assert any("InternVL-G is empty" in note for note in without_query.notes)
    assert any("batch 8" in note for note in without_query.notes)
    for cases in ([vision, query, short], [vision, query, timed("qllama_text", 1, 5.0, text=80)]):
        table = table19(224, cases)
        assert not measured(table)
        assert any("not measured at one batch size" in note for note in table.notes)
    nothing = table19(224, [])
    assert not measured(nothing)
    assert [line.paper for line in nothing.lines] == list(PAPER)


def test_the_papers_lines_are_about_the_full_model_only() -> None:
    cases = [timed("vision", 8, 160.0), timed("qllama_text", 8, 40.0, text=80)]
    model, config = full_model(224, 383_499)
    small = InternVLConfig(vision=VisionConfig(num_hidden_layers=47))
    for table in (
        table19_of(model, config, cases, "here"),
        table19_of(full_model(224)[0], small, cases, "here"),
    ):
        assert "13,834,975,747" in table.notes[0]
        assert not any(row for line in table.lines if line.paper for row in line.measured)
        (own,) = [line for line in table.lines if line.paper is None]
        assert (own.model, own.method) == ("anything", "InternVL-C")
    contrastive = 12_620_029_697  # C alone, as internvl_c_13b_224px.pth
    assert measured(table19_of(*full_model(224, contrastive), cases, "here"))
    data = table19(224, cases).to_json()
    assert data["lines"][0]["measured"][0]["pairs_per_s"] == 40
