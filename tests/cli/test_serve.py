"""What ``ivl-export serve`` refuses before it listens; tests/serve drives the started process."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from ivl_export.cli import main

pytest.importorskip("fastapi")


def test_what_cannot_be_served(
    tiny_bundle: Path, chat_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, empty = str(tiny_bundle), tmp_path / "keys"
    empty.write_text("# none\n\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, code, word in (
            ([str(tmp_path)], 8, "is not a bundle"),
            ([f"a={tiny}", f"a={tiny}"], 2, "Two models are called a"),
            ([tiny, "--api-keys", str(empty)], 2, "has no key"),
            ([tiny, "-O", "max-pixels=0"], 2, "max-pixels"),
            ([tiny, "--shadow", str(chat_bundle)], 2, "cannot be the shadow"),
            ([tiny, "--port", port], 2, "Cannot listen"),
        ):
            assert main(["serve", *arguments]) == code, arguments
            assert word in capsys.readouterr().err


def test_a_model_that_cannot_run_ends_the_server(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sizes are right, its graph is not: seen when it is warmed up, and told with the usual exit code."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    graph = bundle / manifest["components"]["vision"]["graphs"]["fp32"]
    graph.write_bytes(b"x" * graph.stat().st_size)
    assert main(["serve", str(bundle), "--port", "0"]) not in (0, 1)
    assert "error:" in capsys.readouterr().err
