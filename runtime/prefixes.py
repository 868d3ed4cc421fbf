"""What conversations share: keys and values of their first positions, and embeddings of their images.

Positions are kept in blocks of :data:`BLOCK`. A block is known by what its positions stand for and by the
block before it: conversations that begin alike share their first blocks, whatever follows. (So does vLLM's
automatic prefix caching; prefixes are shared in PagedAttention, arXiv 2309.06180, section 4.4.)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..engines.device import copied
from ..errors import UsageError
from ..inputs.preprocess import Array

BLOCK = 16
"""Positions kept or dropped together; what is left over at the end of a prefix is computed again."""
KEPT_BYTES = 2**29
_FIRST = -1


@dataclass(frozen=True)
class _Kept:
    number: int
    value: Any
    nbytes: int


class Prefixes:
    """A store of at most ``limit`` bytes of arrays, safe to use from several threads.

    What was not used for the longest time goes first. A block counts as used after the blocks behind it, so
    that no block is held whose way from the first position is gone. Values are copies, which nobody writes
    to; they lie where the cache lies that they came from.

    Raises:
        UsageError: a negative ``limit``.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        if limit < 0:
            raise UsageError("A store cannot have a negative size.", f"{limit} bytes.", "0 keeps nothing.")
        self.limit = limit
        self._nbytes = 0
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()  # the least recently used first
        self._numbers = count()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._nbytes

    def find(self, keys: Sequence[Hashable]) -> list[Any]:
        """Blocks [2 (key, value), layers, 1, heads, BLOCK, head_dim] of the first positions, as far as held.

        ``keys`` say what each position stands for.
        """
        with self._lock:
            return [self._kept[name].value for name in self._walk(keys)]

    def keep(self, keys: Sequence[Hashable], data: Any) -> None:
        """Keep copies of the first positions of ``data`` [2, layers, 1, heads, at least len(keys), head_dim].

        Positions that fill no block are left out, and so is the end of what does not fit as a whole.
        """
        positions = data.shape[4]
        fitting = len(keys) // BLOCK
        if positions:
            fitting = min(fitting, self.limit // max(int(data.nbytes) * BLOCK // positions, 1))
        with self._lock:
            held = len(self._walk(keys))
        # Copied without the lock: others may read meanwhile.
        made = {i: copied(data[..., i * BLOCK : (i + 1) * BLOCK, :]) for i in range(held, fitting)}
        with self._lock:
            names = self._walk(keys)
            for i in range(len(names), fitting):
                if i not in made:  # dropped by another thread since
                    break
                names.append(self._name(names, keys))
                self._put(names[-1], made[i])
            self._use(names)

    def image(self, digest: bytes) -> Array | None:
        """The embeddings [V, H] of the image whose pixels have this digest, if they are held."""
        with self._lock:
            found = self._kept.get(digest)
            self._use([digest] if found else [])
            return found.value if found else None

    def keep_image(self, digest: bytes, embeds: Array) -> None:
        """Keep a copy of an image's embeddings [V, H]."""
        if embeds.nbytes <= self.limit:
            with self._lock:
                if digest not in self._kept:
                    self._put(digest, embeds.copy())

    def _walk(self, keys: Sequence[Hashable]) -> list[Hashable]:
        """Names of the blocks that are held of ``keys``, which count as used now."""
        names: list[Hashable] = []
        while len(names) < len(keys) // BLOCK and (name := self._name(names, keys)) in self._kept:
            names.append(name)
        self._use(names)
        return names

    def _name(self, before: Sequence[Hashable], keys: Sequence[Hashable]) -> Hashable:
        """The name of the block behind those named ``before``."""
        parent = self._kept[before[-1]].number if before else _FIRST
        return parent, tuple(keys[len(before) * BLOCK : (len(before) + 1) * BLOCK])

    def _use(self, names: Sequence[Hashable]) -> None:
        for name in reversed(names):
            self._kept.move_to_end(name)

    def _put(self, name: Hashable, value: Any) -> None:
        size = int(value.nbytes)
        while self._nbytes + size > self.limit:
            self._nbytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[name] = _Kept(next(self._numbers), value, size)
        self._nbytes += size
