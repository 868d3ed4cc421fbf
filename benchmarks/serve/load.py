"""Clients of an HTTP server: latencies, and the CPU time of its processes.

A client writes prepared requests to one keep-alive connection and reads the answers with asyncio's streams:
what a client library costs would be measured, too, where server and clients share the cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """What a number of requests took.

    Args:
        seconds: from the first request to the last answer.
        latencies: seconds of each request that was answered.
        cpu_seconds: of all processes of the server.
        statuses: HTTP status -> number of answers; 0 where the connection broke.
    """

    seconds: float
    latencies: tuple[float, ...]
    cpu_seconds: float
    statuses: Mapping[int, int]

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of CPU time of a request."""
        return 1e3 * self.cpu_seconds / max(len(self.latencies), 1)

    def percentile(self, share: float) -> float:
        """Milliseconds that ``share`` percent of the requests took at most."""
        return 1e3 * float(np.percentile(self.latencies, share))

    def to_json(self) -> dict[str, Any]:
        """Figures for a receipt."""
        return {
            "requests": len(self.latencies),
            "rate": self.rate,
            "p50_ms": self.percentile(50),
            "p99_ms": self.percentile(99),
            "cpu_ms": self.cpu_ms,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
        }


def post(address: str, path: str, body: Any, key: str = "") -> bytes:
    """The bytes of a POST request with a JSON body, for :class:`Connection`."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(address).netloc}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}", *([f"Authorization: Bearer {key}"] if key else [])]
    return "\r\n".join([*lines, "", ""]).encode() + data


def get(address: str, path: str) -> bytes:
    """The bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: {urlsplit(address).netloc}\r\n\r\n".encode()


class Connection:
    """A keep-alive connection to ``address``, opened when it is first needed, and again after it broke."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer; status 0 where the connection broke."""
        try:
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
            self._writer.write(request)
            assert self._reader is not None
            status, headers = await _head(self._reader)
            body = await _body(self._reader, headers)
        except (OSError, asyncio.IncompleteReadError, ValueError, IndexError):
            self.close()
            return 0, b""
        if headers.get("connection", "").lower() == "close":
            self.close()
        return status, body

    def close(self) -> None:
        """Close it."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(parts)


async def closed_loop(
    address: str, requests: Sequence[bytes], clients: int, count: int, cpu: Callable[[], float]
) -> Load:
    """``count`` requests of ``clients`` that each wait for an answer before they ask again."""
    taken = iter(range(count))
    latencies: list[float] = []
    statuses: Counter[int] = Counter()

    async def client() -> None:
        connection = Connection(address)
        for index in taken:
            began = time.perf_counter()
            status, _ = await connection.ask(requests[index % len(requests)])
            statuses[status] += 1
            if status == 200:
                latencies.append(time.perf_counter() - began)
        connection.close()

    before, began = cpu(), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(time.perf_counter() - began, tuple(latencies), cpu() - before, statuses)


async def open_loop(
    address: str, requests: Sequence[bytes], rate: float, count: int, cpu: Callable[[], float], seed: int = 0
) -> Load:
    """``count`` requests that arrive at random, ``rate`` a second, whether others were answered or not.

    A latency counts from the moment at which the request was due.
    """
    due = np.random.default_rng(seed).exponential(1 / rate, count).cumsum()
    idle: list[Connection] = []
    latencies: list[float] = []
    statuses: Counter[int] = Counter()

    async def one(index: int) -> None:
        await asyncio.sleep(max(0.0, began + due[index] - time.perf_counter()))
        connection = idle.pop() if idle else Connection(address)
        status, _ = await connection.ask(requests[index % len(requests)])
        idle.append(connection)
        statuses[status] += 1
        if status == 200:
            latencies.append(time.perf_counter() - began - due[index])

    before, began = cpu(), time.perf_counter()
    await asyncio.gather(*(one(index) for index in range(count)))
    seconds = time.perf_counter() - began
    for connection in idle:
        connection.close()
    return Load(seconds, tuple(latencies), cpu() - before, statuses)


def tree_cpu(pid: int) -> float:
    """Seconds of CPU time of a process and all that it started (Linux)."""
    return sum(_cpu(one) for one in family(pid))


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and all that it started; shared pages count in each (Linux)."""
    page = os.sysconf("SC_PAGE_SIZE")
    sizes = (_read(f"/proc/{one}/statm").split() for one in family(pid))
    return sum(int(fields[1]) * page for fields in sizes if fields)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _fields(int(folder.name)):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, rest = [], [pid]
    while rest:
        found.append(rest.pop())
        rest += children.get(found[-1], [])
    return found


def _cpu(pid: int) -> float:
    fields = _fields(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS if fields else 0.0


def _fields(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the third on, the name may hold blanks; empty if it has ended."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
