"""Runs plans: ``build`` (checkpoint in, verified bundle out) and ``calibrate`` (ranges in a file)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle import Bundle, seal
from ..bundle.manifest import Manifest
from ..calibration.accuracy import BUDGETS, check_budget
from ..engines.memory import check_memory
from ..errors import AccuracyError, BuildError, UsageError
from ..files.json import read_json
from ..progress import Progress, reported
from ..quantization.ranges import ActivationRanges
from ..quantization.schemes import folded_layers
from .accuracy_steps import accuracy_step, headlines, tasks_step
from .calibration_steps import calibrate_step, finite_step, fold_steps, preprocess_step
from .config import MIXED, BuildConfig
from .engine_steps import engine_step, verification_step
from .graph_steps import RANGES, graph_step, store_steps
from .manifest import manifest_of
from .plan import SIGNS, SMOOTHING, BuildPlan, plan_build
from .search_steps import plan_mixed, search_steps
from .workspace import RECEIPT, Record, Step, Workspace, run_step

DEFAULT_BUDGET = 1.0
SIGNS_BUDGETS = {"fp8": 1.5}
"""Where they differ about signs: a build asks 300 questions, so that each is a third of a point."""
HEADROOM = 256 << 20
"""Disk for small files: graphs, receipts, ranges."""


@dataclass(frozen=True)
class Result:
    """A finished build.

    Args:
        bundle: the finished bundle.
        ran: names of the steps that were run; the others were reused.
        records: every step's record.
        over_budget: the accuracy loss over budget that was allowed; empty if none.
    """

    bundle: Bundle
    ran: tuple[str, ...]
    records: dict[str, Record]
    over_budget: str = ""


@dataclass(frozen=True)
class StepPreview:
    """A step of a dry run.

    Args:
        step: its name.
        known: whether its result is there already.
        writes: about how many bytes it writes.
        memory: about the most memory it takes, in bytes; 0 where that is little or not known.
    """

    step: str
    known: bool
    writes: int
    memory: int


def open_plan(config: BuildConfig, progress: Progress) -> BuildPlan:
    """The plan of ``config``; with the precision ``mixed`` its recipe is searched first.

    Raises:
        IvlError: as :func:`.plan.plan_build` and :func:`.search_steps.plan_mixed`.
    """
    with reported(progress, "open") as advanced:
        return plan_mixed(config, progress) if config.precision == MIXED else plan_build(config, advanced)


def build_steps(plan: BuildPlan) -> list[Step]:
    """All steps of a build in the order they run; a step's inputs hold the hashes of those it reads.

    finite (a look at the weights), preprocess, fold (SmoothQuant and AWQ), calibrate, sensitivity and search
    (of a mixed recipe), weights, quantise, a graph for each component, accuracy of the components (which
    refuses a 16-bit type that overflows: before engines take minutes), an engine for
    each component and target, verification, accuracy on the tasks.
    """
    preprocess = preprocess_step(plan)
    fold = fold_steps(plan, preprocess)
    ranges = list(fold)
    if plan.searched:
        _, *searched = search_steps(plan)
        ranges += searched
    elif plan.layers.rounded:
        ranges.append(calibrate_step(plan, [preprocess, *fold]))
    stores = store_steps(plan, fold)
    graphs = {c: graph_step(plan, c, [*ranges, *stores]) for c in plan.components}
    engines = [
        engine_step(plan, component, part, backend, target, graphs[component])
        for component in plan.components
        for backend, target in plan.engines
        for part in range(plan.parts[component])
    ]
    steps = [finite_step(plan), preprocess, *ranges, *stores, *graphs.values()]
    steps.append(accuracy_step(plan, [preprocess, *graphs.values()]))
    steps += [*engines, verification_step(plan, [*graphs.values(), *engines])]
    if plan.runs_tasks:
        steps.append(tasks_step(plan, preprocess, [*ranges, *graphs.values()]))
    return steps


def preview(plan: BuildPlan, progress: Progress) -> list[StepPreview]:
    """The steps that :func:`build` would run or reuse; nothing is written.

    Raises:
        BuildError: there is too little disk or memory for it.
    """
    space = Workspace(plan.config.out, progress)
    steps = build_steps(plan)
    _check_room(plan, space, steps)
    return [
        StepPreview(
            step.name,
            space.known(step.name, step.inputs),
            step.writes,
            step.load.build_bytes if step.load else 0,
        )
        for step in steps
    ]


def build(plan: BuildPlan, progress: Progress) -> Result:
    """Run the steps that have to be run, hold the result to its accuracy budget, and seal the bundle.

    Raises:
        BuildError: too little disk or memory; a step failed, or an engine breaks its promise.
        AccuracyError: a task loses more than its budget, and that was not allowed.
    """
    steps = build_steps(plan)
    with Workspace(plan.config.out, progress) as space:
        result = _unchanged(plan, space, steps)
        if result is None:
            _check_room(plan, space, steps)
            for step in steps:
                run_step(space, step)
            over_budget = check_accuracy(plan, space.staging_dir, space.records)
            manifest = _manifest(plan, space.records)
            space.finish()
            bundle = seal(space.staging_dir, manifest, plan.config.out)
            result = Result(bundle, tuple(space.ran), dict(space.records), over_budget)
        space.discard()
        return result


def calibrate(plan: BuildPlan, progress: Progress) -> ActivationRanges:
    """Measure the ranges of ``plan`` and write them to ``plan.config.out``, whole or not at all.

    A recipe that folds factors into the weights gets them next to it, as :data:`.plan.SMOOTHING`. A run that
    was killed continues at the block it was in.

    Raises:
        UsageError: the recipe rounds no inputs.
        BuildError: NaN, infinity, or nothing but zeros at a layer's input; too little disk.
    """
    if not plan.layers.rounded and not folded_layers(plan.layers.quantised):
        raise UsageError(
            f"Precision {plan.recipe.name} rounds no inputs: there is nothing to measure.",
            fix="Name the recipe that you will build with: --precision fp8.",
        )
    out = plan.config.out
    preprocess = preprocess_step(plan)
    fold = fold_steps(plan, preprocess)
    steps = [finite_step(plan), preprocess, *fold, calibrate_step(plan, [preprocess, *fold])]
    with Workspace(out.parent / f"{out.name}.calibration", progress) as space:
        check_disk(out, steps)
        for step in steps:
            run_step(space, step)
        for name, place in ((SMOOTHING, out.parent / SMOOTHING), (RANGES, out)):
            if (space.staging_dir / name).is_file():
                (space.staging_dir / name).replace(place)
        space.discard()
    return ActivationRanges.load(out)


def check_disk(out: Path, steps: Sequence[Step]) -> None:
    """BuildError unless the disk of ``out`` has room for the files of all ``steps``."""
    needed = sum(step.writes for step in steps) + HEADROOM
    folder = next(p for p in out.absolute().parents if p.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        largest = sorted((step for step in steps if step.writes), key=lambda step: -step.writes)[:3]
        raise BuildError(
            "There is not enough disk space for this build.",
            f"It will write {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Most goes to "
            + ", ".join(f"{step.name} ({step.writes / 1e9:.1f} GB)" for step in largest)
            + ".",
            "Free some, choose another --out, or build fewer --components or --targets.",
        )


def check_accuracy(plan: BuildPlan, root: Path, records: Mapping[str, Record]) -> str:
    """The loss over budget in words, empty if there is none; AccuracyError where it is not allowed.

    Args:
        plan: has the budget.
        root: folder of the bundle, or of its staging folder.
        records: of all steps.
    """
    if "tasks" not in records:
        return ""
    scores = read_json(root / "receipts" / "tasks.json")["scores"]
    budget = plan.config.budget
    if budget is None:
        budgets = BUDGETS | (SIGNS_BUDGETS if plan.evaluation == SIGNS else {})
        budget = budgets.get(plan.recipe.name, DEFAULT_BUDGET)
    try:
        check_budget(
            headlines(scores["fp32"]), headlines(scores[plan.recipe.name]), budget, what=plan.recipe.name
        )
    except AccuracyError as error:
        if not plan.config.allow_accuracy_loss:
            raise
        return f"{error.what} {error.why}"
    return ""


def _check_room(plan: BuildPlan, space: Workspace, steps: Sequence[Step]) -> None:
    # Steps that are run, or whose files are copied from the bundle that is there.
    check_disk(plan.config.out, [s for s in steps if not space.staged(s.name, s.inputs)])
    for step in steps:
        if step.load is not None and not space.known(step.name, step.inputs):
            check_memory(step.name.removeprefix("engine-"), step.load, step.parts)


def _manifest(plan: BuildPlan, records: Mapping[str, Record]) -> Manifest:
    receipts = [rel for r in records.values() for rel in r.files if rel.startswith("receipts/")]
    names = [rel.removeprefix("receipts/").removesuffix(".json") for rel in receipts]
    return manifest_of(plan, records, [*names, RECEIPT])


def _unchanged(plan: BuildPlan, space: Workspace, steps: Sequence[Step]) -> Result | None:
    """The existing bundle, if this build would produce the same one; its files are not read or copied."""
    bundle, sealed = space.sealed
    if bundle is None or any(s.name not in sealed or sealed[s.name].digest != s.digest for s in steps):
        return None
    records = {step.name: sealed[step.name] for step in steps}
    if replace(bundle.manifest, files={}) != _manifest(plan, records):
        return None
    over_budget = check_accuracy(plan, bundle.root, records)
    for name, record in records.items():
        space.progress.finished(name, record.seconds, True)
    return Result(bundle, (), records, over_budget)
