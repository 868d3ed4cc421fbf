"""Steps before any graph: a look at the weights, tokenizer, image settings, smoothing factors, ranges."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from ..calibration.calibrate import (
    PartTime,
    calibrate,
    calibration_units,
    seconds_per_block,
    spilled_bytes,
)
from ..export.unquantized import weight_keys
from ..models.finite import check_finite
from ..quantization.algorithms import depends_on_type
from ..quantization.ranges import Scales
from ..quantization.schemes import folded_layers
from .calibration import SMOOTHING
from .graphs import SCALES, folded_checkpoint
from .job import Job
from .step import Made, Step, after, model_of
from .workspace import Workspace, step_digest

CALIBRATION_BATCH = 16
MEGABYTE = 10**6


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


def finite_step(job: Job) -> Step:
    """Looks at every byte of the weights of the components, and of those they take inputs from.

    NaN in a row that no sample touches would be served otherwise; elsewhere calibration would be blamed.
    """
    from ..calibration.segments import needed

    checkpoint = job.checkpoint
    keys = weight_keys(checkpoint, needed(job.components, checkpoint.whole))
    total = sum(checkpoint.tensors[key].nbytes for key in keys)

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        check_finite(checkpoint, keys, lambda done: advanced(done // MEGABYTE))
        return [], {"tensors": len(keys), "bytes": total}

    return Step("finite", {**model_of(job), "keys": keys}, run, total // MEGABYTE, unit="MB")


def fold_steps(job: Job, preprocess: Step) -> list[Step]:
    """What is folded into the weights before they are quantised; empty where the recipe folds nothing."""
    if not folded_layers(job.plan.schemes):
        return []
    if job.given is not None and job.given.factors is not None:
        return [_given_factors(job.given.factors)]
    from ..calibration.folding import groups_apart

    groups_apart(job.plan.schemes)
    return [_fold_step(job, preprocess)]


def _fold_step(job: Job, preprocess: Step) -> Step:
    """What inputs are divided by, channel by channel, and weights multiplied by."""
    smoothed = folded_layers(job.plan.schemes, "smooth")
    searched = {layer: job.plan.schemes[layer] for layer in folded_layers(job.plan.schemes, "awq")}
    config, samples = job.checkpoint.whole, len(job.calibration)
    units = calibration_units(config, job.components, samples)

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        from safetensors.torch import save_file

        from ..calibration.awq import awq_factors
        from ..calibration.smoothquant import channel_ranges, factors

        run_on = (job.calibration, job.settings, job.tokenizer)
        found = {}
        with tempfile.TemporaryDirectory(dir=space.home, prefix="fold-") as folder:
            given = (*run_on, Path(folder))
            size = CALIBRATION_BATCH
            if smoothed:
                ranges = channel_ranges(
                    job.checkpoint, job.components, smoothed, *given, batch_size=size, progress=advanced
                )
                found.update(factors(job.checkpoint, ranges, smoothed))
            if searched:
                done = units if smoothed else 0
                found.update(
                    awq_factors(
                        job.checkpoint,
                        job.components,
                        searched,
                        *given,
                        base=job.recipe.base,
                        batch_size=size,
                        progress=lambda more: advanced(done + more),
                    )
                )
        save_file(found, space.root / SMOOTHING)
        return [SMOOTHING], {"sources": len(found)}

    return Step(
        "fold",
        {
            **model_of(job),
            "set": job.calibration.hash,
            "components": list(job.components),
            "smoothed": smoothed,
            "searched": searched,
            "base": job.recipe.base,
            **after([preprocess]),
        },
        run,
        units * (bool(smoothed) + bool(searched)),
        spilled_bytes(config, job.components, samples),
        "samples x blocks",
    )


def _given_factors(factors: bytes) -> Step:
    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        (space.root / SMOOTHING).write_bytes(factors)
        return [SMOOTHING], {"given": True}

    return Step("fold", {"given": hashlib.sha256(factors).hexdigest()}, run)


def calibrate_step(job: Job, before: list[Step]) -> Step:
    """Activation ranges of every layer that the recipe quantises."""
    if job.given is not None:
        return _given_scales(job.given.scales, before)
    kinds = job.plan.rounded if depends_on_type(job.algorithm) else {}
    inputs = {
        **model_of(job),
        "set": job.calibration.hash,
        "components": list(job.components),
        "algorithm": job.algorithm,
        "kinds": kinds,
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
            algorithm=job.algorithm,
            kinds=kinds,
            folder=space.home / "calibrate",
            key=step_digest("calibrate", inputs),
            progress=advanced,
            timed=times.append,
        )
        if folded_layers(job.plan.schemes):
            factors = (space.root / SMOOTHING).read_bytes()
            scales = replace(scales, folded=hashlib.sha256(factors).hexdigest())
        scales.save(space.root / SCALES)
        layers = sum(len(v) for v in scales.amax.values())
        seconds = seconds_per_block(times)
        return [SCALES], {
            "samples": scales.samples,
            "layers": layers,
            "seconds_per_sample_and_block": seconds,
        }

    config, samples = job.checkpoint.whole, len(job.calibration)
    return Step(
        "calibrate",
        inputs,
        run,
        calibration_units(config, job.components, samples),
        spilled_bytes(config, job.components, samples),
        "samples x blocks",
    )


def _given_scales(scales: Scales, before: list[Step]) -> Step:
    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        scales.save(space.root / SCALES)
        return [SCALES], {"given": True}

    return Step("calibrate", {"given": asdict(scales), **after(before)}, run)
