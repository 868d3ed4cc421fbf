"""Writes the tables of docs/scale.md from the receipts of :mod:`.report` and :mod:`.build`.

python -m ivl_export.benchmarks.fullsize.document
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ivl_export.files.write import write_text

ROOT = Path(__file__).resolve().parents[2]
RECEIPTS = ROOT / "profiles" / "receipts"
DOCUMENT = ROOT / "docs" / "scale.md"
BEGIN = "<!-- begin: written by benchmarks/fullsize/document.py -->"
BUILDS = "<!-- begin: builds, written by benchmarks/fullsize/document.py -->"
END = "<!-- end -->"
COLUMNS = (
    "blocks",
    "components",
    "step",
    "seconds",
    "anonymous GB",
    "GB read",
    "GB written",
    "x cp",
    "notes",
)


def render(text: str, rows: Iterable[Sequence[str]], begin: str = BEGIN) -> str:
    """``text`` with the table of ``rows`` between the mark ``begin`` and the next :data:`END`.

    Raises:
        ValueError: ``begin`` does not occur once, or no end follows.
    """
    before, mark, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not mark or not end or begin in after:
        raise ValueError(f"{begin!r} must occur once, with {END!r} after it.")
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return f"{before}{begin}\n{chr(10).join(lines)}\n{END}{after}"


def builds(receipt: Path) -> Iterator[Sequence[str]]:
    """Header, rule, then a row for each whole build of the receipt of :mod:`.build`."""
    yield ("model", "blocks", "recipe", "seconds", "peak GiB", "8-bit products", "not in 8 bits", "steps")
    yield ("---", "---", "---", "---:", "---:", "---:", "---:", "---")
    for row in json.loads(receipt.read_text(encoding="utf-8"))["rows"]:
        promised, fallbacks = 0, 0
        for backend, components in row["verification"].items():
            if not backend.startswith("onnxruntime"):
                promised += sum(c["promised"] for c in components.values())
                fallbacks += sum(c["fallbacks"] for c in components.values())
        steps = [(name, seconds) for name, seconds in row["steps_seconds"].items() if seconds >= 10]
        yield (
            row["layout"].partition(":")[0],
            " + ".join(map(str, row["blocks"])),
            row["precision"],
            f"{row['seconds']:.0f}",
            f"{row['peak_anonymous'] / 2**30:.1f}",
            str(promised),
            str(fallbacks),
            ", ".join(f"{name} {seconds:.0f} s" for name, seconds in steps),
        )


def table(receipts: Sequence[Path]) -> Iterator[Sequence[str]]:
    """Header, rule, then the rows of every receipt, small models first."""
    yield COLUMNS
    yield ("---", "---", "---", *("---:",) * 5, "---")
    loaded = [json.loads(path.read_text(encoding="utf-8")) for path in receipts]
    for receipt in sorted(loaded, key=_order):
        blocks = " + ".join(map(str, _depths(receipt)))
        components = ", ".join(receipt["components"])
        for row in receipt["rows"]:
            yield blocks, components, *_cells(row)


def _cells(row: dict[str, Any]) -> Sequence[str]:
    if row["error"]:
        return row["step"], *("",) * 5, f"failed: {' '.join(row['error'].split()).replace('|', '/')}"
    return (
        row["step"],
        f"{row['seconds']:.1f}",
        "" if row["peak_anonymous"] is None else f"{row['peak_anonymous'] / 1e9:.2f}",
        f"{row['bytes_read'] / 1e9:.2f}",
        f"{row['bytes_written'] / 1e9:.2f}",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "; ".join(notes(row)),
    )


def notes(row: dict[str, Any]) -> Iterator[str]:
    """A step's details in words; ``row`` as in a receipt."""
    details = row["details"] or {}
    if "times_seconds_of_copy" in details:
        yield f"{details['times_seconds_of_copy']:.1f}x the seconds of copy"
        yield f"{details['times_memory_of_copy']:.1f}x its memory"
    for tower, seconds in details.get("seconds_per_sample_and_block", {}).items():
        yield f"{tower}: {seconds:.3f} s a sample and block"
    if estimate := details.get("estimate"):
        yield (
            f"estimate for all blocks, {estimate['samples']} samples on {estimate['devices']} such machines: "
            f"{estimate['seconds'] / 60:.1f} min"
        )
    if steps := details.get("steps_seconds"):
        yield "steps: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in steps.items())
    for detail in details.values():
        if isinstance(detail, dict) and "products" in detail:
            products = ", ".join(f"{count} {kind}" for kind, count in sorted(detail["products"].items()))
            yield f"{detail['promised']} quantised products promised; found {products}"
            if predicted := detail.get("record", {}).get("predicted_bytes"):
                took = row["peak_anonymous"] - detail["anonymous_before"]
                yield f"build predicted to take {predicted / 1e9:.2f} GB; took {took / 1e9:.2f} GB"


def _depths(receipt: dict[str, Any]) -> tuple[int, int]:
    config = receipt["config"]
    return config["vision_config"]["num_hidden_layers"], config["qllama_config"]["num_hidden_layers"]


def _order(receipt: dict[str, Any]) -> tuple[Any, ...]:
    return *_depths(receipt), receipt["holes"], receipt["components"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the table of docs/scale.md from the receipts.")
    parser.add_argument("--check", action="store_true", help="only say whether it is stale (exit code 1)")
    args = parser.parse_args(argv)
    old = DOCUMENT.read_text(encoding="utf-8")
    new = render(old, table(sorted(RECEIPTS.glob("fullsize-*.json"))))
    if (receipt := RECEIPTS / "fullbuild.json").exists():
        new = render(new, builds(receipt), BUILDS)
    if args.check:
        return int(old != new)
    write_text(new, DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
