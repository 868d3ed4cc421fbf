"""Admission control: limits concurrent and queued requests, and the time of each; counts and times them.

A request that is cancelled or out of time gives up its place at once. One beyond the limits is refused
immediately, so that memory stays bounded.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ...errors import BusyError, TimeLimitError, UsageError
from ...forks import renew_after_fork
from .batching import BatchResult

R = TypeVar("R")


@dataclass(frozen=True)
class ServiceLimits:
    """Limits of a service.

    Args:
        max_running: requests admitted at a time: being read, waiting for a batch, or in one.
        max_queued: requests that may wait to be admitted; one more is refused.
        timeout: seconds for a request from its call to its result, where the request sets none.
        max_batch: rows in a batch, and captions decoded at a time; None: the batch the engines were tuned
            for.
        max_delay: seconds that the first request of a batch waits for others whose inputs are being read;
            None: 20 ms where they are read on the cores that run batches, else 2 ms.
        idle_seconds: without a request for so long, memory is handed back to the system; the next request
            takes it again, page by page. ``math.inf``: never.
        invariant: the bits of an embedding do not depend on what shares its batch: one that is alone in it
            runs twice, side by side. Tested for ONNX Runtime on the CPU.
    """

    max_running: int = 64
    max_queued: int = 256
    timeout: float = 30.0
    max_batch: int | None = None
    max_delay: float | None = None
    idle_seconds: float = 10.0
    invariant: bool = False


@dataclass(frozen=True)
class Response(Generic[R]):
    """A result, how long each stage took, and how many requests shared its batch.

    ``timings`` are seconds: ``admit``, ``read`` (image or text), ``queue``, ``run``, and ``total``.
    """

    value: R
    timings: dict[str, float]
    batch: int


@dataclass
class Counts:
    """Requests so far by how they ended, and those in the service now."""

    done: int = 0
    failed: int = 0
    refused: int = 0
    expired: int = 0
    cancelled: int = 0
    running: int = 0
    waiting: int = 0


@dataclass
class Clock:
    """Seconds of the stages of one request, one after another."""

    began: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    def mark(self, stage: str) -> None:
        """End ``stage`` now."""
        self.stages[stage] = time.perf_counter() - self.began - sum(self.stages.values())


class Admission:
    """The admission of one service, for one event loop at a time.

    Args:
        limits: see there.
        release_memory: called on a thread after ``limits.idle_seconds`` seconds without a request.
    """

    def __init__(self, limits: ServiceLimits, release_memory: Callable[[], None]) -> None:
        self.limits, self.counts, self._release_memory = limits, Counts(), release_memory
        self._closed = False
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """No request is in the service, and no event loop is known."""
        self.counts.running = self.counts.waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle_timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Admit nothing any more."""
        self._closed = True

    async def request(
        self, run: Callable[[Clock], Awaitable[BatchResult[R]]], timeout: float | None
    ) -> Response[R]:
        """The result of ``run``, once it has a place.

        BusyError if there is none, TimeLimitError if no time is left, UsageError once closed.
        """
        if self._closed:
            raise UsageError("This model was closed.", fix="Load it again.")
        clock, seconds = Clock(), self.limits.timeout if timeout is None else timeout

        async def admitted() -> BatchResult[R]:
            async with self._place():
                clock.mark("admit")
                return await run(clock)

        try:
            result = await asyncio.wait_for(admitted(), seconds)
        except (asyncio.TimeoutError, TimeoutError) as error:
            self.counts.expired += 1
            raise TimeLimitError(
                "A request was not done in time.",
                f"It had {seconds:g} s; {self.counts.running} are running, {self.counts.waiting} wait.",
                "Ask again later, or give it more time.",
            ) from error
        except asyncio.CancelledError:
            self.counts.cancelled += 1
            raise
        except BusyError:
            self.counts.refused += 1
            raise
        except Exception:
            self.counts.failed += 1
            raise
        self.counts.done += 1
        clock.stages |= {
            "queue": result.waited,
            "run": result.seconds,
            "total": time.perf_counter() - clock.began,
        }
        return Response(result.value, clock.stages, result.batch)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places of running requests; BusyError where too many wait for one."""
        if (loop := asyncio.get_running_loop()) is not self._loop:  # the former one has ended
            self._loop, self._places = loop, asyncio.Semaphore(self.limits.max_running)
        if self._places.locked() and self.counts.waiting >= self.limits.max_queued:
            raise BusyError(
                "This service takes no more requests now.",
                f"{self.counts.running} are running and {self.counts.waiting} wait.",
                "Ask again later.",
            )
        self.counts.waiting += 1
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        try:
            await self._places.acquire()
        finally:
            self.counts.waiting -= 1
        self.counts.running += 1
        try:
            yield
        finally:
            self.counts.running -= 1
            self._places.release()
            if (
                not self.counts.running
                and not self.counts.waiting
                and math.isfinite(self.limits.idle_seconds)
            ):
                self._idle_timer = loop.call_later(
                    self.limits.idle_seconds, loop.run_in_executor, None, self._release_memory
                )
