"""Asynchronous requests to an :class:`~..model.InternVL`: bounded, batched, timed.

Each request is admitted (:mod:`.admission`), its image is read on a pool of threads, and it joins a batch of
its kind (:mod:`.batching`); captions then join the batch that is decoded step by step (:mod:`.scheduler`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...arrays import Floats
from ...forks import cached_property, renew_after_fork
from ...host import cores
from ...inputs.preprocess import ResizeMode
from ...inputs.sources import ImageInput
from ...inputs.tokenizer import CAPTION_PROMPT, Pieces
from ...sampling import Sampling, StopCriteria, check_search
from .. import captions, matching
from ..image_batches import Images
from ..invariance import encode_texts, in_batches
from ..matching import Ranking
from .admission import Admission, Clock, Response, ServiceLimits
from .batching import Batcher, BatchResult
from .scheduler import OnToken, Scheduler

if TYPE_CHECKING:
    from ..model import InternVL, Mode

T = TypeVar("T")
R = TypeVar("R")
_CPU_DELAY, _GPU_DELAY = 0.02, 0.002
"""Seconds: a batch that begins while images are read takes the cores from them; on a GPU it takes nothing."""


class Service:
    """Asynchronous requests on ``model``, from one event loop at a time. Close it when done."""

    def __init__(self, model: InternVL, limits: ServiceLimits | None = None) -> None:
        self.model, self.limits = model, limits or ServiceLimits()
        self._admission = Admission(self.limits, self.model.components.release_memory)
        self.counts = self._admission.counts
        self.after_fork()
        renew_after_fork(self)
        self._images = self._batcher(self._run_images)
        self._texts = self._batcher(self._run_texts)
        self._pairs = self._batcher(self._run_pairs)
        self._beams = self._batcher(self._run_beams)
        self._starts = self._batcher(partial(captions.start, model))

    def after_fork(self) -> None:
        """New reader threads: the parent's are not in this process."""
        self._readers = ThreadPoolExecutor(cores(), "ivl-reader")

    async def encode_image(
        self,
        image: ImageInput,
        mode: Mode = "InternVL-C",
        resize: ResizeMode | None = None,
        timeout: float | None = None,
    ) -> Response[Floats]:
        """The embedding [E] of one image; see :meth:`InternVL.encode_image`.

        Raises:
            BusyError: too many requests wait, or it was not done in ``timeout`` seconds.
            InputError: the image cannot be read.
        """
        return await self._request(
            self._images, lambda: (mode, self.model.pixel_values([image], resize)[0]), timeout
        )

    async def encode_text(self, text: str, timeout: float | None = None) -> Response[Floats]:
        """The embedding [E] of one text; errors as :meth:`encode_image`."""
        return await self._request(self._texts, lambda: text, timeout)

    async def classify(
        self,
        image: ImageInput,
        classes: Floats,
        mode: Mode = "InternVL-C",
        resize: ResizeMode | None = "center_crop",
        timeout: float | None = None,
    ) -> Response[Floats]:
        """Probabilities [L] of ``classes``, which :meth:`InternVL.class_embeddings` made."""
        from ..zero_shot import probabilities

        answer = await self.encode_image(image, mode, resize, timeout)
        scale = self.model.bundle.manifest.model.logit_scale
        shares = probabilities(answer.value[None], classes, scale)[0]
        return Response(shares, answer.timings, answer.batch)

    async def match(
        self,
        image: ImageInput,
        text: str,
        resize: ResizeMode | None = "square",
        timeout: float | None = None,
    ) -> Response[float]:
        """The probability that ``text`` describes ``image``; see :meth:`InternVL.match`.

        Raises:
            BusyError, InputError: as :meth:`encode_image`.
            CapabilityError: the bundle has no ``qllama_itm``.
        """
        answer = await self._matched(text, [image], resize, timeout)
        return Response(float(matching.probability(answer.value)[0]), answer.timings, answer.batch)

    async def rerank(
        self,
        query: str,
        images: Images,
        ranking: Ranking,
        resize: ResizeMode | None = "square",
        timeout: float | None = None,
    ) -> Response[Ranking]:
        """``ranking`` (one row) of ``query`` in the order of both heads; see :meth:`InternVL.rerank`.

        One request, in one batch; the pixels of all images that it names are held until it is done.

        Raises:
            UsageError: ``ranking`` is not of one query and these images.
            BusyError, InputError, CapabilityError: as :meth:`match`.
        """
        order = matching.checked(ranking, 1, len(images))[0]
        shown = matching.chosen(images, order[order >= 0])
        answer = await self._matched(query, shown, resize, timeout)
        ranked = matching.rescored(self.model, ranking, answer.value)
        return Response(ranked, answer.timings, answer.batch)

    async def _matched(
        self, text: str, images: Images, resize: ResizeMode | None, timeout: float | None
    ) -> Response[NDArray[np.float64]]:
        """The log odds [K] that ``text`` describes each of ``images``."""
        matching.check_matching(self.model)
        return await self._request(
            self._pairs, lambda: (self.model.pixel_values(images, resize), text), timeout
        )

    async def caption(
        self,
        image: ImageInput,
        prompt: str = CAPTION_PROMPT["en"],
        num_beams: int = 1,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        resize: ResizeMode | None = "square",
        timeout: float | None = None,
        sampling: Sampling | None = None,
    ) -> Response[str]:
        """The caption of one image.

        It is decoded together with the other running requests, each with its own settings, in a
        batch that is formed again for every token. Beams wait for a batch of requests with equal settings.
        """
        stop = captions.stop_criteria(self.model, max_new_tokens, min_new_tokens)
        check_search(stop, num_beams, sampling)
        if num_beams == 1:
            decoded = await self.caption_tokens(image, prompt, stop, resize, timeout, sampling)
            caption = self.model.tokenizer.decode(decoded.value).strip()
            return Response(caption, decoded.timings, decoded.batch)
        key = (num_beams, max_new_tokens, min_new_tokens)
        return await self._request(
            self._beams, lambda: (key, prompt, self.model.pixel_values([image], resize)[0]), timeout
        )

    async def stream_caption(
        self,
        image: ImageInput,
        prompt: str = CAPTION_PROMPT["en"],
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        resize: ResizeMode | None = "square",
        timeout: float | None = None,
        sampling: Sampling | None = None,
    ) -> AsyncGenerator[str, None]:
        """The caption of one image in pieces, as they are decoded; closing the generator gives up its place.

        ``timeout`` is for the whole caption.
        """
        stop = captions.stop_criteria(self.model, max_new_tokens, min_new_tokens)
        check_search(stop, 1, sampling)
        loop, pieces = asyncio.get_running_loop(), Pieces(self.model.tokenizer)
        tokens: asyncio.Queue[int | None] = asyncio.Queue()

        def on_token(token: int) -> None:  # by the scheduler's thread
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        request = self.caption_tokens(image, prompt, stop, resize, timeout, sampling, on_token)
        task = asyncio.create_task(request)
        task.add_done_callback(lambda _: tokens.put_nowait(None))
        try:
            while (token := await tokens.get()) is not None:
                if piece := pieces.add(token):
                    yield piece
            await task
        finally:
            task.cancel()

    async def caption_tokens(
        self,
        image: ImageInput,
        prompt: str,
        stop: StopCriteria,
        resize: ResizeMode | None = "square",
        timeout: float | None = None,
        sampling: Sampling | None = None,
        on_token: OnToken | None = None,
    ) -> Response[list[int]]:
        """The tokens of one caption, the one that ended it among them; ``on_token`` gets each as it comes."""
        scheduler = self._scheduler  # made here if it is not there: by one thread
        return await self._request(
            self._starts,
            lambda: (self.model.pixel_values([image], resize)[0], prompt),
            timeout,
            lambda started: scheduler.submit(started, stop, sampling, on_token),
        )

    @cached_property
    def _scheduler(self) -> Scheduler:
        return captions.scheduler(self.model, self._rows)

    def close(self) -> None:
        """Refuse new requests, cancel waiting ones, finish running ones."""
        self._admission.close()
        for batcher in (self._images, self._texts, self._pairs, self._beams, self._starts):
            batcher.close()
        if "_scheduler" in self.__dict__:
            self._scheduler.close()
        self._readers.shutdown(cancel_futures=True)

    async def _request(
        self,
        batcher: Batcher[Any, T],
        load: Callable[[], Any],
        timeout: float | None,
        then: Callable[[T], Future[BatchResult[R]]] | None = None,
    ) -> Response[Any]:
        """The result of ``batcher`` for the item that ``load`` returns; ``then`` continues with it."""

        async def run(clock: Clock) -> BatchResult[Any]:
            with batcher.coming():
                item = await asyncio.get_running_loop().run_in_executor(self._readers, load)
                clock.mark("read")  # before its batch can begin
                submitted = batcher.submit(item)
            result = await asyncio.wrap_future(submitted)
            if then is None:
                return result
            last = await asyncio.wrap_future(then(result.value))
            return replace(last, waited=result.waited + last.waited, seconds=result.seconds + last.seconds)

        return await self._admission.request(run, timeout)

    def _batcher(self, run: Callable[[Sequence[Any]], Sequence[Any]]) -> Batcher[Any, Any]:
        delay = self.limits.max_delay
        if delay is None:
            delay = _CPU_DELAY if self.model.components.on_cpu else _GPU_DELAY
        return Batcher(run, max_batch=self._rows, max_delay=delay)

    @property
    def _rows(self) -> int:
        most = self.model.components.batch
        if self.limits.invariant:  # of more, one could be left for an engine's last batch
            return min(self.limits.max_batch or most, most)
        return self.limits.max_batch or most

    def _run_images(self, items: Sequence[tuple[Mode, Floats]]) -> list[Floats]:
        def run(mode: Mode, rows: list[Floats]) -> list[Floats]:
            pixels = np.stack(rows)
            if not self.limits.invariant:
                return list(self.model.encode_image(pixels, mode))
            parts = in_batches(
                lambda part: self.model.encode_image(part, mode), pixels, self.model.components.batch
            )
            return [row for part in parts for row in part]

        return _grouped(items, run)

    def _run_texts(self, texts: Sequence[str]) -> list[Floats]:
        if not self.limits.invariant:
            return list(self.model.encode_text(texts))
        return encode_texts(self.model, texts, self.model.components.batch)

    def _run_pairs(self, items: Sequence[tuple[Floats, str]]) -> list[NDArray[np.float64]]:
        """Log odds [K] for each text and its images [K, 3, S, S]."""
        ends = np.cumsum([len(pixels) for pixels, _ in items])
        said = np.repeat(np.arange(len(items)), [len(pixels) for pixels, _ in items])
        pixels, texts = np.concatenate([pixels for pixels, _ in items]), [text for _, text in items]
        return np.split(matching.log_odds(self.model, pixels, texts, np.arange(len(said)), said), ends[:-1])

    def _run_beams(self, items: Sequence[tuple[Any, str, Floats]]) -> list[str]:
        def run(key: tuple[int, int, int], rows: list[tuple[str, Floats]]) -> list[str]:
            pixels = np.stack([row for _, row in rows])
            return self.model.caption(pixels, [prompt for prompt, _ in rows], *key)

        return _grouped([(key, (prompt, row)) for key, prompt, row in items], run)


def _grouped(items: Sequence[tuple[Any, Any]], run: Callable[[Any, list[Any]], list[R]]) -> list[R]:
    """``run(key, rows)`` for the items ``(key, row)`` of each key; results in the order of ``items``."""
    where: dict[Any, list[int]] = {}
    for i, (key, _) in enumerate(items):
        where.setdefault(key, []).append(i)
    results: dict[int, R] = {}
    for key, places in where.items():
        results.update(zip(places, run(key, [items[i][1] for i in places]), strict=True))
    return [results[i] for i in range(len(items))]
