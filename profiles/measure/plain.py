"""Plain data back into the frozen dataclasses it was made from, checked entry by entry."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ...errors import InputError

T = TypeVar("T")


def decode(kind: type[T], data: Any, where: str = "") -> T:
    """``data`` (of ``json.loads``) as a ``kind``: dataclasses, tuples, dicts, optional values, literals.

    Entries that ``kind`` has no field for are passed over: receipts hold derived figures as well.

    Raises:
        InputError: an entry is missing or of another type; it is named.
    """
    return cast(T, _value(kind, data, where))


def _value(kind: Any, data: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _record(kind, data, where)
    if origin in (Union, types.UnionType):
        return _union(parts, data, where)
    if origin is Literal:
        return data if data in parts else _refuse(where, f"is none of {', '.join(map(repr, parts))}")
    if origin is tuple:
        items = data if isinstance(data, list) else _refuse(where, "is not a list")
        return tuple(_value(parts[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        pairs = data if isinstance(data, dict) else _refuse(where, "is not an object")
        return {key: _value(parts[1], item, f"{where}.{key}") for key, item in pairs.items()}
    return _scalar(kind, data, where)


def _record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        _refuse(where, "is not an object")
    hints, values = _hints(kind), {}
    for field in fields(kind):
        if field.name in data:
            values[field.name] = _value(hints[field.name], data[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            _refuse(where, f"has no {field.name!r}")
    return kind(**values)


def _union(parts: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in parts:
        return None
    kinds = [part for part in parts if part is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"{where}: a union of {kinds} cannot be read from plain data")
    return _value(kinds[0], data, where)


def _scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and type(data) in (int, float) and math.isfinite(data):
        return float(data)
    if kind in (bool, int) and type(data) is kind:
        return data
    if kind is str and isinstance(data, str) and len(data) <= 4096 and data.isprintable():
        return data
    return _refuse(where, f"is not {_NAMES[kind]}")


def _refuse(where: str, why: str) -> NoReturn:
    raise InputError(
        f"The receipt is not valid at {where.lstrip('.') or 'the top level'}.",
        f"It {why}.",
        "Write it again with this release: ivl-export profile BUNDLE --out RECEIPT.",
    )


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind)


_NAMES = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a printable text"}
