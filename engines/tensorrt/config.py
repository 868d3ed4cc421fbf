"""Builder configurations of TensorRT: targets, profiles, and every option with where it can be had.

Features of a release are looked up in its bindings; features that fail nevertheless are listed here, with
sources: NVIDIA's documentation of TensorRT 10.16, 11.4 and TensorRT-RTX 1.7, or a build that was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from ...errors import CapabilityError
from ..gpu import gpus
from .library import Library
from .network import Network
from .options import BuildOptions

Shape = tuple[int, ...]
_REFIT_LOSES_BIASES = "11.3."  # release notes of 11.3.0: with REFIT a GEMM's bias can be taken for zero


def builder_config(
    parsed: Network,
    targets: Sequence[str],
    profiles: Sequence[dict[str, tuple[Shape, Shape, Shape]]],
    options: BuildOptions | None = None,
) -> Any:
    """A builder configuration.

    Args:
        parsed: the network.
        targets: compute capabilities (``"sm89"``); empty: the GPU of this machine.
        profiles: for each optimization profile, input name -> (min, opt, max) shape.
        options: further builder settings.

    Raises:
        CapabilityError: this library only builds for the GPU in the machine, or not for a target, or cannot
            support an option.
    """
    lib, options = parsed.library, options or BuildOptions()
    check_options(lib, options)
    config = parsed.builder.create_builder_config()
    if targets:
        _set_targets(lib, config, targets)
    _set_options(lib, config, options)
    for shapes in profiles:
        profile = parsed.builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
        parsed.keep.append(profile)
    return config


def check_options(lib: Library, options: BuildOptions) -> None:
    """CapabilityError if ``lib`` does not support an option, naming a library that does."""
    trt, rtx = lib.module, lib.cross_builds
    if rtx and options.hardware not in (None, "none"):
        _refuse(
            lib,
            "-O hardware-compatible",
            "Its engines run on the GPUs they name.",
            "Give --targets sm80,sm89.",
        )
    if rtx and options.version_compatible:  # it looks for a library libnvinfer_lean that RTX does not ship
        _refuse(
            lib, "-O version-compatible", "Its engines are tied to the release that built them.",
            "Build with --backend tensorrt, or once more for each release.",
        )  # fmt: skip
    if rtx and (options.refit or options.strip_plan) and not gpus():  # fails in its code generator: tried
        flag = "-O strip-plan" if options.strip_plan else "-O refit"
        _refuse(
            lib, flag, "It needs a GPU and its driver to build such engines.", "Build on a machine with one."
        )
    if options.refit and lib.release.startswith(_REFIT_LOSES_BIASES):
        _refuse(
            lib, "-O refit", "In 11.3 engines that can be refitted may lose biases (NVIDIA's release notes).",
            "Use TensorRT 10.16 or 11.4, or -O strip-plan, which is not concerned.",
        )  # fmt: skip
    for source in options.tactic_sources or ():
        if not hasattr(trt.TacticSource, _member(source)):
            have = ", ".join(name.lower().replace("_", "-") for name in trt.TacticSource.__members__)
            _refuse(lib, f"-O tactic-sources={source}", f"It has {have}.", "TensorRT 10 has all of them.")


def _set_targets(lib: Library, config: Any, targets: Sequence[str]) -> None:
    known = getattr(lib.module, "ComputeCapability", None)
    if not lib.cross_builds or known is None:
        raise CapabilityError(
            f"{lib} cannot build for {', '.join(targets)}.",
            "It builds for the GPU of this machine only.",
            "Build on that GPU without --targets, or with --backend tensorrt-rtx.",
        )
    config.num_compute_capabilities = len(targets)
    for i, name in enumerate(targets):
        if not hasattr(known, name.upper()):
            raise CapabilityError(
                f"{lib} cannot build for {name}.",
                f"It knows {', '.join(known.__members__)}.",
                f"Install a newer release: pip install -U {lib.backend}",
            )
        config.set_compute_capability(getattr(known, name.upper()), i)


def _set_options(lib: Library, config: Any, options: BuildOptions) -> None:
    trt = lib.module
    if not lib.cross_builds:  # else the inspector gives names only; RTX has its program
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.tactic_sources is not None:
        bits = sum(1 << int(getattr(trt.TacticSource, _member(s))) for s in set(options.tactic_sources))
        config.set_tactic_sources(bits)
    if options.tiling is not None:
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options.tiling.upper())
    if options.l2_bytes is not None:
        config.l2_limit_for_tiling = options.l2_bytes
    if options.hardware not in (None, "none"):
        name = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}[options.hardware or ""]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, name)
    for enabled, names in (
        (options.weight_streaming, ("WEIGHT_STREAMING",)),
        (options.refit, ("REFIT",)),
        (options.version_compatible, ("VERSION_COMPATIBLE",)),
        # Stripped weights come back as they were: the faster kind of refit, unless any are to go in.
        (options.strip_plan, ("STRIP_PLAN",) if options.refit else ("STRIP_PLAN", "REFIT_IDENTICAL")),
    ):
        for name in names if enabled else ():
            config.set_flag(getattr(trt.BuilderFlag, name))


def _member(source: str) -> str:
    return source.upper().replace("-", "_")


def _refuse(lib: Library, what: str, why: str, fix: str) -> NoReturn:
    raise CapabilityError(f"{lib} cannot do {what}.", why, fix)
