"""Key-value caches: of one call, of sequences decoded together, and of prefixes that conversations share.

- :class:`KVCache`: all rows have one length and take each step together (captions, beams, one conversation).
- :class:`BatchedKVCache`: each row has its own length and is inserted and released at any time.
- :class:`PrefixCache`: copies of first positions, in blocks, looked up by the content of the positions.

The first two are one array with spare capacity, see :func:`next_capacity`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..bundle.spec import Axis, ComponentSpec
from ..engines.device import Buffer, copied, zeros
from ..errors import UsageError
from ..forks import fork_safe_lock

GRAIN = 32
"""The capacity of a cache is a multiple of this many positions: a step computes over all of them."""


def next_capacity(needed: int, capacity: int, past: Axis) -> int:
    """The capacity of a cache whose longest sequence has ``needed`` positions.

    A full cache grows by an eighth at least, so that the positions copied stay in proportion to those
    written, and it shrinks when not half of it is needed. With a capacity of 1,024 the 1,025th position makes
    it 1,152 (1,024 + 128, a multiple of :data:`GRAIN`), which stays until 512 or fewer are needed.

    Args:
        needed: within ``past``.
        capacity: of the cache now; 0: there is none.
        past: the axis of the step engine.
    """

    def rounded(positions: int) -> int:
        return max(needed, past.min, min(-(-positions // GRAIN) * GRAIN, past.max))

    if needed <= capacity < 2 * rounded(needed + needed // 8):
        return capacity
    return rounded(max(needed, capacity + capacity // 8) if needed > capacity else needed)


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
        """A cache for positions such as ``like`` [2, layers, rows, heads, n, head_dim], on its device."""
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
        """Change the capacity to ``capacity`` positions (at least :attr:`length`); the stored ones stay."""
        data, mask = self.data[..., : self.length, :], self.mask[:, : self.length]
        self.data = zeros((*self.data.shape[:4], capacity, self.data.shape[5]), self.data)
        self.data[..., : self.length, :] = data
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


class BatchedKVCache:
    """Keys and values of at most ``count`` sequences, of different lengths, which take each step together.

    Layout: as :class:`KVCache`; row ``r`` is slot ``r``, whose positions 0 to ``lengths[r] - 1`` are held and
    visible. A new sequence takes the lowest free slot, and a step computes the rows up to the last one in
    use: the engine's input is contiguous, and no sequence ever moves. A free row between others attends
    only to the token of its own step, so that it stays finite.

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

    def insert(self, data: Any) -> int:
        """Copy keys and values ``data`` [2, layers, heads, n, head_dim], n >= 1, into a free slot; its
        number.

        One must be free.
        """
        slot = int(np.flatnonzero(self.lengths == 0)[0])
        length = data.shape[3]
        self._fit(max(length, int(self.lengths.max())), data[:, :, None])
        self._data[:, :, slot, :, :length] = data
        self.lengths[slot] = length
        return slot

    def read_from(self, slot: int, position: int) -> Any:
        """A copy of the keys and values in ``slot`` from ``position`` on, [2, layers, heads, n, head_dim]."""
        return copied(self._data[:, :, slot, :, position : self.lengths[slot]])

    def release(self, slot: int) -> None:
        """Free ``slot`` for the next sequence; its positions are hidden from now on."""
        self.lengths[slot] = 0

    def feeds(self) -> dict[str, Any]:
        """The inputs of a step of one token a row, without the tokens, for :attr:`rows` rows.

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
        """Write the step's ``key.{i}`` and ``value.{i}`` [rows, heads, 1, head_dim] after each sequence."""
        used = np.flatnonzero(self.lengths)
        places = self.lengths[used]
        for which, kind in enumerate(("key", "value")):
            for i in range(self._data.shape[1]):
                self._data[which, i][used, :, places] = outputs[f"{kind}.{i}"][used, :, 0]
        self.lengths[used] += 1

    def _fit(self, needed: int, like: Any) -> None:
        """Resize for ``needed`` positions a row; a new array has the device and sizes of ``like``."""
        before = 0 if self._data is None else self._data.shape[4]
        capacity = next_capacity(needed, before, self._past)
        if capacity == before:
            return
        kinds, layers, _, heads, _, width = like.shape
        data = zeros((kinds, layers, len(self.lengths), heads, capacity, width), like)
        if self._data is not None:
            written = min(int(self.lengths.max()), capacity)
            data[..., :written, :] = self._data[..., :written, :]
        self._data = data


BLOCK = 16
"""Positions of a :class:`PrefixCache` that are kept or dropped together; a rest at the end is not kept."""
PREFIX_BYTES = 2**29
"""The usual size of a :class:`PrefixCache`."""
_FIRST = -1


@dataclass(frozen=True)
class _Entry:
    number: int
    value: Any
    nbytes: int


class PrefixCache:
    """First positions of conversations and embeddings of their images, at most ``limit`` bytes of arrays.

    Positions are kept in blocks of :data:`BLOCK`. A block's key is the content of its positions and the
    block before it: conversations that begin alike share their first blocks, whatever follows. (So does
    vLLM's automatic prefix caching; prefixes are shared in PagedAttention, arXiv 2309.06180, section 4.4.)

    The least recently used goes first. A block counts as used after the blocks that follow it, so that no
    block outlives the blocks before it. Values are copies, never written to; they lie on the device of the
    cache that they came from. Safe to use from several threads.

    Raises:
        UsageError: a negative ``limit``.
    """

    def __init__(self, limit: int = PREFIX_BYTES) -> None:
        if limit < 0:
            raise UsageError("A store cannot have a negative size.", f"{limit} bytes.", "0 keeps nothing.")
        self.limit = limit
        self._nbytes = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # the least recently used first
        self._numbers = count()
        self._lock = fork_safe_lock()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._nbytes

    def find(self, keys: Sequence[Hashable]) -> list[Any]:
        """Blocks [2 (key, value), layers, 1, heads, BLOCK, head_dim] of the first positions, as far as held.

        ``keys``: content of each position.
        """
        with self._lock:
            return [self._entries[name].value for name in self._walk(keys)]

    def store(self, keys: Sequence[Hashable], data: Any) -> None:
        """Copy the first positions of ``data`` [2, layers, 1, heads, at least len(keys), head_dim].

        Positions that fill no block are left out, and so is the end where not all blocks fit.
        """
        positions = data.shape[4]
        blocks = len(keys) // BLOCK
        if positions:
            blocks = min(blocks, self.limit // max(int(data.nbytes) * BLOCK // positions, 1))
        with self._lock:
            stored = len(self._walk(keys))
        # Copied without the lock: others may read meanwhile.
        copies = {i: copied(data[..., i * BLOCK : (i + 1) * BLOCK, :]) for i in range(stored, blocks)}
        with self._lock:
            names = self._walk(keys)
            for i in range(len(names), blocks):
                if i not in copies:  # dropped by another thread since
                    break
                names.append(self._name(names, keys))
                self._put(names[-1], copies[i])
            self._use(names)

    def image(self, digest: bytes) -> Array | None:
        """The embeddings [V, H] of the image whose pixels have this digest, if they are held."""
        with self._lock:
            entry = self._entries.get(digest)
            self._use([digest] if entry else [])
            return entry.value if entry else None

    def store_image(self, digest: bytes, embeds: Array) -> None:
        """Keep a copy of an image's embeddings [V, H]."""
        if embeds.nbytes <= self.limit:
            with self._lock:
                if digest not in self._entries:
                    self._put(digest, embeds.copy())

    def _walk(self, keys: Sequence[Hashable]) -> list[Hashable]:
        """Names of the blocks that are held of ``keys``, which count as used now."""
        names: list[Hashable] = []
        while len(names) < len(keys) // BLOCK and (name := self._name(names, keys)) in self._entries:
            names.append(name)
        self._use(names)
        return names

    def _name(self, before: Sequence[Hashable], keys: Sequence[Hashable]) -> Hashable:
        """The name of the block after those named ``before``."""
        parent = self._entries[before[-1]].number if before else _FIRST
        return parent, tuple(keys[len(before) * BLOCK : (len(before) + 1) * BLOCK])

    def _use(self, names: Sequence[Hashable]) -> None:
        for name in reversed(names):
            self._entries.move_to_end(name)

    def _put(self, name: Hashable, value: Any) -> None:
        size = int(value.nbytes)
        while self._nbytes + size > self.limit:
            self._nbytes -= self._entries.popitem(last=False)[1].nbytes
        self._entries[name] = _Entry(next(self._numbers), value, size)
        self._nbytes += size
