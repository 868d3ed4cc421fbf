"""Two pieces of work in two threads, which fail together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

Check = Callable[[], None]
"""Raises when the other piece has failed."""


@contextmanager
def concurrent(work: Callable[[Check], None]) -> Iterator[Check]:
    """Run ``work`` in a thread while the ``with`` block runs; the block's end waits for it.

    Both get a check function to call now and then. In ``work`` it raises after the block has failed, which
    stops the thread; in the block it raises the error of ``work``, which the end of the block raises at the
    latest. An interrupt counts as an error of the block. The thread has ended when this returns.
    """
    stopped = threading.Event()

    def check_block() -> None:
        if stopped.is_set():
            raise _Stopped

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, check_block)

        def check_work() -> None:
            if future.done():
                future.result()

        try:
            yield check_work
            future.result()
        except BaseException:
            stopped.set()
            raise


class _Stopped(Exception):
    """Ends the work in the thread; callers get the block's own error."""
