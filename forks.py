"""Objects that survive ``os.fork()``: the child has no threads, and held locks stay held.

A server that loads a model and then forks its workers (gunicorn with ``--preload``) works because of this:
objects with threads or locks register, and in the child each replaces them before anything else runs.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol
from weakref import WeakSet


class Renewed(Protocol):
    """An object with a method to call in a forked child."""

    def after_fork(self) -> None:
        """Replace threads and their queues; called in the child, where this is the only thread."""
        ...


_objects: WeakSet[Renewed] = WeakSet()
_locks: WeakSet[Any] = WeakSet()


def renew_after_fork(owner: Renewed) -> None:
    """Call ``owner.after_fork()`` in every child that is forked while ``owner`` lives."""
    _objects.add(owner)


def fork_safe_lock() -> threading.Lock:
    """A lock that is free in a forked child, even if it was held in the parent."""
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
