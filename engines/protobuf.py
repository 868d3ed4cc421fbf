"""Protobuf's wire format: reading the fields of a message, and changing some of them in place.

Field lengths come from files and are checked; ValueError names the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value (an int, or the bytes of a length-delimited field) of one message."""
    for number, wire, _, begin, end in _spans(data):
        if wire == _BYTES:
            yield number, data[begin:end]
        elif wire == _VARINT:
            yield number, _varint(data, begin)[0]


def messages(data: memoryview, number: int) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields ``number`` of one message."""
    for key, value in fields(data):
        if key == number and not isinstance(value, int):
            yield key, value


def packed(data: memoryview) -> Iterator[int]:
    """The numbers of a packed repeated field."""
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def rewritten(data: memoryview, way: tuple[int, ...], change: Callable[[memoryview], bytes]) -> bytes:
    """A message in which every message at the field numbers ``way`` is replaced by ``change`` of it.

    Everything else stays byte for byte.
    """
    out, copied_to = bytearray(), 0
    for number, wire, start, begin, end in _spans(data):
        if number == way[0] and wire == _BYTES:
            part = data[begin:end]
            new = change(part) if len(way) == 1 else rewritten(part, way[1:], change)
            out += data[copied_to:start]
            out += delimited(number, new)
            copied_to = end
    return bytes(out) + data[copied_to:]


def delimited(number: int, value: bytes) -> bytes:
    """The length-delimited field ``number`` with ``value``."""
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def _spans(data: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each field its number and wire type, and where it starts and where its value begins and ends."""
    at, size = 0, len(data)
    while at < size:
        start = at
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            end = _varint(data, at)[1]
        elif wire == _BYTES:
            length, at = _varint(data, at)
            end = at + length
        elif wire in (_FIXED32, _FIXED64):
            end = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"unknown protobuf wire type {wire}")
        if end > size:
            raise ValueError("a protobuf field reaches beyond the file: it is truncated")
        yield key >> 3, wire, start, at, end
        at = end


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the protobuf data is truncated")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise ValueError("a protobuf number is too long")


def _encoded(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))
