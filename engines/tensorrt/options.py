"""Settings of the TensorRT builders, as data: for the command line, the manifest and a step's hash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from ...errors import IntegrityError, UsageError
from ...files.cache_dir import parse_size
from ...files.json import decode

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
                raise _refused(key, value)
        for key, size in (("workspace", self.workspace_bytes), ("l2", self.l2_bytes)):
            if size is not None and size <= 0:
                raise _refused(key, size)

    @classmethod
    def of(cls, options: Mapping[str, object] | Iterable[str]) -> BuildOptions:
        """The settings of ``{"workspace": "2G", "refit": True}``, or of ``["workspace=2G", "refit"]``.

        Keys are those of :data:`OPTIONS`; a dash in them may be an underscore.

        Raises:
            UsageError: an unknown key, one that is given twice, or a value that it does not take.
        """
        pairs = options.items() if isinstance(options, Mapping) else map(_key_and_value, options)
        values: dict[str, Any] = {}
        for name, value in pairs:
            key = name.replace("_", "-")
            if key not in OPTIONS:
                raise _unknown(name)
            option = OPTIONS[key]
            if option.field in values:
                raise UsageError(f"-O {key} is given twice.", "It has one value.", "Leave one of them out.")
            values[option.field] = option.read(key, value)
        return cls(**values)

    def flags(self) -> list[str]:
        """The words of ``ivl-export build`` that give these options."""
        keys = {option.field: key for key, option in OPTIONS.items()}
        words: list[str] = []
        for name, value in self.to_json().items():
            text = ",".join(value) or "none" if isinstance(value, list) else str(value)
            words += ["-O", keys[name] if value is True else f"{keys[name]}={text}"]
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
        what, fix = "The builder options of an engine", "Rebuild the bundle."
        try:
            options = decode(cls, dict(data), what=what, fix=fix)
        except UsageError as error:
            raise IntegrityError(f"{what} cannot be read.", str(error), fix) from error
        if options.to_json() != dict(data):
            raise IntegrityError(f"{what} cannot be read.", f"{dict(data)}", fix)
        return options


@dataclass(frozen=True)
class Option:
    """A setting as it is typed.

    Args:
        field: of :class:`BuildOptions`.
        values: what may be given, for people.
        meaning: in one line.
        read: the field's value of a key and what was given for it.
    """

    field: str
    values: str
    meaning: str
    read: Callable[[str, object], object]


def _key_and_value(text: str) -> tuple[str, object]:
    """``key=value``; of ``key`` alone the value is True."""
    key, equals, value = text.partition("=")
    return key.strip(), value.strip() if equals else True


def _level(key: str, value: object) -> object:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _refused(key, value)


def _size(key: str, value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return parse_size(str(value), key)
    except UsageError:
        raise _refused(key, value) from None


def _names(key: str, value: object) -> object:
    if isinstance(value, str):
        value = [] if value == "none" else value.split(",")
    if not isinstance(value, list | tuple):
        raise _refused(key, value)
    return tuple(str(name).strip() for name in value)


def _choice(key: str, value: object) -> object:
    if not isinstance(value, str):
        raise _refused(key, value)
    return value


def _switch(key: str, value: object) -> object:
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise _refused(key, value)
    return known[str(value).lower()]


_SWITCH = "nothing, true or false"
OPTIONS: dict[str, Option] = {
    "optimization-level": Option(
        "optimization_level",
        "0 to 5",
        "0 builds fastest, 5 gives the fastest engine; else the library's 3",
        _level,
    ),
    "workspace": Option("workspace_bytes", "a size: 512M, 2G", "scratch memory an engine may use", _size),
    "tactic-sources": Option(
        "tactic_sources", f"{', '.join(TACTICS)}, or none", "where kernels may come from", _names
    ),
    "tiling": Option("tiling", ", ".join(TILINGS), "how hard to look for tilings in the L2 cache", _choice),
    "l2": Option("l2_bytes", "a size: 32M", "how much of the L2 cache a tiling may use", _size),
    "weight-streaming": Option(
        "weight_streaming", _SWITCH, "weights may stay in host memory, streamed while running", _switch
    ),
    "refit": Option("refit", _SWITCH, "weights can be exchanged in the engine; needs a GPU", _switch),
    "strip-plan": Option(
        "strip_plan", _SWITCH, "engines without weights, put in when opened; needs a GPU", _switch
    ),
    "hardware-compatible": Option(
        "hardware", ", ".join(HARDWARE), "tensorrt: which other GPUs the engine runs on", _choice
    ),
    "version-compatible": Option(
        "version_compatible", _SWITCH, "tensorrt: later releases can load the engine", _switch
    ),
}
"""The keys of ``-O KEY=VALUE``."""


def _refused(key: str, value: object) -> UsageError:
    option = OPTIONS[key]
    example = option.values.removeprefix("a size: ").replace(" to ", ",").split(",")[0]
    typed = key if option.values == _SWITCH else f"{key}={example}"
    return UsageError(
        f"-O {key} does not take {value!r}.",
        f"It takes {option.values}: {option.meaning}.",
        f"Give -O {typed}, or leave it out.",
    )


def _unknown(name: str) -> UsageError:
    close = get_close_matches(name.replace("_", "-"), OPTIONS, 2)
    lines = [f"\n    {key} ({option.values}): {option.meaning}" for key, option in OPTIONS.items()]
    return UsageError(
        f"There is no engine option {name!r}.",
        "Known:" + "".join(lines),
        f"Did you mean -O {' or '.join(close)}?" if close else "Give -O KEY=VALUE with one of these.",
    )
