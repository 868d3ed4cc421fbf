"""The tables of docs/precision.md, from receipts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECEIPTS = ROOT / "profiles" / "receipts"
RECEIPT = RECEIPTS / "precision-nano.json"
DOCUMENT = ROOT / "docs" / "precision.md"
END = "<!-- end -->"
_MARK = re.compile(r"<!-- begin: (\w+), written by benchmarks/precision/report.py -->\n.*?<!-- end -->", re.S)

Lines = Iterator[Sequence[str]]


def render(text: str) -> str:
    """``text`` with its tables written again.

    Raises:
        ValueError: a mark names no table, or a table has no mark.
    """
    receipt = json.loads(RECEIPT.read_text(encoding="utf-8"))
    written: list[str] = []

    def table(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"no table {match[1]!r}")
        written.append(match[1])
        lines = ["| " + " | ".join(cells) + " |" for cells in TABLES[match[1]](receipt)]
        return f"{match[0].splitlines()[0]}\n{chr(10).join(lines)}\n{END}"

    page = _MARK.sub(table, text)
    if sorted(written) != sorted(TABLES):
        raise ValueError(f"{sorted(TABLES)} must each occur once, not {written}")
    return page


def recipes(receipt: Mapping[str, Any]) -> Lines:
    """nano under every recipe."""
    yield ("recipe", "weights MB", *_TASKS, *_SQNR, "modelled images/s", "of 14B")
    yield ("---", *("---:",) * 11)
    first = receipt["recipes"][0]
    yield ("*fp32*", "", *_percent(first["reference"]), *("",) * 4, "", "")
    for row in receipt["recipes"]:
        yield (
            row["recipe"],
            f"{row['weight_bytes'] / 1e6:.2f}",
            *_percent(row["tasks"]),
            *_decibels(row["sqnr_db"]),
            f"{row['images_per_s']:,.0f}",
            "" if row["images_per_s_14b"] is None else f"{row['images_per_s_14b']:.0f}",
        )


def algorithms(receipt: Mapping[str, Any]) -> Lines:
    """Ways to pick the ranges of activations, side by side."""
    yield ("recipe", "ranges", *_TASKS, *_SQNR)
    yield ("---", "---", *("---:",) * 9)
    for row in receipt["algorithms"]:
        yield (row["recipe"], row["algorithm"], *_percent(row["tasks"]), *_decibels(row["sqnr_db"]))


def outliers(receipt: Mapping[str, Any]) -> Lines:
    """The block with massive channels, and the same block without."""
    rows = receipt["outliers"]["rows"]
    yield ("scheme", "ranges", "without: SQNR dB", "cosine", "with outliers: SQNR dB", "cosine")
    yield ("---", "---", *("---:",) * 4)
    for loud in (row for row in rows if row["outliers"]):
        same = ("scheme", "algorithm", "smooth")
        (plain,) = (r for r in rows if not r["outliers"] and all(r[k] == loud[k] for k in same))
        yield (
            f"{loud['scheme']}{', SmoothQuant' if loud['smooth'] else ''}",
            loud["algorithm"],
            *(text for r in (plain, loud) for text in (f"{r['sqnr_db']:.1f}", f"{r['cosine']:.4f}")),
        )


def mixed(receipt: Mapping[str, Any]) -> Lines:
    """The search's choices, by kind of layer."""
    (row,) = (row for row in receipt["recipes"] if "search" in row)
    search = row["search"]
    yield ("layers", "scheme", "why (of the first)")
    yield ("---", "---", "---")
    seen: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for choice in search["choices"]:
        kind = re.sub(r"\.\d+\.", ".*.", choice["layers"][0])
        seen.setdefault((kind, choice["scheme"]), []).append(choice)
    for (kind, scheme), choices in seen.items():
        joined = ", ".join(layer.rpartition(".")[2] for layer in choices[0]["layers"])
        place = kind.rpartition(".")[0]
        yield f"{len(choices)} x `{place}`: {joined}", scheme, choices[0]["reason"]


def finetuned(_: Mapping[str, Any]) -> Lines:
    """What fine-tuning gave back: receipts of ``ivl-export train qat``, kept as ``qat-*.json``."""
    from ivl_export.pipeline.accuracy_steps import headlines

    yield ("recipe", "learned from", "steps", "minutes", "", *_TASKS)
    yield ("---", "---", "---:", "---:", "---", *("---:",) * 5)
    for path in sorted(RECEIPTS.glob("qat-*.json")):
        receipt = json.loads(path.read_text(encoding="utf-8"))
        if "scores" not in receipt:
            continue
        settings = receipt["settings"]
        teacher = "the fp32 model" if settings["teacher"] else f"stage {settings['stage']}'s losses"
        about = (receipt["recipe"], teacher, str(settings["steps"]), f"{receipt['seconds'] / 60:.1f}")
        for which, label in (("ptq", "before"), ("qat", "after")):
            first = about if which == "ptq" else ("",) * 4
            yield (*first, label, *_percent(headlines(receipt["scores"][which])))


TABLES: dict[str, Callable[[Mapping[str, Any]], Lines]] = {
    "recipes": recipes,
    "algorithms": algorithms,
    "outliers": outliers,
    "mixed": mixed,
    "finetuned": finetuned,
}
_TASKS = ("C classify", "C retrieve", "G classify", "G retrieve", "caption")
_SQNR = ("image dB", "query dB", "text dB", "logits dB")


def _percent(tasks: Mapping[str, float]) -> Iterator[str]:
    return (f"{100 * value:.1f}%" for value in tasks.values())


def _decibels(sqnr: Mapping[str, float | None]) -> Iterator[str]:
    return ("exact" if value is None else f"{value:.1f}" for value in sqnr.values())
