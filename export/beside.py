"""Two pieces of work at once that end together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

Check = Callable[[], None]
"""Raises when the other piece has failed."""


@contextmanager
def beside(work: Callable[[Check], None]) -> Iterator[Check]:
    """Run ``work`` in a thread while the block runs; the block's end waits for it.

    Both get a function to call now and then. In ``work`` it raises once the block has failed, so that it
    stops; in the block it raises the error of ``work``, which the end of the block raises at the latest.
    An interrupt counts as an error of the block. Nothing of ``work`` runs any more when this ends.
    """
    over = threading.Event()

    def go_on() -> None:
        if over.is_set():
            raise _Stopped

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, go_on)

        def sound() -> None:
            if running.done():
                running.result()

        try:
            yield sound
            running.result()
        except BaseException:
            over.set()
            raise


class _Stopped(Exception):
    """Ends the work in the thread; the block's own error is the one that is told."""
