"""Component contracts: inputs, outputs and the range of every dynamic axis.

A :class:`ComponentSpec` is the only source for tracing, engine optimization profiles, run-time checks,
the manifest and the docs. It imports nothing heavy, so that the runtime can use it without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..errors import InputError, UsageError
from ..files.json import Count, Name


class Shaped(Protocol):
    """An array or tensor, as far as its sizes go."""

    @property
    def shape(self) -> Any:
        """Its sizes."""
        ...


SUMS = {"total": ("past", "text")}
"""Axes that are the sum of others."""
_PLUS = re.compile(r"(\w+)\.plus\.(\d+)")


def terms(axis: str) -> tuple[str | int, ...]:
    """Terms of an axis that is a sum: axes, or one and a number (``text.plus.16``); empty if it is none."""
    match = _PLUS.fullmatch(axis)
    return (match[1], int(match[2])) if match else SUMS.get(axis, ())


FEATURES = "features."
"""Prefix of the outputs of ``vision`` that are a block's; the block's number follows."""


def feature_name(block: int) -> str:
    """The output of ``vision`` that is the hidden state after ``block`` blocks."""
    return f"{FEATURES}{block}"


def block_number(block: int, depth: int) -> int:
    """``block`` of a tower of ``depth`` blocks, as a number from 1 to ``depth``; -1 is the last.

    A negative number counts as in ``mm_vision_select_layer``: -4 of 48 blocks is block 45.

    Raises:
        UsageError: there is no such block.
    """
    if not 1 <= abs(block) <= depth:
        raise UsageError(
            f"There is no block {block}.",
            f"The vision tower has {depth}.",
            f"Give a number from 1 to {depth}, or -1 (the last) to -{depth}.",
        )
    return block % (depth + 1)


def part_starts(blocks: int, count: int) -> list[int]:
    """The first block of each of ``count`` parts of a split component, as equal as can be."""
    return [k * blocks // count for k in range(count)]


@dataclass(frozen=True)
class Axis:
    """A dynamic axis and the range an engine is built for (``opt``: the size it is tuned for)."""

    name: Name
    min: Count
    opt: Count
    max: Count

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"axis {self.name}: need 0 <= min <= opt <= max, got {self}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. ``shape`` mixes fixed sizes with axis names: ``("batch", 3, 224, 224)``.

    ``dtype`` is ``"float"`` for the graph's compute type (float32, bfloat16 or float16, by graph variant),
    or a numpy name for the rest.
    """

    name: Name
    dtype: Name
    shape: tuple[Count | str, ...]


@dataclass(frozen=True)
class ComponentSpec:
    """A component's name, inputs, outputs and dynamic axes."""

    name: Name
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...]

    def axis(self, name: str) -> Axis:
        """The axis called ``name``; KeyError if there is none."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(name)

    def shape(self, tensor: TensorSpec, which: str) -> tuple[int, ...]:
        """Concrete shape with every dynamic axis at its ``min``, ``opt`` or ``max``."""
        return tuple(d if isinstance(d, int) else int(getattr(self.axis(d), which)) for d in tensor.shape)

    def select(self, outputs: Sequence[str] | None) -> list[str]:
        """``outputs`` as a list, all of them if None; UsageError for one that there is not."""
        names = [t.name for t in self.outputs]
        unknown = [name for name in outputs or () if name not in names]
        if unknown:
            raise UsageError(
                f"Component {self.name} has no output {unknown[0]!r}.", f"It has {', '.join(names)}."
            )
        return names if outputs is None else list(outputs)

    def check(self, inputs: Mapping[str, Shaped]) -> dict[str, int]:
        """Sizes of the dynamic axes; InputError when names, ranks, sizes or shared axes do not fit."""
        names = {t.name for t in self.inputs}
        if set(inputs) != names:
            raise InputError(
                f"Component {self.name} got the wrong inputs.",
                f"missing {sorted(names - set(inputs))}, unexpected {sorted(set(inputs) - names)}.",
            )
        sizes: dict[str, int] = {}
        fitting: dict[tuple[int | str, ...], tuple[int, ...]] = {}
        for spec in self.inputs:
            got = tuple(inputs[spec.name].shape)
            if fitting.get(spec.shape) == got:  # keys and values of all layers: this runs before every token
                continue
            if len(got) != len(spec.shape):
                raise InputError(
                    f"Component {self.name}, input {spec.name}: wrong rank.",
                    f"got shape {list(got)}, need {list(spec.shape)}.",
                )
            for size, want in zip(got, spec.shape, strict=True):
                if isinstance(want, int):
                    if size != want:
                        raise InputError(
                            f"Component {self.name}, input {spec.name}: wrong size.",
                            f"got shape {list(got)}, need {list(spec.shape)}.",
                        )
                    continue
                axis = self.axis(want)
                if not axis.min <= size <= axis.max:
                    raise InputError(
                        f"Component {self.name}, input {spec.name}: axis {want} is out of range.",
                        f"got {size}, the bundle was built for {axis.min}..{axis.max}.",
                        "Split the request, or rebuild with a larger range.",
                    )
                if sizes.setdefault(want, size) != size:
                    raise InputError(
                        f"Component {self.name}: axis {want} differs between inputs.",
                        f"{spec.name} has {size}, an earlier input has {sizes[want]}.",
                    )
            fitting[spec.shape] = got
        return sizes

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)
