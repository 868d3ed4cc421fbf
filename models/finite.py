"""Looking for NaN and infinity in stored weights: every byte is read once, at about the speed of the disk.

A float is NaN or infinite where all bits of its exponent are set, so integers are compared: no value is
converted, and 8-bit and 16-bit types need no arithmetic of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError
from .storage import TensorRef

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

BLOCK_BYTES = 1 << 20
"""Bytes looked at a time: a block and the scratch array beside it stay in the processor's cache."""
READERS = 2
LISTED = 5

_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float8_e5m2": (np.uint8, 0x7C),
    "float8_e4m3fn": (np.uint8, 0x7F),  # no infinity, and NaN is all ones
}
"""Type to the integers of its size, and the bits that are all set in a value that is not finite."""


@dataclass(frozen=True)
class NonFinite:
    """Values of one tensor that are not finite.

    Args:
        name: the tensor.
        index: where the first of them is.
        value: ``NaN``, ``inf`` or ``-inf``: the first of them.
        count: how many there are.
    """

    name: str
    index: tuple[int, ...]
    value: str
    count: int

    def __str__(self) -> str:
        more = f", and {self.count - 1} more of its values are not finite" if self.count > 1 else ""
        return f"{self.name}{list(self.index) if self.index else ''} is {self.value}{more}"


class FiniteCheck:
    """Looks at one tensor piece by piece, in any order of whole values.

    Args:
        name: the tensor.
        dtype: its type, as :class:`.storage.TensorRef` names it; other types than floats are never wrong.
        shape: its shape.
    """

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape
        self._words, self._mask = _BITS.get(dtype, (np.uint8, 0))
        self._dtype, self._first, self._count = dtype, -1, 0
        self._text = ""
        self._scratch = np.empty(0, self._words)

    def look(self, data: memoryview, begin: int) -> None:
        """Look at ``data``, which begins at byte ``begin`` of the tensor."""
        if not self._mask:
            return
        size = np.dtype(self._words).itemsize
        words = np.frombuffer(data, self._words)
        for start in range(0, len(words), BLOCK_BYTES // size):
            self._block(words[start : start + BLOCK_BYTES // size], begin // size + start)

    def result(self) -> NonFinite | None:
        """What was seen; None where all values are finite."""
        if not self._count:
            return None
        index = tuple(int(i) for i in np.unravel_index(self._first, self.shape)) if self.shape else ()
        return NonFinite(self.name, index, self._text, self._count)

    def _block(self, words: np.ndarray[Any, Any], begin: int) -> None:
        if len(self._scratch) < len(words):
            self._scratch = np.empty(len(words), self._words)
        scratch = self._scratch[: len(words)]
        np.bitwise_and(words, self._words(self._mask), out=scratch)
        if int(scratch.max(initial=0)) != self._mask:
            return
        places = np.flatnonzero(scratch == self._mask)
        self._count += len(places)
        first = begin + int(places[0])
        if self._first < 0 or first < self._first:
            self._first, self._text = first, self._shown(int(words[places[0]]))

    def _shown(self, word: int) -> str:
        bits = 8 * np.dtype(self._words).itemsize
        magnitude = word & ((1 << (bits - 1)) - 1)
        if magnitude != self._mask or self._dtype == "float8_e4m3fn":
            return "NaN"
        return "-inf" if word >> (bits - 1) else "inf"


def non_finite(
    checkpoint: Checkpoint, keys: Iterable[str], progress: Callable[[int], None] = lambda done: None
) -> list[NonFinite]:
    """The tensors among ``keys`` that hold NaN or infinity; all of their bytes are read.

    Args:
        checkpoint: an opened checkpoint.
        keys: published keys.
        progress: callback with the number of bytes done.

    Raises:
        CheckpointError: a file cannot be read, or became shorter.
    """
    refs = checkpoint.tensors
    order = sorted(dict.fromkeys(keys), key=lambda key: (refs[key].file, refs[key].offset or 0))
    for key in order:  # opened here: readers are not made for several threads at once
        if refs[key].offset is None:
            checkpoint.load(key)
    reports = []
    done = 0
    with ThreadPoolExecutor(READERS) as pool:
        for key, report in zip(order, pool.map(lambda key: _look_at(checkpoint, key), order), strict=True):
            done += refs[key].nbytes
            progress(done)
            if report is not None:
                reports.append(report)
    return reports


def check_finite(
    checkpoint: Checkpoint, keys: Iterable[str], progress: Callable[[int], None] = lambda done: None
) -> None:
    """CheckpointError naming tensor, index and value where :func:`non_finite` reports any."""
    if reports := non_finite(checkpoint, keys, progress):
        raise not_finite(str(checkpoint.path), reports)


def not_finite(source: str, reports: list[NonFinite]) -> CheckpointError:
    """The error for weights that hold NaN or infinity."""
    more = f"; and {len(reports) - LISTED} more tensors" if len(reports) > LISTED else ""
    return CheckpointError(
        f"{source} holds weights that are not finite.",
        f"{'; '.join(map(str, reports[:LISTED]))}{more}.",
        "Download it again, or save it anew from a training step before its loss became NaN.",
    )


def _look_at(checkpoint: Checkpoint, key: str) -> NonFinite | None:
    ref = checkpoint.tensors[key]
    check = FiniteCheck(key, ref.dtype, ref.shape)
    begin = 0
    for piece in _pieces(ref) if ref.offset is not None else (checkpoint.file_bytes(key),):
        check.look(piece, begin)
        begin += len(piece)
    return check.result()


def _pieces(ref: TensorRef) -> Iterator[memoryview]:
    """The bytes of a tensor, read into one buffer again and again: no pages are mapped for them."""
    assert ref.offset is not None
    buffer = memoryview(bytearray(min(BLOCK_BYTES, ref.nbytes)))
    try:
        with ref.file.open("rb", buffering=0) as file:
            file.seek(ref.offset)
            left = ref.nbytes
            while left:
                piece = buffer[: min(len(buffer), left)]
                size = 0
                while size < len(piece):
                    more = file.readinto(piece[size:])
                    if not more:
                        raise CheckpointError(f"{ref.file} has become shorter.", f"{left} bytes are gone.")
                    size += more
                left -= size
                yield piece
    except OSError as error:
        raise CheckpointError(f"{ref.file} cannot be read.", error.strerror or str(error)) from error
