"""Writes the table of docs/embed.md for a billion images: machines, hours, cost and storage, from receipts.

    python -m ivl_export.benchmarks.serve.scale

Images a second are those that ``ivl-export estimate`` predicts from the receipts of this repository, or those
that a profile receipt measured on a CPU. The formula is printed above the table; prices are the reader's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl_export.benchmarks.fullsize.document import render
from ivl_export.benchmarks.readme import RECEIPTS, receipts
from ivl_export.files.write import write_text
from ivl_export.models.config import InternVLConfig
from ivl_export.models.registry import load_config
from ivl_export.models.shipped import nano_folder
from ivl_export.profiles.cost.estimate import estimate
from ivl_export.profiles.cost.gpus import find_gpu
from ivl_export.profiles.cost.sizes import plan_of
from ivl_export.quantization.recipe import load_recipe
from ivl_export.runtime.shards import GROUP_BYTES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "embed.md"
BEGIN = "<!-- begin: written by benchmarks/serve/scale.py from profiles/receipts -->"
IMAGES = 1_000_000_000
DAY = 24.0
BATCH = 128
SHARD_ITEMS = 65536
GPUS = (("l4", "fp8"), ("l40s", "fp8"), ("h100", "fp8"), ("a100", "int8"))
KEY_BYTES = 40
"""Of a key, compressed: what a path of a photograph takes, as an allowance."""
HASH_BYTES, FOOTER_BYTES = 32, 4096


@dataclass(frozen=True)
class Speed:
    """Images a second of one machine: ``on`` what, by ``source``, vectors of ``width``."""

    model: str
    on: str
    images_per_second: float
    width: int
    source: str

    @property
    def hours(self) -> float:
        """Hours of one machine for :data:`IMAGES`."""
        return IMAGES / self.images_per_second / 3600

    @property
    def machines(self) -> int:
        """Machines that do it within a day."""
        return math.ceil(self.hours / DAY)


def speeds(folder: Path = RECEIPTS) -> Iterator[Speed]:
    """InternVL-14B on GPUs as predicted, nano in INT8 on the CPU as measured."""
    config = InternVLConfig()
    for name, precision in GPUS:
        recipe, gpu = load_recipe(precision), find_gpu(name)
        result = estimate(config, recipe, plan_of(recipe, config), gpu, (BATCH,), receipts=folder)
        rate = result.points[0].images_c_per_s
        yield Speed("InternVL-14B, C", f"{gpu.title}, {precision}", rate, config.clip_embed_dim, "predicted")
    nano: Any = load_config(nano_folder() / "config.json")
    for profile in receipts(folder):
        best = [c for c in profile.of_kind("chained") if c.name == "encode_image InternVL-C"]
        if profile.subject.name == "internvl-nano-int8" and best:
            rate = max(case.per_second for case in best)
            yield Speed("internvl-nano, C", "one CPU thread, int8", rate, nano.clip_embed_dim, "measured")


def storage(width: int, itemsize: int, rows: int = IMAGES) -> int:
    """Bytes of the shards of ``rows`` vectors."""
    groups = max(1, math.ceil(SHARD_ITEMS * width * itemsize / GROUP_BYTES))
    shards = math.ceil(rows / SHARD_ITEMS)
    return rows * (width * itemsize + HASH_BYTES + KEY_BYTES) + shards * (FOOTER_BYTES + 64 * groups)


def table(folder: Path = RECEIPTS) -> Iterator[Sequence[str]]:
    """Header, rule, and a row for each speed."""
    yield (
        "model", "on", "images/s", "by", "hours of one", "machines for a day", "at 2.00 an hour",
        "float32", "float16",
    )  # fmt: skip
    yield ("---", "---", "---:", "---", *("---:",) * 5)
    for speed in speeds(folder):
        sizes = (f"{storage(speed.width, size) / 1e12:.2f} TB" for size in (4, 2))
        yield (
            speed.model,
            speed.on,
            f"{speed.images_per_second:,.0f}",
            speed.source,
            f"{speed.hours:,.0f}",
            f"{speed.machines:,}",
            f"{2 * speed.hours:,.0f}",
            *sizes,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the table of docs/embed.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is stale")
    args = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    fresh = render(text, table(RECEIPTS), BEGIN)
    if args.check:
        return int(fresh != text)
    write_text(fresh, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
