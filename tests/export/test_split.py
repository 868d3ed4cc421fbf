"""Split components: the parts run as one, give the same as the whole, and are verified together."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_export.bundle import Bundle, seal
from ivl_export.bundle.manifest import Manifest, manifest_from_json
from ivl_export.bundle.spec import ComponentSpec, TensorSpec
from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.errors import BuildError, InputError, IntegrityError, UsageError
from ivl_export.export.split import split_graph
from ivl_export.export.trace import export_component
from ivl_export.models.registry import component_spec
from ivl_export.pipeline import graph_steps
from ivl_export.pipeline.config import BuildConfig
from ivl_export.pipeline.graph_steps import graph_path
from ivl_export.pipeline.manifest import manifest_of
from ivl_export.pipeline.plan import plan_build
from ivl_export.pipeline.workspace import Record
from ivl_export.profiles.measure.layer_timing import profile_layers
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.runtime import InternVL
from ivl_export.runtime.components import Components
from ivl_export.runtime.model import MODES
from ivl_export.verify.expectations import check_expectations
from ivl_export.verify.onnxruntime import read_onnxruntime
from ivl_export.verify.report import merge_reports
from ivl_export.verify.rtx import read_rtx

pytestmark = [pytest.mark.numeric, pytest.mark.slow]

pytest.importorskip("onnxscript")

COMPONENTS = ("vision", "qllama_query", "qllama_text", "qllama_step", "qllama_itm")
BLOCKS = "vision_model.encoder.layers"
QUERIES = 8


@dataclass(frozen=True)
class Split:
    """Nano's FP8 graphs for ONNX Runtime, each in ``count`` parts, as a bundle; their source."""

    count: int
    bundle: Bundle
    source: graph_steps.GraphSource
    promised: dict[str, dict[str, str]]

    @property
    def whole(self) -> Manifest:
        """The manifest without the parts: ONNX Runtime then runs the graphs that were not cut."""
        components = {c: replace(v, parts=()) for c, v in self.bundle.manifest.components.items()}
        return replace(self.bundle.manifest, components=components, engines=())


@pytest.fixture(scope="module", params=[2, 3])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Scales are made up: both sides compute with the same ones."""
    root = tmp_path_factory.mktemp("split")
    # Nano's second block ends the first of two parts, its first and third those of three.
    config = BuildConfig(root / "out", split=request.param, backend=("onnxruntime",), calib_samples=4)
    plan = plan_build(replace(config, itm=True, features=(1, 2, 3)))
    source = graph_steps.GraphSource(plan.checkpoint, plan.recipe, plan.layers, None)
    layers = {c: graph_steps.component_weights(source, [c])[1] for c in plan.components}
    amax = {c: dict.fromkeys(names, 8.0) for c, names in layers.items()}
    source = replace(
        source, ranges=ActivationRanges(amax, "max", 1, "0" * 64, True, 0, plan.checkpoint.revision)
    )
    staging = root / "staging"
    keys, low = graph_steps.component_weights(source, plan.components)
    graph_steps.write_base_store(source, keys, staging)
    graph_steps.write_quantised_store(source, low, staging)
    (staging / "preprocess").mkdir()
    plan.settings.save(staging / "preprocess" / "preprocessor_config.json")
    (staging / "preprocess" / "tokenizer.model").write_bytes(plan.tokenizer.files["tokenizer.model"])
    records, promised = {}, {}
    for c in plan.components:
        promised[c], specs = graph_steps.write_split_graph(
            source, c, staging, "fp32", "onnxruntime", request.param
        )
        data = {"parts": [spec.to_json() for spec in specs]}
        records[f"graph-{c}"] = Record("0" * 64, {}, 0.0, data)
    manifest = manifest_of(plan, records, ())
    for whole in manifest.components.values():
        for piece in (whole, *whole.parts):
            del piece.graphs["bf16"]
    return Split(request.param, seal(staging, manifest, root / "out"), source, promised)


def inputs(spec: ComponentSpec, rows: int, length: int) -> dict[str, Any]:
    """Feeds of ``rows`` rows; texts of ``length`` tokens, a past of five positions, its first one hidden."""
    rng = np.random.default_rng(rows + length)
    sizes = {"batch": rows, "text": length, "past": QUERIES + 5, "total": QUERIES + 5 + length}

    def values(tensor: TensorSpec) -> Any:
        shape = [d if isinstance(d, int) else max(sizes[d], spec.axis(d).min) for d in tensor.shape]
        if tensor.dtype == "float":
            return rng.standard_normal(shape).astype(np.float32)
        if tensor.name == "attention_mask":
            mask = np.ones(shape, np.int64)
            mask[:, 0] = 0
            return mask
        return rng.integers(1, length + 1 if tensor.name == "lengths" else 60, shape)

    feeds = {t.name: values(t) for t in spec.inputs}
    if "attention_mask" in feeds:
        past = feeds["past_key.0"].shape[2]
        feeds["attention_mask"] = np.ones((rows, past + length), np.int64)
        feeds["attention_mask"][:, 1] = 0
    return feeds


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_chain_equals_the_whole(split: Split, component: str) -> None:
    spec = split.bundle.spec(component)
    whole = Components(Bundle(split.bundle.root, split.whole), "onnxruntime", threads=1)
    chain = Components(split.bundle, "onnxruntime", threads=1)
    for rows, length in ((1, 1), (3, 6)):
        feeds = inputs(spec, rows, length)
        want, got = whole.run(component, feeds), chain.run(component, feeds)
        assert list(got) == list(want) == [t.name for t in spec.outputs]
        for name in want:
            assert got[name].shape == want[name].shape
            np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6 * abs(want[name]).max())
    first = spec.outputs[0].name
    assert list(chain.run(component, feeds, [first])) == [first]
    with pytest.raises(UsageError, match=r"no output 'hidden\.1'"):
        chain.run(component, feeds, ["hidden.1"])
    with pytest.raises(InputError, match=f"Component {component}"):
        chain.open(component).run({})
    whole.close()
    chain.close()
    with pytest.raises(InputError, match="closed"):
        chain.run(component, feeds)


def test_the_runtime_runs_a_split_bundle(split: Split) -> None:
    opened = Bundle.open(split.bundle.root, verify="hash")
    assert opened.manifest == split.bundle.manifest
    assert [e.part for e in opened.engines("vision", "onnxruntime")] == list(range(split.count))
    pixels = inputs(opened.spec("vision"), 2, 1)["pixel_values"]
    texts = ["a red circle", "a blue square left of a green triangle"]
    whole = Bundle(opened.root, split.whole)
    with (
        InternVL(opened, Components(opened, "onnxruntime")) as chain,
        InternVL(whole, Components(whole, "onnxruntime")) as one,
    ):
        for mode in MODES:
            got, want = chain.encode_image(pixels, mode), one.encode_image(pixels, mode)
            np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(chain.encode_text(texts), one.encode_text(texts), atol=1e-5)
        captions = chain.caption(pixels, num_beams=2, max_new_tokens=8)
        assert captions == one.caption(pixels, num_beams=2, max_new_tokens=8)
        assert chain.caption(pixels, max_new_tokens=8) == one.caption(pixels, max_new_tokens=8)


def test_layers_of_all_parts_are_timed(split: Split) -> None:
    whole = Bundle(split.bundle.root, split.whole)
    one, all_parts = (profile_layers(b, "vision", "onnxruntime", 1, 2, 1) for b in (whole, split.bundle))
    assert set(all_parts.by(lambda layer: layer.block)) == set(one.by(lambda layer: layer.block))
    products = {layer.name for layer in one.layers if layer.name.endswith((".qkv", ".fc1", ".fc2"))}
    assert products
    assert products <= {layer.name for layer in all_parts.layers}
    starts = [event.start_us for event in all_parts.trace]
    assert starts == sorted(starts)
    assert starts[0] < 0.5e3 * all_parts.call_ms < starts[-1]


def test_each_weight_of_a_block_is_in_one_part(split: Split) -> None:
    import onnx_ir as ir

    for component, whole in split.bundle.manifest.components.items():
        contents = [
            set(ir.load(split.bundle.root / p.graphs["fp32"]).graph.initializers) for p in whole.parts
        ]
        blocks = [{name for name in names if ".layers." in name} for names in contents]
        assert len(whole.parts) == split.count
        assert all(blocks)
        assert sum(map(len, blocks)) == len(set().union(*blocks)), component
    parts = split.bundle.manifest.components["qllama_step"].parts
    layers = [{t.name for t in p.spec.inputs if t.name.startswith("past_key.")} for p in parts]
    assert sum(map(len, layers)) == len(set().union(*layers)), "a past goes to one part"


def test_parts_are_proven_together(split: Split, tmp_path: Path) -> None:
    root, component = split.bundle.root, "qllama_query"
    pieces = split.bundle.manifest.components[component].parts
    plain = merge_reports([read_onnxruntime(root / piece.graphs["fp32"]) for piece in pieces])
    assert {g.node for g in plain.gemms} >= set(split.promised[component])
    pytest.importorskip("tensorrt_rtx")
    shutil.copytree(root / "onnx" / "weights", tmp_path / "onnx" / "weights")
    promised, specs = graph_steps.write_split_graph(
        split.source, component, tmp_path, "bf16", "tensorrt", split.count
    )
    assert specs == [piece.spec for piece in pieces], "both variants are cut alike"
    reports = []
    for spec in specs:
        graph, engine = tmp_path / graph_path(spec.name, "bf16"), tmp_path / f"{spec.name}.engine"
        assert build_engine(graph, spec, engine).component == spec.name
        reports.append(read_rtx(engine, graph))
    check_expectations(merge_reports(reports), promised)
    assert sum(g.precision == "fp8xfp8" for g in merge_reports(reports).gemms) == len(promised) > 0
    with pytest.raises(BuildError, match="the graph has no such matrix product"):
        check_expectations(merge_reports(reports[:-1]), promised)


def test_more_parts_than_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Component vision cannot be split into 6 parts") as caught:
        plan_build(BuildConfig(tmp_path / "out", split=6, components=("vision",), calib_samples=4))
    assert caught.value.fix == "Give -O split a number from 1 to 5."
    checkpoint = plan_build(BuildConfig(tmp_path / "out", calib_samples=4)).checkpoint
    model = export_component("vision", checkpoint, "fp32")
    for count in (0, 6):
        with pytest.raises(UsageError, match="It has 5 blocks"):
            split_graph(model, component_spec("vision", checkpoint.config), BLOCKS, count)


def test_a_second_stream_between_blocks_is_refused(tmp_path: Path) -> None:
    """A block that reads an inner value of the one before cannot be cut off from it."""
    checkpoint = plan_build(BuildConfig(tmp_path / "out", calib_samples=4)).checkpoint
    model = export_component("vision", checkpoint, "fp32")
    norms = [n for n in model.graph if n.op_type == "RMSNormalization"]
    inner = next(n for n in norms if n.inputs[1].name == "vision_model.encoder.layers.0.norm2.weight")  # type: ignore[union-attr]
    later = next(n for n in norms if n.inputs[1].name == "vision_model.encoder.layers.4.norm1.weight")  # type: ignore[union-attr]
    later.replace_input_with(0, inner.outputs[0])
    with pytest.raises(BuildError, match="cannot be split") as caught:
        split_graph(model, component_spec("vision", checkpoint.config), BLOCKS, 5)
    assert caught.value.why.startswith("2 values go")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d["components"]["vision"]["parts"].pop(), "parts"),
        (lambda d: d["components"]["vision"]["parts"].reverse(), "parts"),
        (lambda d: d["components"]["vision"]["parts"][1].update(parts=[]), "parts"),
        (lambda d: d["components"]["vision"]["parts"][0]["graphs"].update(fp32="onnx/x.onnx"), "onnx/x.onnx"),
        (lambda d: d["components"]["vision"]["parts"][0]["spec"].update(outputs=[]), "nothing before gives"),
        (lambda d: d["engines"].pop(), "engines"),
        (lambda d: d["engines"][0].update(part=7), "engines"),
    ],
)
def test_a_chain_that_cannot_run_is_refused(split: Split, change: Any, where: str) -> None:
    data = split.bundle.manifest.to_json()
    assert manifest_from_json(data) == split.bundle.manifest
    change(data)
    with pytest.raises(IntegrityError, match=where):
        manifest_from_json(data)


def test_unsplit_manifests_say_nothing_of_parts(split: Split) -> None:
    data = split.whole.to_json()
    assert "parts" not in data["components"]["vision"]
    assert "part" in split.bundle.manifest.to_json()["engines"][0]
    assert graph_path("vision.0", "fp32").as_posix() in split.bundle.manifest.files
