"""Measures the runtime, part by part, compared with alternatives.

    python -m ivl_export.benchmarks.runtime.report --work DIR                  # all parts
    python -m ivl_export.benchmarks.runtime.report --work DIR --parts chained  # some
    python -m ivl_export.benchmarks.runtime.document                           # docs/runtime.md from them

Each part prints its tables and leaves its receipt in ``profiles/receipts/runtime-<part>.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path

from ivl_export.benchmarks.runtime.measured import RECEIPTS, ROUNDS, Comparison, keep, receipt, show
from ivl_export.benchmarks.runtime.models import Setting

Part = Callable[[Setting], Iterable[Comparison]]
PARTS = ("chained", "pytorch", "precisions", "clients", "decoding", "prefix", "images", "tiles")
"""Modules of this folder; each has a function ``measure`` that is a :data:`Part`."""


def part(name: str) -> Part:
    """The function that measures part ``name``."""
    measure: Part = import_module(f"ivl_export.benchmarks.runtime.{name}").measure
    return measure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the runtime and its alternatives.")
    parser.add_argument("--work", type=Path, required=True, help="where models are made, built and kept")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--models", default="nano,mid")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RECEIPTS, help="the folder of the receipts")
    args = parser.parse_args(argv)
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.work, args.threads, args.rounds, tuple(args.models.split(",")))
    for name in names:
        comparisons: list[Comparison] = []
        for comparison in part(name)(setting):
            comparisons.append(comparison)
            show([comparison])
            keep(receipt(name, setting.threads, comparisons), args.out)  # a killed run keeps its parts
    return 0


if __name__ == "__main__":
    sys.exit(main())
