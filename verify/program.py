"""The readable program inside a TensorRT-RTX engine file.

An engine starts with ``vtrt`` and embeds text programs: a ``header``, the ``descriptors`` of all tensors with
their element types, and sections of kernels with the ONNX layers each came from. There is one program for
each optimization profile (targets share it), and a small one for each kernel that is compiled when the engine
is loaded (``runtime_fusion``). The format is undocumented (this is TensorRT-RTX 1.7's) and read for reports
and tests only, never at run time. The reader is bounded and evaluates nothing.

Two builds of one graph can differ in bytes. What differs is the envelope around the programs: the numbers
that symbolic sizes of tensors get, the table of their expressions, and the order in which outputs are listed.
Both follow the addresses of objects in the builder's memory, which every process and every build has others
of. The programs (text, kernels, constants) and the section of weights are the same: :func:`program_digest`
compares these.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import IntegrityError

MAGIC = b"vtrt"
MAX_PROGRAM_BYTES = 256 << 20
"""Longest program read; the 48 blocks of InternViT-6B need about 2 MB."""
UNTOLD = "unknown"
"""The type of an operand that an engine does not show."""
_MAX_DEPTH = 32
_START = b"header {\n"
_BLOB = struct.Struct("<Q4sI")
"""Before a program: the bytes from the name on, its name ``NLYM``, a number; the text's length follows."""
_NAME = b"NLYM"
_HEADER = 64
_SECTION = struct.Struct("<8sQQ")
"""At byte 64, as many as byte 8 says: a section's name backwards, where it starts, its bytes."""
_WEIGHTS = b"THGW\0\0\0\0"
_MAX_SECTIONS = 64
_TOKEN = re.compile(r'"[^"]*"|[{}=]|[^\s{}="]+')
_SIZE = re.compile(r"[0-9]{1,15}")
_LAYER = re.compile(r"\[ONNX Layer: ([^\]\x1f]*)\]")
_SHORT = {"fp8_e4m3": "fp8", "half": "fp16", "float": "fp32", "double": "fp64"}
_NO_KERNELS = frozenset({"shape_call", "signal", "wait"})
_FUSED_REGION = "runtime-fusion-consts"
_OPERAND_KEYS = ("input_args", "input")
_RESULT_KEYS = ("output_args", "output")


@dataclass(frozen=True)
class Kernel:
    """One line of a program.

    ``op`` is the engine's own word (``fully_connected``, ``function``, ...), ``name`` the kernel's name,
    ``args`` and ``results`` the element types in this package's short names (``?`` where the program does not
    say), ``constants`` the bytes that the engine keeps of each of ``args`` (0: it is computed), ``layers``
    the ONNX node names.
    """

    op: str
    name: str
    args: tuple[str, ...]
    results: tuple[str, ...]
    layers: tuple[str, ...]
    constants: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """The kernels of one optimization profile.

    ``fused`` are the parts of those kernels that are compiled when the engine is loaded. ``constant_bytes``
    is everything stored: weights, scales, tables.
    """

    kernels: tuple[Kernel, ...]
    fused: tuple[Kernel, ...] = ()
    constant_bytes: int = 0


@dataclass(frozen=True)
class _Node:
    """A block: ``key = value`` pairs in order, and the bare words between them."""

    pairs: tuple[tuple[str, Any], ...]
    words: tuple[str, ...]

    def get(self, *keys: str) -> Any:
        """The first value among ``keys``, or None."""
        for key in keys:
            for name, value in self.pairs:
                if name == key:
                    return value
        return None


def read_programs(path: Path) -> tuple[Program, ...]:
    """The programs in the engine file at ``path``, one for each optimization profile.

    Raises:
        IntegrityError: the file is not a TensorRT-RTX engine, or holds no program that can be read.
    """
    programs: list[Program] = []
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[: len(MAGIC)] != MAGIC:
                raise _unreadable(path, "It does not start with 'vtrt'.")
            for text in _texts(data, path):
                program, fused = _program(text, path)
                if fused and programs:
                    last = programs.pop()
                    programs.append(replace(last, fused=last.fused + program.kernels))
                else:
                    programs.append(program)
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not programs:
        raise _unreadable(path, "It embeds no program; this release may write it in another form.")
    return tuple(programs)


def program_digest(path: Path) -> str:
    """sha256 of the program of the engine file at ``path``; empty if the file has another layout.

    It covers the programs of all profiles with their kernels and constants, and the weights, in the file's
    order. Engines of two builds with equal graphs, options and releases have equal digests, even where their
    bytes differ.
    """
    total = hashlib.sha256()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            parts = [*_blobs(data), _weights(data)]
            if data[: len(MAGIC)] != MAGIC or None in parts or len(parts) < 2:
                return ""
            with memoryview(data) as view:
                for part in parts:
                    assert part is not None
                    with view[slice(*part)] as piece:
                        total.update(hashlib.sha256(piece).digest())
    except (OSError, ValueError, struct.error):
        return ""
    return total.hexdigest()


def _blobs(data: mmap.mmap) -> Iterator[tuple[int, int] | None]:
    """Start and end of each program with its kernels and constants; None for one that has no length."""
    at = data.find(_START)
    while at >= 0:
        begin = at - 16
        length, name, _ = _BLOB.unpack_from(data, begin - 8) if begin >= 8 else (0, b"", 0)
        end = begin + length
        if name != _NAME or not at < end <= len(data):
            yield None
            return
        yield begin, end
        at = data.find(_START, end)


def _weights(data: mmap.mmap) -> tuple[int, int] | None:
    """Start and end of the section of weights; None if the file does not say."""
    (count,) = struct.unpack_from("<Q", data, 8)
    for number in range(min(count, _MAX_SECTIONS)):
        name, start, size = _SECTION.unpack_from(data, _HEADER + number * _SECTION.size)
        if name == _WEIGHTS and 0 < start <= start + size <= len(data):
            return start, start + size
    return None


def _unreadable(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"{path} cannot be read as a TensorRT-RTX engine.", why, "Build the engine again.")


def _texts(data: mmap.mmap, path: Path) -> Iterator[str]:
    at = data.find(_START)
    while at >= 0:
        end = data.find(b"\0", at, at + MAX_PROGRAM_BYTES)
        if end < 0:
            raise _unreadable(path, f"The program at byte {at} does not end.")
        text = data[at:end].decode("utf-8", "replace")
        if "\ndescriptors {" in text:
            yield text
        at = data.find(_START, end)


@dataclass(frozen=True)
class _Tensor:
    """A tensor's element type, and the bytes stored of it (0: it is computed)."""

    kind: str
    stored: int


_UNKNOWN = _Tensor("?", 0)


def _program(text: str, path: Path) -> tuple[Program, bool]:
    """A program, and whether it belongs to a kernel of the program before it."""
    tensors: dict[str, _Tensor] = {}
    kernels: list[Kernel] = []
    fused = False
    for section, node in _sections(text, path):
        if section == "header":
            fused = any(isinstance(v, _Node) and v.get("name") == _FUSED_REGION for _, v in node.pairs)
        elif section == "descriptors":
            _read_tensors(node, tensors)
        elif section.startswith("shape_"):
            break  # the last section: sizes computed on the host
        else:
            kernels += [
                _kernel(op, value, tensors)
                for op, value in node.pairs
                if isinstance(value, _Node) and op not in _NO_KERNELS
            ]
    return Program(tuple(kernels), (), sum(t.stored for t in tensors.values())), fused


def _read_tensors(node: _Node, tensors: dict[str, _Tensor]) -> None:
    for _, value in node.pairs:
        if isinstance(value, _Node):
            name, kind, stored = value.get("name"), value.get("type"), value.get("const_payload_size")
            if isinstance(name, str) and isinstance(kind, str):
                size = int(stored) if isinstance(stored, str) and _SIZE.fullmatch(stored) else 0
                tensors[name] = _Tensor(_SHORT.get(kind, kind), size)


def _kernel(op: str, node: _Node, tensors: dict[str, _Tensor]) -> Kernel:
    def found(keys: tuple[str, ...]) -> list[_Tensor]:
        value = node.get(*keys)
        return [tensors.get(word, _UNKNOWN) for word in value.words] if isinstance(value, _Node) else []

    name, layers, args = node.get("name"), node.get("layers"), found(_OPERAND_KEYS)
    return Kernel(
        op,
        name if isinstance(name, str) else "",
        tuple(t.kind for t in args),
        tuple(t.kind for t in found(_RESULT_KEYS)),
        tuple(_LAYER.findall(layers)) if isinstance(layers, str) else (),
        tuple(t.stored for t in args),
    )


def _sections(text: str, path: Path) -> Iterator[tuple[str, _Node]]:
    tokens = (match.group() for match in _TOKEN.finditer(text))
    word = ""
    for token in tokens:
        if token == "{":
            yield word, _block(tokens, path, 1)
        else:
            word = token


def _block(tokens: Iterator[str], path: Path, depth: int) -> _Node:
    """Read up to the closing brace. A word followed by ``=`` is a key; its value is a word or a block."""
    if depth > _MAX_DEPTH:
        raise _unreadable(path, "The embedded program nests too deep.")
    pairs: list[tuple[str, Any]] = []
    words: list[str] = []
    key: str | None = None
    for token in tokens:
        if token == "}":
            return _Node(tuple(pairs), tuple(words))
        if token == "=":
            key = words.pop() if words else ""
            continue
        value: Any = _block(tokens, path, depth + 1) if token == "{" else token.strip('"')
        if key is not None:
            pairs.append((key, value))
            key = None
        elif isinstance(value, str):
            words.append(value)
    raise _unreadable(path, "The embedded program breaks off.")
