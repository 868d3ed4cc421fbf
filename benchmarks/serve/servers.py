"""Servers in processes of their own: ours, and the alternatives that it is compared with."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ivl_export.benchmarks.serve.load import tree_bytes, tree_cpu

HERE = "ivl_export.benchmarks.serve"
START_SECONDS = 120


@dataclass(frozen=True)
class Server:
    """A started server: its name in tables, address, and process."""

    name: str
    address: str
    pid: int

    @property
    def cpu(self) -> Callable[[], float]:
        """Reads the CPU seconds of its processes."""
        return partial(tree_cpu, self.pid)

    @property
    def rss(self) -> int:
        """Resident bytes of its processes."""
        return tree_bytes(self.pid)


@contextmanager
def ours(folder: Path, bundles: Sequence[str], threads: int, *options: str) -> Iterator[Server]:
    """``ivl-export serve`` of ``bundles`` (``NAME=FOLDER``); its log goes to ``folder``."""
    code = "import sys; from ivl_export.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", *bundles, "--port", "0", "-O", f"threads={threads}"]
    with _process([*command, *options], folder / "ours.log") as (process, log):
        yield Server("ivl-export serve", _announced(process, log), process.pid)


@contextmanager
def alternative(name: str, folder: Path, bundle: Path, threads: int) -> Iterator[Server]:
    """The server of the module ``name`` of this folder: ``naive`` or ``lit``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", f"{HERE}.{name}", str(bundle), str(port), str(threads)]
    with _process(command, folder / f"{name}.log") as (process, log):
        address = f"http://127.0.0.1:{port}"
        _wait(process, log, lambda: _answers(f"{address}/health"))
        yield Server(name, address, process.pid)


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process, log
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _announced(process: subprocess.Popen[bytes], log: Path) -> str:
    def address() -> str:
        match = re.search(r" on (http://\S+) ", log.read_text())
        return match[1] if match and _answers(f"{match[1]}/ready") else ""

    _wait(process, log, lambda: bool(address()))
    return address()


def _wait(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text()}")
        time.sleep(0.1)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
