"""The steps of a build, as data: name, what decides the result, and how to make it.

preprocess, smooth (if the recipe does), calibrate, weights, quantise, a graph for each component, an engine
for each component and target, kernels (the proof), accuracy of the components, accuracy on the tasks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..calibration.calibrate import (
    PartTime,
    calibrate,
    calibration_units,
    seconds_per_block,
    spilled_bytes,
)
from ..calibration.recipe import load_recipe, plan
from ..calibration.recording import recorded_bytes
from ..calibration.scales import Scales
from ..calibration.schemes import smoothed_layers
from ..engines.build import build_engine
from ..engines.memory import Load
from ..engines.proof import KernelReport, check_promise, joined, proof_from_engine, proof_from_onnxruntime
from ..export.components import component_spec
from ..manifest import Component, FileEntry, Manifest
from ..models.checkpoint import Checkpoint
from ..specs import ComponentSpec
from . import evaluate, graphs
from .graphs import Source, graph_path
from .manifest import manifest_of, part_specs
from .request import ORT, RTX, Job
from .resources import build_load, stored_bytes
from .workspace import Data, Workspace, step_digest

SCALES = "scales.json"
SMOOTHING = "smoothing.safetensors"
"""What the norms were divided by, where the recipe smooths."""
CALIBRATION_BATCH = 16
MEGABYTE = 10**6
COMPARED = ("fp8", "int8")
"""Recipes whose task accuracy is shown beside fp32, bf16 and what is built."""

Made = tuple[list[str], Data]
"""Files a step made, relative to the staging folder, and what it found out."""


@dataclass(frozen=True)
class Step:
    """One step; ``run(space, advanced)`` makes its files in ``space.root`` and calls ``advanced(done)``.

    ``inputs`` decides the result; ``total`` is what ``advanced`` counts to, in ``unit``; ``writes`` are about
    the bytes of disk it takes, where they are many; ``load`` says what memory an engine takes, as one of
    ``parts`` of its component.
    """

    name: str
    inputs: Data
    run: Callable[[Workspace, Callable[[int], None]], Made]
    total: int | None = None
    writes: int = 0
    unit: str = ""
    load: Load | None = None
    parts: int = 1

    @property
    def digest(self) -> str:
        """Content hash."""
        return step_digest(self.name, self.inputs)


def steps(job: Job) -> list[Step]:
    """All steps of ``job`` in the order they run; a step's inputs hold the hashes of those it reads."""
    preprocess = _preprocess(job)
    found = [preprocess]
    scales: list[Step] = []
    smooth = [_smooth(job, preprocess)] if smoothed_layers(job.plan.schemes) else []
    if job.recipe.quantises:
        scales = [*smooth, _calibrate(job, [preprocess, *smooth])]
    stores = _stores(job, smooth)
    graph_steps = {c: _graph(job, c, [*scales, *stores]) for c in job.components}
    engine_steps = [
        _engine(job, component, part, target, graph_steps[component])
        for component in job.components
        for target in (job.targets if RTX in job.backends else ())
        for part in range(job.parts[component])
    ]
    found += [*scales, *stores, *graph_steps.values(), *engine_steps]
    found.append(_kernels(job, [*graph_steps.values(), *engine_steps]))
    found.append(_accuracy(job, [preprocess, *graph_steps.values()]))
    if job.evaluation and set(job.components) == set(job.checkpoint.components):
        found.append(_tasks(job, preprocess, [*scales, *graph_steps.values()]))
    return found


def source(job: Job, root: Path) -> Source:
    """What the graphs of ``job`` are made from, once calibration is done."""
    scales = Scales.load(root / SCALES) if job.recipe.quantises else None
    return Source(_checkpoint(job, root), job.recipe, job.plan, scales)


def _checkpoint(job: Job, root: Path) -> Checkpoint:
    """The weights that graphs are made from: folded where the recipe smooths."""
    if not smoothed_layers(job.plan.schemes):
        return job.checkpoint
    from safetensors.torch import load_file

    from ..calibration.smooth import fold

    return fold(job.checkpoint, load_file(root / SMOOTHING))


def graph_manifest(job: Job, manifest: Manifest, root: Path) -> Manifest:
    """``manifest`` with the files that are in ``root``, unhashed: enough to run them from there."""
    files = {
        p.relative_to(root).as_posix(): FileEntry("", p.stat().st_size)
        for p in root.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    components = {
        c: Component(component_spec(c, job.checkpoint.config), {"fp32": graph_path(c, "fp32").as_posix()})
        for c in job.components
    }
    return replace(manifest, components=components, engines=(), files=files)


def engine_path(component: str, target: str) -> Path:
    """Where the TensorRT-RTX engine of ``component`` lies in a bundle."""
    return Path("engines") / f"{RTX}-{target}" / f"{component}.engine"


def _preprocess(job: Job) -> Step:
    settings, model = job.settings.to_json(), job.tokenizer.model

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        folder = space.root / "preprocess"
        folder.mkdir(exist_ok=True)
        job.settings.save(folder / "preprocessor_config.json")
        (folder / "tokenizer.model").write_bytes(model)
        return ["preprocess/preprocessor_config.json", "preprocess/tokenizer.model"], {}

    return Step("preprocess", {"settings": settings, "tokenizer": hashlib.sha256(model).hexdigest()}, run)


def _smooth(job: Job, preprocess: Step) -> Step:
    """How much of its input each layer's norm divides away, channel by channel."""
    layers = smoothed_layers(job.plan.schemes)
    given = (job.calibration, job.settings, job.tokenizer)

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        from safetensors.torch import save_file

        from ..calibration.smooth import channel_ranges, factors

        with tempfile.TemporaryDirectory(dir=space.home, prefix="smooth-") as folder:
            ranges = channel_ranges(
                job.checkpoint,
                job.components,
                layers,
                *given,
                Path(folder),
                batch_size=CALIBRATION_BATCH,
                progress=advanced,
            )
        found = factors(job.checkpoint, ranges, layers)
        save_file(found, space.root / SMOOTHING)
        return [SMOOTHING], {"norms": len(found)}

    config, samples = job.checkpoint.config, len(job.calibration)
    return Step(
        "smooth",
        {
            **_model(job),
            "set": job.calibration.hash,
            "components": list(job.components),
            "layers": layers,
            **_after([preprocess]),
        },
        run,
        calibration_units(config, job.components, samples),
        spilled_bytes(config, job.components, samples),
        "samples x blocks",
    )


def _calibrate(job: Job, before: list[Step]) -> Step:
    inputs = {
        **_model(job),
        "set": job.calibration.hash,
        "components": list(job.components),
        **_after(before),
    }

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        times: list[PartTime] = []
        scales = calibrate(
            _checkpoint(job, space.root),
            job.components,
            job.calibration,
            job.settings,
            job.tokenizer,
            batch_size=CALIBRATION_BATCH,
            folder=space.home / "calibrate",
            key=step_digest("calibrate", inputs),
            progress=advanced,
            timed=times.append,
        )
        scales.save(space.root / SCALES)
        layers = sum(len(v) for v in scales.amax.values())
        seconds = seconds_per_block(times)
        return [SCALES], {
            "samples": scales.samples,
            "layers": layers,
            "seconds_per_sample_and_block": seconds,
        }

    config, samples = job.checkpoint.config, len(job.calibration)
    return Step(
        "calibrate",
        inputs,
        run,
        calibration_units(config, job.components, samples),
        spilled_bytes(config, job.components, samples),
        "samples x blocks",
    )


def _stores(job: Job, smooth: list[Step]) -> list[Step]:
    made = Source(job.checkpoint, job.recipe, job.plan, None)
    keys, layers = graphs.component_weights(made, job.components)
    inputs = {**_model(job), "base": job.recipe.base, **(_after(smooth) if smooth else {})}

    def folded(root: Path) -> Source:
        return replace(made, checkpoint=_checkpoint(job, root))

    def base(space: Workspace, advanced: Callable[[int], None]) -> Made:
        files = graphs.write_base_store(
            folded(space.root), keys, space.root, lambda done: advanced(done // MEGABYTE)
        )
        return files, {"tensors": len(keys)}

    def low(space: Workspace, advanced: Callable[[int], None]) -> Made:
        files = graphs.write_quantised_store(folded(space.root), layers, space.root, advanced)
        return files, {"layers": len(layers)}

    kept, quantised = stored_bytes(made, job.components)
    found = [Step("weights", {**inputs, "keys": keys}, base, kept // MEGABYTE, kept, "MB")]
    if layers:
        schemes = {name: job.plan.schemes[name] for name in layers}
        found.append(Step("quantise", {**inputs, "schemes": schemes}, low, len(layers), quantised))
    return found


def _graph(job: Job, component: str, before: list[Step]) -> Step:
    spec = component_spec(component, job.checkpoint.config)

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        made, files = source(job, space.root), []
        promised: dict[str, dict[str, str]] = {}
        pieces: list[ComponentSpec] = []
        for done, (compute, style) in enumerate(made.variants(), 1):
            if count == 1:
                promised[compute] = graphs.write_graph(made, component, space.root, compute, style)
            else:
                promised[compute], pieces = graphs.write_split_graph(
                    made, component, space.root, compute, style, count
                )
            names = [component, *(piece.name for piece in pieces)]
            files += [graph_path(name, compute).as_posix() for name in names]
            advanced(done)
        parts = {"parts": [piece.to_json() for piece in pieces]} if pieces else {}
        return files, {"promised": promised, **parts}

    count = job.parts[component]
    parts = {"parts": count} if count > 1 else {}
    return Step(f"graph-{component}", {"spec": spec.to_json(), **parts, **_after(before)}, run, 2)


def _engine(job: Job, component: str, part: int, target: str, graph: Step) -> Step:
    split = job.parts[component] > 1
    name = f"{component}.{part}" if split else component

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        parts = part_specs(space.records, component)
        spec = parts[part] if split else component_spec(component, job.checkpoint.config)
        out = engine_path(name, target)
        path = space.root / graph_path(name, job.recipe.base)
        record = build_engine(path, spec, space.root / out, backend=RTX, target=target, parts=count)
        return [out.as_posix()], {**record.to_json(), "component": component, "part": part}

    made, count = Source(job.checkpoint, job.recipe, job.plan, None), job.parts[component]
    # An engine carries a copy of the weights it reads.
    size = sum(stored_bytes(made, [component])) // count
    load = build_load(made, component).split(count)
    inputs = {"target": target, **_after([graph])}
    return Step(f"engine-{name}-{target}", inputs, run, writes=size, load=load, parts=count)


def _kernels(job: Job, before: list[Step]) -> Step:
    """The proof: what really runs in 8 bits. A broken promise fails the build."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        proofs: dict[str, dict[str, Any]] = {}
        unread: dict[str, str] = {}
        for component in job.components:
            promised = space.records[f"graph-{component}"].data["promised"]
            pieces = [spec.name for spec in part_specs(space.records, component)] or [component]
            if why := evaluate.no_session(job.checkpoint, [component]):
                unread[component] = why
            else:
                plain = [space.root / graph_path(name, "fp32") for name in pieces]
                report = joined([proof_from_onnxruntime(path) for path in plain])
                # ONNX Runtime has no FP8 kernels on a CPU: there only INT8 is held to its promise.
                int8 = {node: s for node, s in promised["fp32"].items() if s == "int8"}
                if int8:
                    check_promise(report, int8)
                proofs.setdefault(f"{ORT}-cpu", {})[component] = _proof(report, promised["fp32"])
            for target in job.targets if RTX in job.backends else ():
                report = joined([_engine_proof(job, space.root, name, target) for name in pieces])
                check_promise(report, promised[job.recipe.base])
                proofs.setdefault(f"{RTX}-{target}", {})[component] = _proof(
                    report, promised[job.recipe.base]
                )
        return [_receipt(space, "kernels", proofs)], {"unread": unread}

    return Step("kernels", _after(before), run)


def _engine_proof(job: Job, root: Path, name: str, target: str) -> KernelReport:
    return proof_from_engine(root / engine_path(name, target), root / graph_path(name, job.recipe.base))


def _accuracy(job: Job, before: list[Step]) -> Step:
    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        receipt = evaluate.component_receipt(job, source(job, space.root), space, advanced)
        return [_receipt(space, "accuracy", receipt.to_json())], {}

    inputs = {"held_out": job.held_out.hash, **_after(before)}
    writes = recorded_bytes(job.checkpoint.config, job.components, len(job.held_out))
    return Step("accuracy", inputs, run, evaluate.receipt_units(job), writes, "samples x blocks")


def _tasks(job: Job, preprocess: Step, before: list[Step]) -> Step:
    """Task accuracy in fp32, bf16, FP8, INT8 and in what is built, all on the same questions."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        model, made = {**_model(job), **_after([preprocess])}, source(job, space.root)
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
            key = [model, other.recipe.to_json(), asdict(other.scales) if other.scales else None]
            scores[other.recipe.name] = evaluate.cached(key, partial(_graph_scores, job, other, space))
        return [_receipt(space, "tasks", {"scores": scores, "sizes": evaluate.SIZES})], {}

    return Step("tasks", {"sizes": evaluate.SIZES, **_after([preprocess, *before])}, run, 5)


def _compared(job: Job, made: Source) -> list[Source]:
    """What is built, if it is quantised, and the other quantised recipes on the same scales."""
    if not job.recipe.quantises:
        return []
    if smoothed_layers(job.plan.schemes):
        return [made]  # the others would run on folded weights too
    recipes = [load_recipe(n) for n in COMPARED if n != job.recipe.name]
    return [made, *(replace(made, recipe=r, plan=plan(r, job.linear_shapes)) for r in recipes)]


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


def _proof(report: KernelReport, promised: dict[str, str]) -> Data:
    return {"promised": promised, **report.to_json()}


def _receipt(space: Workspace, name: str, data: Any) -> str:
    path = space.root / "receipts" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path.relative_to(space.root).as_posix()


def _model(job: Job) -> Data:
    return {"revision": job.checkpoint.revision}


def _after(before: list[Step]) -> Data:
    return {"after": {step.name: step.digest for step in before}}
