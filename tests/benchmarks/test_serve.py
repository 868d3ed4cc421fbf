"""The clients of the server's benchmarks: what they count, and what they make of answers and failures."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")

from ivl_export.benchmarks.serve.http import Row, goals
from ivl_export.benchmarks.serve.load import (
    Connection,
    Load,
    closed_loop,
    family,
    get,
    open_loop,
    post,
    tree_bytes,
    tree_cpu,
)
from ivl_export.benchmarks.serve.mixed import growth

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"


def asked(answers: list[bytes], call: Callable[[str], Any]) -> tuple[Any, list[bytes]]:
    """What ``call`` of an address gives, and the requests there; ``answers`` take turns, empty: hang up."""
    requests: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0
                )
                requests.append(head + await reader.readexactly(length))
                text = answers[(len(requests) - 1) % len(answers)]
                if not text:
                    break
                writer.write(text)
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    async def run() -> Any:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await call(f"http://127.0.0.1:{port}")

    return asyncio.run(run()), requests


@pytest.mark.parametrize("text", [WHOLE, CHUNKED])
def test_answers_are_read_whole(text: bytes) -> None:
    async def call(address: str) -> list[tuple[int, bytes]]:
        connection = Connection(address)
        both = [await connection.ask(post(address, "/x", {"a": 1}, "key")) for _ in range(2)]
        connection.close()
        return both

    both, requests = asked([text], call)
    assert both == [(200, b"hello")] * 2
    assert requests[0].startswith(b"POST /x HTTP/1.1\r\n")
    assert requests[0].endswith(b'\r\n\r\n{"a": 1}')
    assert b"Authorization: Bearer key" in requests[0]


def test_what_was_refused_or_lost_is_counted_apart() -> None:
    async def call(address: str) -> Load:
        return await closed_loop(address, [get(address, "/")], 1, 6, lambda: 0.0)

    load, _ = asked([WHOLE, BUSY, b""], call)
    assert dict(load.statuses) == {200: 2, 429: 2, 0: 2}
    assert len(load.latencies) == 2


def test_arrivals_do_not_wait_for_answers() -> None:
    async def call(address: str) -> Load:
        return await open_loop(address, [get(address, "/")], 1000.0, 20, lambda: 0.0)

    load, requests = asked([WHOLE], call)
    assert len(requests) == len(load.latencies) == 20
    assert all(seconds >= 0 for seconds in load.latencies)


def test_a_processs_figures_are_those_of_its_family() -> None:
    assert os.getpid() in family(os.getppid())
    assert tree_cpu(os.getpid()) > 0.1
    assert tree_bytes(os.getpid()) > 1 << 20
    assert tree_cpu(2**22 + 1) == tree_bytes(2**22 + 1) == 0


def test_goals_are_about_rates_and_the_slowest() -> None:
    def row(name: str, rate: float, p99: float, cpu: float) -> Row:
        latencies = (0.001,) * 98 + (p99, p99)
        return Row("128 x 128", "8 clients", name, (Load(100 / rate, latencies, cpu / 10, {200: 100}),))

    rows = [
        row("ivl-export serve", 300, 0.02, 4.5),
        row("service", 320, 0.02, 4.0),
        row("naive", 100, 0.03, 9),
    ]
    first, second = goals(rows)
    assert first["value"] == pytest.approx(0.5)
    assert first["met"]
    assert second["value"] == pytest.approx(3)
    assert second["met"]
    slower = goals([rows[0], row("naive", 100, 0.01, 9)])
    assert not slower[0]["met"], "more requests at a worse p99"


def test_memory_grows_from_the_second_quarter_on() -> None:
    assert growth([50, 80, 100, 100, 100, 100, 102, 102]) == pytest.approx(0.02)
    assert growth([50, 50, 100, 100, 100, 100, 100, 100]) == 0
