"""Steps before any graph: a look at the weights, tokenizer, image settings, smoothing factors, ranges."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from ..calibration import magnitudes
from ..calibration.calibrate import (
    SegmentTime,
    calibrate,
    calibration_units,
    seconds_per_block,
    spilled_bytes,
)
from ..export.unquantized import weight_keys
from ..models.finite import check_weights
from ..models.registry import component_names
from ..quantization.algorithms import depends_on_type
from ..quantization.quantize import LIMITS
from ..quantization.ranges import ActivationRanges
from ..quantization.schemes import SCHEMES, folded_layers
from .graph_steps import RANGES, folded_checkpoint
from .plan import SMOOTHING, BuildPlan
from .workspace import Step, StepResult, Workspace, after, step_digest

CALIBRATION_BATCH = 16
MEGABYTE = 10**6


def preprocess_step(plan: BuildPlan) -> Step:
    """Tokenizer and image settings, so that nothing is fetched at run time."""
    settings, tokenizer = plan.settings.to_json(), plan.tokenizer

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        folder = space.staging_dir / "preprocess"
        folder.mkdir(exist_ok=True)
        plan.settings.save(folder / "preprocessor_config.json")
        for name, data in tokenizer.files.items():
            (folder / name).write_bytes(data)
        return [f"preprocess/{name}" for name in ("preprocessor_config.json", *tokenizer.files)], {}

    chat = None if plan.chat is None else plan.chat.to_json()
    return Step("preprocess", {"settings": settings, "tokenizer": tokenizer.digest, "chat": chat}, run)


def finite_step(plan: BuildPlan) -> Step:
    """Looks at every byte of the weights of the components, and of those they take inputs from.

    NaN in a row that no sample touches would be served otherwise; elsewhere calibration would be blamed.
    Channels that are denormal in the base type are noted; of a quantised weight those whose scale would be.
    """
    from ..calibration.segments import needed

    checkpoint = plan.checkpoint
    keys = weight_keys(checkpoint, needed(plan.components, checkpoint.model))
    known = weight_keys(checkpoint, component_names(checkpoint.model, optional=True))
    keys += sorted(checkpoint.tensors.keys() - set(known))  # what no component reads: logit_scale
    total = sum(checkpoint.tensors[key].nbytes for key in keys)

    base, schemes = plan.recipe.base, plan.layers.quantised

    def floors(key: str) -> tuple[float, float]:
        scheme, normal = schemes.get(key.removesuffix(".weight")), magnitudes.RANGES[base][0]
        if scheme:
            return normal * LIMITS[SCHEMES[scheme].weight], 0.0
        return normal, magnitudes.ZERO[base]

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        smallest = {key: floors(key) for key in keys}
        faint = check_weights(checkpoint, smallest, lambda count: advanced(count // MEGABYTE))
        return [], {"tensors": len(keys), "bytes": total, "denormal": [asdict(weight) for weight in faint]}

    inputs = {**plan.identity, "keys": keys, "base": base, "schemes": schemes}
    return Step("finite", inputs, run, total // MEGABYTE, unit="MB")


def fold_steps(plan: BuildPlan, preprocess: Step) -> list[Step]:
    """Steps that find factors to fold into the weights; empty where the recipe folds none."""
    if not folded_layers(plan.layers.schemes):
        return []
    if plan.ranges_file is not None and plan.ranges_file.factors is not None:
        return [_given_factors(plan.ranges_file.factors)]
    from ..calibration.folding import groups_apart

    groups_apart(plan.layers.schemes)
    return [_fold_step(plan, preprocess)]


def _fold_step(plan: BuildPlan, preprocess: Step) -> Step:
    """The step that finds factors s [in]: inputs are divided by s, weight columns multiplied."""
    smoothed = folded_layers(plan.layers.schemes, "smooth")
    searched = {layer: plan.layers.schemes[layer] for layer in folded_layers(plan.layers.schemes, "awq")}
    config, samples = plan.checkpoint.model, len(plan.calibration)
    units = calibration_units(config, plan.components, samples)

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        from safetensors.torch import save_file

        from ..calibration.awq import awq_factors
        from ..calibration.smoothquant import channel_ranges, factors

        run_on = (plan.calibration, plan.settings, plan.tokenizer)
        folding_factors = {}
        with tempfile.TemporaryDirectory(dir=space.work_dir, prefix="fold-") as folder:
            common = (*run_on, Path(folder))
            size = CALIBRATION_BATCH
            if smoothed:
                ranges = channel_ranges(
                    plan.checkpoint, plan.components, smoothed, *common, batch_size=size, progress=advanced
                )
                folding_factors.update(factors(plan.checkpoint, ranges, smoothed))
            if searched:
                offset = units if smoothed else 0
                folding_factors.update(
                    awq_factors(
                        plan.checkpoint,
                        plan.components,
                        searched,
                        *common,
                        base=plan.recipe.base,
                        batch_size=size,
                        progress=lambda more: advanced(offset + more),
                    )
                )
        save_file(folding_factors, space.staging_dir / SMOOTHING)
        return [SMOOTHING], {"sources": len(folding_factors)}

    return Step(
        "fold",
        {
            **plan.identity,
            "set": plan.calibration.hash,
            "components": list(plan.components),
            "smoothed": smoothed,
            "searched": searched,
            "base": plan.recipe.base,
            **after([preprocess]),
        },
        run,
        units * (bool(smoothed) + bool(searched)),
        spilled_bytes(config, plan.components, samples),
        "samples x blocks",
    )


def _given_factors(factors: bytes) -> Step:
    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        (space.staging_dir / SMOOTHING).write_bytes(factors)
        return [SMOOTHING], {"given": True}

    return Step("fold", {"given": hashlib.sha256(factors).hexdigest()}, run)


def calibrate_step(plan: BuildPlan, before: list[Step]) -> Step:
    """Activation ranges of every layer that the recipe quantises."""
    if plan.ranges_file is not None:
        return _given_ranges(plan.ranges_file.ranges, before)
    kinds = plan.layers.rounded if depends_on_type(plan.algorithm) else {}
    inputs = {
        **plan.identity,
        "set": plan.calibration.hash,
        "components": list(plan.components),
        "algorithm": plan.algorithm,
        "kinds": kinds,
        **after(before),
    }

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        times: list[SegmentTime] = []
        ranges = calibrate(
            folded_checkpoint(plan, space.staging_dir),
            plan.components,
            plan.calibration,
            plan.settings,
            plan.tokenizer,
            batch_size=CALIBRATION_BATCH,
            algorithm=plan.algorithm,
            kinds=kinds,
            folder=space.work_dir / "calibrate",
            key=step_digest("calibrate", inputs),
            progress=advanced,
            timed=times.append,
        )
        if folded_layers(plan.layers.schemes):
            factors = (space.staging_dir / SMOOTHING).read_bytes()
            ranges = replace(ranges, folded=hashlib.sha256(factors).hexdigest())
        ranges.save(space.staging_dir / RANGES)
        layers = sum(len(v) for v in ranges.amax.values())
        seconds = seconds_per_block(times)
        return [RANGES], {
            "samples": ranges.samples,
            "layers": layers,
            "seconds_per_sample_and_block": seconds,
        }

    config, samples = plan.checkpoint.model, len(plan.calibration)
    return Step(
        "calibrate",
        inputs,
        run,
        calibration_units(config, plan.components, samples),
        spilled_bytes(config, plan.components, samples),
        "samples x blocks",
    )


def _given_ranges(ranges: ActivationRanges, before: list[Step]) -> Step:
    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        ranges.save(space.staging_dir / RANGES)
        return [RANGES], {"given": True}

    return Step("calibrate", {"given": asdict(ranges), **after(before)}, run)
