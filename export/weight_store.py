"""The weights store: one safetensors file that all graphs of a bundle point into.

Any safetensors reader opens it. A tensor that several components and both graph variants use is stored once;
:mod:`.binding` points their initializers at it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..dtypes import dtype_of
from ..errors import BuildError
from ..files.write import temporary_path
from ..models.finite import FiniteCheck, NonFinite
from ..models.storage import TensorRef, read_header
from .copying import copy_bytes, reserve, write_all

if TYPE_CHECKING:
    import torch


ALIGNMENT = 4096  # a page: memory maps and direct reads need it

Store = dict[str, TensorRef]
"""Stored name to its place, over all files of a store."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a store: its name, torch dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return dtype_of(self.dtype).nbytes(math.prod(self.shape))


@dataclass(frozen=True)
class StoreLayout:
    """Places of all tensors of a store, known before any is written.

    Tensors are sorted by the power of two in their size, largest first: each then starts at a multiple of
    that power (up to a page) without holes, which safetensors forbids.

    Args:
        path: the file.
        header: its first bytes, all before the tensors.
        refs: tensor to its place, as :func:`open_store` will read it.
        size: bytes of the file.
    """

    path: Path
    header: bytes
    refs: Store
    size: int


def plan_store(path: Path, tensors: Iterable[StoredTensor]) -> StoreLayout:
    """The layout of a store of ``tensors`` at ``path``; ValueError when a name is listed twice."""
    ordered = sorted(tensors, key=lambda t: (-_power_of_two(t.nbytes), t.name))
    header: dict[str, object] = {}
    begins, end = [], 0
    for t in ordered:
        begins.append(end)
        end += t.nbytes
        header[t.name] = {
            "dtype": dtype_of(t.dtype).safetensors,
            "shape": list(t.shape),
            "data_offsets": [begins[-1], end],
        }
    if len(header) != len(ordered):
        raise ValueError("a tensor is listed twice")
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    data = 8 + len(raw)
    refs = {
        t.name: TensorRef(path, t.name, t.dtype, t.shape, data + begin, t.nbytes)
        for t, begin in zip(ordered, begins, strict=True)
    }
    return StoreLayout(path, len(raw).to_bytes(8, "little") + raw, refs, data + end)


class StoreWriter:
    """Writes a store of known tensors as a stream; a context manager.

    Offsets are fixed by the layout, so rows of different tensors may come in any interleaving. The file
    appears under ``path`` when the block ends without an error, whole or not at all.
    """

    def __init__(self, path: Path, tensors: Sequence[StoredTensor]) -> None:
        self.path = path
        self._temporary = temporary_path(path)
        self._layout = plan_store(path, tensors)
        self._tensors = {t.name: t for t in tensors}
        self._written = dict.fromkeys(self._tensors, 0)
        self._file: FileIO | None = None

    def __enter__(self) -> StoreWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self._temporary, "w")
            reserve(self._file, self._layout.size)
            write_all(self._file, 0, memoryview(self._layout.header))
        except OSError as error:
            self._abandon()
            raise cannot_write(self.path, error) from error
        return self

    def write(self, name: str, values: torch.Tensor) -> None:
        """Append ``values`` (whole rows, of the tensor's dtype) to tensor ``name``.

        Raises:
            BuildError: more rows than the tensor has, another dtype, or the disk is full.
        """
        import torch

        tensor, row = self._tensors[name], self._written[name]
        nbytes = values.numel() * values.element_size()
        if str(values.dtype) != f"torch.{tensor.dtype}" or row + nbytes > tensor.nbytes:
            raise BuildError(
                f"The weights store got the wrong values for {name}.",
                f"{list(values.shape)} {values.dtype} after {row} of {tensor.nbytes} bytes of "
                f"{list(tensor.shape)} {tensor.dtype}.",
            )
        data = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with self._place(name) as (file, at):
            write_all(file, at, data)
        self._written[name] += nbytes

    def copy(self, name: str, ref: TensorRef, progress: Callable[[int], None]) -> NonFinite | None:
        """Make the bytes that ``ref`` points at tensor ``name``, which is of its dtype and shape.

        ``progress`` is called with the size of each piece.

        Returns:
            Report of NaN and infinite values, which are checked while copying; None: there are none.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was.
            BuildError: the disk is full.
        """
        if ref.offset is None or ref.nbytes != self._tensors[name].nbytes:
            raise ValueError(f"{ref} cannot be copied to {self._tensors[name]}")
        check = FiniteCheck(name, ref.dtype, ref.shape)
        with self._place(name) as (file, at):
            copy_bytes(ref.file, ref.offset, file, at, ref.nbytes, progress, check.look)
        self._written[name] += ref.nbytes
        return check.result()

    @contextlib.contextmanager
    def _place(self, name: str) -> Iterator[tuple[FileIO, int]]:
        """The file, and the byte where tensor ``name`` continues; errors name the file."""
        assert self._file is not None, "used outside its with block"
        begin = self._layout.refs[name].offset
        assert begin is not None
        try:
            yield self._file, begin + self._written[name]
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        short = [n for n, t in self._tensors.items() if self._written[n] != t.nbytes]
        if short:
            self._abandon()
            raise BuildError(
                f"{len(short)} tensors of the weights store are incomplete.", f"For example {short[0]}."
            )
        try:
            assert self._file is not None
            self._file.close()
            self._temporary.replace(self.path)
        except OSError as failure:
            self._abandon()
            raise cannot_write(self.path, failure) from failure

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):  # the buffer may not fit on the disk either
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def open_store(*paths: Path) -> Store:
    """Every tensor of the given store files, from their headers.

    Raises:
        CheckpointError: a file is missing or damaged.
        BuildError: a name is in two of them.
    """
    store: Store = {}
    for path in paths:
        refs = read_header(path)
        twice = sorted(set(refs) & set(store))
        if twice:
            raise BuildError(
                f"{len(twice)} tensors are in two weights stores.", f"{twice[0]} is in {path} and before."
            )
        store.update(refs)
    return store


def _power_of_two(nbytes: int) -> int:
    """The largest power of two that divides ``nbytes``, at most a page."""
    return min(nbytes & -nbytes or ALIGNMENT, ALIGNMENT)


def cannot_write(path: Path, error: OSError) -> BuildError:
    """The error for a file that could not be written."""
    return BuildError(
        f"{path} cannot be written.",
        error.strerror or str(error),
        "Free disk space or choose another --out; finished steps are kept.",
    )
