"""``calibrate``: measure the ranges of a model once, for builds that take them from the file."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..quantization.ranges import Scales
from ..quantization.schemes import folded_layers
from .calibration import SMOOTHING
from .calibration_steps import calibrate_step, finite_step, fold_steps, preprocess_step
from .graphs import SCALES
from .job import Job
from .resources import check_disk
from .step import run_step
from .workspace import Reporter, Workspace


def measure(job: Job, out: Path, reporter: Reporter) -> Scales:
    """Write the ranges that ``job`` would measure to ``out``, whole or not at all.

    A recipe that folds factors into the weights gets them beside it, as :data:`.calibration.SMOOTHING`. A run
    that was killed goes on at the block it was in.

    Raises:
        UsageError: the recipe rounds no inputs.
        BuildError: NaN, infinity, or nothing but zeros at a layer's input; too little disk.
    """
    if not job.plan.rounded and not folded_layers(job.plan.quantised):
        raise UsageError(
            f"Precision {job.recipe.name} rounds no inputs: there is nothing to measure.",
            fix="Name the recipe that you will build with: --precision fp8.",
        )
    preprocess = preprocess_step(job)
    folds = fold_steps(job, preprocess)
    plan = [finite_step(job), preprocess, *folds, calibrate_step(job, [preprocess, *folds])]
    with Workspace(out.parent / f"{out.name}.calibration", reporter) as space:
        check_disk(out, plan)
        for step in plan:
            run_step(space, step)
        for name, place in ((SMOOTHING, out.parent / SMOOTHING), (SCALES, out)):
            if (space.root / name).is_file():
                (space.root / name).replace(place)
        space.discard()
    return Scales.load(out)
