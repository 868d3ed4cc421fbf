"""A graph whose weights are in a file of its own: all graphs of a bundle read one store.

Only the places of weights in the ONNX file are written anew; everything else stays byte for byte.
"""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath

from ..bundle import Bundle
from ..engines.protobuf import delimited, fields, messages, rewritten
from ..errors import IntegrityError
from .contract import Pieces

_GRAPH, _INITIALIZER, _EXTERNAL = 7, 5, 13
"""Fields of ONNX' ModelProto, GraphProto and TensorProto."""
_ALIGN = 64
"""Bytes: weights begin at a multiple of it."""


def with_own_weights(bundle: Bundle, graph: str, name: str) -> tuple[bytes, Pieces]:
    """The graph, reading from the file ``name`` next to it, and that file.

    Args:
        bundle: an opened bundle.
        graph: one of its ONNX files.
        name: of the file of weights.

    Raises:
        IntegrityError: the file is not a valid ONNX model, or its weights are not files of the bundle.
    """
    path = bundle.path(graph)
    places: dict[tuple[str, int, int], int] = {}
    end = 0

    def moved(tensor: memoryview) -> bytes:
        nonlocal end
        entries = dict(_entry(entry) for _, entry in messages(tensor, _EXTERNAL))
        if not entries:
            return bytes(tensor)
        source = posixpath.normpath(str(PurePosixPath(graph).parent / entries["location"]))
        key = source, int(entries["offset"]), int(entries["length"])
        if key not in places:
            places[key] = -(-end // _ALIGN) * _ALIGN
            end = places[key] + key[2]
        new = {"location": name, "offset": str(places[key]), "length": str(key[2])}

        def rewrite(entry: memoryview) -> bytes:
            known, value = _entry(entry)
            return delimited(1, known.encode()) + delimited(2, new.get(known, value).encode())

        return rewritten(tensor, (_EXTERNAL,), rewrite)

    try:
        written = rewritten(memoryview(path.read_bytes()), (_GRAPH, _INITIALIZER), moved)
    except (ValueError, KeyError) as error:
        raise IntegrityError(f"{path} is not a valid ONNX model.", f"{error}.", "Build it again.") from error
    parts = sorted((at, bundle.path(file), offset, size) for (file, offset, size), at in places.items())
    return written, Pieces(tuple(parts))


def _entry(data: memoryview) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    pair = {number: str(text, "utf-8") for number, text in fields(data) if not isinstance(text, int)}
    return pair[1], pair[2]
