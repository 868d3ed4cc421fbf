"""``POST /v1/embeddings`` against the bare service, a plain FastAPI server and LitServe, on the same cores.

    python -m ivl_export.benchmarks.serve.http --bundle BUNDLE --work FOLDER

A request is a JPEG in a data URL, and the vector comes back in base64. Every round measures each server
once, the first of them another one each time; figures are medians of the rounds. CPU time is that of the
server's processes by ``/proc`` (of ``service``: this one): other work on the machine disturbs it less than
the clock. LitServe is measured where it is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ivl_export.benchmarks.runtime.measured import RECEIPTS, receipt
from ivl_export.benchmarks.serve.load import Load, closed_loop, open_loop, post
from ivl_export.benchmarks.serve.servers import Server, alternative, ours
from ivl_export.cli.output import print_table
from ivl_export.files.write import write_text
from ivl_export.profiles.measure.inputs import jpeg
from ivl_export.runtime import InternVL

CLIENTS = (1, 8, 32, 64)
SIZES = {"128 x 128": (128, 128), "640 x 480": (640, 480)}
OURS, SERVICE, NAIVE, LIT = "ivl-export serve", "service", "naive", "lit"
ARRIVALS = 0.6
"""Of the open loop: the share of the rate that was reached with eight clients."""
Measure = Callable[[int, int], Load]
"""Clients and requests -> what they took."""


@dataclass(frozen=True)
class Row:
    """One server under one load: medians of the rounds' figures."""

    picture: str
    load: str
    name: str
    rounds: tuple[Load, ...]

    def median(self, figure: str) -> float:
        """The median over rounds of ``rate``, ``cpu_ms``, ``p50_ms`` or ``p99_ms``."""
        return statistics.median(float(load.to_json()[figure]) for load in self.rounds)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the receipt."""
        medians = {name: self.median(name) for name in ("rate", "cpu_ms", "p50_ms", "p99_ms")}
        return {
            "picture": self.picture, "load": self.load, "name": self.name, **medians,
            "rounds": [load.to_json() for load in self.rounds],
        }  # fmt: skip


async def service_loop(model: InternVL, picture: bytes, clients: int, count: int) -> Load:
    """:func:`.load.closed_loop` on the service itself, in this process."""
    taken = iter(range(count))
    latencies: list[float] = []

    async def client() -> None:
        for _ in taken:
            began = time.perf_counter()
            await model.aencode_image(picture)
            latencies.append(time.perf_counter() - began)

    before, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    return Load(seconds, tuple(latencies), time.process_time() - before, {200: count})


def measure(
    servers: Sequence[Server], model: InternVL, options: argparse.Namespace, keep: Callable[[list[Row]], None]
) -> list[Row]:
    """Rows of all pictures and loads; ``keep`` is called with those so far after each load."""
    rows: list[Row] = []
    for name, size in SIZES.items():
        picture = jpeg(size)
        url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
        body = {"input": url, "encoding_format": "base64", "modality": "image"}
        ways: dict[str, Measure] = {SERVICE: partial(_service, model, picture)}
        for server in servers:
            request = post(server.address, "/v1/embeddings", body)
            ways[server.name] = partial(_closed, server, request)
        for clients in options.clients:
            count = max(options.requests, 4 * clients)
            rows += rounds(ways, name, f"{clients} clients", options.rounds, clients, count)
            keep(rows)
        rate = ARRIVALS * next(r for r in rows if (r.name, r.load) == (OURS, "8 clients")).median("rate")
        arriving: dict[str, Measure] = {
            server.name: partial(_open, server, post(server.address, "/v1/embeddings", body), rate)
            for server in servers
        }
        rows += rounds(arriving, name, f"{rate:.0f} arrivals a second", options.rounds, 8, options.requests)
        keep(rows)
    return rows


def _service(model: InternVL, picture: bytes, clients: int, count: int) -> Load:
    return asyncio.run(service_loop(model, picture, clients, count))


def _closed(server: Server, request: bytes, clients: int, count: int) -> Load:
    return asyncio.run(closed_loop(server.address, [request], clients, count, server.cpu))


def _open(server: Server, request: bytes, rate: float, _: int, count: int) -> Load:
    return asyncio.run(open_loop(server.address, [request], rate, count, server.cpu))


def rounds(
    ways: dict[str, Measure], picture: str, load: str, count: int, clients: int, requests: int
) -> list[Row]:
    """Every way once a round, after one call that does not count."""
    names = list(ways)
    loads: dict[str, list[Load]] = {name: [] for name in names}
    for name in names:
        ways[name](clients, 2 * clients)
    for turn in range(count):
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            loads[name].append(ways[name](clients, requests))
            if set(loads[name][-1].statuses) != {200}:
                raise RuntimeError(
                    f"{name} answered with {dict(loads[name][-1].statuses)}, {load}, {picture}"
                )
    return [Row(picture, load, name, tuple(loads[name])) for name in names]


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What shall hold with eight clients, and whether it does."""
    by = {(row.picture, row.load, row.name): row for row in rows}
    result = []
    for picture in SIZES:
        own, service, naive, lit = (by.get((picture, "8 clients", n)) for n in (OURS, SERVICE, NAIVE, LIT))
        if own is None:
            continue
        if service is not None and picture == next(iter(SIZES)):
            over = own.median("cpu_ms") - service.median("cpu_ms")
            result.append(_goal("CPU ms of HTTP over the service", picture, over, over <= 1.0, "at most 1.0"))
        for other, least in ((naive, 2.0), (lit, 1.2)):
            if other is None:
                continue
            ratio = own.median("rate") / other.median("rate")
            slower = own.median("p99_ms") > other.median("p99_ms")
            what = f"requests a second over {other.name}, p99 no worse"
            result.append(_goal(what, picture, ratio, ratio >= least and not slower, f"at least {least}"))
    return result


def _goal(what: str, picture: str, value: float, met: bool, bound: str) -> dict[str, Any]:
    return {"what": what, "picture": picture, "value": value, "met": met, "bound": bound}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the server and its alternatives.")
    parser.add_argument("--bundle", type=Path, required=True, help="an InternVL in INT8")
    parser.add_argument("--work", type=Path, required=True, help="for the servers' logs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200, help="of a round")
    parser.add_argument(
        "--clients", type=lambda text: tuple(map(int, text.split(","))), default=CLIENTS, help="1,8,32,64"
    )
    parser.add_argument("--out", type=Path, default=RECEIPTS / "serve-http.json", help="the receipt")
    options = parser.parse_args(argv)
    if 8 not in options.clients:
        parser.error("the goals are about 8 clients")
    options.work.mkdir(parents=True, exist_ok=True)

    def keep(rows: list[Row]) -> None:
        data = receipt("serve-http", options.threads, ())
        data |= {"bundle": options.bundle.name, "goals": goals(rows), "rows": [row.to_json() for row in rows]}
        write_text(json.dumps(data, indent=1) + "\n", options.out)

    with ExitStack() as stack:
        servers = [stack.enter_context(ours(options.work, [f"m={options.bundle}"], options.threads))]
        others = [NAIVE, *([LIT] if find_spec("litserve") is not None else [])]
        opened = (alternative(name, options.work, options.bundle, options.threads) for name in others)
        servers += [stack.enter_context(one) for one in opened]
        model = stack.enter_context(InternVL.load(options.bundle, threads=options.threads))
        rows = measure(servers, model, options, keep)
        memory = {server.name: server.rss for server in servers}
    figures = ("rate", "p50_ms", "p99_ms", "cpu_ms")
    table = [(r.picture, r.load, r.name, *(f"{r.median(f):.4g}" for f in figures)) for r in rows]
    headings = ("picture", "load", "server", "a second", "p50", "p99", "CPU ms")
    print_table("Embeddings over HTTP", headings, table)
    for goal in goals(rows):
        word = "met" if goal["met"] else "missed"
        print(f"{goal['picture']}: {goal['what']}: {goal['value']:.2f} ({goal['bound']}: {word})")
    print("resident MB:", ", ".join(f"{name} {size / 1e6:.0f}" for name, size in memory.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
