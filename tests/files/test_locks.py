"""Locks between threads and processes, with flock and without."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivl_export.files.locks import locked
from ivl_export.files.write import atomic

HOLDER = """
import sys, time
from pathlib import Path
from ivl_export.files.locks import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["flock", "msvcrt"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """This system's flock, or none and a ``msvcrt`` whose calls lock as on Windows."""
    if request.param == "msvcrt":
        import fcntl

        def locking(handle: int, mode: int, count: int) -> None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

        module = types.ModuleType("msvcrt")
        module.__dict__.update(locking=locking, LK_NBLCK=2)
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", module)
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return str(request.param)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_holder_at_a_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "folder":
        path.mkdir()
    with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
        raise AssertionError
    with locked(path, wait=False):
        pass
    if kind == "folder":
        path.rmdir()  # nothing of the lock is in it


@pytest.mark.usefixtures("system")
def test_writers_take_turns_and_readers_see_whole_files(tmp_path: Path) -> None:
    path, lock = tmp_path / "times", tmp_path / "times.lock"
    path.write_bytes(b"")

    def add(name: bytes) -> None:
        for _ in range(20):
            with locked(lock), atomic(path, durable=True) as partial:
                partial.write_bytes(path.read_bytes() + name)

    threads = [threading.Thread(target=add, args=(bytes([65 + i]),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_bytes()) == sorted(b"ABCD" * 20)
    assert {p.name for p in tmp_path.iterdir()} - {"temporary"} == {"times", "times.lock"}


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_killed_process_releases_its_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
        raise AssertionError
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path, wait=False):
        pass


def test_a_system_without_locks_runs_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with locked(tmp_path / "a"), locked(tmp_path / "a", wait=False):
        pass
