"""The steps of :mod:`.report` that no verb does alone; each prints JSON.

python -m ivl_export.benchmarks.fullsize.tool quantise MODEL OUT vision
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivl_export.pipeline.graphs import (
    Source,
    component_weights,
    graph_path,
    write_base_store,
    write_graph,
    write_quantised_store,
)

SCALES = "scales.json"
SAMPLES = 4
RECIPE = "fp8"


def source(model: Path) -> Source:
    """The checkpoint and what the FP8 recipe makes of it, without scales."""
    from torch import nn

    from ivl_export.calibration.recipe import load_recipe, plan
    from ivl_export.models.checkpoint import open_checkpoint
    from ivl_export.models.load import meta_model

    checkpoint, recipe = open_checkpoint(model), load_recipe(RECIPE)
    modules = meta_model(checkpoint).named_modules()
    shapes = {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, nn.Linear)}
    return Source(checkpoint, recipe, plan(recipe, shapes), None)


def quantise(model: Path, out: Path, components: Sequence[str]) -> dict[str, Any]:
    """Every weight that ``components`` need, in one pass: FP8 values and scales, and what stays in bf16."""
    made = source(model)
    kept, layers = component_weights(made, components)
    write_quantised_store(made, layers, out)
    write_base_store(made, kept, out)
    return {"layers": len(layers), "kept": len(kept)}


def prepare(model: Path, out: Path, components: Sequence[str]) -> dict[str, Any]:
    """Scales from a few drawn images (their values do not matter here), the stores and the FP8 graphs."""
    from ivl_export.calibration.observe import calibrate
    from ivl_export.calibration.sources import scenes_calibration
    from ivl_export.preprocess import ImageSettings, Tokenizer

    made = source(model)
    settings = ImageSettings.load(model / "preprocessor_config.json")
    tokenizer = Tokenizer(model / "tokenizer.model")
    samples = scenes_calibration(SAMPLES)
    scales = calibrate(made.checkpoint, components, samples, settings, tokenizer, batch_size=SAMPLES)
    quantise(model, out, components)
    scales.save(out / SCALES)
    made = replace(made, scales=scales)
    promised = [write_graph(made, c, out, made.recipe.base, "tensorrt") for c in components]
    return {"samples": SAMPLES, "promised": sum(map(len, promised))}


def engine(model: Path, out: Path, components: Sequence[str]) -> dict[str, Any]:
    """TensorRT-RTX engines for SM89 of the graphs that :func:`prepare` wrote, held to the graphs' promise."""
    from collections import Counter

    import onnx_ir as ir

    from ivl_export.calibration.qdq import quantised_gemms
    from ivl_export.engines.build import build_engine
    from ivl_export.engines.proof import check_promise, proof_from_engine
    from ivl_export.export.components import component_spec

    made = source(model)
    found: dict[str, Any] = {}
    for name in components:
        graph, path = out / graph_path(name, made.recipe.base), out / f"{name}.engine"
        record = build_engine(graph, component_spec(name, made.checkpoint.config), path, target="sm89")
        proof = proof_from_engine(path, graph)
        promised = quantised_gemms(ir.load(graph))
        check_promise(proof, promised)
        kinds = Counter(gemm.precision for gemm in proof.gemms)
        found[name] = {
            "build_seconds": record.seconds,
            "engine_bytes": record.size,
            "promised": len(promised),
            "products": dict(kinds),
            "fused_attention": proof.fused_attention,
        }
    return found


STEPS = {"quantise": quantise, "prepare": prepare, "engine": engine}


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
