"""Places in one key-value cache, each for a sequence of its own length that comes and goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bundle.spec import ComponentSpec
from ..engines.device import copied, zeros
from .kv_cache import fitted


class Slots:
    """At most ``count`` sequences, whose steps are taken together.

    Layout: as :class:`.kv_cache.KVCache`; row ``r`` is slot ``r``, whose positions 0 to ``lengths[r] - 1``
    are
    held and visible. New sequences take the lowest slot, and a step computes the rows up to the last one in
    use: what is passed to the engine lies in one piece, and no sequence ever moves. A free row between others
    sees nothing but the token it is given, so that it stays finite.

    Args:
        spec: the contract of the step engine.
        count: slots; no more than the engine has rows.
    """

    def __init__(self, spec: ComponentSpec, count: int) -> None:
        self._past = spec.axis("past")
        self.lengths = np.zeros(count, np.int64)  # 0: free
        self._data: Any = None  # it comes with the first sequence, on its device

    @property
    def rows(self) -> int:
        """Rows that a step computes."""
        return int(np.flatnonzero(self.lengths).max(initial=-1)) + 1

    def take(self, held: Any) -> int:
        """A slot for the sequence with keys and values ``held`` [2, layers, heads, n, head_dim], n >= 1.

        There must be a free one.
        """
        slot = int(np.flatnonzero(self.lengths == 0)[0])
        length = held.shape[3]
        self._fit(max(length, int(self.lengths.max())), held[:, :, None])
        self._data[:, :, slot, :, :length] = held
        self.lengths[slot] = length
        return slot

    def behind(self, slot: int, position: int) -> Any:
        """A copy of the keys and values in ``slot`` from ``position`` on, [2, layers, heads, n, head_dim]."""
        return copied(self._data[:, :, slot, :, position : self.lengths[slot]])

    def free(self, slot: int) -> None:
        """Let the next sequence have ``slot``; what is in it is hidden from now on."""
        self.lengths[slot] = 0

    def feeds(self) -> dict[str, Any]:
        """What a step of one token a row takes beside the tokens, for :attr:`rows` rows.

        ``positions`` and ``attention_mask`` are arrays, ``past_key.{i}`` and ``past_value.{i}`` views.
        """
        self._fit(int(self.lengths.max()) + 1, self._data)
        rows = self.rows
        lengths = self.lengths[:rows, None]
        capacity = self._data.shape[4]
        mask = np.ones((rows, capacity + 1), np.int64)
        mask[:, :capacity] = np.arange(capacity) < lengths
        past = {
            f"past_{kind}.{i}": self._data[which, i, :rows]
            for which, kind in enumerate(("key", "value"))
            for i in range(self._data.shape[1])
        }
        return {"positions": lengths.copy(), "attention_mask": mask, **past}

    def append(self, outputs: Mapping[str, Any]) -> None:
        """Write the step's ``key.{i}`` and ``value.{i}`` [rows, heads, 1, head_dim] behind each sequence."""
        used = np.flatnonzero(self.lengths)
        places = self.lengths[used]
        for which, kind in enumerate(("key", "value")):
            for i in range(self._data.shape[1]):
                self._data[which, i][used, :, places] = outputs[f"{kind}.{i}"][used, :, 0]
        self.lengths[used] += 1

    def _fit(self, longest: int, like: Any) -> None:
        """Have room for ``longest`` positions a row, and not for many more; ``like`` is such a cache."""
        have = 0 if self._data is None else self._data.shape[4]
        wanted = fitted(longest, have, self._past)
        if wanted == have:
            return
        kinds, layers, _, heads, _, width = like.shape
        made = zeros((kinds, layers, len(self.lengths), heads, wanted, width), like)
        if self._data is not None:
            kept = min(int(self.lengths.max()), wanted)
            made[..., :kept, :] = self._data[..., :kept, :]
        self._data = made
