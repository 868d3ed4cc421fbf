"""Steps that measure what accuracy was lost, of the components and on the tasks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..bundle.manifest import Component, FileEntry, Manifest
from ..calibration.recording import recorded_bytes
from ..export.components import component_spec
from ..quantization.algorithms import depends_on_type
from ..quantization.recipe import load_recipe, plan_layers
from ..quantization.schemes import folded_layers
from . import evaluate, graphs
from .graphs import Source, graph_path, source
from .job import Job
from .manifest import manifest_of
from .step import Made, Step, after, model_of, write_receipt
from .workspace import Workspace

COMPARED = ("fp8", "int8")
"""Recipes whose task accuracy is shown beside fp32, bf16 and what is built."""


def accuracy_step(job: Job, before: list[Step]) -> Step:
    """Every component against fp32, on held-out samples."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        receipt = evaluate.component_receipt(job, source(job, space.root), space, advanced)
        return [write_receipt(space, "accuracy", receipt.to_json())], {}

    inputs = {"held_out": job.held_out.hash, **after(before)}
    writes = recorded_bytes(job.checkpoint.whole, job.components, len(job.held_out))
    return Step("accuracy", inputs, run, evaluate.receipt_units(job), writes, "samples x blocks")


def tasks_step(job: Job, preprocess: Step, before: list[Step]) -> Step:
    """Task accuracy in fp32, bf16, FP8, INT8 and in what is built, all on the same questions."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        model, made = {**model_of(job), **after([preprocess])}, source(job, space.root)
        torch_scores = partial(evaluate.evaluate_torch, job)
        scores = {"fp32": evaluate.cached([model, "fp32"], partial(torch_scores, "float32"))}
        advanced(1)
        scores["bf16"] = evaluate.cached([model, "bf16"], partial(torch_scores, "bfloat16"))
        if not job.recipe.quantises:
            # ONNX Runtime computes these graphs in fp32: torch shows what 16-bit arithmetic costs.
            base = job.recipe.base
            run_base = partial(torch_scores, graphs.DTYPES[base])
            scores[job.recipe.name] = evaluate.cached([model, base], run_base)
        for done, other in enumerate(_compared(job, made), 2):
            advanced(done)
            scores[other.recipe.name] = scores_of(job, other, space, preprocess)
        return [write_receipt(space, "tasks", {"scores": scores, "sizes": evaluate.sizes(job)})], {}

    return Step("tasks", {"sizes": evaluate.sizes(job), **after([preprocess, *before])}, run, 5)


def scores_of(job: Job, made: Source, space: Workspace, preprocess: Step) -> dict[str, Any]:
    """Task scores of the graphs of ``made``, computed once for all builds."""
    rules = {k: v for k, v in made.recipe.to_json().items() if k != "summary"}
    model = {**model_of(job), **after([preprocess])}
    key = [model, rules, asdict(made.scales) if made.scales else None]
    return evaluate.cached(key, partial(_graph_scores, job, made, space))


def graph_manifest(job: Job, manifest: Manifest, root: Path) -> Manifest:
    """``manifest`` with the files that are in ``root``, unhashed: enough to run them from there."""
    files = {
        p.relative_to(root).as_posix(): FileEntry("", p.stat().st_size)
        for p in root.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    components = {
        c: Component(component_spec(c, job.checkpoint.whole), {"fp32": graph_path(c, "fp32").as_posix()})
        for c in job.components
    }
    return replace(manifest, components=components, engines=(), files=files)


def _compared(job: Job, made: Source) -> list[Source]:
    """What is built, if it is quantised, and the other quantised recipes on the same scales."""
    if not job.recipe.quantises:
        return []
    if folded_layers(job.plan.schemes):
        return [made]  # the others would run on folded weights too
    if made.scales is None or depends_on_type(made.scales.algorithm):
        return [made]  # the others need ranges that were not measured
    recipes = [load_recipe(n) for n in COMPARED if n != job.recipe.name]
    return [made, *(replace(made, recipe=r, plan=plan_layers(r, job.linear_shapes)) for r in recipes)]


def _graph_scores(job: Job, made: Source, space: Workspace) -> dict[str, Any]:
    blank = manifest_of(job, {}, ())
    if made.recipe == job.recipe:
        return evaluate.evaluate_engines(space.root, graph_manifest(job, blank, space.root))
    with tempfile.TemporaryDirectory(dir=space.home) as folder:
        root = Path(folder)
        keys, layers = graphs.component_weights(made, job.components)
        graphs.write_base_store(made, keys, root)
        graphs.write_quantised_store(made, layers, root)
        for component in job.components:
            graphs.write_graph(made, component, root, "fp32", "onnxruntime")
        shutil.copytree(space.root / "preprocess", root / "preprocess")
        return evaluate.evaluate_engines(root, graph_manifest(job, blank, root))
