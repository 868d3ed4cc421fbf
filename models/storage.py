"""Reading weight files without loading them: safetensors and zip-format torch files, both memory-mapped.

Files are untrusted: headers are checked against the file before anything is read, and torch files are opened
with ``weights_only=True`` (no code in a pickle runs).
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import find_dtype
from ..errors import CheckpointError
from ..files.lfs import refuse_lfs_pointer
from ..files.text import read_text
from .misfits import explain_dict, explain_names

if TYPE_CHECKING:
    import torch

FLOATS = ("float32", "float16", "bfloat16")
"""Types that weights of a checkpoint may have."""
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CLASS = re.compile(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class):? (?!GLOBAL)([\w.]+)")
_INDEX_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@dataclass(frozen=True)
class TensorRef:
    """The place of one tensor.

    Args:
        file: the file that holds it.
        name: its name in that file (differs from the published key in the older layout).
        dtype: ``float32``, ``float16`` or ``bfloat16`` (other types are refused when a checkpoint is opened).
        shape: its shape.
        offset: first byte in ``file``, None where the format does not say (torch files), or its bytes
            are not contiguous.
        nbytes: its size, contiguous.
        view: how it is assembled from stored tensors; None: it is stored itself.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    nbytes: int
    view: View | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of a stored tensor: runs of (first, count), one after another.

    A row is the last axis, and all axes before it count as one; a vector's rows are single values.
    """

    ref: TensorRef
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class View:
    """A tensor assembled from stored ones: rows concatenated, then columns selected, then transposed.

    Args:
        rows: the stored tensors and their rows, in order.
        columns: the first, and the step from each to the next.
        transposed: columns become rows.
    """

    rows: tuple[Rows, ...]
    columns: tuple[int, int] = (0, 1)
    transposed: bool = False

    def ref(self, shape: tuple[int, ...]) -> TensorRef:
        """A reference to this view, of ``shape``; with an offset where it is one run of whole rows."""
        first = self.rows[0].ref
        if any(rows.ref.dtype != first.dtype for rows in self.rows):
            raise CheckpointError(
                f"{first.file} holds parts of one tensor in different types.",
                named([f"{rows.ref.name} {rows.ref.dtype}" for rows in self.rows]),
            )
        known = find_dtype(first.dtype)
        nbytes = known.nbytes(math.prod(shape)) if known else math.prod(shape)
        offset = None
        if len(self.rows) == len(self.rows[0].runs) == 1 and self.columns == (0, 1) and not self.transposed:
            row, height = self.rows[0].runs[0][0], math.prod(first.shape[:-1] or first.shape)
            offset = None if first.offset is None else first.offset + row * (first.nbytes // max(height, 1))
        return TensorRef(first.file, first.name, first.dtype, shape, offset, nbytes, self)

    def read(self, shape: tuple[int, ...], load: Callable[[TensorRef], torch.Tensor]) -> torch.Tensor:
        """The tensor; a view of ``load``'s result if possible."""
        import torch

        blocks = []
        for rows in self.rows:
            stored = load(rows.ref)
            matrix = stored.reshape(-1, stored.shape[-1]) if stored.dim() > 1 else stored.reshape(-1, 1)
            blocks += [matrix[first : first + count] for first, count in rows.runs]
        matrix = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        matrix = matrix[:, self.columns[0] :: self.columns[1]]
        return (matrix.T if self.transposed else matrix).reshape(shape)

    def write(self, tensor: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> None:
        """Put ``tensor`` where :meth:`read` takes it from, in stored tensors by their names, contiguous."""
        height = sum(count for rows in self.rows for _, count in rows.runs)
        matrix = tensor.reshape(-1, height).T if self.transposed else tensor.reshape(height, -1)
        start = 0
        for rows in self.rows:
            whole = stored[rows.ref.name]
            whole = whole.view(-1, whole.shape[-1]) if whole.dim() > 1 else whole.view(-1, 1)
            for first, count in rows.runs:
                part = whole[first : first + count, self.columns[0] :: self.columns[1]]
                part.copy_(matrix[start : start + count])
                start += count


def read_header(path: Path) -> dict[str, TensorRef]:
    """Tensors of a safetensors file, from its header only; CheckpointError when it is not whole.

    Types that :mod:`..dtypes` does not know keep their safetensors name.
    """
    size = _size(path)
    refuse_lfs_pointer(path, CheckpointError)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise _damaged(path, f"the file has {size} bytes, its header alone would need {8 + length}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    refs = {name: _ref(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for ref in sorted(refs.values(), key=lambda r: (r.offset or 0, r.nbytes)):
        if ref.offset != end:
            raise _damaged(
                path, f"tensor {ref.name} starts at byte {ref.offset}, the one before ends at {end}"
            )
        end += ref.nbytes
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}, the file has {size} bytes")
    return refs


def _ref(path: Path, name: str, entry: Any, data: int) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header entry of {name} is incomplete") from error
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise _damaged(path, f"its header entry of {name} is not a dtype, a shape and two offsets")
    known = find_dtype(dtype)
    dtype = known.array if known else dtype
    if known and end - begin != known.nbytes(math.prod(shape)):
        raise _damaged(path, f"tensor {name} {list(shape)} {dtype} has {end - begin} bytes")
    return TensorRef(path, name, dtype, shape, data + begin, end - begin)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice")
    return entries


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    """Memory-mapped tensors of a zip-format torch file (``.bin``, ``.pth``); CheckpointError when damaged."""
    import torch

    _size(path)
    refuse_lfs_pointer(path, CheckpointError)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is damaged, or not a zip-format torch file.",
            "The zip directory at its end cannot be read: the file is truncated, or was written "
            "by torch before 1.6.",
            "Download it again, or save it again with a current torch.",
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ValueError and more
        raise _not_plain(path, error) from error
    if not isinstance(loaded, dict) or not all(isinstance(k, str) for k in loaded):
        raise CheckpointError(f"{path} holds no table of tensors.", f"It holds a {type(loaded).__name__}.")
    odd = [k for k, v in loaded.items() if not isinstance(v, torch.Tensor) or v.layout != torch.strided]
    if odd:
        inner = {k: sum(isinstance(t, torch.Tensor) for t in v.values()) for k, v in _tables(loaded)}
        why, fix = explain_dict(loaded, {k: n for k, n in inner.items() if n}) or (named(odd), "")
        raise CheckpointError(f"{path} has objects that are not dense tensors.", why, fix)
    return loaded


def _tables(loaded: dict[str, Any]) -> list[tuple[str, dict[Any, Any]]]:
    return [(key, value) for key, value in loaded.items() if isinstance(value, dict)]


def _not_plain(path: Path, error: Exception) -> CheckpointError:
    """The error for a torch file that torch does not load without running code in it."""
    text = _ANSI.sub("", str(error))
    if names := _CLASS.search(text):
        return CheckpointError(
            f"{path} cannot be read as plain weights: it holds more than weights.",
            f"It holds a Python object, {names[1] or names[2]}, too; loading one runs code of the file.",
            "Where you trust it, save the weights alone: torch.save(torch.load(path, weights_only=False)"
            "['model'], path), with the key that they are under.",
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return CheckpointError(f"{path} cannot be read as plain weights.", first, "Download it again.")


def torch_refs(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorRef]:
    """References for :func:`read_torch`'s tensors (offset None)."""
    return {
        name: TensorRef(
            path,
            name,
            str(t.dtype).removeprefix("torch."),
            tuple(t.shape),
            None,
            t.numel() * t.element_size(),
        )
        for name, t in tensors.items()
    }


def open_reader(path: Path) -> Callable[[str], torch.Tensor]:
    """A function from a stored name to its memory-mapped CPU tensor."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            handle: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error

        def read(name: str) -> torch.Tensor:
            tensor: torch.Tensor = handle.get_tensor(name)
            return tensor

        return read
    return read_torch(path).__getitem__


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor to shard. Shards are next to the index, nowhere else."""
    try:
        weight_map = json.loads(read_text(path, CheckpointError))["weight_map"]
        pairs = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has no weight_map.", str(error), "Download it again.") from error
    for name, shard in pairs.items():
        if not isinstance(shard, str) or not _INDEX_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{path} names a shard that is not a plain file name.",
                f"Tensor {name} is said to be in {shard!r}.",
                "Do not use this checkpoint: a sound index names files next to it.",
            )
    return pairs


def check_tensors(source: Path, tensors: dict[str, TensorRef], want: dict[str, tuple[int, ...]]) -> None:
    """Compare names, shapes and types with the config's; report all kinds of mismatch at once.

    Raises:
        CheckpointError: tensors missing, surplus, of another shape, or of a type that is not computed with.
    """
    problems: list[str] = []

    def add(kind: str, names: Iterable[str]) -> None:
        if listed := list(names):
            problems.append(f"{kind}: {named(listed)}")

    add("missing", (k for k in want if k not in tensors))
    add("unexpected", (k for k in tensors if k not in want))
    both: list[tuple[str, TensorRef, Any]] = [(k, tensors[k], s) for k, s in want.items() if k in tensors]
    add("wrong shape", (f"{k} {list(r.shape)} instead of {list(s)}" for k, r, s in both if r.shape != s))
    add("unsupported type", (f"{k} {r.dtype}" for k, r, _ in both if r.dtype not in FLOATS))
    if problems:
        why, fix = explain_names(tensors, want) or (
            "",
            "Use the config.json of this very checkpoint, or download it again.",
        )
        raise CheckpointError(
            f"{source} does not fit its config.", " ".join([why, *problems] if why else problems), fix
        )


def named(names: list[str], limit: int = 5) -> str:
    """``"3 tensors: a, b, c"``, shortened after ``limit``."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)}: {', '.join(names[:limit])}{more}."


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"Weights file {path} cannot be read.", error.strerror or str(error), "Download the missing file."
        ) from error


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged.", f"{why}.", "Download it again.")
