"""Settings typed as ``KEY=VALUE``, checked against a table of the known ones: ``-O workspace=2G -O refit``.

A table maps each key to a :class:`Setting`. Commands and engine builders have one each; :func:`read_settings`
turns texts into keyword arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import UsageError

SWITCH = "nothing, true or false"
"""``values`` of a setting that is on or off; its key alone turns it on."""


@dataclass(frozen=True)
class Setting:
    """One key of a table.

    Args:
        values: allowed values, for people, an example first: ``0 to 5``, ``a size: 512M, 2G``;
            or :data:`SWITCH`.
        meaning: description in one line.
        parse: the value of a text, or of True, which a key alone has; ValueError if the setting does not
            take it.
        name: keyword argument that gets the value; empty: the key with underscores.
        default: the argument where the key is not given; None: it is left out then.
    """

    values: str
    meaning: str
    parse: Callable[[object], object]
    name: str = ""
    default: object = None

    @property
    def is_switch(self) -> bool:
        """Whether the setting is on or off."""
        return self.values == SWITCH


Table = Mapping[str, Setting]
"""Key, with dashes -> the setting."""


def keyword(table: Table, key: str) -> str:
    """The keyword argument that ``key`` sets."""
    return table[key].name or key.replace("-", "_")


def read_settings(
    table: Table, settings: Mapping[str, object] | Iterable[str], what: str = "setting"
) -> dict[str, Any]:
    """Keyword arguments of ``{"workspace": "2G", "refit": True}``, or of ``["workspace=2G", "refit"]``.

    A dash in a key may be an underscore. ``what`` is the word for a setting in messages.

    Raises:
        UsageError: an unknown key, one that is given twice, or a value that it does not take.
    """
    pairs = settings.items() if isinstance(settings, Mapping) else map(_key_and_value, settings)
    values: dict[str, Any] = {}
    for name, value in pairs:
        key = name.replace("_", "-")
        if key not in table:
            raise _unknown(table, name, what)
        argument = keyword(table, key)
        if argument in values:
            raise UsageError(f"-O {key} is given twice.", "It has one value.", "Leave one of them out.")
        try:
            values[argument] = table[key].parse(value)
        except (UsageError, ValueError):
            raise refused(table, key, value) from None
    defaults = {keyword(table, key): s.default for key, s in table.items() if s.default is not None}
    return {**defaults, **values}


def refused(table: Table, key: str, value: object) -> UsageError:
    """The error for a value that a setting does not take."""
    setting = table[key]
    example = re.split(r",? or |, | to ", setting.values.rpartition(": ")[2])[0]
    return UsageError(
        f"-O {key} does not take {value!r}.",
        f"It takes {setting.values} ({setting.meaning}).",
        f"Give -O {key if setting.is_switch else f'{key}={example}'}, or leave it out.",
    )


def described(table: Table) -> list[str]:
    """A line for each setting: key, values, meaning."""
    return [f"{key} ({setting.values}): {setting.meaning}" for key, setting in table.items()]


def _unknown(table: Table, name: str, what: str) -> UsageError:
    close = get_close_matches(name.replace("_", "-"), table, 2)
    return UsageError(
        f"There is no {what} {name!r}.",
        "Known:" + "".join(f"\n    {line}" for line in described(table)),
        f"Did you mean -O {' or '.join(close)}?" if close else "Give -O KEY=VALUE with one of these.",
    )


def _key_and_value(text: str) -> tuple[str, object]:
    """``key=value``; of ``key`` alone the value is True."""
    key, equals, value = text.partition("=")
    return key.strip(), value.strip() if equals else True


def whole(least: int = 0) -> Callable[[object], int]:
    """Reads whole numbers from ``least``."""

    def read(value: object) -> int:
        number = int(value) if isinstance(value, str) else value
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(value)
        return number

    return read


def number(least: float = 0.0) -> Callable[[object], float]:
    """Reads finite numbers from ``least``."""

    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(value)
        if not least <= float(value) < float("inf"):
            raise ValueError(value)
        return float(value)

    return read


def text(value: object) -> str:
    """Reads any text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return value


def path(value: object) -> Path:
    """Reads a path."""
    return value if isinstance(value, Path) else Path(text(value))


def names(value: object) -> tuple[str, ...]:
    """Reads names joined by commas, or a list of them; ``none`` is an empty list."""
    if isinstance(value, str):
        value = [] if value == "none" else value.split(",")
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return tuple(str(name).strip() for name in value)


def choice(choices: Sequence[str]) -> Callable[[object], str]:
    """Reads one of ``choices``."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(value)
        return value

    return read


def switch(value: object) -> bool:
    """Reads on or off."""
    values = {"true": True, "false": False}
    if str(value).lower() not in values:
        raise ValueError(value)
    return values[str(value).lower()]
