"""CPU cores: the affinity of this process, and the quotas of its cgroups, of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ivl_export import host
from ivl_export.tests.sources import ROOT, sources

V2 = "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
US = "sys/fs/cgroup/cpu"
V1 = "32 31 0:29 {top} /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def processes(mount: str, group: str) -> dict[str, str]:
    other = "31 23 0:28 / /proc rw - proc proc rw"
    return {"proc/self/mountinfo": f"{other}\n{mount}", "proc/self/cgroup": f"9:name=systemd:/\n{group}"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({**processes(V2, "0::/"), "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({**processes(V2, "0::/"), "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({**processes(V2, "0::/a/b"), "sys/fs/cgroup/a/cpu.max": "200000 100000",
          "sys/fs/cgroup/a/b/cpu.max": "400000 100000"}, 2.0),  # the least of all that are above it
        ({**processes(V2, "0::/../x"), "sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
        ({**processes(V1.format(top="/"), "1:cpu,cpuacct:/d"), f"{US}/d/cpu.cfs_quota_us": "50000",
          f"{US}/d/cpu.cfs_period_us": "100000"}, 0.5),
        # a container with the host's names, but only its own part of the tree
        ({**processes(V1.format(top="/docker/1"), "1:cpu:/docker/1"),
          f"{US}/cpu.cfs_quota_us": "800000", f"{US}/cpu.cfs_period_us": "100000"}, 8.0),
        ({**processes(V1.format(top="/"), "1:cpu:/"), f"{US}/cpu.cfs_quota_us": "-1",
          f"{US}/cpu.cfs_period_us": "100000"}, None),
        ({**processes(V2, "0::/"), "sys/fs/cgroup/cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_quota_of_the_cgroups(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert host.cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"), [(8, None, 8), (8, 2.5, 3), (8, 0.3, 1), (2, 16.0, 2), (8, 4.0, 4)]
)
def test_the_smaller_of_affinity_and_quota(
    affinity: int, quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(host, "cpu_quota", lambda: quota)
    assert host.cores() == cores


@pytest.mark.parametrize(
    ("affinity", "quota", "limit"), [(64, None, None), (64, 80.0, None), (64, 2.5, 3), (4, None, 4)]
)
def test_libraries_are_held_to_what_may_be_used(
    affinity: int, quota: float | None, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(host, "cpu_quota", lambda: quota)
    assert host.core_limit() == limit


def test_cores_are_counted_in_one_place() -> None:
    counting = [
        path.relative_to(ROOT).as_posix()
        for path in sources("tests")
        if "cpu_count" in (text := path.read_text(encoding="utf-8")) or "sched_getaffinity" in text
    ]
    assert counting == ["host.py"]
