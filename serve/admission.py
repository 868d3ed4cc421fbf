"""Admission of HTTP requests: by the items that they hold, before anything of them is decoded.

An item is an image, a text or a conversation. All items of a request are admitted, or none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import HttpError

_RECENT = 1000
"""Items after which the measured rate forgets half of what it knows."""
_LONGEST = 60
"""Seconds that a client is told to wait at most."""


class HeldBytes:
    """Bytes of the bodies that are held."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def take(self, count: int) -> None:
        """``count`` more; HttpError 429 if there is no room for them now."""
        if self.held + count > self.limit:
            raise HttpError(
                429, "The server holds too many bytes of requests.", code="overloaded", retry_after=1
            )
        self.held += count

    def give_back(self, count: int) -> None:
        """Of a body that is done with."""
        self.held -= count


class Throughput:
    """Items finished per second of the time in which there were any."""

    def __init__(self) -> None:
        self._items, self._seconds, self._held, self._since = 0.0, 0.0, 0, 0.0

    def begin(self, items: int) -> None:
        """``items`` arrive."""
        self._advance()
        self._held += items

    def end(self, items: int) -> None:
        """``items`` are finished, or given up."""
        self._advance()
        self._held -= items
        self._items += items
        if self._items > _RECENT:
            self._items, self._seconds = self._items / 2, self._seconds / 2

    def _advance(self) -> None:
        now = time.monotonic()
        if self._held:
            self._seconds += now - self._since
        self._since = now

    def seconds(self, items: int) -> float:
        """Time until ``items`` are finished, as it was lately."""
        self._advance()
        return items * self._seconds / max(1.0, self._items)


class Admission:
    """Counts the items of one model that are in the server.

    Args:
        capacity: items at most, running or waiting.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held, self.refused = capacity, 0, 0
        self._throughput = Throughput()

    @contextmanager
    def place(self, items: int, param: str) -> Iterator[None]:
        """Room for ``items`` inside the ``with`` block.

        Raises:
            HttpError: 413: never so many; 429: not now, with the time until enough are finished.
        """
        if items > self.capacity:
            message = f"The request has {items} items; this server takes {self.capacity} at most."
            raise HttpError(413, message, param, "too_many_items")
        over = self.held + items - self.capacity
        if over > 0:
            self.refused += 1
            seconds = min(_LONGEST, max(1, math.ceil(self._throughput.seconds(over))))
            message = f"The server is full: {self.held} items are running or wait, {self.capacity} may be."
            raise HttpError(429, message, code="overloaded", retry_after=seconds)
        self.held += items
        self._throughput.begin(items)
        try:
            yield
        finally:
            self.held -= items
            self._throughput.end(items)
