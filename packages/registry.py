"""The formats by name; a format's module is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from ..errors import UsageError
from ..settings import Setting
from .contract import Format

MODULES = {
    "python": ".project",
    "docker": ".docker",
    "triton": ".triton",
    "wheelhouse": ".wheelhouse",
    "kubernetes": ".kubernetes",
}
"""Name of a format -> the module that has it as ``FORMAT``."""


def find_format(name: str) -> Format:
    """The format called ``name``; UsageError names those there are."""
    if name not in MODULES:
        raise UsageError(
            f"Unknown format {name!r}.", f"Known: {', '.join(MODULES)}.", "Give --format one of these."
        )
    found: Format = import_module(MODULES[name], __package__).FORMAT
    return found


def formats() -> Iterator[Format]:
    """All formats."""
    yield from map(find_format, MODULES)


def all_settings() -> dict[str, Setting]:
    """The settings of all formats; those of one name have one meaning."""
    return {key: setting for one in formats() for key, setting in one.settings.items()}
