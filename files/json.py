"""Untrusted JSON, read strictly into frozen dataclasses; every refusal names the entry that it is about.

:func:`read_json` parses a file: size, encoding, duplicate keys, NaN and depth are checked. :func:`decode`
turns plain data into a dataclass (by msgspec): types are exact (no text for a number, no true for 1), entries
that the class does not know are refused, numbers are finite, texts printable. Fields say more by the
annotations below or by ``__post_init__``, whose ValueError becomes part of the refusal. A field of type
``dict[str, Any]`` or ``Any`` is free: its content is not looked at.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from ..errors import InputError, IntegrityError, IvlError
from .lfs import refuse_lfs_pointer
from .text import decode_text, read_text

MAX_JSON_BYTES = 16 << 20  # a manifest of thousands of files fits; anything larger is not one
MAX_TEXT = 4096
T = TypeVar("T")

Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", title="a name")]
"""Letters, digits, dot, underscore and hyphen; at most 64 characters."""
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z", title="a sha256 in lower-case hex")]
RelativePath = Annotated[
    str,
    Meta(
        pattern=r"\A(?!(?:.*/)?\.{0,2}(?:/|\Z))[^\\:\x00-\x1f\x7f\ud800-\udfff]{1,512}\Z",
        title="a relative path inside the folder",
    ),
]
"""POSIX, in one spelling: no empty part, ``.`` or ``..``, no backslash or colon."""
Count = Annotated[int, Meta(ge=0, le=(1 << 62) - 1, title="a whole number of at least 0")]

_TITLES = {
    repr(meta.pattern): meta.title
    for kind in (Name, Sha256, RelativePath)
    for meta in get_args(kind)
    if isinstance(meta, Meta)
}
_KINDS = {
    "int": "a whole number", "float": "a finite number", "str": "a text", "bool": "true or false",
    "object": "an object", "array": "a list",
}  # fmt: skip
_PLACE = re.compile(r" - at (?P<key>`key` in )?`\$(?P<place>.*)`\Z", re.S)
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|(\[\.\.\.\])")


def read_json(path: Path, *, fix: str = "Copy it again from where it was made.") -> Any:
    """The JSON value in ``path``.

    Args:
        path: a file.
        fix: remedy, for a file that is refused.

    Raises:
        IntegrityError: larger than 16 MiB, not UTF-8 JSON, nested too deep, NaN, or a key given twice.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise IntegrityError(f"{path} is refused.", f"It is larger than {MAX_JSON_BYTES} bytes.", fix)
    try:
        return parse_json(decode_text(raw))
    except ValueError as error:
        refuse_lfs_pointer(path, IntegrityError)
        raise IntegrityError(f"{path} is not valid JSON.", f"{error}.", fix) from error


def parse_json(text: str | bytes) -> Any:
    """The JSON value in ``text``; ValueError for bad syntax, a key given twice, NaN, or too deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_text_from_user(path: Path, what: str) -> str:
    """The text of a file that a person wrote, see :mod:`.text`.

    Raises:
        InputError: it cannot be read, or is not text; ``what`` names the file's kind.
    """
    try:
        return read_text(path)
    except OSError as error:
        raise InputError(f"Cannot read {path}.", f"{error.strerror or error}.", f"Give {what}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text.", f"{error}.", f"Save it as UTF-8, or give {what}."
        ) from error


def decode(
    kind: type[T],
    data: Any,
    *,
    what: str,
    fix: str = "",
    error: type[IvlError] = IntegrityError,
    ignore_unknown: bool = False,
) -> T:
    """``data`` as a ``kind``.

    Args:
        kind: a dataclass whose fields are numbers, texts, dataclasses, tuples, dicts, literals or optional.
        data: plain data, as of :func:`read_json`; or the path of a file that is read by it.
        what: name of the data, for messages: ``The bundle's manifest``.
        fix: remedy, for data that is refused.
        error: the type of error.
        ignore_unknown: pass over entries that ``kind`` has no field for.

    Raises:
        IvlError: of type ``error``; an entry is missing, unknown, or of another type, and is named.
        OSError: ``data`` is a path that cannot be read.
    """
    if isinstance(data, Path):
        data = read_json(data, fix=fix)
    try:
        value = msgspec.convert(data, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as problem:
        place, why = _explained(kind, data, str(problem))
        _refuse(what, place, why, fix, error)
    for place, why in _faults(kind, value, data, "", ignore_unknown):
        _refuse(what, place, why, fix, error)
    return value


def _refuse(what: str, place: str, why: str, fix: str, error: type[IvlError]) -> NoReturn:
    raise error(f"{what} is not valid at {place.lstrip('.') or 'the top level'}.", f"It {why}.", fix)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return data


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _explained(kind: Any, data: Any, message: str) -> tuple[str, str]:
    """Place and reason of a refusal of msgspec, which names keys of dicts by ``[...]`` only."""
    match = _PLACE.search(message)
    if match is None:
        return "", _reason(message)
    steps: list[str | int] = []
    for name, index, dots in _STEP.findall(match["place"]):
        step = int(index) if index else _failing_key(kind, data, steps, message) if dots else str(name)
        if step is None:
            break
        steps.append(step)
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    if match["key"]:
        key = _failing_key(kind, data, steps, message)
        return place, f"has the key {key!r:.200}, which {_reason(message)}"
    return place, _reason(message[: match.start()])


def _failing_key(kind: Any, data: Any, steps: list[str | int], message: str) -> str | None:
    """Which key of the dict at ``steps`` the refusal is about: the one that alone leads to it too."""
    entries = data
    for step in steps:
        entries = entries[step]
    alone = {key: _refusal(kind, _with(data, steps, {key: entry})) for key, entry in entries.items()}
    return next((key for key, refusal in alone.items() if refusal == message), None)


def _refusal(kind: Any, data: Any) -> str:
    try:
        msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def _with(node: Any, steps: list[str | int], entries: dict[str, Any]) -> Any:
    """A copy of ``node`` that has ``entries`` at ``steps``."""
    if not steps:
        return entries
    copy = node.copy()
    copy[steps[0]] = _with(node[steps[0]], steps[1:], entries)
    return copy


def _reason(text: str) -> str:
    """msgspec's reason, as the rest of a sentence that begins with It."""
    if match := re.match(r"Object missing required field `(.*)`", text):
        return f"has no {match[1]!r}"
    if title := next((title for pattern, title in _TITLES.items() if pattern in text), None):
        return f"is not {title}"
    if match := re.match(r"Expected `([^`]*)`(.*)", text, re.S):
        kinds = [_KINDS.get(kind, kind) for kind in match[1].split(" | ")]
        return f"is not {' or '.join(kinds)}{match[2].replace('`', '').replace(' > 0.0', ' over 0')}"
    return f"is refused: {text}"


def _faults(kind: Any, value: Any, data: Any, place: str, ignore_unknown: bool) -> Iterator[tuple[str, str]]:
    """Unknown entries, infinite numbers and unprintable texts, at any depth but in free fields."""
    if is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        if not ignore_unknown and (unknown := sorted(map(str, set(data) - set(hints)))):
            yield place, f"has unknown entry {unknown[0]!r:.200}"
        for name in set(data) & set(hints):
            inner, where = getattr(value, name), f"{place}.{name}"
            yield from _faults(hints[name], inner, data[name], where, ignore_unknown)
    elif isinstance(value, dict):
        item = _argument(kind, dict, 1)
        for key, entry in value.items() if item is not Any else ():
            yield from _faults(str, key, key, f"{place}[{key!r:.80}]", ignore_unknown)
            yield from _faults(item, entry, data[key], f"{place}.{key}", ignore_unknown)
    elif isinstance(value, list | tuple):
        item = _argument(kind, type(value), 0)
        for i, entry in enumerate(value):
            yield from _faults(item, entry, data[i], f"{place}[{i}]", ignore_unknown)
    elif isinstance(value, float) and not math.isfinite(value):  # JSON can say 1e999
        yield place, "is not a finite number"
    elif isinstance(value, str) and kind is not Any and not (len(value) <= MAX_TEXT and value.isprintable()):
        yield place, f"is not a printable text of at most {MAX_TEXT} characters"


def _argument(kind: Any, origin: type, index: int) -> Any:
    """The type of a container's items; ``kind`` may be a union with None."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is origin:
            return get_args(part)[index]
    return kind


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)
