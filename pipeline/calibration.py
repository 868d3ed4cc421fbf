"""What the ranges of a job are measured on, or the scales that stand in for measuring them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.dataset import CalibrationSet, set_notices
from ..calibration.sources import KINDS, open_calibration, scenes_calibration
from ..calibration.tensor_cache import TensorCache
from ..errors import InputError, UsageError
from ..files.cache_dir import cache_folder
from ..quantization.attention import operand_names
from ..quantization.ranges import Scales
from ..quantization.schemes import folded_layers

if TYPE_CHECKING:
    from .job import Job

OWN_CALIBRATION = ("calibration.jsonl", "calibration")
"""A manifest or folder beside the weights: the calibration set that a checkpoint brings along."""
HELD_OUT = 32
"""Calibration samples kept back to measure accuracy on."""
SMOOTHING = "smoothing.safetensors"
"""What norms and layers were divided by, beside ``scales.json``, where the recipe folds."""


@dataclass(frozen=True)
class Given:
    """Scales that were measured before.

    Args:
        scales: as read and checked.
        factors: content of :data:`SMOOTHING` beside them; None where the recipe folds nothing.
    """

    scales: Scales
    factors: bytes | None

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user must be told about the set they were measured on."""
        s = self.scales
        return set_notices(s.samples, s.synthetic, s.without_caption)


def needs_data(job: Job) -> bool:
    """Whether anything is measured: input ranges, or how much of them is folded away."""
    return job.request.scales is None and bool(job.plan.rounded or folded_layers(job.plan.quantised))


def choose_sets(
    job: Job, progress: Callable[[int, int], None] | None
) -> tuple[CalibrationSet, CalibrationSet]:
    """(to calibrate on, held back to measure accuracy on).

    Raises:
        InputError: no usable data, or none given where some is needed.
    """
    request = job.request
    samples, measured = request.calib_samples + HELD_OUT, needs_data(job)
    own = next((p for name in OWN_CALIBRATION if (p := job.folder / name).exists()), None)
    source = request.calib or own
    if source is not None:
        # Otherwise only accuracy is measured; given scales may come from this set, cut in the same way.
        count = samples if measured or request.scales else min(samples, 4 * HELD_OUT)
        columns = request.calib_columns
        chosen = open_calibration(source, count, request.calib_seed, progress, columns)
        chosen = replace(chosen, cache=TensorCache(cache_folder() / "images"))
    elif job.evaluation is not None:
        chosen = scenes_calibration(samples)
    elif measured:
        raise InputError(
            f"Precision {job.recipe.name} needs calibration data.",
            "The ranges of activations are measured on images and captions like those you will serve.",
            f"Give --calib {'; '.join(KINDS)}.",
        )
    else:
        # Only to compare the graphs with fp32: any images will do for that.
        chosen = scenes_calibration(min(samples, HELD_OUT))
    # A small set keeps fewer samples back: what is left over is more than was asked for.
    rest, held_out = chosen.split(HELD_OUT)
    asked = request.calib_samples
    return replace(rest, samples=rest.samples[:asked], asked=asked), held_out


def given_scales(job: Job) -> Given | None:
    """The scales that ``job`` was given, checked against its model and recipe.

    Raises:
        UsageError: an algorithm was asked for too; the recipe measures nothing.
        InputError: the file is broken, of another model, or does not cover what the recipe quantises.
    """
    path = job.request.scales
    if path is None:
        return None
    kinds, folds = job.plan.rounded, bool(folded_layers(job.plan.quantised))
    if job.request.algorithm is not None:
        raise UsageError(
            "--algorithm and --scales were both given.",
            "The scales have been measured already.",
            "Give one of them.",
        )
    if not kinds and not folds:
        raise UsageError(
            f"Precision {job.recipe.name} takes no scales.", "It measures nothing.", "Leave --scales out."
        )
    scales = Scales.load(path)
    fused = {c: [o for n in names for o in operand_names(n)] for c, names in job.plan.attention.items()}
    wanted = {
        component: {name: kinds[name] for name in (*layers, *fused.get(component, ())) if name in kinds}
        for component, layers in job.component_linears.items()
    }
    scales.check(job.linear_shapes, wanted, job.checkpoint.revision)
    return Given(scales, _factors(job, path, scales) if folds or scales.folded else None)


def _factors(job: Job, path: Path, scales: Scales) -> bytes:
    """The factors beside ``path`` that the scales were measured with."""
    if not folded_layers(job.plan.quantised) or not scales.folded:
        without = "without" if scales.folded else "with"
        raise InputError(
            f"The scales are not those of precision {job.recipe.name}.",
            f"They were measured on weights {'with' if scales.folded else 'without'} folded factors; "
            f"this recipe is {without} them.",
            f"ivl-export calibrate --precision {job.recipe.name}",
        )
    beside = path.parent / SMOOTHING
    try:
        data = beside.read_bytes()
    except OSError as error:
        raise InputError(
            f"{beside} cannot be read.",
            f"{error.strerror or error}. The scales were measured with the factors in it.",
            "Keep both files together.",
        ) from error
    if hashlib.sha256(data).hexdigest() != scales.folded:
        raise InputError(
            f"{beside} does not belong to {path.name}.", "Its hash is another.", "Calibrate again."
        )
    return data
