"""What a process has to make anew after ``os.fork()``: threads do not come along, held locks stay held.

A server that loads a model and then forks its workers (gunicorn with ``--preload``) works because of this:
objects with threads or locks register, and in the child each makes them anew before anything else runs.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol
from weakref import WeakSet


class Renewed(Protocol):
    """An object that is told that it is in a forked child."""

    def after_fork(self) -> None:
        """Make threads and their queues anew; called in the child, where this is the only thread."""
        ...


_objects: WeakSet[Renewed] = WeakSet()
_locks: WeakSet[Any] = WeakSet()


def renew_after_fork(owner: Renewed) -> None:
    """Call ``owner.after_fork()`` in every child that is forked while ``owner`` lives."""
    _objects.add(owner)


def fork_safe_lock() -> threading.Lock:
    """A lock that is free in a forked child, whoever held it in the parent."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def _renew() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()  # as logging and threading do with theirs
    for owner in list(_objects):
        owner.after_fork()


if hasattr(os, "register_at_fork"):  # Windows cannot fork
    os.register_at_fork(after_in_child=_renew)
