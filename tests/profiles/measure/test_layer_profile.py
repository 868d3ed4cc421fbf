"""Where the time of a call goes, by ONNX Runtime's profile and torch's profiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl_export import cli
from ivl_export.bundle import Bundle
from ivl_export.engines.onnxruntime.backend import optimized_graph
from ivl_export.engines.products import node_name
from ivl_export.profiles.measure.layer_profile import OUTSIDE, LayerTime
from ivl_export.profiles.measure.layer_timing import chrome_trace, profile_layers
from ivl_export.profiles.measure.receipt import read


def test_every_node_of_onnxruntimes_graph_is_timed(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    layers = profile_layers(bundle, "qllama_text", "onnxruntime", 2, 3, threads=1)
    graph = optimized_graph(bundle.graph("qllama_text", "fp32"))
    nodes = {node_name(node) for node in graph.nodes if node.op != "Constant"}
    timed = {layer.name for layer in layers.layers}
    assert {name for name in nodes if "layers." in name} <= timed
    assert layers.calls == 3
    assert len(layers.trace) >= len(timed)
    assert layers.sizes["batch"] == 2
    assert 0 < sum(layer.ms for layer in layers.layers) <= layers.call_ms  # one thread: nodes do not overlap
    for sums in (layers.by(lambda la: la.op), layers.by(lambda la: la.block), layers.by(lambda la: la.type)):
        assert sum(sums.values()) == pytest.approx(layers.call_ms - layers.rest_ms)
        assert list(sums.values()) == sorted(sums.values(), reverse=True)
    assert set(layers.by(lambda la: la.block)) == {*(f"block {i}" for i in range(4)), OUTSIDE}


def test_torch_operators_are_named_by_their_module(tiny_bundle: Path) -> None:
    layers = profile_layers(Bundle.open(tiny_bundle), "vision", "torch", 1, 2, threads=1)
    assert {"block 0", "block 1"} <= set(layers.by(lambda layer: layer.block))
    products = {
        layer.name.rpartition(".")[2] for layer in layers.layers if layer.op in ("aten::mm", "aten::addmm")
    }
    assert {"qkv", "fc1", "fc2"} <= products
    assert sum(layer.ms for layer in layers.layers) < layers.call_ms


def test_layers_of_a_chat_are_timed(chat_bundle: Path) -> None:
    layers = profile_layers(Bundle.open(chat_bundle), "decoder", "onnxruntime", 1, 2, threads=1)
    assert "block 0" in layers.by(lambda layer: layer.block)
    assert layers.sizes["total"] == layers.sizes["past"] + layers.sizes["text"]


@pytest.mark.slow
def test_a_profile_keeps_the_layers_of_its_components(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt, page = tmp_path / "receipt.json", tmp_path / "page.html"
    line = ["profile", str(tiny_bundle), "--batch", "2", "--seconds", "0.01", "--no-ceilings", "--layers"]
    line += ["--component", "vision", "--calls", "2", "--out", str(receipt), "--html", str(page)]
    assert cli.main(line) == 0
    assert "by block" in capsys.readouterr().out
    (layers,) = read(receipt).layers
    assert (layers.component, layers.sizes["batch"], layers.calls) == ("vision", 2, 2)
    assert 'id="layer-times"' in page.read_text()


def test_blocks_and_types_by_name() -> None:
    name = "vision_model.encoder.layers.12.mlp.fc1/Add"
    assert LayerTime(name, "Add", 1.0).block == "block 12"
    assert LayerTime(name, "Add", 1.0).type == "vision_model.encoder.layers.*.mlp.fc1/Add"
    assert LayerTime("conv2d_nchwc", "Conv", 1.0).block == OUTSIDE


def test_the_verb_and_its_trace(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    command = ["profile", str(tiny_bundle), "--layers", "--no-latency", "--component", "vision"]
    command += ["--calls", "2"]
    assert cli.main([*command, "--trace", str(trace), "--json"]) == 0
    (receipt,) = json.loads(capsys.readouterr().out)["components"]
    assert receipt["component"] == "vision"
    assert sum(receipt["by_op"].values()) == pytest.approx(receipt["call_ms"] - receipt["rest_ms"])
    events = json.loads(trace.read_text())["traceEvents"]
    assert events[0]["args"]["name"] == "vision on onnxruntime"
    assert all(e["ph"] == "X" and e["dur"] >= 0 and e["ts"] >= 0 for e in events[1:])
    assert {e["cat"] for e in events[1:]} == set(receipt["by_op"])
    page = tmp_path / "layers.html"
    assert cli.main([*command, "--top", "2", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert f"Written: {page}" in out
    assert 'id="layer-times"' in page.read_text()
    assert "mean of the quicker half of 2 calls" in page.read_text()
    assert "by block" in out
    assert "in no layer" in out
    assert cli.main([*command, "--backend", "torch-tensorrt"]) == 2
    assert cli.main([*command, "--backend", "tensorrt-rtx"]) == 5  # it has no such engines
    assert cli.main([*command, "--batch", "99999"]) == 2
    assert cli.main([*command, "--trace", str(tmp_path)]) == 2
    assert cli.main([*command, "--out", str(tmp_path / "x.json")]) == 2
    assert cli.main(["profile", str(tiny_bundle), "--component", "vision"]) == 2
    assert chrome_trace([]) == {"traceEvents": [], "displayTimeUnit": "ms"}
