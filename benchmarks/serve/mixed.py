"""Minutes of mixed requests with broken ones among them: no 5xx, flat memory, and ``/health`` that answers.

    python -m ivl_export.benchmarks.serve.mixed --bundle BUNDLE --chat CHAT_BUNDLE --work FOLDER --seconds 600

Clients send embeddings of images and texts, captions, labels, scores and conversations; one request of ten is
broken (no image, a truncated one, a wrong type, a model that is not there, an empty list, too many items).
Beside them one client asks ``/health`` four times a second. Memory is read every ten seconds; its growth is
that of the last quarter's median over the median of the second quarter: in the first, caches fill.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivl_export.benchmarks.runtime.measured import RECEIPTS, receipt
from ivl_export.benchmarks.serve.load import Connection, get, post
from ivl_export.benchmarks.serve.servers import Server, ours
from ivl_export.cli.output import print_table
from ivl_export.files.write import write_text
from ivl_export.profiles.measure.inputs import jpeg

CLIENTS = 8
BROKEN = 0.1
EVERY = 10.0
"""Seconds between two looks at the memory."""
HEALTH_MS, GROWTH = 50.0, 0.02


def good(rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """Path and body of a request that is answered."""
    width, height = (int(side) for side in rng.integers(40, 300, 2))
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg((width, height))).decode()
    words = " ".join(rng.choice(["a", "red", "small", "circle", "left", "of", "star"], rng.integers(1, 9)))
    mode = str(rng.choice(["C", "G"]))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"model": "m", "input": [url, words], "mode": mode}),
        ("/v1/embeddings", {"model": "m", "input": words, "encoding_format": "base64"}),
        ("/v1/captions", {"model": "m", "input": url, "max_tokens": 8}),
        ("/v1/classify", {"model": "m", "input": url, "labels": ["circle", "star", "ring"]}),
        ("/v1/rerank", {"model": "m", "query": words, "documents": [url, words]}),
        ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": parts}],
                                  "max_tokens": 8, "stream": bool(rng.integers(2))}),
    ]  # fmt: skip
    return kinds[rng.integers(len(kinds))]


def broken(rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """Path and body of a request that is refused."""
    path, body = good(rng)
    whole = base64.b64encode(jpeg((64, 64))[:200]).decode()
    faults: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"model": "m", "input": "data:image/png;base64,aGVsbG8="}),
        ("/v1/captions", {"model": "m", "input": f"data:image/jpeg;base64,{whole}"}),
        ("/v1/embeddings", {"model": "m", "input": []}),
        ("/v1/embeddings", {"model": "m", "input": {"image": 5}}),
        ("/v1/embeddings", {"model": "m", "input": ["a"] * 100_000}),
        (path, {**body, "model": "../../etc/passwd"}),
    ]
    return faults[rng.integers(len(faults))]


async def clients(server: Server, until: float, statuses: Counter[int], unexpected: Counter[str]) -> None:
    """Ask until then."""

    async def one(seed: int) -> None:
        rng = np.random.default_rng(seed)
        connection = Connection(server.address)
        while time.monotonic() < until:
            fails = rng.random() < BROKEN
            path, body = broken(rng) if fails else good(rng)
            status, text = await connection.ask(post(server.address, path, body))
            statuses[status] += 1
            if (status != 200) != fails:
                unexpected[f"{status} {path} {text[:120]!r}"] += 1
        connection.close()

    await asyncio.gather(*(one(seed) for seed in range(CLIENTS)))


async def health(server: Server, until: float, latencies: list[float]) -> None:
    """Ask ``/health`` four times a second."""
    connection = Connection(server.address)
    while time.monotonic() < until:
        began = time.perf_counter()
        status, _ = await connection.ask(get(server.address, "/health"))
        latencies.append(time.perf_counter() - began if status == 200 else float("inf"))
        await asyncio.sleep(0.25)
    connection.close()


async def memory(server: Server, until: float, sizes: list[int]) -> None:
    """Read the memory."""
    while time.monotonic() < until:
        sizes.append(server.rss)
        await asyncio.sleep(EVERY)


def growth(sizes: Sequence[int]) -> float:
    """Of the last quarter's median over the second quarter's."""
    quarter = max(1, len(sizes) // 4)
    return statistics.median(sizes[-quarter:]) / statistics.median(sizes[quarter : 2 * quarter] or sizes) - 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Minutes of mixed requests, with broken ones among them.")
    parser.add_argument("--bundle", type=Path, required=True, help="an InternVL")
    parser.add_argument("--chat", type=Path, required=True, help="a chat bundle")
    parser.add_argument("--work", type=Path, required=True, help="for the server's log")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RECEIPTS / "serve-mixed.json", help="the receipt")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    statuses: Counter[int] = Counter()
    unexpected: Counter[str] = Counter()
    latencies: list[float] = []
    sizes: list[int] = []

    async def all_of_it(server: Server) -> None:
        until = time.monotonic() + options.seconds
        await asyncio.gather(
            clients(server, until, statuses, unexpected),
            health(server, until, latencies),
            memory(server, until, sizes),
        )

    bundles = [f"m={options.bundle}", f"chat={options.chat}"]
    with ours(options.work, bundles, options.threads) as server:
        asyncio.run(all_of_it(server))
    p99 = 1e3 * float(np.percentile(latencies, 99))
    failures = sum(count for status, count in statuses.items() if status >= 500 or status == 0)
    figures = {
        "/health p99, ms": (p99, p99 <= HEALTH_MS, f"at most {HEALTH_MS:g}"),
        "growth of memory": (growth(sizes), growth(sizes) <= GROWTH, f"at most {GROWTH:g}"),
        "5xx and broken connections": (failures, failures == 0, "none"),
        "answers of another kind than asked for": (unexpected.total(), not unexpected, "none"),
    }
    data = receipt("serve-mixed", options.threads, ()) | {
        "bundles": [options.bundle.name, options.chat.name], "clients": CLIENTS, "seconds": options.seconds,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "unexpected": dict(unexpected.most_common(20)), "rss": sizes,
        "figures": {n: {"value": v, "met": met, "bound": bound} for n, (v, met, bound) in figures.items()},
    }  # fmt: skip
    write_text(json.dumps(data, indent=1) + "\n", options.out)
    rows = [
        (name, f"{v:.4g}", bound, "met" if met else "missed") for name, (v, met, bound) in figures.items()
    ]
    print_table(f"{sum(statuses.values()):,} requests", ("figure", "value", "goal", ""), rows)
    for text, count in unexpected.most_common(5):
        print(f"{count} x {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
