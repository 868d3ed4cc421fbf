"""The steps of :mod:`.report` that no verb does alone; each prints JSON.

python -m ivl_export.benchmarks.fullsize.tool quantise MODEL OUT vision
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ivl_export.benchmarks.fullsize.measured import anonymous
from ivl_export.pipeline.graph_steps import (
    GraphSource,
    component_weights,
    graph_path,
    write_base_store,
    write_graph,
    write_quantised_store,
)

RANGES = "ranges.json"
SAMPLES = 4
SET, DEVICES = 512, 20
"""Cases of the estimated time of a whole calibration: samples, and devices as fast as this one."""

RECIPE = "fp8"


def source(model: Path, name: str = RECIPE) -> GraphSource:
    """The checkpoint with the plan of the recipe ``name``, without ranges."""
    from torch import nn

    from ivl_export.models.checkpoint import open_checkpoint
    from ivl_export.models.load import meta_model
    from ivl_export.quantization.recipe import load_recipe, plan_layers

    checkpoint, recipe = open_checkpoint(model), load_recipe(name)
    modules = meta_model(checkpoint).named_modules()
    shapes = {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, nn.Linear)}
    return GraphSource(checkpoint, recipe, plan_layers(recipe, shapes), None)


def quantise(model: Path, out: Path, components: Sequence[str], recipe: str = RECIPE) -> dict[str, Any]:
    """Every weight that ``components`` need, in one pass: 8-bit values and scales, and what stays in bf16."""
    graphs_of = source(model, recipe)
    keys, layers = component_weights(graphs_of, components)
    write_quantised_store(graphs_of, layers, out)
    write_base_store(graphs_of, keys, out)
    return {"layers": len(layers), "kept": len(keys)}


def plain(model: Path, out: Path, components: Sequence[str], mapped: bool = False) -> dict[str, Any]:
    """The usual route: ``torch.onnx.export`` of the modules with their weights, saved as external data.

    With ``mapped`` parameters stay views of the mapped checkpoint, which is not anonymous memory; else they
    are read into memory first, as scripts do that load a model and then export it.
    """
    import torch

    from ivl_export.export.trace import OPSET, example_inputs
    from ivl_export.models.checkpoint import load_state, open_checkpoint
    from ivl_export.models.registry import component_module, component_spec

    checkpoint = open_checkpoint(model)
    out.mkdir(parents=True)
    for name in components:
        with torch.device("meta"):
            module = component_module(name, checkpoint.model)
        load_state(module, checkpoint, torch.bfloat16)
        if not mapped:
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
        args, shapes = example_inputs(component_spec(name, checkpoint.model))
        with torch.no_grad(), redirect_stdout(sys.stderr):
            program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
            assert exported is not None, "it returns None only where it falls back to a file"
            exported.save(out / f"{name}.onnx", external_data=True)
    return {"components": list(components)}


def calibrate(model: Path, out: Path, components: Sequence[str]) -> dict[str, Any]:
    """Scales from a few drawn images (their values do not matter here), and the time of one sample."""
    from ivl_export.calibration.calibrate import SegmentTime, calibration_seconds, seconds_per_block
    from ivl_export.calibration.calibrate import calibrate as measure
    from ivl_export.calibration.sources import scenes_calibration
    from ivl_export.inputs.preprocess import ImageSettings
    from ivl_export.inputs.tokenizer import SentencePieceTokenizer
    from ivl_export.models.checkpoint import open_checkpoint
    from ivl_export.models.config import InternVLConfig

    out.mkdir(parents=True, exist_ok=True)
    settings = ImageSettings.load(model / "preprocessor_config.json")
    tokenizer = SentencePieceTokenizer(model / "tokenizer.model")
    times: list[SegmentTime] = []
    chosen = scenes_calibration(SAMPLES)
    ranges = measure(
        open_checkpoint(model),
        components,
        chosen,
        settings,
        tokenizer,
        batch_size=SAMPLES,
        folder=out / "calibration",
        timed=times.append,
    )
    ranges.save(out / RANGES)
    per_block = seconds_per_block(times)
    full = calibration_seconds(InternVLConfig(), per_block, SET, DEVICES)
    return {
        "samples": SAMPLES,
        "seconds_per_sample_and_block": per_block,
        "estimate": {"samples": SET, "devices": DEVICES, "seconds": full},
    }


def graphs(model: Path, out: Path, components: Sequence[str]) -> dict[str, Any]:
    """The stores, and the FP8 graphs with the ranges that :func:`calibrate` left in ``out``."""
    from ivl_export.quantization.ranges import ActivationRanges

    ranged = replace(source(model), ranges=ActivationRanges.load(out / RANGES))
    quantise(model, out, components)
    promised = {c: len(write_graph(ranged, c, out, ranged.recipe.base, "tensorrt")) for c in components}
    return {"promised": promised}


def engine(model: Path, out: Path, components: Sequence[str]) -> dict[str, Any]:
    """TensorRT-RTX engines for SM89 of what :func:`graphs` wrote, held to the graphs' promise."""
    from collections import Counter

    import onnx_ir as ir

    from ivl_export.engines.tensorrt.build import build_engine
    from ivl_export.models.registry import component_spec
    from ivl_export.quantization.qdq import quantised_gemms
    from ivl_export.verify.expectations import check_expectations
    from ivl_export.verify.rtx import read_rtx

    graphs_of = source(model)
    facts: dict[str, Any] = {}
    for name in components:
        graph, path = out / graph_path(name, graphs_of.recipe.base), out / f"{name}.engine"
        before = anonymous(os.getpid())
        record = build_engine(graph, component_spec(name, graphs_of.checkpoint.config), path, target="sm89")
        proof = read_rtx(path, graph)
        promised = quantised_gemms(ir.load(graph))
        check_expectations(proof, promised)
        kinds = Counter(gemm.precision for gemm in proof.gemms)
        facts[name] = {
            "record": record.to_json(),
            "anonymous_before": before,
            "promised": len(promised),
            "products": dict(kinds),
            "fused_attention": proof.fused_attention,
        }
    return facts


STEPS: dict[str, Callable[[Path, Path, Sequence[str]], dict[str, Any]]] = {
    "plain": plain,
    "plain-mapped": partial(plain, mapped=True),
    "quantise": quantise,
    "quantise-int8": partial(quantise, recipe="int8"),
    "calibrate": calibrate,
    "graphs": graphs,
    "engine": engine,
}


def main(argv: Sequence[str]) -> int:
    """``cli ARGUMENTS`` is the ``ivl-export`` command; else ``STEP MODEL OUT COMPONENTS``."""
    if argv[0] == "cli":
        from ivl_export.cli import main as command

        return command(argv[1:])
    step, model, out, components = argv
    print(json.dumps(STEPS[step](Path(model), Path(out), components.split(","))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
