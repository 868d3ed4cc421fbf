"""The key-value cache of a decoder: one block, with room for what is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.spec import Axis
from ..engines.device import Buffer, zeros

GRAIN = 32
"""A cache has a multiple of this many positions: a step computes over all of them."""


def fitted(longest: int, have: int, past: Axis) -> int:
    """Positions that a cache shall have for sequences of ``longest`` ones.

    It grows by an eighth at least, so that what is copied to make room stays in proportion to what is
    written, and shrinks when not half of it is needed.

    Args:
        longest: positions that are needed, within ``past``.
        have: positions there is room for now.
        past: what the step engine takes.
    """

    def rounded(positions: int) -> int:
        return max(longest, past.min, min(-(-positions // GRAIN) * GRAIN, past.max))

    if longest <= have < 2 * rounded(longest + longest // 8):
        return have
    return rounded(max(longest, have + have // 8) if longest > have else longest)


class KVCache:
    """Keys and values of all layers, for ``rows`` sequences of at most ``capacity`` positions.

    Layout: ``data`` [2 (key, value), layers, rows, heads, capacity, head_dim]. A layer's keys of some rows
    are one contiguous piece, so an engine takes them without a copy: it is handed all ``capacity`` positions
    every step, and ``mask`` [rows, capacity] (1 = visible) hides padding and the positions not written yet
    (they are zero). Shapes are thus the same from step to step. The image's queries fill positions 0..Q-1 and
    are always visible. ``data`` is a numpy array, or a torch tensor where the queries were left on a
    GPU; ``mask`` is on the host.
    """

    def __init__(self, data: Any, mask: NDArray[np.int64], length: int, shared: int) -> None:
        self.data, self.mask = data, mask
        self.length = length  # positions written
        self.shared = shared  # the first ones, equal in all beams of an image: the queries

    @classmethod
    def of_queries(cls, outputs: Mapping[str, Buffer], layers: int, capacity: int) -> KVCache:
        """A cache that starts with the query pass' ``key.{i}``, ``value.{i}`` [rows, heads, Q, head_dim]."""
        rows, heads, queries, width = outputs["key.0"].shape
        data = zeros((2, layers, rows, heads, capacity, width), outputs["key.0"])
        cache = cls(data, np.zeros((rows, capacity), np.int64), 0, queries)
        cache.append(outputs, np.ones((rows, queries), np.int64))
        return cache

    @classmethod
    def empty(cls, like: Any, capacity: int) -> KVCache:
        """A cache for positions such as ``like`` [2, layers, rows, heads, n, head_dim], which lies there."""
        shape = tuple(like.shape)
        data = zeros((*shape[:4], capacity, shape[5]), like)
        return cls(data, np.zeros((shape[2], capacity), np.int64), 0, 0)

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return int(self.data.shape[4])

    @property
    def rows(self) -> int:
        """Sequences held."""
        return int(self.data.shape[2])

    def feeds(self) -> dict[str, Any]:
        """``past_key.{i}`` and ``past_value.{i}`` [rows, heads, capacity, head_dim], views of the cache."""
        names = ("past_key", "past_value")
        layers = range(self.data.shape[1])
        return {f"{name}.{i}": self.data[kind, i] for kind, name in enumerate(names) for i in layers}

    def row(self, row: int) -> Any:
        """A copy of the visible keys and values of one row, [2, layers, heads, n, head_dim]."""
        return self.data[:, :, row][..., np.flatnonzero(self.mask[row]), :]

    def append(self, outputs: Mapping[str, Any], mask: NDArray[np.int64]) -> None:
        """Write new positions: ``key.{i}``, ``value.{i}`` [rows, heads, n, head_dim], ``mask`` [rows, n]."""
        end = self.length + mask.shape[1]
        if end > self.data.shape[4]:
            raise ValueError(f"{end} positions in a cache of {self.data.shape[4]}")
        for kind, name in enumerate(("key", "value")):
            for layer in range(self.data.shape[1]):
                self.data[kind, layer, :, :, self.length : end] = outputs[f"{name}.{layer}"]
        self.mask[:, self.length : end] = mask
        self.length = end

    def extend(self, data: Any) -> None:
        """Write new positions [2, layers, rows, heads, n, head_dim], all visible."""
        end = self.length + data.shape[4]
        self.data[..., self.length : end, :] = data
        self.mask[:, self.length : end] = 1
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on: hidden, they may hold anything."""
        self.mask[:, length:] = 0
        self.length = min(self.length, length)

    def resize(self, capacity: int) -> None:
        """Have room for ``capacity`` positions, no fewer than are held; these stay."""
        held, mask = self.data[..., : self.length, :], self.mask[:, : self.length]
        self.data = zeros((*self.data.shape[:4], capacity, self.data.shape[5]), self.data)
        self.data[..., : self.length, :] = held
        self.mask = np.zeros((self.rows, capacity), np.int64)
        self.mask[:, : self.length] = mask

    def expand(self, source: NDArray[np.int64]) -> KVCache:
        """A new cache whose row ``r`` is this one's ``source[r]``: an image's row for each of its beams."""
        # take, unlike data[:, :, source], gives a contiguous array; torch's does so either way.
        whole = (
            np.take(self.data, source, 2) if isinstance(self.data, np.ndarray) else self.data[:, :, source]
        )
        return KVCache(whole, self.mask[source], self.length, self.shared)

    def reorder(self, source: NDArray[np.int64]) -> None:
        """Row ``r`` becomes row ``source[r]`` of the same image; the queries' positions need no move."""
        moved = np.flatnonzero(source != np.arange(self.rows))
        if len(moved):
            text = np.s_[self.shared : self.length]
            self.data[:, :, moved, :, text] = self.data[:, :, source[moved], :, text]
            self.mask[moved] = self.mask[source[moved]]
