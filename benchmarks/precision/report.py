"""Measures the cost of every precision, and writes docs/precision.md.

internvl-nano is built under every shipped recipe and under a searched one, and under every way to pick INT8
and FP8 ranges; a block of InternViT-6B's width is given outliers. The measurements go to a receipt, with
machine, versions and commit; the document is written from the receipt.

    python -m ivl_export.benchmarks.precision.report            # everything: some ten minutes on one core
    python -m ivl_export.benchmarks.precision.report --document # the document only
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ivl_export.benchmarks.precision.document import DOCUMENT, RECEIPT, render
from ivl_export.benchmarks.precision.outliers import measure
from ivl_export.errors import UsageError
from ivl_export.files.write import write_text
from ivl_export.models.config import InternVLConfig
from ivl_export.pipeline.accuracy_steps import headlines
from ivl_export.pipeline.config import MIXED, ORT, BuildConfig
from ivl_export.pipeline.run import build, open_plan
from ivl_export.profiles.cost.estimate import estimate
from ivl_export.profiles.cost.gpus import find_gpu
from ivl_export.profiles.cost.sizes import plan_of
from ivl_export.profiles.measure.machine import commit, machine, versions
from ivl_export.progress import Silent
from ivl_export.quantization.recipe import Recipe, shipped_recipes

SCHEMA = "ivl-export.precision/1"
GPU = "l40s"
BATCH = 8
BUDGET = 0.3
ALGORITHMS = ("max", "percentile", "entropy", "mse")
OUTPUTS = {
    "vision": "image_embed",
    "qllama_query": "query_embed",
    "qllama_text": "text_embed",
    "qllama_step": "logits",
}
"""The output of each component that is public."""


def built(work: Path, precision: str, algorithm: str | None = None) -> dict[str, Any]:
    """nano in one precision: size, task accuracy, SQNR, modelled speed."""
    name = f"{precision}-{algorithm}" if algorithm else precision
    config = BuildConfig(
        work / name,
        precision=precision,
        algorithm=algorithm,
        backend=(ORT,),
        allow_accuracy_loss=True,
        budget=BUDGET if precision == MIXED else None,
    )
    plan = open_plan(config, Silent())
    bundle = build(plan, Silent()).bundle
    scores, accuracy = bundle.receipt("tasks")["scores"], bundle.receipt("accuracy")
    stores = (bundle.root / "onnx" / "weights").glob("*.safetensors")
    nano = plan.checkpoint.config
    return {
        "recipe": plan.recipe.name,
        "algorithm": plan.algorithm if plan.layers.rounded else "",
        "weight_bytes": sum(path.stat().st_size for path in stores),
        "tasks": headlines(scores[plan.recipe.name]),
        "reference": headlines(scores["fp32"]),
        "questions": scores["fp32"]["settings"],
        "sqnr_db": {c: accuracy["chained"][c][output]["sqnr_db"] for c, output in OUTPUTS.items()},
        "images_per_s": speed(plan.recipe, nano),
        "images_per_s_14b": None if precision == MIXED else speed(plan.recipe, InternVLConfig()),
        **({"search": bundle.receipt(MIXED)} if precision == MIXED else {}),
    }


def speed(recipe: Recipe, config: InternVLConfig) -> float:
    """Modelled images a second, InternVL-G, on :data:`GPU`."""
    layers = plan_of(recipe, config)
    return estimate(config, recipe, layers, find_gpu(GPU), [BATCH]).points[0].images_g_per_s


def outliers() -> dict[str, Any]:
    """The block with massive channels."""
    with tempfile.TemporaryDirectory(prefix="ivl-outliers-") as folder:
        return measure(Path(folder))


def measured(work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything the document shows."""
    recipes, algorithms = [], []
    for name in (*shipped_recipes(), MIXED):
        say(f"recipe {name}")
        recipes.append(built(work, name))
    for scheme in ("int8", "fp8"):
        for algorithm in ALGORITHMS:
            say(f"{scheme}, {algorithm}")
            algorithms.append(built(work, scheme, algorithm))
    say("outliers")
    return {
        "schema": SCHEMA,
        "machine": asdict(machine()),
        "versions": versions(),
        "commit": commit(),
        "gpu": asdict(find_gpu(GPU)),
        "batch": BATCH,
        "recipes": recipes,
        "algorithms": algorithms,
        "outliers": outliers(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure every precision, and write docs/precision.md.")
    parser.add_argument("--work", type=Path, help="where bundles are built and kept; else a temporary folder")
    parser.add_argument("--document", action="store_true", help="only write the document, from the receipt")
    parser.add_argument("--check", action="store_true", help="only say whether it is stale (exit code 1)")
    args = parser.parse_args(argv)
    if not (args.document or args.check):
        started = time.perf_counter()

        def say(what: str) -> None:
            print(f"{time.perf_counter() - started:7.1f} s  {what}", file=sys.stderr, flush=True)

        with tempfile.TemporaryDirectory(prefix="ivl-precision-") as folder:
            receipt = measured(args.work or Path(folder), say)
        write_text(json.dumps(receipt, indent=1) + "\n", RECEIPT)
    if not RECEIPT.is_file():
        raise UsageError(f"{RECEIPT} is not there.", fix="Run this without --document first.")
    old = DOCUMENT.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        return int(old != new)
    write_text(new, DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
