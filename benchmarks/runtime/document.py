"""The tables of docs/runtime.md, from receipts.

python -m ivl_export.benchmarks.runtime.document
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivl_export.atomic import write_text
from ivl_export.benchmarks.runtime.measured import (
    COLUMNS,
    RECEIPTS,
    SCHEMA,
    Comparison,
    receipt_path,
    rows,
)
from ivl_export.benchmarks.runtime.report import PARTS

DOCUMENT = RECEIPTS.parents[1] / "docs" / "runtime.md"
END = "<!-- end -->"
_MARK = re.compile(r"<!-- begin: (\w+), written by benchmarks/runtime/document.py -->\n.*?<!-- end -->", re.S)


def render(text: str, folder: Path = RECEIPTS) -> str:
    """``text`` with the table of each part written anew from its receipt in ``folder``, if there is one.

    Raises:
        ValueError: a mark names no part, a part has not one mark, or a receipt has another schema.
    """
    written: list[str] = []

    def table(match: re.Match[str]) -> str:
        if match[1] not in PARTS:
            raise ValueError(f"no part {match[1]!r}")
        written.append(match[1])
        return "\n".join([match[0].splitlines()[0], *_section(receipt_path(match[1], folder)), END])

    made = _MARK.sub(table, text)
    if sorted(written) != sorted(PARTS):
        raise ValueError(f"{sorted(PARTS)} must each stand once, found {written}")
    return made


def _section(path: Path) -> Iterator[str]:
    if not path.is_file():
        yield "Not measured yet: there is no receipt."
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["schema"] != SCHEMA:
        raise ValueError(f"{path.name}: {found['schema']} is not {SCHEMA}")
    yield from lines(found)
    yield ""
    yield about(found)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The table of a receipt, then its notes."""
    notes: list[str] = []
    table: list[Sequence[str]] = [("", *COLUMNS), ("---", "---", "---", "---:", "---", "---:", "---")]
    for comparison in map(Comparison.from_json, found["comparisons"]):
        for i, cells in enumerate(rows(comparison)):
            table.append(("" if i else comparison.case, *cells))
        notes += [f"- {comparison.case}: {note}" for note in comparison.notes]
    yield from ("| " + " | ".join(cells) + " |" for cells in table)
    if notes:
        yield ""
        yield from notes


def about(found: Mapping[str, Any]) -> str:
    """Where and how it was measured."""
    rounds = {len(t["seconds"]) for c in found["comparisons"] for t in c["timed"]}
    few, many = min(rounds, default=0), max(rounds, default=0)
    return (
        f"Medians of {few if few == many else f'{few} to {many}'} rounds on {found['machine']['cpu']}, "
        f"{found['threads']} thread{'s' * (found['threads'] > 1)}, {found['created'][:10]}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/runtime.md from the receipts.")
    parser.add_argument("--check", action="store_true", help="only say whether it is stale (exit code 1)")
    args = parser.parse_args(argv)
    old = DOCUMENT.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        return int(old != new)
    write_text(new, DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
