"""Settings of the TensorRT builders, as data: for the command line, the manifest and a step's hash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import IntegrityError, UsageError
from ...files.cache_dir import parse_size
from ...files.json import decode
from ...settings import SWITCH, Setting, keyword, names, read_settings, refused, switch, text, whole

TILINGS = ("none", "fast", "moderate", "full")
HARDWARE = ("none", "ampere+", "same-cc")
TACTICS = ("edge-mask-convolutions", "jit-convolutions", "cublas", "cublas-lt", "cudnn")
LEVELS = range(6)


@dataclass(frozen=True)
class BuildOptions:
    """Builder settings; None and False mean the library's default. :mod:`.config` lists the requirements of
    each.

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

    Raises:
        UsageError: a value that its option does not take.
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
        allowed = (
            ("optimization-level", self.optimization_level, LEVELS),
            ("tiling", self.tiling, TILINGS),
            ("hardware-compatible", self.hardware, HARDWARE),
            *(("tactic-sources", source, TACTICS) for source in self.tactic_sources or ()),
        )
        for key, value, known in allowed:
            if value is not None and value not in known:
                raise refused(OPTIONS, key, value)
        for key, size in (("workspace", self.workspace_bytes), ("l2", self.l2_bytes)):
            if size is not None and size <= 0:
                raise refused(OPTIONS, key, size)

    @classmethod
    def of(cls, options: Mapping[str, object] | Iterable[str]) -> BuildOptions:
        """The settings of ``{"workspace": "2G", "refit": True}``, or of ``["workspace=2G", "refit"]``.

        Keys are those of :data:`OPTIONS`; a dash in them may be an underscore.

        Raises:
            UsageError: an unknown key, one that is given twice, or a value that it does not take.
        """
        return cls(**read_settings(OPTIONS, options, "engine option"))

    def flags(self) -> list[str]:
        """The words of ``ivl-export build`` that give these options."""
        keys = {keyword(OPTIONS, key): key for key in OPTIONS}
        words: list[str] = []
        for name, value in self.to_json().items():
            text = ",".join(value) or "none" if isinstance(value, list) else str(value)
            words += ["-O", keys[name] if value is True else f"{keys[name]}={text}"]
        return words

    def to_json(self) -> dict[str, Any]:
        """Plain data of the settings that differ from the defaults."""
        plain = asdict(self)
        return {
            f.name: list(value) if isinstance(value := plain[f.name], tuple) else value
            for f in fields(self)
            if plain[f.name] != f.default
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildOptions:
        """Inverse of :meth:`to_json`; IntegrityError if ``data`` is something else."""
        what, fix = "The builder options of an engine", "Rebuild the bundle."
        try:
            options = decode(cls, dict(data), what=what, fix=fix)
        except UsageError as error:
            raise IntegrityError(f"{what} cannot be read.", str(error), fix) from error
        if options.to_json() != dict(data):
            raise IntegrityError(f"{what} cannot be read.", f"{dict(data)}", fix)
        return options


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return parse_size(text(value), "a size")


OPTIONS: dict[str, Setting] = {
    "optimization-level": Setting(
        "0 to 5",
        "0 builds fastest, 5 gives the fastest engine; else the library's 3",
        whole(),
    ),
    "workspace": Setting(
        "a size: 512M, 2G", "scratch memory an engine may use", _size, name="workspace_bytes"
    ),
    "tactic-sources": Setting(f"{', '.join(TACTICS)}, or none", "where kernels may come from", names),
    "tiling": Setting(", ".join(TILINGS), "how hard to look for tilings in the L2 cache", text),
    "l2": Setting("a size: 32M", "how much of the L2 cache a tiling may use", _size, name="l2_bytes"),
    "weight-streaming": Setting(SWITCH, "weights may stay in host memory, streamed while running", switch),
    "refit": Setting(SWITCH, "weights can be exchanged in the engine; needs a GPU", switch),
    "strip-plan": Setting(SWITCH, "engines without weights, put in when opened; needs a GPU", switch),
    "hardware-compatible": Setting(
        ", ".join(HARDWARE), "tensorrt: which other GPUs the engine runs on", text, name="hardware"
    ),
    "version-compatible": Setting(SWITCH, "tensorrt: later releases can load the engine", switch),
}
"""The keys of ``-O KEY=VALUE``."""
