"""Search in folders of shards: exact over mapped vectors, and FAISS's inverted lists on the disk.

    python -m ivl_export.benchmarks.serve.index --work DIR                     # 200,000 vectors
    python -m ivl_export.benchmarks.serve.index --work DIR --vectors 5000000   # 5 million: 12 GB of disk

The vectors are made up: unit vectors near a random subspace of 24 dimensions, without the clusters that lists
could follow. Recall is the share of the ten nearest by exact search that are found. Times are of single
queries, medians of 200, the files in the page cache as far as memory holds them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ivl_export.arrays import Floats
from ivl_export.benchmarks.runtime.measured import RECEIPTS
from ivl_export.files.write import write_text
from ivl_export.profiles.measure.machine import commit, machine, versions
from ivl_export.runtime import Index
from ivl_export.runtime.shards import Embedding, ShardReceipt, shard_name, write_shard
from ivl_export.runtime.zero_shot import l2

PART = "serve-index"
SCHEMA = "ivl-export.index-search/1"
ROWS = 16384
QUERIES, TOP = 200, 10
PROBES = (4, 16, 64)
DIMENSIONS = 24
"""Of the subspace that vectors are near to."""
NOISE = 0.3
"""Length of a vector's part outside the subspace, against the part in it."""


@dataclass(frozen=True)
class Search:
    """One way to search.

    Args:
        name: ``exact``, or the lists that are read.
        milliseconds: of a query: median, and the slowest of a hundred.
        recall: share of the ten nearest.
        disk: bytes of the files that are searched.
    """

    name: str
    milliseconds: tuple[float, float]
    recall: float
    disk: int


def made_up(count: int, width: int, seed: int) -> Floats:
    """Unit vectors [count, width] near one random subspace."""
    axes = np.random.default_rng(0).standard_normal((min(DIMENSIONS, width), width), np.float32)
    rng = np.random.default_rng([1, seed])
    inside = l2(rng.standard_normal((count, len(axes)), np.float32) @ axes)
    outside = l2(rng.standard_normal((count, width), np.float32))
    return l2(inside + np.float32(NOISE) * outside)


def make_folder(folder: Path, count: int, width: int) -> None:
    """Shards of made-up vectors in ``folder``; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    embedding = Embedding(
        "0" * 64, "made-up", "none", "none", "", width, "float32", "", True, False, "", 0, 8, False
    )
    shards = -(-count // ROWS)
    for number in range(shards):
        path = folder / shard_name(number)
        if path.is_file():
            continue
        rows = min(ROWS, count - number * ROWS)
        receipt = ShardReceipt(embedding, "0" * 64, number, shards, rows, "0" * 64, rows)
        columns: dict[str, Any] = {
            "vector": made_up(rows, width, number + 1),
            "key": [f"{number}-{row}" for row in range(rows)],
            "kind": ["image"] * rows,
            "sha256": [bytes(32)] * rows,
        }
        write_shard(path, receipt, columns)


def measure(folder: Path, count: int, width: int, lists: int | None = None) -> dict[str, Any]:
    """Search made-up vectors exactly and with several numbers of probes; plain data."""
    make_folder(folder, count, width)
    queries = made_up(QUERIES, width, 0)
    start = time.perf_counter()
    place = Index.build(folder, lists)
    build_seconds = time.perf_counter() - start
    start = time.perf_counter()
    exact, approximate = Index.open(folder), Index.open(folder, "faiss")
    open_seconds = (time.perf_counter() - start) / 2
    want = exact.search(queries, TOP)[0]
    shards = sum(path.stat().st_size for path in folder.glob("shard-*"))
    lists_bytes = sum(path.stat().st_size for path in place.iterdir())
    searches = [Search("exact", _times(exact, queries[:20], None), 1.0, shards)]
    for probes in PROBES:
        found = approximate.search(queries, TOP, probes=probes)[0]
        shares = [len({*a} & {*b}) / TOP for a, b in zip(found.tolist(), want.tolist(), strict=True)]
        times = _times(approximate, queries, probes)
        searches.append(Search(f"{probes} lists", times, float(np.mean(shares)), lists_bytes))
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(machine()),
        "versions": versions(),
        "commit": commit(),
        "vectors": count,
        "width": width,
        "lists": json.loads((place / "ivf.json").read_text(encoding="utf-8"))["lists"],
        "build_seconds": build_seconds,
        "open_seconds": open_seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "searches": [asdict(search) for search in searches],
    }


def _times(index: Index, queries: Floats, probes: int | None) -> tuple[float, float]:
    """Milliseconds of single queries: the median, and the 99th percentile."""
    seconds = []
    for query in queries:
        start = time.perf_counter()
        index.search(query[None], TOP, probes=probes)
        seconds.append(time.perf_counter() - start)
    middle, slow = np.percentile(seconds, (50, 99)) * 1e3
    return float(middle), float(slow)


def main(argv: Sequence[str] | None = None) -> int:
    from ivl_export.cli.output import human_bytes, print_table

    parser = argparse.ArgumentParser(description="Measure recall and latency of searches in shards.")
    parser.add_argument("--work", type=Path, required=True, help="where the shards are made")
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--lists", type=int, help="else about 4 times the root of the vectors")
    parser.add_argument("--out", type=Path, default=RECEIPTS, help="the folder of the receipt")
    parser.add_argument("--delete", action="store_true", help="delete the shards at the end")
    args = parser.parse_args(argv)
    folder = args.work / f"vectors-{args.vectors}-{args.width}"
    data = measure(folder, args.vectors, args.width, args.lists)
    write_text(json.dumps(data, indent=1) + "\n", args.out / f"{PART}-{args.vectors}.json")
    built = f"{data['lists']} lists, built in {data['build_seconds']:.0f} s"
    title = f"{args.vectors:,} vectors of {args.width}, {built}"
    rows = [
        (s["name"], *(f"{ms:.3g}" for ms in s["milliseconds"]), f"{s['recall']:.3f}", human_bytes(s["disk"]))
        for s in data["searches"]
    ]
    print_table(title, ("search", "ms", "99th of 100", f"recall@{TOP}", "on disk"), rows)
    if args.delete:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
