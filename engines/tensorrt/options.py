"""What a TensorRT builder can be told, as data: for the command line, the manifest and a step's hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ...errors import IntegrityError, UsageError

TILINGS = ("none", "fast", "moderate", "full")
HARDWARE = ("none", "ampere+", "same-cc")
TACTICS = ("edge-mask-convolutions", "jit-convolutions", "cublas", "cublas-lt", "cudnn")
LEVELS = range(6)


@dataclass(frozen=True)
class BuildOptions:
    """Builder settings; None and False mean the library's default. :mod:`.config` says what each needs.

    Args:
        optimization_level: 0 (fast build) to 5 (fast engine).
        workspace_bytes: scratch memory an engine may use.
        tactic_sources: which of :data:`TACTICS` kernels may come from; an empty tuple: none of them.
        tiling: how hard to look for tilings that stay in the L2 cache, one of :data:`TILINGS`.
        l2_bytes: how much of the L2 cache a tiling may use.
        weight_streaming: weights may stay in host memory and be streamed while running.
        refit: weights may be exchanged in the engine.
        strip_plan: leave weights out; they are put in from the graph when the engine is opened.
        hardware: which other GPUs the engine must run on, one of :data:`HARDWARE`.
        version_compatible: later releases of the library can load the engine too.
    """

    optimization_level: int | None = None
    workspace_bytes: int | None = None
    tactic_sources: tuple[str, ...] | None = None
    tiling: str | None = None
    l2_bytes: int | None = None
    weight_streaming: bool = False
    refit: bool = False
    strip_plan: bool = False
    hardware: str | None = None
    version_compatible: bool = False

    def __post_init__(self) -> None:
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise UsageError(
                f"There is no optimisation level {self.optimization_level}.",
                "0 builds fastest, 5 gives the fastest engine.",
                "Give --optimization-level 3.",
            )
        named = (("--tiling", self.tiling, TILINGS), ("--hardware-compatible", self.hardware, HARDWARE))
        tactics = tuple(("--tactic-sources", source, TACTICS) for source in self.tactic_sources or ())
        for flag, value, known in (*named, *tactics):
            if value is not None and value not in known:
                raise UsageError(
                    f"{flag} does not know {value!r}.",
                    f"Known: {', '.join(known)}.",
                    "Give one of these, or leave it out.",
                )
        for flag, size in (("--workspace", self.workspace_bytes), ("--l2", self.l2_bytes)):
            if size is not None and size <= 0:
                raise UsageError(
                    f"{flag} must be more than 0 bytes.", f"It is {size}.", "Give a size such as 512M."
                )

    def flags(self) -> list[str]:
        """The words of ``ivl-export build`` that give these options."""
        names = {"workspace_bytes": "workspace", "l2_bytes": "l2", "hardware": "hardware-compatible"}
        words: list[str] = []
        for name, value in self.to_json().items():
            words.append("--" + names.get(name, name).replace("_", "-"))
            if value is not True:
                words.append(",".join(value) or "none" if isinstance(value, list) else str(value))
        return words

    def to_json(self) -> dict[str, Any]:
        """Plain data of what differs from the defaults."""
        plain = asdict(self)
        return {
            f.name: list(value) if isinstance(value := plain[f.name], tuple) else value
            for f in fields(self)
            if plain[f.name] != f.default
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildOptions:
        """Inverse of :meth:`to_json`; IntegrityError if ``data`` is something else."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        try:
            made = replace(cls(), **values)
        except (TypeError, UsageError) as error:
            raise IntegrityError(
                "The builder options of an engine cannot be read.", str(error), "Rebuild the bundle."
            ) from error
        if made.to_json() != dict(data):
            raise IntegrityError("The builder options of an engine cannot be read.", f"{dict(data)}")
        return made
