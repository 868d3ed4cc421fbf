"""Optimization profiles: the ranges of sizes an engine is built and tuned for, from a component's axes.

A component that grows a KV cache runs in two ways: a prompt of many positions once (prefill), then one
position a step (decode). It gets a profile for each; they share the weights in the engine. Decode reaches
from 1 to 4 positions: with a profile of exactly 1 TensorRT-RTX 1.7 kept a second copy of bf16 weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...bundle.spec import ComponentSpec, terms
from ...errors import UsageError

Range = tuple[int, int, int]
Profile = dict[str, Range]
"""Axis name -> smallest, tuned-for and largest size."""

PRESETS: dict[str, str] = {
    "latency": "single requests: tuned for batch 1, at most 8 at once",
    "throughput": "many images at once: tuned for the largest batch",
    "edge": "little memory: batch 1 and 256 MiB of workspace",
}
"""Name -> purpose. They change the axis ``batch``; ``edge`` limits the workspace as well."""
EDGE_WORKSPACE = 256 << 20
_LATENCY_BATCH = 8
_DECODE_MAX = 4


def profiles_of(
    spec: ComponentSpec, preset: str | None = None, shapes: Mapping[str, Range] | None = None
) -> tuple[Profile, ...]:
    """The profiles of ``spec``, every axis in each; the narrowest first, which is tried first at run time.

    Args:
        spec: its axes give the widest ranges, and the default sizes to tune for.
        preset: one of :data:`PRESETS`.
        shapes: ranges by axis name, or by ``component.axis`` for one component; they win over the preset.

    Raises:
        UsageError: an unknown preset, or a range outside the component's graph's.
    """
    if preset is not None and preset not in PRESETS:
        known = "; ".join(f"{name} ({what})" for name, what in PRESETS.items())
        raise UsageError(f"Unknown preset {preset!r}.", f"Known: {known}.", "Give -O preset=latency.")
    ranges = {axis.name: (axis.min, axis.opt, axis.max) for axis in spec.axes}
    if preset is not None and "batch" in ranges:
        ranges["batch"] = _batch(preset, ranges["batch"])
    whole = spec.name.partition(".")[0]  # of vision.1, a part of a split component
    for key, sizes in (shapes or {}).items():
        component, _, axis = key.rpartition(".")
        if axis in ranges and component in ("", whole):
            ranges[axis] = _within(key, sizes, ranges_of(spec)[axis])
    if not {"text", "past"} <= set(ranges):
        return (_summed(ranges),)
    low, best, high = ranges["text"]
    if low > _DECODE_MAX or high <= _DECODE_MAX:
        return (_summed(ranges),)
    decode = {**ranges, "text": (low, min(max(low, 1), _DECODE_MAX), _DECODE_MAX)}
    prefill = {**ranges, "text": (low, max(best, (high + 1) // 2), high)}
    return _summed(decode), _summed(prefill)


def ranges_of(spec: ComponentSpec) -> Profile:
    """All axes of ``spec`` as it says."""
    return {axis.name: (axis.min, axis.opt, axis.max) for axis in spec.axes}


def restrict_axes(spec: ComponentSpec, profiles: tuple[Profile, ...]) -> ComponentSpec:
    """``spec`` with the ranges that ``profiles`` cover together; as it is where there are none."""
    if not profiles:
        return spec
    axes = []
    for axis in spec.axes:
        ranges = [profile[axis.name] for profile in profiles if axis.name in profile]
        if ranges:
            low, high = min(r[0] for r in ranges), max(r[2] for r in ranges)
            axis = replace(axis, min=low, opt=ranges[0][1], max=high)
        axes.append(axis)
    return replace(spec, axes=tuple(axes))


def choose_profile(profiles: tuple[Profile, ...], sizes: Mapping[str, int]) -> int | None:
    """The first profile that holds ``sizes`` (axis name -> size); None if none does."""
    for index, profile in enumerate(profiles):
        if all(profile[axis][0] <= n <= profile[axis][2] for axis, n in sizes.items() if axis in profile):
            return index
    return None


def parse_shapes(texts: tuple[str, ...]) -> dict[str, Range]:
    """Ranges of ``("batch=1:8:32", "qllama_step.text=1:8:32")``; UsageError names the faulty text."""
    ranges: dict[str, Range] = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        parts = sizes.split(":")
        if not name or len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
            raise UsageError(
                f"--shapes cannot read {text!r}.",
                "It takes an axis and its smallest, tuned-for and largest size.",
                "Give --shapes batch=1:8:32, or batch=8 for that size only.",
            )
        low, best, high = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
        if not low <= best <= high:
            raise UsageError(
                f"--shapes {text} is out of order.",
                f"{low}, {best} and {high} are the smallest size, the one tuned for, and the largest.",
                f"Give --shapes {name}={':'.join(map(str, sorted((low, best, high))))}.",
            )
        if parts_of := terms(name.rpartition(".")[2]):
            raise UsageError(
                f"--shapes cannot set {name}.",
                f"It is {' plus '.join(map(str, parts_of))}.",
                "Set those.",
            )
        ranges[name] = (low, best, high)
    return ranges


def check_shape_names(shapes: Mapping[str, Range], specs: Mapping[str, ComponentSpec]) -> None:
    """UsageError if a key of ``shapes`` is an axis of no component of ``specs``."""
    own = {n: [axis.name for axis in s.axes if not terms(axis.name)] for n, s in specs.items()}
    known = {axis for axes in own.values() for axis in axes}
    known |= {f"{n}.{axis}" for n, axes in own.items() for axis in axes}
    for key in shapes:
        if key not in known:
            raise UsageError(
                f"--shapes knows no axis {key!r}.",
                f"Known: {', '.join(sorted(known))}.",
                "Name one of these.",
            )


def _batch(preset: str, batch: Range) -> Range:
    low, _, high = batch
    if preset == "throughput":
        return low, high, high
    return low, low, min(high, _LATENCY_BATCH) if preset == "latency" else low


def _within(key: str, sizes: Range, allowed: Range) -> Range:
    if sizes[0] < allowed[0] or sizes[2] > allowed[2]:
        raise UsageError(
            f"--shapes {key}={':'.join(map(str, sizes))} is out of range.",
            f"The graph takes {allowed[0]} to {allowed[2]}.",
            f"Give --shapes {key}={':'.join(map(str, allowed))} or less.",
        )
    return sizes


def _summed(ranges: Profile) -> Profile:
    """``ranges`` with every axis that is a sum of others set to their sum."""

    def summed(name: str, value: Range) -> Range:
        parts = [(t, t, t) if isinstance(t, int) else ranges.get(t) for t in terms(name)]
        present = [part for part in parts if part is not None]
        return _total(present) if present and len(present) == len(parts) else value

    return {name: summed(name, value) for name, value in ranges.items()}


def _total(parts: list[Range]) -> Range:
    low, best, high = (sum(part[i] for part in parts) for i in range(3))
    return low, best, high
