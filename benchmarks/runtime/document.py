"""The tables of docs/runtime.md, from receipts.

python -m ivl_export.benchmarks.runtime.document
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivl_export.benchmarks.runtime.measured import (
    COLUMNS,
    RECEIPTS,
    SCHEMA,
    Comparison,
    receipt_path,
    rows,
)
from ivl_export.benchmarks.runtime.report import PARTS
from ivl_export.files.write import write_text

DOCUMENT = RECEIPTS.parents[1] / "docs" / "runtime.md"
END = "<!-- end -->"
_MARK = re.compile(r"<!-- begin: (\w+), written by benchmarks/runtime/document.py -->\n.*?<!-- end -->", re.S)


def render(text: str, folder: Path = RECEIPTS) -> str:
    """``text`` with the table of each part written again from its receipt in ``folder``, if there is one.

    Raises:
        ValueError: a mark names no part, a part has not one mark, or a receipt has another schema.
    """
    written: list[str] = []

    def table(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"no part {match[1]!r}")
        written.append(match[1])
        return "\n".join([match[0].splitlines()[0], *_section(match[1], folder), END])

    page = _MARK.sub(table, text)
    if sorted(written) != sorted(TABLES):
        raise ValueError(f"{sorted(TABLES)} must each occur once, not {written}")
    return page


def _section(part: str, folder: Path) -> Iterator[str]:
    paths = [
        path
        for path in (receipt_path(name, folder) for name in RECEIPTS_OF.get(part, (part,)))
        if path.is_file()
    ]
    if not paths:
        yield "Not measured yet: there is no receipt."
        return
    receipts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path, receipt in zip(paths, receipts, strict=True):
        if receipt["schema"] != SCHEMA:
            raise ValueError(f"{path.name}: {receipt['schema']} is not {SCHEMA}")
    yield from TABLES[part](*receipts)
    yield ""
    yield about(receipts[0])


def lines(receipt: Mapping[str, Any]) -> Iterator[str]:
    """The table of comparisons, then their notes."""
    notes: list[str] = []
    table: list[Sequence[str]] = []
    for comparison in map(Comparison.from_json, receipt["comparisons"]):
        for i, cells in enumerate(rows(comparison)):
            table.append(("" if i else comparison.case, *cells))
        notes += [f"- {comparison.case}: {note}" for note in comparison.notes]
    yield from _table(("", *COLUMNS), "lll-l-l", table)
    if notes:
        yield ""
        yield from notes


def memory(receipt: Mapping[str, Any]) -> Iterator[str]:
    """What bundles hold, then their calls on shared weights."""
    from ivl_export.benchmarks.runtime.memory import COLUMNS as HELD
    from ivl_export.benchmarks.runtime.memory import Held

    runs = [
        Held(**{key: value for key, value in row.items() if key != "ratio"}).row() for row in receipt["held"]
    ]
    yield from _table(HELD, "ll-------", runs)
    yield ""
    yield from lines(receipt)


def soak(*receipts: Mapping[str, Any]) -> Iterator[str]:
    """How memory went over a service's requests, a row for each way malloc was set."""
    table = []
    for receipt in receipts:
        malloc = ", ".join(f"{name}={value}" for name, value in receipt["malloc"].items()) or "as it is"
        requests = f"{receipt['requests'][-1] - receipt['warm_up']:,}"
        for what, ends in receipt["ends"].items():
            sizes = (f"{size / 1e6:.1f}" for size in ends)
            table.append((malloc, what, requests, *sizes, f"{receipt['growth'][what]:+.2%}"))
    yield from _table(("malloc", "", "requests", "MB at first", "MB at last", "growth"), "ll----", table)


def _table(head: Sequence[str], align: str, cells: Iterable[Sequence[str]]) -> Iterator[str]:
    """Markdown; ``align`` has a letter a column: ``l``eft, or ``-`` for numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" if letter == "l" else "---:" for letter in align) + " |"
    yield from ("| " + " | ".join(row) + " |" for row in cells)


TABLES: dict[str, Callable[..., Iterator[str]]] = dict.fromkeys(PARTS, lines) | {
    "memory": memory,
    "soak": soak,
}
"""Writers of a part's table from its receipt."""
RECEIPTS_OF = {"soak": ("soak", "soak-default")}
"""Parts of several receipts."""


def about(receipt: Mapping[str, Any]) -> str:
    """Where and how it was measured."""
    rounds = {len(t["seconds"]) for c in receipt["comparisons"] for t in c["timed"]}
    few, many = min(rounds, default=0), max(rounds, default=0)
    medians = f"Medians of {few if few == many else f'{few} to {many}'} rounds on" if many else "On"
    return (
        f"{medians} {receipt['machine']['cpu']}, "
        f"{receipt['threads']} thread{'s' * (receipt['threads'] > 1)}, {receipt['created'][:10]}."
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
