"""Dynamic batching: single requests are queued and run together on one worker thread.

A request is a future. Cancelling it while it waits takes it out of the queue at once; once its batch has
begun, only its result is dropped.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ...errors import UsageError
from ...forks import renew_after_fork

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class BatchResult(Generic[R]):
    """The result of one request, its seconds in the queue, the seconds of its batch, and the batch's size."""

    value: R
    waited: float
    seconds: float
    batch: int


@dataclass(eq=False)
class _Request(Generic[T, R]):
    item: T
    future: Future[BatchResult[R]] = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)


class Batcher(Generic[T, R]):
    """Collects items and runs them together.

    Args:
        run: maps a batch to results in the same order. A batch that it raises for is run again item by item,
            so that only those fail that are at fault.
        max_batch: items in a batch at most.
        max_delay: seconds that the first item of a batch waits at most for those that are :meth:`coming`.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R]],
        *,
        max_batch: int,
        max_delay: float = 0.002,
    ) -> None:
        if max_batch < 1 or max_delay < 0:
            raise UsageError("These batching settings cannot be right.", f"{max_batch=}, {max_delay=}.")
        self._run, self._max_batch, self._max_delay = run, max_batch, max_delay
        self._closed = False
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """An empty queue without a worker: waiting requests are answered by the parent."""
        self._coming = 0
        self._queue: deque[_Request[T, R]] = deque()
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._queue)

    @contextmanager
    def coming(self) -> Iterator[None]:
        """An item is on its way inside the ``with`` block, where it is submitted or given up."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify_all()

    def submit(self, item: T) -> Future[BatchResult[R]]:
        """Queue ``item``; cancel the future to take it out again. UsageError once closed."""
        request: _Request[T, R] = _Request(item)
        with self._changed:
            if self._closed:
                raise UsageError("This model was closed.", fix="Load it again.")
            self._queue.append(request)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True, name="ivl-batcher")
                self._worker.start()
            self._changed.notify_all()
        request.future.add_done_callback(lambda future: self._left(request))
        return request.future

    def close(self) -> None:
        """Cancel waiting requests and end the worker after the running batch."""
        with self._changed:
            self._closed = True
            waiting = list(self._queue)
            self._changed.notify_all()
        for request in waiting:
            request.future.cancel()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    def _left(self, request: _Request[T, R]) -> None:
        """A cancelled request gives up its place."""
        if request.future.cancelled():
            with self._changed:
                if request in self._queue:
                    self._queue.remove(request)
                self._changed.notify_all()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            began = time.perf_counter()
            live = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if not live:
                continue
            if not self._answer(live, began) and len(live) > 1:
                for request in live:
                    self._answer([request], time.perf_counter())

    def _answer(self, batch: Sequence[_Request[T, R]], began: float) -> bool:
        """Run ``batch``. False if it failed; a request alone then has the error."""
        try:
            values = self._run([request.item for request in batch])
            if len(values) != len(batch):
                raise ValueError(f"{len(values)} results for {len(batch)} items")
        except Exception as error:  # raised by the request; the worker continues
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            return False
        seconds = time.perf_counter() - began
        for request, value in zip(batch, values, strict=True):
            request.future.set_result(BatchResult(value, began - request.arrived, seconds, len(batch)))
        return True

    def _next(self) -> list[_Request[T, R]] | None:
        """The next batch, at least one item; None when closed."""
        with self._changed:
            while True:
                if self._closed:
                    return None
                if not self._queue:
                    self._changed.wait()
                    continue
                left = self._queue[0].arrived + self._max_delay - time.perf_counter()
                if len(self._queue) >= self._max_batch or not self._coming or left <= 0:
                    return [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
                self._changed.wait(left)
