"""Looking at stored weights: NaN, infinity, and channels that are denormal in a 16-bit type.

Every byte is read once, at about the speed of the disk. Without their sign, floats are ordered as the
integers of the same bits, and NaN and infinity are those with all bits of the exponent set: so integers are
compared, and 8-bit and 16-bit types need no special arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dtypes import dtype_of
from ..errors import CheckpointError
from .storage import TensorRef

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

BLOCK_BYTES = 1 << 20
"""Bytes checked at a time: a block and its scratch array stay in the processor's cache."""
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
"""Type to the integers of its size, and the first of them, without sign, that is not finite."""


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


@dataclass(frozen=True)
class Faint:
    """Channels of a weight whose largest value a 16-bit type holds in denormal numbers at best.

    Args:
        name: the tensor.
        channel: the faintest channel.
        value: its largest magnitude.
        count: how many channels are denormal, those that become zero among them.
        zeros: how many become zero.
        channels: how many there are.
    """

    name: str
    channel: int
    value: float
    count: int
    zeros: int
    channels: int

    def __str__(self) -> str:
        more = f", and {self.count - 1} more of {self.channels}" if self.count > 1 else ""
        return f"{self.name} channel {self.channel} ({self.value:.2g}){more}"


class FiniteCheck:
    """Looks at one tensor piece by piece, in any order of whole values.

    Args:
        name: the tensor.
        dtype: its type, as :class:`.storage.TensorRef` names it; other types than floats are never wrong.
        shape: its shape.
        by_channel: keep the largest magnitude of each channel (:func:`channels_of`) too.
    """

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], by_channel: bool = False) -> None:
        self.name, self.shape = name, shape
        self._words, self._mask = _BITS.get(dtype, (np.uint8, 0))
        self._dtype, self._first, self._count = dtype, -1, 0
        self._text = ""
        self._scratch = np.empty(0, self._words)
        count = channels_of(name, shape) if by_channel and self._mask else 0
        self._channels, self._each = np.zeros(count, self._words), math.prod(shape) // count if count else 0

    def look(self, data: memoryview, begin: int) -> None:
        """Look at ``data``, which begins at byte ``begin`` of the tensor."""
        if not self._mask:
            return
        size = np.dtype(self._words).itemsize
        words = np.frombuffer(data, self._words)
        for start in range(0, len(words), BLOCK_BYTES // size):
            self._block(words[start : start + BLOCK_BYTES // size], begin // size + start)

    def result(self) -> NonFinite | None:
        """The non-finite values counted; None if there are none."""
        if not self._count:
            return None
        index = tuple(int(i) for i in np.unravel_index(self._first, self.shape)) if self.shape else ()
        return NonFinite(self.name, index, self._text, self._count)

    def close(self) -> None:
        """Nothing more will be looked at: the scratch memory goes."""
        self._scratch = np.empty(0, self._words)

    def faint(self, floor: float, zero: float) -> Faint | None:
        """The channels whose largest magnitude is below ``floor`` and not 0; None where there is none.

        Up to ``zero`` a channel becomes zero.
        """
        largest = self._floats(self._channels)
        small = (largest > 0) & (largest < floor)
        if not small.any():
            return None
        channel = int(np.where(small, largest, np.inf).argmin())
        zeros = int((small & (largest <= zero)).sum())
        return Faint(self.name, channel, float(largest[channel]), int(small.sum()), zeros, len(largest))

    def _floats(self, words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if not len(words):
            return np.zeros(0, np.float64)
        values: np.ndarray[Any, Any] = words.view(dtype_of(self._dtype).numpy).astype(np.float64)
        return values

    def _block(self, words: np.ndarray[Any, Any], begin: int) -> None:
        if len(self._scratch) < len(words):
            self._scratch = np.empty(len(words), self._words)
        scratch = self._scratch[: len(words)]
        np.bitwise_and(words, self._words((1 << (8 * scratch.itemsize - 1)) - 1), out=scratch)
        if self._each and len(words):
            first = begin // self._each
            starts = np.arange(first, (begin + len(words) - 1) // self._each + 1) * self._each - begin
            starts[0] = 0
            known = self._channels[first : first + len(starts)]
            np.maximum(known, np.maximum.reduceat(scratch, starts), out=known)
        if int(scratch.max(initial=0)) < self._mask:
            return
        places = np.flatnonzero(scratch >= self._mask)
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


def channels_of(name: str, shape: tuple[int, ...]) -> int:
    """Channels of a weight that are checked one by one.

    The rows of a matrix, and the values of a vector that is multiplied by (a norm, LayerScale). A bias is
    added: one small value in it has no visible effect, so all of it is one channel.
    """
    if not math.prod(shape):
        return 0
    return 1 if not shape or name.endswith("bias") else shape[0]


def look_at(
    checkpoint: Checkpoint,
    keys: Iterable[str],
    progress: Callable[[int], None] = lambda count: None,
    by_channel: bool = False,
) -> list[FiniteCheck]:
    """Checks of the tensors ``keys``, in the order of their files; all of their bytes are read.

    Args:
        checkpoint: an opened checkpoint.
        keys: published keys.
        progress: callback with the number of bytes done.
        by_channel: keep the largest magnitude of each channel too.

    Raises:
        CheckpointError: a file cannot be read, or became shorter.
    """
    refs = checkpoint.tensors
    order = sorted(dict.fromkeys(keys), key=lambda key: (refs[key].file, refs[key].offset or 0))
    for key in order:  # opened here: readers are not made for several threads at once
        if refs[key].offset is None:
            checkpoint.load(key)
    checks = []
    bytes_done = 0
    with ThreadPoolExecutor(READERS) as pool:
        looked = pool.map(lambda key: _look_at(checkpoint, key, by_channel), order)
        for key, check in zip(order, looked, strict=True):
            bytes_done += refs[key].nbytes
            progress(bytes_done)
            checks.append(check)
    return checks


def non_finite(
    checkpoint: Checkpoint, keys: Iterable[str], progress: Callable[[int], None] = lambda count: None
) -> list[NonFinite]:
    """The tensors among ``keys`` that hold NaN or infinity; see :func:`look_at`."""
    return [report for check in look_at(checkpoint, keys, progress) if (report := check.result())]


def check_finite(
    checkpoint: Checkpoint, keys: Iterable[str], progress: Callable[[int], None] = lambda count: None
) -> None:
    """CheckpointError naming tensor, index and value where :func:`non_finite` reports any."""
    if reports := non_finite(checkpoint, keys, progress):
        raise not_finite(str(checkpoint.path), reports)


def check_weights(
    checkpoint: Checkpoint,
    floors: Mapping[str, tuple[float, float]],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Faint]:
    """As :func:`check_finite`; returns the weights with denormal channels, those with most of them first.

    ``floors`` says of each key below which magnitude a channel is denormal, and up to which it is zero.
    """
    checks = look_at(checkpoint, floors, progress, by_channel=True)
    if reports := [report for check in checks if (report := check.result())]:
        raise not_finite(str(checkpoint.path), reports)
    faint = [weight for check in checks if (weight := check.faint(*floors[check.name]))]
    return sorted(faint, key=lambda weight: (-weight.zeros, -weight.count))


def not_finite(source: str, reports: list[NonFinite]) -> CheckpointError:
    """The error for weights that hold NaN or infinity."""
    more = f"; and {len(reports) - LISTED} more tensors" if len(reports) > LISTED else ""
    return CheckpointError(
        f"{source} holds weights that are not finite.",
        f"{'; '.join(map(str, reports[:LISTED]))}{more}.",
        "Download it again, or save it again from a training step before its loss became NaN.",
    )


def _look_at(checkpoint: Checkpoint, key: str, by_channel: bool) -> FiniteCheck:
    ref = checkpoint.tensors[key]
    check = FiniteCheck(key, ref.dtype, ref.shape, by_channel)
    begin = 0
    for piece in _pieces(ref) if ref.offset is not None else (checkpoint.file_bytes(key),):
        check.look(piece, begin)
        begin += len(piece)
    check.close()
    return check


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
