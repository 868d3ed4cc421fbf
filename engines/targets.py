"""GPU generations an engine is built for, and the element types each can compute with."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CapabilityError, UsageError


@dataclass(frozen=True)
class Target:
    """A compute capability. ``missing`` are the element types its matrix units lack."""

    name: str
    gpus: str
    missing: frozenset[str] = frozenset()


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm75", "T4, RTX 20", frozenset({"bf16", "fp8"})),
        Target("sm80", "A100, A30", frozenset({"fp8"})),
        Target("sm86", "A10, A40, RTX 30", frozenset({"fp8"})),
        Target("sm89", "L4, L40S, RTX 40"),
        Target("sm120", "RTX PRO 6000 Blackwell, RTX 50"),
        Target("sm121", "GB10 (DGX Spark)"),
    )
}
"""The generations TensorRT-RTX 1.7 compiles for, with GPUs of each."""

TENSORRT_ONLY: dict[str, str] = {
    "sm90": "H100, H200, GH200",
    "sm100": "B200, GB200",
}
"""Generations TensorRT-RTX does not compile for, with GPUs of each: TensorRT does, on the GPU itself."""

ON_THE_GPU = "Build on that GPU: ivl-export build --backend tensorrt (pip install 'ivl-export[gpu,quant]')."
"""Advice for owners of a GPU of :data:`TENSORRT_ONLY`."""


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets of ``"sm89"``, ``"sm89,sm120"`` or ``"sm89+sm120"``, in that order and without repeats.

    Raises:
        UsageError: a name that is not in :data:`TARGETS`; the known ones are listed with their GPUs, and for
            one of :data:`TENSORRT_ONLY` the command that builds on it.
    """
    names = [name.strip().lower() for name in text.replace("+", ",").split(",")]
    unknown = [name for name in names if name not in TARGETS]
    known = "; ".join(f"{t.name} ({t.gpus})" for t in TARGETS.values())
    for name in unknown:
        if name in TENSORRT_ONLY:
            raise UsageError(
                f"TensorRT-RTX does not build for {name} ({TENSORRT_ONLY[name]}).",
                f"It compiles for {known}. TensorRT builds on the GPU that runs the engine.",
                ON_THE_GPU,
            )
    if unknown:
        raise UsageError(
            f"Unknown target {unknown[0]!r}.", f"Known targets: {known}.", "Give --targets sm89."
        )
    return tuple(TARGETS[name] for name in dict.fromkeys(names))


def check_types(component: str, types: frozenset[str], targets: tuple[Target, ...]) -> None:
    """Refuse a graph with element types that a target lacks.

    Args:
        component: named in the error.
        types: element types in the graph (``fp8``, ``int8``, ``int4``, ``bf16``, ``fp16``, ``fp32``).
        targets: the GPUs that the engine is to run on.

    Raises:
        CapabilityError: it names the type, the target, and the targets that can.
    """
    for target in targets:
        for kind in sorted(types & target.missing):
            able = ", ".join(f"{t.name} ({t.gpus})" for t in TARGETS.values() if kind not in t.missing)
            other = "int8" if kind == "fp8" else "fp16"
            raise CapabilityError(
                f"{component} cannot be built for {target.name} ({target.gpus}): it has no {kind.upper()}.",
                f"The graph computes with {kind} values.",
                f"Build {kind} for {able}, or take --precision {other} for {target.name}.",
            )
