"""A started server, which the tests of this folder share."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
KEY = "key-of-the-tests"


def picture(seed: int = 0, kind: str = "PNG") -> bytes:
    """The file of a small picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def data_url(data: bytes) -> str:
    """As clients send a file."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


@dataclass
class Server:
    """A process, its address, and the file that it writes to."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def asked(server: Server, path: str, request: Any) -> Any:
    """The answer to a POST; urllib's HTTPError for others than 200."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = json.dumps(request).encode()
    with urllib.request.urlopen(urllib.request.Request(server.address + path, body, headers)) as answer:
        return json.load(answer)


@contextmanager
def started(log: Path, arguments: Sequence[str], before: str = "") -> Iterator[Server]:
    """``ivl-export serve`` in its own process, ready; ``before`` is run in it first."""
    code = f"{before}\nimport sys; from ivl_export.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "IVL_EXPORT_API_KEY": KEY}
    command = [sys.executable, "-c", code, "serve", *arguments, "--port", "0", "-O", "threads=1"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield Server(process, _address(process, log), log)
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(1200):
        found = re.search(r" on (http://\S+) ", log.read_text())
        if found:
            try:
                urllib.request.urlopen(f"{found[1]}/ready", timeout=30).close()
                return found[1]
            except urllib.error.HTTPError:
                pass
            except OSError:
                pass
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def server(
    tiny_bundle: Path, chat_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Both tiny bundles, under the names ``tiny`` and ``chat``."""
    arguments = [f"tiny={tiny_bundle}", f"chat={chat_bundle}", "--invariant"]
    with started(tmp_path_factory.mktemp("serve") / "log", arguments) as one:
        yield one
