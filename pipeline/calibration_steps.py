"""Steps before any graph: tokenizer and image settings, smoothing factors, activation ranges."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..calibration.calibrate import (
    PartTime,
    calibrate,
    calibration_units,
    seconds_per_block,
    spilled_bytes,
)
from ..calibration.schemes import smoothed_layers
from .graphs import SCALES, SMOOTHING, folded_checkpoint
from .request import Job
from .step import Made, Step, after, model_of
from .workspace import Workspace, step_digest

CALIBRATION_BATCH = 16


def preprocess_step(job: Job) -> Step:
    """Tokenizer and image settings, so that nothing is fetched at run time."""
    settings, model = job.settings.to_json(), job.tokenizer.model

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        folder = space.root / "preprocess"
        folder.mkdir(exist_ok=True)
        job.settings.save(folder / "preprocessor_config.json")
        (folder / "tokenizer.model").write_bytes(model)
        return ["preprocess/preprocessor_config.json", "preprocess/tokenizer.model"], {}

    return Step("preprocess", {"settings": settings, "tokenizer": hashlib.sha256(model).hexdigest()}, run)


def smooth_step(job: Job, preprocess: Step) -> Step:
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
            **model_of(job),
            "set": job.calibration.hash,
            "components": list(job.components),
            "layers": layers,
            **after([preprocess]),
        },
        run,
        calibration_units(config, job.components, samples),
        spilled_bytes(config, job.components, samples),
        "samples x blocks",
    )


def calibrate_step(job: Job, before: list[Step]) -> Step:
    """Activation ranges of every layer that the recipe quantises."""
    inputs = {
        **model_of(job),
        "set": job.calibration.hash,
        "components": list(job.components),
        **after(before),
    }

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        times: list[PartTime] = []
        scales = calibrate(
            folded_checkpoint(job, space.root),
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
