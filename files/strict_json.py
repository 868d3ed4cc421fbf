"""Strict reading of JSON that came from elsewhere: every refusal names the entry it is about."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import IntegrityError

MAX_JSON_BYTES = 16 << 20  # a manifest of thousands of files fits; anything larger is not one
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_T = TypeVar("_T")


def read_json(path: Path) -> Any:
    """The JSON value in ``path``.

    Raises:
        IntegrityError: larger than 16 MiB, not UTF-8 JSON, nested too deep, NaN, or a key given twice.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise IntegrityError(f"{path} is refused.", f"It is larger than {MAX_JSON_BYTES} bytes.")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is not valid JSON.", f"{error}.", "Copy the bundle again or rebuild it."
        ) from error


def check_path(text: Any, where: str) -> str:
    """``text`` if it is a plain relative POSIX path; IntegrityError naming ``where`` if not."""
    if not isinstance(text, str) or not text or len(text) > 512:
        refuse(where, "is not a path of 1 to 512 characters")
    if "\\" in text or ":" in text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        refuse(where, f"has a character that paths in a bundle may not have: {text!r}")
    if any(part in ("", ".", "..") for part in text.split("/")):
        refuse(where, f"is not a relative path inside the bundle: {text!r}")
    if not text.isprintable():  # lone surrogates and the like cannot be written back
        refuse(where, f"is not printable: {text!r}")
    return text


def refuse(where: str, why: str) -> NoReturn:
    """Raise IntegrityError for the entry ``where``; ``why`` continues a sentence that starts with It."""
    raise IntegrityError(
        f"The bundle's manifest is not valid at {where or 'the top level'}.",
        f"It {why}.",
        "Copy the bundle again from where it was built, or rebuild it.",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return data


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


class Node:
    """A value with its place in the manifest, so that every refusal can name the entry."""

    def __init__(self, where: str, data: Any) -> None:
        self.where, self.data = where, data

    def bad(self, why: str) -> NoReturn:
        """Refuse this entry."""
        refuse(self.where, why)

    def __getitem__(self, key: str) -> Node:
        if key not in self.data:
            self.bad(f"has no {key!r}")
        return Node(f"{self.where}.{key}" if self.where else key, self.data[key])

    def object(self) -> Node:
        """This node, which must be a JSON object."""
        if not isinstance(self.data, dict):
            self.bad("is not an object")
        return self

    def keys(self, allowed: set[str]) -> Node:
        """This node, an object with exactly the keys ``allowed``."""
        self.object()
        if unknown := sorted(set(self.data) - allowed):
            self.bad(f"has unknown entry {unknown[0]!r}")
        if missing := sorted(allowed - set(self.data)):
            self.bad(f"has no {missing[0]!r}")
        return self

    def text(self) -> str:
        """A printable text (no terminal escapes) of at most 4096 characters."""
        if not isinstance(self.data, str) or len(self.data) > 4096 or not self.data.isprintable():
            self.bad("is not a printable text of at most 4096 characters")
        return str(self.data)

    def name(self) -> str:
        """A name: letters, digits, dot, underscore, hyphen; at most 64 characters."""
        if not isinstance(self.data, str) or not _NAME.fullmatch(self.data):
            self.bad(f"is not a name: {self.data!r}")
        return str(self.data)

    def path(self) -> str:
        """A relative path inside the bundle."""
        return check_path(self.data, self.where)

    def sha256(self) -> str:
        """A sha256 in lower-case hex."""
        if not isinstance(self.data, str) or not _SHA256.fullmatch(self.data):
            self.bad("is not a sha256 in lower-case hex")
        return str(self.data)

    def integer(self) -> int:
        """A whole number of at least 0 (no bool)."""
        if type(self.data) is not int or not 0 <= self.data < 1 << 62:
            self.bad("is not a whole number of at least 0")
        return int(self.data)

    def number(self) -> float:
        """A finite number (no bool)."""
        # False for anything that float64 cannot hold: the JSON text 1e999 reads as infinity
        if type(self.data) not in (int, float) or not abs(self.data) < 1e300 or math.isnan(self.data):
            self.bad("is not a finite number")
        return float(self.data)

    def flag(self) -> bool:
        """true or false."""
        if type(self.data) is not bool:
            self.bad("is not true or false")
        return bool(self.data)

    def list(self, read: Callable[[Node], _T]) -> list[_T]:
        """A list, each item read by ``read``."""
        if not isinstance(self.data, list):
            self.bad("is not a list")
        return [read(Node(f"{self.where}[{i}]", item)) for i, item in enumerate(self.data)]

    def map(
        self, read: Callable[[Node], _T], check_key: Callable[[Node], str] | None = None
    ) -> dict[str, _T]:
        """An object, each value read by ``read`` and each key checked by ``check_key``."""
        self.object()
        if check_key is not None:
            for key in self.data:
                check_key(Node(f"{self.where}[{key!r:.80}]", key))
        return {key: read(self[key]) for key in self.data}
