"""What verbs print: JSON on stdout, or tables."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError


def print_json(data: Any) -> None:
    """``data`` as one JSON document on stdout."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    # The bytes of a file name that are no UTF-8 are lone surrogates here; as \udcXX they are JSON again.
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; columns that hold only numbers and sizes stand right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        numbers = bool(cells) and all(_is_number(row[i]) for row in cells)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(show(cell)) for cell in row))
    # Piped output is read in files and logs, where rich would fold tables at 80 columns.
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = Console(width=wide)
    # Apart and unwrapped: a table's own title wraps at its width, and titles hold paths.
    console.print(Text(show(title), style="bold"), soft_wrap=True)
    console.print(table)


def show(value: object) -> str:
    """A cell: floats with four significant digits, nothing as a dash, lists joined."""
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(show(v) for v in value)
    return "".join(c if c.isprintable() else "\ufffd" for c in str(value))  # no terminal escapes


def human_bytes(size: int) -> str:
    """``size`` in B, KiB, MiB or GiB."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def _is_number(cell: object) -> bool:
    if isinstance(cell, str):
        return cell[:1].isdigit() and cell.split(" ")[-1] in ("B", "KiB", "MiB", "GiB", "%", "ms", "s")
    return cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))


def check_writable(option: str, path: Path | None) -> None:
    """UsageError if ``path``, given as ``option``, cannot be written as a file."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(
            f"{option} {path} cannot be written.",
            "It is a folder itself, or its folder does not exist.",
            "Name a file in a folder that exists.",
        )
