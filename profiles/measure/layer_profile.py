"""Measured times of a component's layers: of each, by layer type, by block."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ...engines.layer_times import Event
from ..cost.flops import layer_type

OUTSIDE = "outside the blocks"
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)(?:[./]|$)")


@dataclass(frozen=True)
class LayerTime:
    """A layer's milliseconds in one call, mean of the calls that count."""

    name: str
    op: str
    ms: float

    @property
    def type(self) -> str:
        """The name without the block's number."""
        return layer_type(self.name)

    @property
    def block(self) -> str:
        """``block 3``, or :data:`OUTSIDE`."""
        match = _BLOCK.search(self.name)
        return f"block {match[1]}" if match else OUTSIDE


@dataclass(frozen=True)
class LayerProfile:
    """One component's layers in ``calls`` calls, of which the quicker half counts.

    ``call_ms`` is the mean of those calls, ``trace`` the quickest one's events.
    """

    component: str
    backend: str
    sizes: dict[str, int]
    calls: int
    call_ms: float
    layers: tuple[LayerTime, ...]
    trace: tuple[Event, ...] = ()

    @property
    def rest_ms(self) -> float:
        """Time of a call in none of its layers; with several threads at work it may be negative."""
        return self.call_ms - sum(layer.ms for layer in self.layers)

    def by(self, key: Callable[[LayerTime], str]) -> dict[str, float]:
        """Milliseconds of one call by ``key``, the most first."""
        sums: dict[str, float] = defaultdict(float)
        for layer in self.layers:
            sums[key(layer)] += layer.ms
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """Plain data with the sums; events go into the trace only."""
        data = {k: v for k, v in asdict(self).items() if k != "trace"}
        sums = {
            "by_op": self.by(lambda layer: layer.op),
            "by_type": self.by(lambda layer: layer.type),
            "by_block": self.by(lambda layer: layer.block),
        }
        return {**data, "rest_ms": self.rest_ms, **sums}
