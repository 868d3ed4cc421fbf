"""Objects that survive ``os.fork()``: the child has no threads, and held locks stay held.

A server that loads a model and then forks its workers (gunicorn with ``--preload``) works because of this:
objects with threads or locks register, and in the child each replaces them before anything else runs. Locks
within a library cannot be replaced: a fork waits until no call that holds them is running.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

T = TypeVar("T")


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


class cached_property(functools.cached_property[T]):
    """``functools.cached_property`` for objects that threads share before a fork.

    Up to Python 3.11 it computes under a lock of the class: a child that was forked meanwhile would wait
    for a thread that it does not have.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        super().__init__(function)
        if (lock := getattr(self, "lock", None)) is not None:
            _locks.add(lock)


class _Calls:
    """Calls into libraries with locks of their own: entered by each call, closed by a fork."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """As new: in a child no other call runs."""
        self.gate, self.idle, self.running = threading.Lock(), threading.Condition(threading.Lock()), 0

    def __enter__(self) -> None:
        with self.gate, self.idle:
            self.running += 1

    def __exit__(self, *_: object) -> None:
        with self.idle:
            self.running -= 1
            if not self.running:
                self.idle.notify_all()

    def close(self) -> None:
        """Let no further call begin, and wait for those that run."""
        self.gate.acquire()
        with self.idle:
            self.idle.wait_for(lambda: not self.running)

    def open(self) -> None:
        """Let calls begin again, in the parent."""
        self.gate.release()


no_fork = _Calls()
"""``with no_fork:`` around a call that must not be interrupted by a fork; it must not be entered twice.

ONNX Runtime frees an array's memory under a lock of its allocator. A child that was forked while another
thread held this lock hangs as soon as it drops an array.
"""


def _renew() -> None:
    no_fork.renew()
    for lock in list(_locks):
        lock._at_fork_reinit()  # as logging and threading do with theirs
    for owner in list(_objects):
        owner.after_fork()


if hasattr(os, "register_at_fork"):  # Windows cannot fork
    os.register_at_fork(before=no_fork.close, after_in_parent=no_fork.open, after_in_child=_renew)
