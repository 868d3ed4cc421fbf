"""Many requests at once on one model: asyncio, bounded, batched, timed.

Each request is admitted, read on a pool of threads, and joins a batch of its kind. One that is cancelled or
out of time leaves its place at once. One beyond the limits is refused, so that memory stays bounded and the
caller hears it soon.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from ..errors import BusyError
from ..pictures import ImageInput
from ..preprocess import CAPTION_PROMPT, ResizeMode
from .batching import Batcher, Ran
from .images import Floats

if TYPE_CHECKING:
    from .model import InternVL, Mode

R = TypeVar("R")


@dataclass(frozen=True)
class ServiceLimits:
    """What a service takes on.

    Args:
        running: requests admitted at a time: being read, waiting for a batch, or in one.
        waiting: requests that may wait to be admitted; one more is refused.
        timeout: seconds for a request from its call to its result, where it gives none itself.
        max_batch: rows in a batch; None: what the engines were tuned for.
        max_delay: seconds that the first request of a batch waits for others on their way.
    """

    running: int = 64
    waiting: int = 256
    timeout: float = 30.0
    max_batch: int | None = None
    max_delay: float = 0.002


@dataclass(frozen=True)
class Answer(Generic[R]):
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
class _Clock:
    began: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    def mark(self, stage: str) -> None:
        self.stages[stage] = time.perf_counter() - self.began - sum(self.stages.values())


class Service:
    """Asynchronous requests on ``model``, from one event loop at a time. Close it when done."""

    def __init__(self, model: InternVL, limits: ServiceLimits | None = None) -> None:
        self.model, self.limits = model, limits or ServiceLimits()
        self.counts = Counts()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers = ThreadPoolExecutor(os.cpu_count() or 1, "ivl-reader")
        self._images = self._batcher(self._run_images)
        self._texts = self._batcher(self._run_texts)
        self._captions = self._batcher(self._run_captions)

    async def encode_image(
        self,
        image: ImageInput,
        mode: Mode = "InternVL-C",
        resize: ResizeMode | None = None,
        timeout: float | None = None,
    ) -> Answer[Floats]:
        """The embedding [E] of one image; see :meth:`InternVL.encode_image`.

        Raises:
            BusyError: too many requests wait, or it was not done in ``timeout`` seconds.
            InputError: the image cannot be read.
        """
        return await self._request(
            self._images, lambda: (mode, self.model.pixel_values([image], resize)[0]), timeout
        )

    async def encode_text(self, text: str, timeout: float | None = None) -> Answer[Floats]:
        """The embedding [E] of one text; errors as :meth:`encode_image`."""
        return await self._request(self._texts, lambda: text, timeout)

    async def classify(
        self,
        image: ImageInput,
        classes: Floats,
        mode: Mode = "InternVL-C",
        resize: ResizeMode | None = "center_crop",
        timeout: float | None = None,
    ) -> Answer[Floats]:
        """Probabilities [L] of ``classes``, which :meth:`InternVL.class_embeddings` made."""
        from .zero_shot import probabilities

        answer = await self.encode_image(image, mode, resize, timeout)
        scale = self.model.bundle.manifest.model.logit_scale
        found = probabilities(answer.value[None], classes, scale)[0]
        return Answer(found, answer.timings, answer.batch)

    async def caption(
        self,
        image: ImageInput,
        prompt: str = CAPTION_PROMPT["en"],
        num_beams: int = 1,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        resize: ResizeMode | None = "square",
        timeout: float | None = None,
    ) -> Answer[str]:
        """The caption of one image; requests with equal settings share a batch."""
        key = (num_beams, max_new_tokens, min_new_tokens)
        return await self._request(
            self._captions, lambda: (key, prompt, self.model.pixel_values([image], resize)[0]), timeout
        )

    def close(self) -> None:
        """Refuse and cancel what waits; what runs is finished."""
        for batcher in (self._images, self._texts, self._captions):
            batcher.close()
        self._readers.shutdown(cancel_futures=True)

    async def _request(
        self, batcher: Batcher[Any, R], read: Callable[[], Any], timeout: float | None
    ) -> Answer[R]:
        clock, seconds = _Clock(), self.limits.timeout if timeout is None else timeout
        try:
            ran = await asyncio.wait_for(self._admitted(batcher, read, clock), seconds)
        except (asyncio.TimeoutError, TimeoutError) as error:
            self.counts.expired += 1
            raise BusyError(
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
        clock.stages |= {"queue": ran.waited, "run": ran.seconds, "total": time.perf_counter() - clock.began}
        return Answer(ran.value, clock.stages, ran.batch)

    async def _admitted(self, batcher: Batcher[Any, R], read: Callable[[], Any], clock: _Clock) -> Ran[R]:
        async with self._place():
            clock.mark("admit")
            item = await asyncio.get_running_loop().run_in_executor(self._readers, read)
            clock.mark("read")
            return await asyncio.wrap_future(batcher.submit(item))

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places of running requests; BusyError where too many wait for one."""
        if (loop := asyncio.get_running_loop()) is not self._loop:  # the former one has ended
            self._loop, self._admission = loop, asyncio.Semaphore(self.limits.running)
        if self._admission.locked() and self.counts.waiting >= self.limits.waiting:
            raise BusyError(
                "This service takes no more requests now.",
                f"{self.counts.running} are running and {self.counts.waiting} wait.",
                "Ask again later.",
            )
        self.counts.waiting += 1
        try:
            await self._admission.acquire()
        finally:
            self.counts.waiting -= 1
        self.counts.running += 1
        try:
            yield
        finally:
            self.counts.running -= 1
            self._admission.release()

    def _batcher(self, run: Callable[[Sequence[Any]], Sequence[Any]]) -> Batcher[Any, Any]:
        return Batcher(
            run,
            max_batch=self.limits.max_batch or self.model.components.batch,
            max_delay=self.limits.max_delay,
            expected=lambda: self.counts.running,
        )

    def _run_images(self, items: Sequence[tuple[Mode, Floats]]) -> list[Floats]:
        return _grouped(items, lambda mode, rows: list(self.model.encode_image(np.stack(rows), mode)))

    def _run_texts(self, texts: Sequence[str]) -> list[Floats]:
        return list(self.model.encode_text(texts))

    def _run_captions(self, items: Sequence[tuple[Any, str, Floats]]) -> list[str]:
        def run(key: tuple[int, int, int], rows: list[tuple[str, Floats]]) -> list[str]:
            pixels = np.stack([row for _, row in rows])
            return self.model.caption(pixels, [prompt for prompt, _ in rows], *key)

        return _grouped([(key, (prompt, row)) for key, prompt, row in items], run)


def _grouped(items: Sequence[tuple[Any, Any]], run: Callable[[Any, list[Any]], list[R]]) -> list[R]:
    """``run(key, rows)`` for the items ``(key, row)`` of each key; results in the order of ``items``."""
    where: dict[Any, list[int]] = {}
    for i, (key, _) in enumerate(items):
        where.setdefault(key, []).append(i)
    made: dict[int, R] = {}
    for key, places in where.items():
        made.update(zip(places, run(key, [items[i][1] for i in places]), strict=True))
    return [made[i] for i in range(len(items))]
