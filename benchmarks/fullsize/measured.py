"""One command in a separate process: its time and its peak of anonymous memory."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """A finished command.

    Args:
        seconds: wall clock, from start to end.
        cpu_seconds: processor time of user and system; far below ``seconds``, it waited (for the disk, or for
            others on this machine).
        peak_anonymous: largest sum of RssAnon and RssShmem over the process and its children, in bytes;
            pages of mapped files do not count, the system drops them when it needs the room. Sampled.
        stdout: its output.
    """

    seconds: float
    cpu_seconds: float
    peak_anonymous: int
    stdout: str


class StepFailed(Exception):
    """A command that ended with an error; its message is the end of its output."""


def run(command: Sequence[str]) -> Run:
    """Run ``command`` to its end.

    Raises:
        StepFailed: its exit code is not 0.
    """
    children = _children_cpu()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_SECONDS):
            peak = max(peak, sum(map(anonymous, _family(process.pid))))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        stdout, stderr = process.communicate()
    except BaseException:
        process.kill()
        raise
    finally:
        ended.set()
        watcher.join()
    seconds = time.perf_counter() - started
    if process.returncode:
        said = (stderr.strip() or stdout.strip()).splitlines()
        raise StepFailed(f"exit code {process.returncode}: {' '.join(said[-3:])}")
    return Run(seconds, _children_cpu() - children, peak, stdout)


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs; 0 once it is gone."""
    total = 0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


def _family(pid: int) -> list[int]:
    """The process and all below it."""
    pids = [pid]
    for parent in pids:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
    return pids


def _children_cpu() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
