"""Rotary embeddings as published configs describe them: the base, and how it is scaled for long contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CapabilityError, CheckpointError
from .section import Section

SCALINGS = ("default", "linear", "dynamic", "longrope", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embeddings.

    Args:
        theta: the base.
        scaling: one of :data:`SCALINGS`. ``linear`` divides all frequencies by ``factor``; ``dynamic`` (NTK)
            raises the base beyond ``original`` positions; ``longrope`` (Phi-3's ``su``) divides them by
            ``short_factor``, beyond ``original`` positions by ``long_factor``; ``llama3`` and ``yarn`` divide
            the slow ones by ``factor``, with a ramp between slow and fast.
        factor: see above.
        original: positions of the model before its context was extended.
        attention_factor: factor of cosines and sines (``longrope``, ``yarn``).
        fast, slow: ends of the ramp: ``beta_fast`` and ``beta_slow`` of ``yarn``, ``high_freq_factor`` and
            ``low_freq_factor`` of ``llama3``.
        truncate: ``yarn``: the ramp begins and ends at whole dimensions.
        short_factor, long_factor: one number for every frequency.
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    original: int = 0
    attention_factor: float = 1.0
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def check(self, head_dim: int) -> None:
        """CheckpointError where the factors do not fit heads of width ``head_dim``."""
        wrong = [n for n in (len(self.short_factor), len(self.long_factor)) if n != head_dim // 2]
        if self.scaling == "longrope" and wrong:
            raise CheckpointError(
                f"rope_scaling has {wrong[0]} factors.",
                f"Heads of {head_dim} have {head_dim // 2} frequencies.",
            )

    def within(self, positions: int) -> RopeConfig:
        """The same embeddings for at most ``positions`` positions, without scaling that acts only beyond."""
        if positions > self.original or self.scaling not in ("dynamic", "longrope"):
            return self
        if self.scaling == "dynamic":
            return RopeConfig(self.theta)
        return replace(self, long_factor=self.short_factor)


def read_rope(section: Section, kind: str, positions: int) -> RopeConfig:
    """The rotary embeddings of a decoder: its ``rope_scaling``, or ``rope_parameters`` (transformers 5).

    Args:
        section: the decoder's.
        kind: its ``model_type``.
        positions: its ``max_position_embeddings``.

    Raises:
        CheckpointError, CapabilityError: naming the key.
    """
    newer, older = section.object("rope_parameters") or {}, section.object("rope_scaling") or {}
    data = older or newer
    if not data and kind == "gpt_oss":  # the class's own default
        data = {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    s = Section(data, f"{section.where}: {'rope_scaling' if older else 'rope_parameters'}")
    if any(isinstance(value, dict) for value in data.values()):
        raise CapabilityError(
            f"{s.where} differs between layers.", "All layers of the family's decoders rotate alike."
        )
    for place in (section, s):
        place.only("partial_rotary_factor", 1, 1.0, why="Only heads that are rotated whole are implemented.")
    s.only("mrope_section", why="Its rotary embeddings have several axes, this family's have one.")
    scaling = s.text("rope_type") or s.text("type") or "default"
    if scaling == "su" or (scaling == "yarn" and kind == "phi3"):
        scaling = "longrope"  # earlier names of the same
    if scaling not in SCALINGS:
        raise CapabilityError(f"{s.where}.rope_type is {scaling!r}.", f"Implemented: {', '.join(SCALINGS)}.")
    default = 150000.0 if kind == "gpt_oss" else 10000.0
    theta = s.number("rope_theta", section.number("rope_theta", default))
    if theta <= 1:
        section.bad("rope_theta", "a number over 1")
    rope = _READERS[scaling](s, section, kind, positions, theta)
    s.ignore(("type", "rope_type", "short_mscale", "long_mscale"))
    unknown = s.unknown()
    if unknown:
        raise CapabilityError(
            f"{s.where} has {', '.join(k.rpartition('.')[2] for k in unknown)}.",
            f"Scaling {scaling!r} has no such setting.",
            "Every setting here changes the positions of all tokens, so none is passed over.",
        )
    return rope


def _default(s: Section, section: Section, kind: str, positions: int, theta: float) -> RopeConfig:
    s.ignore(("factor",))
    return RopeConfig(theta)


def _linear(s: Section, section: Section, kind: str, positions: int, theta: float) -> RopeConfig:
    return RopeConfig(theta, "linear", _factor(s))


def _dynamic(s: Section, section: Section, kind: str, positions: int, theta: float) -> RopeConfig:
    s.ignore(("original_max_position_embeddings",))  # not read by the published code
    return RopeConfig(theta, "dynamic", _factor(s), positions)


def _longrope(s: Section, section: Section, kind: str, positions: int, theta: float) -> RopeConfig:
    original = _original(s, section, 4096 if kind == "phi3" else positions)
    factor = _factor(s, positions / original)
    scale = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta,
        "longrope",
        factor,
        original,
        s.number("attention_factor", scale),
        short_factor=_factors(s, "short_factor"),
        long_factor=_factors(s, "long_factor"),
    )


def _llama3(s: Section, section: Section, kind: str, positions: int, theta: float) -> RopeConfig:
    slow, fast = s.number("low_freq_factor", 1.0), s.number("high_freq_factor", 4.0)
    if not 0 < slow < fast:
        s.bad("high_freq_factor", f"a number over low_freq_factor, {slow}, which is over 0")
    return RopeConfig(theta, "llama3", _factor(s), _original(s, section, positions), fast=fast, slow=slow)


def _yarn(s: Section, section: Section, kind: str, positions: int, theta: float) -> RopeConfig:
    original = _original(s, section, positions)
    factor = _factor(s, positions / original)
    mscale, all_dims = s.number("mscale", 0.0), s.number("mscale_all_dim", 0.0)

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    natural = scale(mscale) / scale(all_dims) if mscale and all_dims else scale(1.0)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        s.number("attention_factor", natural),
        s.number("beta_fast", 32.0) or 32.0,
        s.number("beta_slow", 1.0) or 1.0,
        s.flag("truncate", True),
    )


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "longrope": _longrope,
    "llama3": _llama3,
    "yarn": _yarn,
}


def _factor(s: Section, default: float | None = None) -> float:
    factor = s.number("factor", 0.0 if default is None else default)
    if factor <= 0:
        s.bad("factor", "a number over 0")
    return factor


def _original(s: Section, section: Section, default: int) -> int:
    """The context before it was extended; a value outside ``rope_scaling`` (Phi-3) comes first."""
    inner = s.integer("original_max_position_embeddings", default, most=1 << 31)
    return section.integer("original_max_position_embeddings", inner, most=1 << 31)


def _factors(s: Section, key: str) -> tuple[float, ...]:
    values = s.items(key)
    if not values or not all(type(v) in (int, float) and math.isfinite(v) and v > 0 for v in values):
        s.bad(key, "a list of numbers over 0")
    return tuple(map(float, values))


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The keys of a decoder's section that :func:`read_rope` reads back to ``rope``."""
    data: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.scaling == "default":
        return data
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("longrope", "llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original
    if rope.scaling == "longrope":
        scaling |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
        data["original_max_position_embeddings"] = rope.original
    if rope.scaling in ("longrope", "yarn"):
        scaling["attention_factor"] = rope.attention_factor
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.slow, "high_freq_factor": rope.fast}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.fast, "beta_slow": rope.slow, "truncate": rope.truncate}
    return data | {"rope_scaling": scaling}
