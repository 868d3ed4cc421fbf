"""The folder of an image: it lints, and what the container runs starts and answers."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ivl_export.errors import UsageError
from ivl_export.packages.docker import USER
from ivl_export.tests.packages.conftest import Pack


def hadolint(dockerfile: Path) -> list[dict[str, str]]:
    """What the linter says of a Dockerfile."""
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("hadolint is not installed")
    told = subprocess.run([tool, "--format", "json", str(dockerfile)], capture_output=True, check=False)
    faults: list[dict[str, str]] = json.loads(told.stdout)
    return faults


def instructions(dockerfile: Path) -> dict[str, list[str]]:
    """Keyword -> what follows it, each time; lines joined."""
    text = dockerfile.read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(rest)
    return found


@pytest.mark.parametrize("settings", [{}, {"device": "cuda", "python": "3.12", "port": 9000}])
def test_it_lints(settings: dict[str, object], pack: Pack, tiny_bundle: Path) -> None:
    root = pack(tiny_bundle, "docker", settings=settings).root
    assert hadolint(root / "Dockerfile") == []


def test_the_linter_sees_faults(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install numpy\nENTRYPOINT ivl-export serve\n")
    assert {"DL3006", "DL3013", "DL3042", "DL3025"} <= {
        fault["code"] for fault in hadolint(tmp_path / "Dockerfile")
    }


def test_what_is_copied_is_there_and_nothing_else_is_sent(pack: Pack, tiny_bundle: Path) -> None:
    package = pack(tiny_bundle, "docker")
    said = instructions(package.root / "Dockerfile")
    copied = {word.rstrip("/") for line in said["COPY"] for word in shlex.split(line)[:-1]}
    assert copied <= {path.split("/")[0] for path in package.files}
    ignore = (package.root / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert {f"*{Path(name).suffix}" if name.endswith(".whl") else name for name in copied} == kept
    requirements = (package.root / "requirements.txt").read_text().splitlines()[1:]
    assert {Requirement(line).name for line in requirements} >= {"numpy", "onnxruntime", "fastapi", "uvicorn"}
    pinned = (package.root / "constraints.txt").read_text().splitlines()
    assert {line for line in requirements if "==" in line} <= {*pinned}


def test_the_container_is_not_root_and_says_whether_it_is_ready(pack: Pack, tiny_bundle: Path) -> None:
    package = pack(tiny_bundle, "docker", name="tiny", settings={"port": 8123, "device": "cuda"})
    said = instructions(package.root / "Dockerfile")
    assert said["USER"] == [f"{USER}:{USER}"]
    assert said["EXPOSE"] == ["8123"]
    assert "/ready" in said["HEALTHCHECK"][0]
    assert json.loads(said["ENTRYPOINT"][0])[:3] == ["ivl-export", "serve", "tiny=/srv/bundle"]
    assert json.loads(said["ENTRYPOINT"][0])[-2:] == ["-O", "device=cuda"]
    assert "NVIDIA_VISIBLE_DEVICES=all" in said["ENV"][0]
    requirements = (package.root / "requirements.txt").read_text()
    assert "onnxruntime-gpu" in requirements
    assert "\nonnxruntime==" not in requirements


def test_entry_point_and_health_check_work_here(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    """Both run as they are in the Dockerfile, but for the place of the bundle and the port."""
    pytest.importorskip("fastapi")
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    package = pack(tiny_bundle, "docker", name="tiny", settings={"port": max(port, 1024)})
    said = instructions(package.root / "Dockerfile")
    entry = [word.replace("/srv/", f"{package.root}/") for word in json.loads(said["ENTRYPOINT"][0])]
    check = json.loads(said["HEALTHCHECK"][0].partition("CMD ")[2])
    main = "import sys; from ivl_export.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", main, *entry[1:], "-O", "threads=1"], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(240):
            ready = (
                subprocess.run([sys.executable, *check[1:]], capture_output=True, check=False).returncode == 0
            )
            if ready or process.poll() is not None:
                break
            time.sleep(0.5)
        assert ready
    finally:
        process.terminate()
    assert process.wait(60) == 0
    failed = subprocess.run([sys.executable, *check[1:]], capture_output=True, check=False)
    assert failed.returncode != 0


def test_settings_that_cannot_be(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    for setting in ("port=80", "port=x", "device=tpu", "image="):
        with pytest.raises(UsageError):
            pack(tiny_bundle, "docker", settings=[setting])
    assert list(tmp_path.iterdir()) == []
