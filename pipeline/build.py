"""``build``: checkpoint in, verified bundle out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..bundle import Bundle, seal
from ..calibration.accuracy import BUDGETS, check_budget
from ..errors import AccuracyError, IntegrityError
from ..manifest import Manifest
from ..strict_json import read_json
from .evaluate import headlines
from .manifest import manifest_of
from .request import Job
from .steps import Step, steps
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
    """A step of a dry run, and whether its result is there already."""

    step: str
    known: bool


def preview(job: Job, reporter: Reporter) -> list[Planned]:
    """What :func:`build` would do; nothing is written."""
    space = Workspace(job.request.out, reporter)
    return [Planned(step.name, space.known(step.name, step.inputs)) for step in steps(job)]


def build(job: Job, reporter: Reporter) -> Result:
    """Run the steps that have to be run, hold the result to its accuracy budget, and seal the bundle.

    Raises:
        BuildError: a step failed, or an engine breaks its promise.
        AccuracyError: a task loses more than its budget, and that was not allowed.
    """
    with Workspace(job.request.out, reporter) as space:
        for step in steps(job):
            _run(space, step)
        over_budget = _check_accuracy(job, space)
        receipts = [rel for r in space.records.values() for rel in r.files if rel.startswith("receipts/")]
        names = [rel.removeprefix("receipts/").removesuffix(".json") for rel in receipts]
        manifest = manifest_of(job, space.records, [*names, RECEIPT])
        bundle = _unchanged(space, manifest)
        if bundle is None:
            space.finish()
            bundle = seal(space.root, manifest, job.request.out)
        space.discard()
        return Result(bundle, tuple(space.ran), dict(space.records), over_budget)


def _run(space: Workspace, step: Step) -> None:
    space.step(
        step.name, step.inputs, lambda root: step.run(space, space.reporter.advanced), total=step.total
    )


def _check_accuracy(job: Job, space: Workspace) -> str:
    """The loss over budget in words, empty if there is none; AccuracyError where it is not allowed."""
    if "tasks" not in space.records:
        return ""
    scores = read_json(space.root / "receipts" / "tasks.json")["scores"]
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


def _unchanged(space: Workspace, manifest: Manifest) -> Bundle | None:
    """The bundle that is there, if it is what this build would seal."""
    try:
        bundle = Bundle.open(space.out)
    except IntegrityError:
        return None
    same = replace(bundle.manifest, files={}) == replace(manifest, files={})
    return bundle if same and not space.ran else None
