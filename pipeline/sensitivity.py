"""``sensitivity``: what each layer loses in each scheme, as resumable steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..calibration.calibrate import calibration_units, spilled_bytes
from ..calibration.sensitivity import Loss, Sensitivity, check_schemes, measure
from ..files.strict_json import read_json
from ..files.write import write_text
from ..quantization.ranges import Scales
from .calibration_steps import calibrate_step, finite_step, preprocess_step
from .graphs import SCALES
from .job import Job
from .layer_tasks import LayerTasks
from .step import Made, Step, after, model_of, run_step, write_receipt
from .workspace import Reporter, Workspace

RECEIPT = Path("receipts") / "sensitivity.json"


def sensitivity_step(job: Job, schemes: Sequence[str], before: list[Step]) -> Step:
    """SQNR and cosine of every block with one layer quantised, on the held-out samples."""
    inputs = {
        **model_of(job),
        "held_out": job.held_out.hash,
        "components": list(job.components),
        "schemes": list(schemes),
        "base": job.recipe.base,
        **after(before),
    }

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        folder = space.home / "sensitivity"
        found = measure(
            job.checkpoint,
            job.components,
            schemes,
            Scales.load(space.root / SCALES),
            job.held_out,
            job.settings,
            job.tokenizer,
            folder,
            base=job.recipe.base,
            progress=advanced,
        )
        made = [write_receipt(space, RECEIPT.stem, found.to_json())]
        shutil.rmtree(folder, ignore_errors=True)
        return made, {"variants": len(found.losses)}

    config, samples = job.checkpoint.whole, len(job.held_out)
    return Step(
        "sensitivity",
        inputs,
        run,
        calibration_units(config, job.components, samples),
        spilled_bytes(config, job.components, samples),
        "samples x blocks",
    )


def tasks_step(job: Job, questions: int, before: Step, variants: int) -> Step:
    """Task accuracy of the whole model with one layer quantised; goes on at the variant it was in."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        found = read_sensitivity(space.root)
        known = space.home / "layer-tasks.jsonl"
        lost = _read_lines(known, before.digest)
        asked = list(found.worst())
        tasks: LayerTasks | None = None
        with known.open("a", encoding="utf-8") as lines:
            for done, key in enumerate(asked, 1):
                if key not in lost:
                    tasks = tasks or LayerTasks(job, Scales.load(space.root / SCALES), questions)
                    lost[key] = tasks.lost(*key)
                    lines.write(json.dumps([before.digest, *key, lost[key]]) + "\n")
                    lines.flush()
                advanced(done)
        losses = (replace(x, tasks=lost.get((x.layer, x.scheme), {})) for x in found.losses)
        whole = replace(found, losses=tuple(losses))
        return [write_receipt(space, "layer-tasks", whole.to_json())], {}

    return Step(
        "layer-tasks",
        {"questions": questions, **after([before])},
        run,
        variants or None,
        unit="layers x schemes",
    )


def sensitivity(
    job: Job, schemes: Sequence[str], out: Path, reporter: Reporter, questions: int = 0
) -> Sensitivity:
    """Losses of every layer of ``job``'s components, written to ``out``/sensitivity.json.

    Args:
        job: names model, components, calibration and held-out samples; its recipe gives the base type.
        schemes: what is tried, see :func:`..calibration.sensitivity.measure`.
        out: a folder.
        reporter: hears how it goes.
        questions: of each task, where the model has an evaluation set; 0: tasks are left out.

    Raises:
        UsageError: a scheme that cannot be tried on a layer alone.
        BuildError: NaN or infinity at a layer's input; too little disk.
    """
    check_schemes(schemes)
    preprocess = preprocess_step(job)
    calibrate = calibrate_step(job, [preprocess])
    losses = sensitivity_step(job, schemes, [preprocess, calibrate])
    with Workspace(out.parent / f"{out.name}.sensitivity", reporter) as space:
        for step in (finite_step(job), preprocess, calibrate, losses):
            run_step(space, step)
        name = RECEIPT.stem
        if questions and job.evaluation:
            found = read_sensitivity(space.root)
            run_step(space, tasks_step(job, questions, losses, len(found.worst())))
            name = "layer-tasks"
        result = Sensitivity.from_json(read_json(space.root / "receipts" / f"{name}.json"))
        out.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(report(job, result, questions), indent=1) + "\n", out / "sensitivity.json")
        space.discard()
    return result


def report(job: Job, found: Sensitivity, questions: int) -> dict[str, object]:
    """``found`` with what it was measured on."""
    return {
        "schema": "ivl-export.sensitivity/1",
        "model": job.folder.resolve().name,
        "revision": job.checkpoint.revision,
        "calibration": {"hash": job.calibration.hash, "samples": len(job.calibration)},
        "held_out": {"hash": job.held_out.hash, "samples": len(job.held_out)},
        "synthetic": job.calibration.synthetic,
        "questions": questions if job.evaluation else 0,
        "tasks": job.evaluation or "none: the model has no evaluation set",
        **found.to_json(),
    }


def read_sensitivity(root: Path) -> Sensitivity:
    """What the step wrote below ``root``."""
    return Sensitivity.from_json(read_json(root / RECEIPT))


def _read_lines(path: Path, digest: str) -> dict[tuple[str, str], dict[str, float]]:
    """What an earlier run of just this kind found out; a line that was cut off does not count."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                own, layer, scheme, lost = json.loads(line)
            except ValueError:
                continue
            if own == digest:
                found[layer, scheme] = lost
    return found


def noisiest(found: Sensitivity, count: int) -> list[Loss]:
    """The ``count`` variants that lose most, worst first."""
    return sorted(found.worst().values(), key=lambda loss: -loss.noise)[:count]
