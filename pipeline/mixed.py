"""``--precision mixed``: the steps that search the fastest recipe within an accuracy budget."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from ..calibration.accuracy import BUDGETS
from ..calibration.search import Group, Option, as_recipe, search
from ..calibration.sensitivity import Loss, Sensitivity
from ..engines.targets import parse_targets
from ..errors import CapabilityError, UsageError
from ..files.strict_json import read_json
from ..quantization.ranges import Scales
from ..quantization.recipe import Recipe, plan_layers
from ..quantization.schemes import element_types
from . import evaluate, graphs
from .accuracy_steps import scores_of
from .calibration_steps import calibrate_step, finite_step, preprocess_step
from .graphs import SCALES, Source
from .job import Job
from .request import MIXED, Request
from .sensitivity import RECEIPT, sensitivity_step
from .step import Made, Step, after, model_of, run_step, write_receipt
from .workspace import Reporter, Workspace

CANDIDATES = ("fp8", "int8", "int8-weight", "int4-weight")
"""Schemes that a search chooses from, less those that a target lacks a type for."""
_JOINED = re.compile(r"(.*\.)(self_attn\.[qkv]|cross_attn\.[kv]|mlp\.(?:gate|up))_proj")
"""Layers that share their input: a builder joins their products where they have one scheme."""


def mixed_job(request: Request, reporter: Reporter, progress: Callable[[int, int], None]) -> Job:
    """The job of ``request``, whose recipe is searched first; what was searched before is not again.

    Raises:
        UsageError: an option that a search cannot take.
        CapabilityError: no published peaks for the target's GPU.
    """
    if request.scales is not None or request.algorithm not in (None, "max"):
        raise UsageError(
            f"--precision {MIXED} measures ranges itself, with max.",
            "Its recipe is not known when they are measured.",
            "Leave --scales and --algorithm out.",
        )
    first = Job(replace(request, precision="int8"), progress)  # a recipe that all targets run
    with Workspace(request.out, reporter) as space:
        for step in (finite_step(first), *search_steps(first)):
            run_step(space, step)
        found = Recipe.from_json(read_json(space.root / "receipts" / f"{MIXED}.json")["recipe"])
    return Job(request, progress, found)


def search_steps(job: Job) -> list[Step]:
    """Ranges, what each layer loses, the search: the same for the job that searches and that which builds."""
    preprocess = preprocess_step(job)
    calibrate = calibrate_step(job, [preprocess])
    losses = sensitivity_step(job, candidates(job), [preprocess, calibrate])
    return [preprocess, calibrate, losses, _search_step(job, preprocess, [calibrate, losses])]


def candidates(job: Job) -> tuple[str, ...]:
    """Schemes that every target of ``job`` has the types for."""
    missing = {kind for target in parse_targets(job.request.targets) for kind in target.missing}
    return tuple(s for s in CANDIDATES if not element_types("bf16", frozenset({s})) & missing)


def _search_step(job: Job, preprocess: Step, before: list[Step]) -> Step:
    from ..profiles.cost.layer_costs import gpu_of

    gpu = gpu_of(job.targets[0])
    if gpu is None:
        raise CapabilityError(
            f"No GPU of {job.targets[0]} is in the table of peaks.",
            "A search weighs accuracy against modelled time.",
            "Give another --targets first, or name a recipe.",
        )
    tasks = bool(job.evaluation) and set(job.components) >= set(job.checkpoint.components)
    budget = BUDGETS[MIXED] if job.request.budget is None else job.request.budget

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        scales = Scales.load(space.root / SCALES)
        found = Sensitivity.from_json(read_json(space.root / RECEIPT))
        measured = 0

        def lost(schemes: dict[str, str]) -> float:
            nonlocal measured
            recipe = as_recipe(MIXED, schemes, list(job.linear_shapes), job.recipe.base, "")
            made = Source(job.checkpoint, recipe, plan_layers(recipe, job.linear_shapes), scales)
            loss = (_task_loss if tasks else _cosine_loss)(job, made, space, preprocess)
            measured += 1
            advanced(measured)
            return loss

        result = search(_groups(job, found), job.recipe.base, budget, lost)
        unit = "points of task accuracy" if tasks else "points of cosine"
        summary = f"Searched: at most {budget:g} {unit} lost, modelled on {gpu.title}."
        recipe = as_recipe(MIXED, result.schemes, list(job.linear_shapes), job.recipe.base, summary)
        receipt = {
            "recipe": recipe.to_json(),
            "budget": budget,
            "unit": unit,
            "gpu": gpu.name,
            "speedup": result.base_ms / result.ms,
            **result.to_json(),
        }
        return [write_receipt(space, MIXED, receipt)], {"measured": measured}

    inputs = {"budget": budget, "gpu": asdict(gpu), "tasks": tasks and evaluate.sizes(job), **model_of(job)}
    return Step("search", {**inputs, **after([preprocess, *before])}, run, unit="recipes measured")


def _groups(job: Job, found: Sensitivity) -> list[Group]:
    """Groups of layers with what they cost and lose; layers outside the blocks keep the base type."""
    from ..profiles.cost.layer_costs import gpu_of, layer_times

    gpu, base, worst = gpu_of(job.targets[0]), job.recipe.base, found.worst()
    assert gpu is not None
    fit = candidates(job)
    times = layer_times(job.checkpoint.whole, job.components, fit, base, gpu)
    members: dict[str, list[str]] = {}
    for layer in dict.fromkeys(layer for layer, scheme in worst if scheme in fit):
        match = _JOINED.fullmatch(layer)
        members.setdefault(f"{match[1]}{match[2][:5]}" if match else layer, []).append(layer)
    return [_group(layers, fit, base, times, worst) for layers in members.values()]


def _group(
    layers: list[str],
    schemes: Sequence[str],
    base: str,
    times: Mapping[str, Mapping[str, float]],
    worst: Mapping[tuple[str, str], Loss],
) -> Group:
    options = [Option(base, sum(times[layer][base] for layer in layers), 0.0)]
    for scheme in schemes:
        losses = [worst[layer, scheme] for layer in layers if (layer, scheme) in worst]
        if len(losses) == len(layers):
            ms = sum(times[layer][scheme] for layer in layers)
            options.append(Option(scheme, ms, sum(loss.noise for loss in losses)))
    return Group(tuple(layers), tuple(options))


def _task_loss(job: Job, made: Source, space: Workspace, preprocess: Step) -> float:
    """The most percentage points lost on a task, on the questions that the build is held to."""
    model = {**model_of(job), **after([preprocess])}
    torch_scores = partial(evaluate.evaluate_torch, job, "float32")
    full = evaluate.headlines(evaluate.cached([model, "fp32"], torch_scores))
    got = evaluate.headlines(scores_of(job, made, space, preprocess))
    return max(round(100 * (full[task] - got[task]), 6) for task in full)


def _cosine_loss(job: Job, made: Source, space: Workspace, _: Step) -> float:
    """100 (1 - cosine) of the worst output of any component, simulated block by block on held-out samples."""
    from ..calibration.simulate import Quantised, simulated_accuracy

    with tempfile.TemporaryDirectory(dir=space.home, prefix="search-") as name:
        root = Path(name)
        keys, layers = graphs.component_weights(made, job.components)
        stores = [root / p for p in graphs.write_base_store(made, keys, root)]
        stores += [root / p for p in graphs.write_quantised_store(made, layers, root)]
        quantised = Quantised(stores, made.plan.quantised, made.recipe.base, made.scales)
        found = simulated_accuracy(
            job.checkpoint, job.components, quantised, job.held_out, job.settings, job.tokenizer, root
        )
    tables = found.chained or found.teacher_forced
    return max(100 * (1 - m.cosine) for outputs in tables.values() for m in outputs.values())
