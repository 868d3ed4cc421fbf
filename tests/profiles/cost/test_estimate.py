"""GPUs, roofline and estimate, checked against published counts, graphs and builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ivl_export import cli
from ivl_export.bundle import Bundle
from ivl_export.errors import CapabilityError, UsageError
from ivl_export.export.unquantized import export_plain
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.config import InternViTConfig, InternVLConfig, VisionConfig
from ivl_export.models.registry import (
    ModelConfig,
    component_names,
    component_spec,
    config_from_published,
    expected_shapes,
)
from ivl_export.pipeline import graph_steps
from ivl_export.pipeline.config import BuildConfig
from ivl_export.pipeline.plan import plan_build
from ivl_export.profiles.cost.estimate import RECEIPTS, Estimate, estimate
from ivl_export.profiles.cost.flops import graph_cost
from ivl_export.profiles.cost.gpus import GPUS, find_gpu, of_driver
from ivl_export.profiles.cost.roofline import (
    Arithmetic,
    Efficiency,
    component_cost,
    component_macs,
    component_time,
    peak,
)
from ivl_export.profiles.cost.sizes import linear_shapes, plan_of, weights
from ivl_export.profiles.cost.table19 import PAPER
from ivl_export.profiles.measure.machine import Gpu
from ivl_export.profiles.measure.receipt import SCHEMA, Settings, read, write
from ivl_export.profiles.measure.timing import StopRule
from ivl_export.quantization.recipe import load_recipe
from ivl_export.tests.components import CHAT_COMPONENTS, COMPONENTS, QUERY_CHAT_COMPONENTS
from ivl_export.tests.profiles.made_profiles import made_case, made_profile

IDEAL = Efficiency(1.0, 1.0, 1.0)
PUBLISHED_GMAC = {224: (1537, 787, 520), 336: (3507, 925, 520), 448: (6370, 1118, 520)}


def arithmetic(precision: str, config: InternVLConfig | None = None) -> Arithmetic:
    recipe = load_recipe(precision)
    return Arithmetic.of(recipe, plan_of(recipe, config or InternVLConfig()))


def predict(gpu: str, precision: str, batches: list[int], **options: Any) -> Estimate:
    config, recipe = InternVLConfig(), load_recipe(precision)
    layers = plan_of(recipe, config)
    return estimate(config, recipe, layers, find_gpu(gpu), batches, **options)


def test_the_table_is_consistent() -> None:
    assert len(GPUS) >= 20
    for gpu in GPUS.values():
        assert gpu.source.startswith("https://")
        assert gpu.fp8 is None or int(gpu.sm[2:]) >= 89  # FP8 products came with Ada and Hopper
        assert gpu.bf16 is None or int(gpu.sm[2:]) >= 80
        assert gpu.fp16 is None or gpu.bf16 in (None, gpu.fp16)
        for low in (gpu.fp8, gpu.int8):  # dense: never over four times 16-bit, and not under twice
            assert low is None or gpu.fp16 is None or 1.99 <= low / gpu.fp16 <= 4.01, gpu.name


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
    ],
)
def test_names_of_the_driver(driver: str, name: str | None) -> None:
    result = of_driver(driver)
    assert (result.name if result else None) == name


def test_gpus_are_found_by_name() -> None:
    assert find_gpu("RTX 4090") is find_gpu("NVIDIA GeForce rtx-4090") is GPUS["rtx4090"]
    with pytest.raises(UsageError, match="not known") as error:
        find_gpu("rtx 9999")
    assert "l40s" in error.value.why


def test_a_missing_peak_is_refused_or_said() -> None:
    with pytest.raises(CapabilityError, match="No fp8 peak is known for A100"):
        peak(GPUS["a100"], "fp8")
    with pytest.raises(CapabilityError, match="No bf16 peak is known for T4"):
        peak(GPUS["t4"], "bf16")
    assert peak(GPUS["l40s"], "fp8") == (733, "")
    value, note = peak(GPUS["jetson-thor"], "bf16")
    assert value == GPUS["jetson-thor"].fp16
    assert "no published bf16 peak" in note
    assert any(note in line for line in predict("jetson-thor", "fp8", [1]).assumptions)


@pytest.mark.parametrize("size", list(PUBLISHED_GMAC))
def test_costs_have_the_published_counts(size: int) -> None:
    config = InternVLConfig(vision=VisionConfig(image_size=size))
    for name, want in zip(("vision", "qllama_query", "qllama_text"), PUBLISHED_GMAC[size], strict=True):
        sizes = {"text": 80} if name == "qllama_text" else {}
        cost = component_cost(name, config, sizes, arithmetic("fp8"))
        # The published counts leave out pooling heads and the text projection.
        heads = sum(x.macs for x in cost.layers if x.layer.startswith(("clip_projector", "text_projection")))
        assert (cost.macs - heads) / 1e9 == pytest.approx(want, rel=1e-3)


@pytest.fixture(scope="module")
def graphs_of(
    tiny_bundle: Path, chat_bundle: Path, query_chat: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[ModelConfig, Callable[[str], Path]]]:
    """Of each form of the model its config, and the path of a component's fp32 graph."""
    checkpoint, out = open_checkpoint(query_chat), tmp_path_factory.mktemp("graphs")
    by_name: dict[str, tuple[ModelConfig, Callable[[str], Path]]] = {
        "with queries": (checkpoint.model, export_plain(checkpoint, out, dtype="fp32").graphs.__getitem__)
    }
    for name, bundle in (("InternVL", Bundle.open(tiny_bundle)), ("chat", Bundle.open(chat_bundle))):
        config = config_from_published(bundle.manifest.model.config)
        assert not isinstance(config, InternViTConfig)
        by_name[name] = config, partial(bundle.graph, dtype="fp32")
    return by_name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "component"),
    [
        *(("InternVL", name) for name in COMPONENTS),
        *(("chat", name) for name in CHAT_COMPONENTS),
        *(("with queries", name) for name in QUERY_CHAT_COMPONENTS),
    ],
)
def test_costs_are_those_of_the_graph(
    graphs_of: dict[str, tuple[ModelConfig, Callable[[str], Path]]], form: str, component: str
) -> None:
    config, graph_of = graphs_of[form]
    spec = component_spec(component, config)
    for which in ("min", "opt", "max"):
        sizes = {axis.name: getattr(axis, which) for axis in spec.axes}
        graph = graph_cost(graph_of(component), spec, sizes, "fp32")
        ours = component_cost(component, config, sizes, Arithmetic("fp32", {}))
        assert (ours.macs, ours.input_bytes, ours.output_bytes) == (
            graph.macs,
            graph.input_bytes,
            graph.output_bytes,
        )
        # The checkpoint with queries is stored in bf16, its graphs cast it.
        stored = Arithmetic("bf16" if form == "with queries" else "fp32", {})
        rest = component_cost(component, config, sizes, stored)
        # Constants of the graph (rotary tables and the like) are not weights of the checkpoint.
        if component != "decoder_embed" or form == "chat":  # a table before a cast is read whole
            assert rest.weight_bytes == pytest.approx(graph.weight_bytes, rel=0.05)
        theirs = {layer.layer: layer for layer in graph.layers}
        assert {layer.layer for layer in rest.layers} == set(theirs)
        for layer in rest.layers:
            same = theirs[layer.layer]
            assert (layer.count, layer.macs) == (same.count, same.macs), layer.layer
            if layer.op != "Attention":
                assert layer.weight_bytes <= same.weight_bytes <= 1.2 * layer.weight_bytes + 4096, layer.layer


def test_the_roofline_by_hand() -> None:
    gpu, exact = GPUS["l40s"], arithmetic("fp8")
    one = component_time(component_cost("vision", InternVLConfig(), {"batch": 1}, exact), gpu, exact, IDEAL)
    many = component_time(
        component_cost("vision", InternVLConfig(), {"batch": 128}, exact), gpu, exact, IDEAL
    )
    macs = component_macs("vision", InternVLConfig(), {"batch": 128})
    low = sum(n for key, n in macs.items() if exact.product(key) == "fp8")
    compute = 2e3 * (low / 733e12 + (sum(macs.values()) - low) / 362.05e12)
    assert many.floor_ms == pytest.approx(compute, rel=1e-9)
    parameters = weights(InternVLConfig(), load_recipe("fp8"), plan_of(load_recipe("fp8"), InternVLConfig()),
                         ["vision"]).nbytes  # fmt: skip
    assert one.floor_ms == pytest.approx(1e3 * parameters / 864e9, rel=0.01)
    assert (one.bound, many.bound) == ("memory", "compute")
    for time in (one, many):
        assert time.floor_ms <= time.expected_ms
        assert time.gmacs == pytest.approx(sum(layer.gmacs for layer in time.layers))


def test_weights_alone_may_be_quantised() -> None:
    layer = "vision_model.encoder.layers.*.mlp.fc1"
    exact = Arithmetic("bf16", {layer: ("int4", "bf16")})
    assert exact.products == ("bf16",)
    costs = [component_cost("vision", InternVLConfig(), {}, a) for a in (exact, arithmetic("bf16"))]
    ours, wide = ({x.layer: x for x in cost.layers}[layer] for cost in costs)
    assert 4 * ours.weight_bytes == wide.weight_bytes
    assert ours.activation_bytes == wide.activation_bytes
    assert costs[1].weight_bytes - costs[0].weight_bytes == wide.weight_bytes - ours.weight_bytes


@pytest.mark.slow
def test_an_estimate() -> None:
    result = predict("l40s", "fp8", [1, 8, 128], cost_per_hour=2.0)
    first, _, last = result.points
    assert first.image_c_ms < last.image_c_ms
    assert first.images_c_per_s < last.images_c_per_s
    assert last.images_g_per_s < last.images_c_per_s
    assert last.cost_c == pytest.approx(2.0 * 1e6 / last.images_c_per_s / 3600)
    assert last.fits
    assert not predict("rtx4090", "bf16", [128]).points[0].fits  # 28 GB of weights
    assert [s.known for s in (result.efficiencies.wide, result.efficiencies.low)] == ["paper", "assumption"]
    faster = predict("h100", "fp8", [128]).points[0]
    assert faster.image_c_ms < last.image_c_ms
    json.dumps(result.to_json(), allow_nan=False)


def test_the_paper_is_met(tmp_path: Path) -> None:
    checks = predict("a100", "bf16", [128], receipts=tmp_path).checks
    assert len(checks) == len({row.image_size for row in PAPER}) * 2 + 1
    for check in checks:
        assert check.error == pytest.approx((check.predicted_ms - check.measured_ms) / check.measured_ms)
        assert abs(check.error) < 0.15, check
        assert not check.receipt


def receipt(folder: Path, gpu: str, ms: float, batch: int = 128) -> None:
    settings = Settings("tensorrt", "sm89", None, (batch,), (), StopRule(), "cuda:0")
    cost = component_cost("vision", InternVLConfig(), {"batch": batch}, arithmetic("fp8"))
    case = made_case("vision", [ms] * 12, batch)
    profile = made_profile([case], [cost], gpus=(Gpu(gpu, 46068, "570"),), settings=settings, ceilings=None)
    write(profile.to_json(), folder / "one.json")
    (folder / "other.json").write_text(json.dumps({"title": "a receipt of something else"}))


@pytest.mark.slow
def test_a_receipt_is_taken_before_an_assumption(tmp_path: Path) -> None:
    floor = predict("l40s", "fp8", [128]).points[0].components[0].floor_ms
    receipt(tmp_path, "NVIDIA L40S", floor / 0.7)
    result = predict("h200", "fp8", [128], receipts=tmp_path)
    assert result.efficiencies.low.known == "receipt"
    assert result.efficiencies.low.value == pytest.approx(0.7)
    (check,) = [c for c in result.checks if c.receipt]
    assert check.name == "one: vision at batch 128"
    assert check.measured_ms == pytest.approx(floor / 0.7)
    layer = predict("l40s", "fp8", [1]).points[0].components[0].floor_ms
    receipt(tmp_path, "NVIDIA L40S", layer / 0.9, batch=1)
    memory = predict("h200", "fp8", [128], receipts=tmp_path).efficiencies.memory
    assert memory.known == "receipt"
    assert memory.value == pytest.approx(0.9)
    receipt(tmp_path, "NVIDIA RTX 9999", floor)  # no peak, no share
    unknown = predict("h200", "fp8", [128], receipts=tmp_path)
    assert unknown.efficiencies.low.known == "assumption"
    assert not any(check.receipt for check in unknown.checks)


def test_a_receipt_without_a_known_gpu_is_held_to_its_own_ceilings(tmp_path: Path) -> None:
    cost = component_cost("vision", InternVLConfig(), {"batch": 1}, arithmetic("fp8"))
    profile = made_profile([made_case("vision", [50_000.0] * 3)], [cost])
    write(profile.to_json(), tmp_path / "cpu.json")
    result = predict("l40s", "fp8", [1], receipts=tmp_path)
    (check,) = [c for c in result.checks if c.receipt]
    assert (check.name, check.gpu, check.published) == (
        "cpu: vision at batch 1", "A CPU, its ceilings", False,
    )  # fmt: skip
    # ONNX Runtime multiplies FP8 weights in fp32 on a CPU: 100 GFLOP/s here, at the shares of an estimate.
    least = 2 * cost.macs / 100e9 * 1e3
    assert least < check.predicted_ms < 3 * least
    assert check.error == pytest.approx((check.predicted_ms - 50_000) / 50_000)
    assert result.efficiencies.low.known == "assumption"  # its shares are of no published peak


def test_every_receipt_of_the_repository_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [path for path in RECEIPTS.glob("*.json") if SCHEMA in path.read_text()[:60]]
    receipts = [path.stem for path in paths if read(path).of_kind("component")]
    assert {"nano-int8", "nano-chat-int8"} <= set(receipts)
    assert cli.main(["estimate", "--gpu", "l4", "--batch", "1", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    for name in receipts:
        assert any(check["name"].startswith(f"{name}: ") for check in checks), name


@pytest.mark.parametrize("form", ["nano", "nano-chat", "with queries"])
def test_sizes_are_those_of_a_build(tmp_path: Path, query_chat: Path, form: str) -> None:
    model = {"nano": None, "nano-chat": Path("nano-chat"), "with queries": query_chat}[form]
    for precision in ("fp8", "bf16", "fp8-attention"):
        plan = plan_build(BuildConfig(tmp_path / "out", model, precision, calib_samples=4))
        source = graph_steps.GraphSource(plan.checkpoint, plan.recipe, plan.layers, None)
        config = plan.checkpoint.model
        assert linear_shapes(config) == plan.linear_shapes
        assert plan_of(plan.recipe, config) == plan.layers
        for name in component_names(config):
            ours = weights(config, plan.recipe, plan_of(plan.recipe, config), [name])
            assert (sum(ours.high.values()), sum(ours.low.values())) == graph_steps.stored_bytes(
                source, [name]
            )
            assert ours.build_load.build_bytes == graph_steps.build_load(source, name).build_bytes
        assert weights(config, plan.recipe, plan.layers).nbytes == sum(
            graph_steps.stored_bytes(source, plan.components)
        )
    assert set(linear_shapes(InternVLConfig())) < {
        key.removesuffix(".weight") for key in expected_shapes(InternVLConfig())
    }


@pytest.mark.slow
def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["estimate", "--gpu", "l40s", "--batch", "1,8", "--cost-per-hour", "1.5"]
    assert cli.main([*line, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "ivl-export.estimate/1"
    assert [p["batch"] for p in data["points"]] == [1, 8]
    assert cli.main([*line, "--image-size", "448"]) == 0
    out = capsys.readouterr().out
    for text in ("predicted, not measured", "assumption", "448 px", "cost of 1M", "images/s", "GPU memory"):
        assert text in out
    assert len(out.splitlines()) < 20
    assert "vision at batch" not in out
    assert cli.main([*line, "--layers", "--evidence"]) == 0
    out = capsys.readouterr().out
    for text in (
        "Assumptions:",
        "No receipt of this repository",
        "its ceilings",
        "vision at batch",
        "bound by",
    ):
        assert text in out
    (tmp_path / "config.json").write_text(json.dumps(InternVLConfig().to_published()))
    assert cli.main([*line, "--model", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == data["points"]
    assert cli.main(["estimate", "--gpu", "a100", "--precision", "fp8"]) == 5
    assert "No fp8 peak" in capsys.readouterr().err
    assert cli.main(["estimate", "--gpu", "nothing"]) == 2
    assert cli.main([*line, "--image-size", "225"]) == 2
