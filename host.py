"""CPU cores that this process may use: by affinity and by the quota of its container."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may keep busy: its affinity, at most its cgroups' quota rounded up."""
    count = os.cpu_count() or 1
    with suppress(AttributeError, OSError):  # only Linux has the affinity
        count = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def core_limit() -> int | None:
    """:func:`cores` where that is fewer than the machine has; None: libraries may choose for themselves.

    ONNX Runtime counts the machine's physical cores, torch follows the affinity but no quota: in a container
    both would start more threads than may run, which then wait for each other.
    """
    count = cores()
    return count if count < (os.cpu_count() or 1) else None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU seconds a second that the cgroups of this process allow; None: as many as there are.

    The least of its own cgroup and those above it, of version 2 (``cpu.max``) and 1 (``cpu.cfs_quota_us``).

    Args:
        root: the file system that ``proc/self`` and the cgroups are looked for in.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    quotas = []
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        top, mount_point = fields.split()[3:5]
        kind_name, _, options = kind.partition(" ")
        if kind_name == "cgroup2":
            names = [g.partition("::")[2] for g in groups if g.startswith("0::")]
        elif kind_name == "cgroup" and "cpu" in options.split()[-1].split(","):
            names = [g.split(":", 2)[2] for g in groups if "cpu" in g.split(":")[1].split(",")]
        else:
            continue
        for name in names:
            folder = root / mount_point.lstrip("/")
            quotas += [_quota(group) for group in _groups(folder, name, top)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(folder: Path, name: str, top: str) -> list[Path]:
    """The folder of cgroup ``name`` below the mount ``folder`` of cgroup ``top``, and those above it."""
    below = Path(name).relative_to(top) if Path(name).is_relative_to(top) else Path()
    own = folder / below if ".." not in below.parts else folder
    return [own, *(parent for parent in own.parents if parent.is_relative_to(folder))]


def _quota(group: Path) -> float | None:
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota_us = int((group / "cpu.cfs_quota_us").read_text())
        return None if quota_us <= 0 else quota_us / int((group / "cpu.cfs_period_us").read_text())
    return None
