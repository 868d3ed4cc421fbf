"""``build``: checkpoint in, verified bundle out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle import Bundle, seal
from ..bundle.manifest import Manifest
from ..calibration.accuracy import BUDGETS, check_budget
from ..engines.memory import check_memory
from ..errors import AccuracyError
from ..files.strict_json import read_json
from .evaluate import headlines
from .job import Job
from .manifest import manifest_of
from .resources import check_disk
from .step import Step, run_step
from .steps import steps
from .workspace import RECEIPT, Record, Reporter, Workspace

DEFAULT_BUDGET = 1.0


@dataclass(frozen=True)
class Result:
    """What a build did.

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
class Planned:
    """A step of a dry run: whether its result is there already, and about how many bytes it writes.

    ``memory`` is about the most it takes, in bytes; 0 where that is little or not known.
    """

    step: str
    known: bool
    writes: int
    memory: int


def preview(job: Job, reporter: Reporter) -> list[Planned]:
    """What :func:`build` would do; nothing is written.

    Raises:
        BuildError: there is too little disk or memory for it.
    """
    space = Workspace(job.request.out, reporter)
    plan = steps(job)
    _check_room(job, space, plan)
    return [
        Planned(
            step.name,
            space.known(step.name, step.inputs),
            step.writes,
            step.load.build_bytes if step.load else 0,
        )
        for step in plan
    ]


def build(job: Job, reporter: Reporter) -> Result:
    """Run the steps that have to be run, hold the result to its accuracy budget, and seal the bundle.

    Raises:
        BuildError: too little disk or memory; a step failed, or an engine breaks its promise.
        AccuracyError: a task loses more than its budget, and that was not allowed.
    """
    plan = steps(job)
    with Workspace(job.request.out, reporter) as space:
        result = _unchanged(job, space, plan)
        if result is None:
            _check_room(job, space, plan)
            for step in plan:
                run_step(space, step)
            over_budget = _check_accuracy(job, space.root, space.records)
            manifest = _manifest(job, space.records)
            space.finish()
            bundle = seal(space.root, manifest, job.request.out)
            result = Result(bundle, tuple(space.ran), dict(space.records), over_budget)
        space.discard()
        return result


def _to_write(space: Workspace, plan: Sequence[Step]) -> list[Step]:
    """Steps that are run, or whose files are copied from the bundle that is there."""
    return [step for step in plan if not space.staged(step.name, step.inputs)]


def _check_room(job: Job, space: Workspace, plan: Sequence[Step]) -> None:
    check_disk(job.request.out, _to_write(space, plan))
    for step in plan:
        if step.load is not None and not space.known(step.name, step.inputs):
            check_memory(step.name.removeprefix("engine-"), step.load, step.parts)


def _check_accuracy(job: Job, root: Path, records: Mapping[str, Record]) -> str:
    """The loss over budget in words, empty if there is none; AccuracyError where it is not allowed."""
    if "tasks" not in records:
        return ""
    scores = read_json(root / "receipts" / "tasks.json")["scores"]
    budget = job.request.budget
    if budget is None:
        budget = BUDGETS.get(job.recipe.name, DEFAULT_BUDGET)
    try:
        check_budget(
            headlines(scores["fp32"]), headlines(scores[job.recipe.name]), budget, what=job.recipe.name
        )
    except AccuracyError as error:
        if not job.request.allow_accuracy_loss:
            raise
        return f"{error.what} {error.why}"
    return ""


def _manifest(job: Job, records: Mapping[str, Record]) -> Manifest:
    receipts = [rel for r in records.values() for rel in r.files if rel.startswith("receipts/")]
    names = [rel.removeprefix("receipts/").removesuffix(".json") for rel in receipts]
    return manifest_of(job, records, [*names, RECEIPT])


def _unchanged(job: Job, space: Workspace, plan: Sequence[Step]) -> Result | None:
    """The bundle that is there, if it is what this build would seal; nothing of it is read or copied."""
    bundle, kept = space.sealed
    if bundle is None or any(s.name not in kept or kept[s.name].digest != s.digest for s in plan):
        return None
    records = {step.name: kept[step.name] for step in plan}
    if replace(bundle.manifest, files={}) != _manifest(job, records):
        return None
    over_budget = _check_accuracy(job, bundle.root, records)
    for name, record in records.items():
        space.reporter.finished(name, record.seconds, True)
    return Result(bundle, (), records, over_budget)
