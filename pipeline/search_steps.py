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
from ..files.json import read_json
from ..progress import Progress
from ..quantization.ranges import ActivationRanges
from ..quantization.recipe import Recipe, plan_layers
from ..quantization.schemes import element_types
from .accuracy_steps import cached, evaluate_torch, headlines, question_counts, scores_of
from .calibration_steps import calibrate_step, finite_step, preprocess_step
from .config import MIXED, BuildConfig
from .graph_steps import (
    RANGES,
    GraphSource,
    component_weights,
    write_base_store,
    write_quantised_store,
)
from .plan import BuildPlan, plan_build
from .sensitivity_steps import RECEIPT, sensitivity_step
from .workspace import Step, StepResult, Workspace, after, run_step, write_receipt

CANDIDATES = ("fp8", "int8", "int8-weight", "int4-weight")
"""Schemes that a search chooses from, less those that a target lacks a type for."""
RecipeLoss = Callable[[BuildPlan, GraphSource, Workspace, Step], float]
"""Loss of a recipe in points: of a plan, the graphs of the recipe, the workspace and preprocessing."""
_JOINED = re.compile(r"(.*\.)(self_attn\.[qkv]|cross_attn\.[kv]|mlp\.(?:gate|up))_proj")
"""Layers that share their input: a builder joins their products where they have one scheme."""


def plan_mixed(config: BuildConfig, progress: Progress, loss: RecipeLoss | None = None) -> BuildPlan:
    """The plan of ``config``, whose recipe is searched first; a finished search is not repeated.

    Args:
        config: the build.
        progress: receives the steps.
        loss: measures the loss of a recipe, in points; None: of task accuracy, or of cosine without tasks.

    Raises:
        UsageError: an option that a search cannot take.
        CapabilityError: no published peaks for the target's GPU.
    """
    if config.ranges is not None or config.algorithm not in (None, "max"):
        raise UsageError(
            f"--precision {MIXED} measures ranges itself, with max.",
            "Its recipe is not known when they are measured.",
            "Leave --ranges and -O algorithm out.",
        )
    first = plan_build(replace(config, precision="int8"), progress.advanced)  # a recipe that all targets run
    with Workspace(config.out, progress) as space:
        for step in (finite_step(first), *search_steps(first, loss)):
            run_step(space, step)
        recipe = Recipe.from_json(read_json(space.staging_dir / "receipts" / f"{MIXED}.json")["recipe"])
    return plan_build(config, progress.advanced, recipe)


def search_steps(plan: BuildPlan, loss: RecipeLoss | None = None) -> list[Step]:
    """Ranges, losses of each layer, the search: the same in the plan that searches and in the one built."""
    preprocess = preprocess_step(plan)
    calibrate = calibrate_step(plan, [preprocess])
    losses = sensitivity_step(plan, candidates(plan), [preprocess, calibrate])
    return [preprocess, calibrate, losses, _search_step(plan, preprocess, [calibrate, losses], loss)]


def candidates(plan: BuildPlan) -> tuple[str, ...]:
    """Schemes that every target of ``plan`` has the types for."""
    missing = {kind for target in parse_targets(plan.config.targets) for kind in target.missing}
    return tuple(s for s in CANDIDATES if not element_types("bf16", frozenset({s})) & missing)


def _search_step(plan: BuildPlan, preprocess: Step, before: list[Step], loss: RecipeLoss | None) -> Step:
    from ..profiles.cost.layer_costs import gpu_of

    gpu = gpu_of(plan.targets[0])
    if gpu is None:
        raise CapabilityError(
            f"No GPU of {plan.targets[0]} is in the table of peaks.",
            "A search weighs accuracy against modelled time.",
            "Give another --targets first, or name a recipe.",
        )
    tasks = plan.runs_tasks
    measure = loss or (_task_loss if tasks else _cosine_loss)
    budget = BUDGETS[MIXED] if plan.config.budget is None else plan.config.budget

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        ranges = ActivationRanges.load(space.staging_dir / RANGES)
        sensitivity = Sensitivity.from_json(read_json(space.staging_dir / RECEIPT))
        measured = 0

        def lost(schemes: dict[str, str]) -> float:
            nonlocal measured
            recipe = as_recipe(MIXED, schemes, list(plan.linear_shapes), plan.recipe.base, "")
            source = GraphSource(plan.checkpoint, recipe, plan_layers(recipe, plan.linear_shapes), ranges)
            points = measure(plan, source, space, preprocess)
            measured += 1
            advanced(measured)
            return points

        result = search(_groups(plan, sensitivity), plan.recipe.base, budget, lost)
        unit = "points of task accuracy" if tasks else "points of cosine"
        summary = f"Searched: at most {budget:g} {unit} lost, modelled on {gpu.title}."
        recipe = as_recipe(MIXED, result.schemes, list(plan.linear_shapes), plan.recipe.base, summary)
        receipt = {
            "recipe": recipe.to_json(),
            "budget": budget,
            "unit": unit,
            "gpu": gpu.name,
            "speedup": result.base_ms / result.ms,
            **result.to_json(),
        }
        return [write_receipt(space, MIXED, receipt)], {"measured": measured}

    inputs = {"budget": budget, "gpu": asdict(gpu), "tasks": tasks and question_counts(plan), **plan.identity}
    return Step("search", {**inputs, **after([preprocess, *before])}, run, unit="recipes measured")


def _groups(plan: BuildPlan, sensitivity: Sensitivity) -> list[Group]:
    """Groups of layers with their times and losses; layers outside the blocks keep the base type."""
    from ..profiles.cost.layer_costs import gpu_of, layer_times

    gpu, base, worst = gpu_of(plan.targets[0]), plan.recipe.base, sensitivity.worst()
    assert gpu is not None
    fit = candidates(plan)
    times = layer_times(plan.checkpoint.model, plan.components, fit, base, gpu)
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


def _task_loss(plan: BuildPlan, source: GraphSource, space: Workspace, preprocess: Step) -> float:
    """The most percentage points lost on a task, on the questions that the build is held to."""
    model = {**plan.identity, **after([preprocess])}
    torch_scores = partial(evaluate_torch, plan, "fp32")
    full = headlines(cached([model, "fp32"], torch_scores))
    got = headlines(scores_of(plan, source, space, preprocess))
    return max(round(100 * (full[task] - got[task]), 6) for task in full)


def _cosine_loss(plan: BuildPlan, source: GraphSource, space: Workspace, _: Step) -> float:
    """100 (1 - cosine) of the worst output of any component, simulated block by block on held-out samples."""
    from ..calibration.simulate import Quantised, simulated_accuracy

    with tempfile.TemporaryDirectory(dir=space.work_dir, prefix="search-") as name:
        root = Path(name)
        keys, layers = component_weights(source, plan.components)
        stores = [root / p for p in write_base_store(source, keys, root)]
        stores += [root / p for p in write_quantised_store(source, layers, root)]
        quantised = Quantised(stores, source.layers.quantised, source.recipe.base, source.ranges)
        simulated = simulated_accuracy(
            plan.checkpoint, plan.components, quantised, plan.held_out, plan.settings, plan.tokenizer, root
        )
    tables = simulated.chained or simulated.teacher_forced
    return max(100 * (1 - m.cosine) for outputs in tables.values() for m in outputs.values())
