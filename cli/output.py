"""Output of the verbs: JSON on stdout, or tables."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError


def print_json(data: Any) -> None:
    """``data`` as one JSON document on stdout."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    # Bytes of a file name that are not UTF-8 are lone surrogates here; as \udcXX they are valid JSON.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    print(text if holds(text) else json.dumps(data, indent=2, allow_nan=False))


def holds(text: str) -> bool:
    """Whether the encoding of stdout has every character of ``text``."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def print_text(text: str) -> None:
    """``text`` on stdout, broken between words where it is wider than the terminal."""
    import typer

    for line in _wrap(text, _columns()):
        typer.echo(line)


def _columns() -> int:
    """Width of the terminal; 120 columns in files and logs."""
    from shutil import get_terminal_size

    return get_terminal_size((120, 24)).columns


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout, as wide as the terminal; 120 columns in files and logs."""
    import typer

    head, body = layout(title, columns, rows, _columns())
    if not holds("─"):
        body = [line.replace("─", "-") for line in body]
    for line in head:
        typer.secho(line, bold=True)
    for line in (*body, ""):
        typer.echo(line)


def layout(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], width: int
) -> tuple[list[str], list[str]]:
    """Lines of the title and of the table. Lines break between words only, never in one: paths can be copied.

    Columns that hold only numbers and sizes are aligned right. A table that does not fit into ``width`` even
    with every cell wrapped is cut into tables of some of its columns each, below each other; where a single
    column does not fit, into records: a line for each cell. Only a single word that is wider than ``width``
    makes a line longer than it.
    """
    cells = [list(row) for row in rows]
    texts = [[show(cell) for cell in row] for row in cells]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    head = _wrap(show(title), width) if title else []
    table = [list(columns), *texts] if any(columns) else texts
    least = [max((_longest(row[i]) for row in table), default=0) for i in range(len(columns))]
    groups = _groups(texts, least, width)
    if not groups:
        return head, _records(columns, texts, width)
    lines: list[str] = []
    for group in groups:
        lines += [""] if lines else []
        lines += _table(
            [columns[i] for i in group],
            [[row[i] for i in group] for row in texts],
            [right[i] for i in group],
            width,
        )
    return head, lines


def _groups(texts: Sequence[Sequence[str]], least: Sequence[int], width: int) -> list[list[int]]:
    """Columns of each table, the first of all being those that tell rows apart; empty: they do not fit."""
    count = len(least)
    keys = next((k for k in range(1, count) if len({tuple(row[:k]) for row in texts}) == len(texts)), 1)
    groups = [list(range(count))] if _fits(least, range(count), width) else []
    if groups or count <= keys or len(texts) < 2:
        return groups
    for i in range(keys, count):
        if groups and _fits(least, [*groups[-1], i], width):
            groups[-1].append(i)
        elif _fits(least, [*range(keys), i], width):
            groups.append([*range(keys), i])
        else:
            return []
    return groups


def _fits(least: Sequence[int], group: Sequence[int], width: int) -> bool:
    return sum(least[i] for i in group) + len(_GAP) * (len(group) - 1) <= width


def _table(
    columns: Sequence[str], texts: Sequence[Sequence[str]], right: Sequence[bool], width: int
) -> list[str]:
    table = [columns, *texts] if any(columns) else texts
    natural = [max((_width(row[i]) for row in table), default=0) for i in range(len(columns))]
    least = [max((_longest(row[i]) for row in table), default=0) for i in range(len(columns))]
    gaps = len(_GAP) * (len(columns) - 1)
    widths = _shrink(natural, least, width - gaps)
    lines = [line for row in texts for line in _row(row, widths, right)]
    if any(columns):
        lines = [*_row(columns, widths, right), "─" * (sum(widths) + gaps), *lines]
    return lines


_GAP = "  "
_EAST = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"
_WORD = re.compile(rf"[{_EAST}]|[^\s{_EAST}]+|\s+")
"""Unbreakable: a word between spaces, or one character of a script that has none."""


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _longest(text: str) -> int:
    return max((_width(word) for word in _WORD.findall(text) if not word.isspace()), default=0)


def _wrap(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` columns, where its words allow that."""
    lines, line = [], ""
    for word in _WORD.findall(text):
        if _width(line) + _width(word) > width and line.strip():
            lines.append(line.rstrip())
            line = ""
        if line or not word.isspace():
            line += word
    return [*lines, line.rstrip()]


def _shrink(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Widths with a sum of at most ``room``: the widest columns shrink first, down to their longest word."""
    widths = list(natural)
    while sum(widths) > room:
        i = max((i for i in range(len(widths)) if widths[i] > least[i]), key=lambda i: widths[i])
        widths[i] -= 1
    return widths


def _row(texts: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    wrapped = [_wrap(text, width) for text, width in zip(texts, widths, strict=True)]
    lines = []
    for i in range(max(map(len, wrapped), default=0)):
        parts = []
        for lines_of_cell, width, aligned_right in zip(wrapped, widths, right, strict=True):
            part = lines_of_cell[i] if i < len(lines_of_cell) else ""
            space = " " * (width - _width(part))
            parts.append(space + part if aligned_right else part + space)
        lines.append(_GAP.join(parts).rstrip())
    return lines


def _records(columns: Sequence[str], texts: Sequence[Sequence[str]], width: int) -> list[str]:
    """Each row as lines ``column  cell``; a cell whose words do not fit starts on the next line."""
    label = min(max(map(_width, columns), default=0), width // 3)
    lines: list[str] = []
    for row in texts:
        if lines and len(columns) > 1:
            lines.append("")
        for column, text in zip(columns, row, strict=True):
            names, room = _wrap(column, label) if column else [], width - label - len(_GAP)
            if _longest(text) <= room and _longest(column) <= label:
                lines += _row((" ".join(names), text), (label, room), (False, False)) if text else []
            elif text:
                lines += [*_wrap(column, width)] if column else []
                lines += [_GAP + line for line in _wrap(text, width - len(_GAP))]
    return lines


def show(value: object) -> str:
    """A cell: floats with four significant digits, or whole; None as a dash; lists joined."""
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
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
