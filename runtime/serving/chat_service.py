"""Asynchronous questions to an :class:`~..chat.InternVLChat`: bounded, decoded together, timed.

Each question is admitted (:mod:`.admission`), the part of its prompt that no cache holds (:mod:`..kv_cache`)
is prefilled on a pool of threads, and its answer is decoded together with those of other conversations
(:mod:`.scheduler`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ...arrays import Array, Ids
from ...forks import cached_property, renew_after_fork
from ...host import cores
from ...inputs.chat_template import AnswerTokens, Question, Turn
from ...inputs.preprocess import PixelValues
from ...inputs.tokenizer import Pieces
from ...sampling import Sampling, StopCriteria
from ..image_batches import Images
from .admission import Admission, Clock, Response, ServiceLimits
from .answer_text import AnswerText
from .batching import Batcher, BatchResult
from .scheduler import OnToken, Scheduler

if TYPE_CHECKING:
    from ..chat import Chat, InternVLChat


_LENGTH = 256
"""New tokens of a completion that says no number, if there is room for them."""


@dataclass(frozen=True)
class Completion:
    """How an answer ended.

    Args:
        finish: ``stop``: the model ended it, or a stop string; ``length``: it was as long as it may be.
        prompt: positions of the prompt, those of its images among them.
        cached: how many of these had been computed before.
        new: tokens decoded, the one that ended the answer among them.
    """

    finish: Literal["stop", "length"]
    prompt: int
    cached: int
    new: int


class ChatService:
    """Asynchronous questions to ``model``, from one event loop at a time. Close it when done.

    ``limits.running`` counts questions whose prompt is read or whose answer is decoded, ``limits.max_batch``
    answers decoded at a time (None: as many as the decoder takes).
    """

    def __init__(self, model: InternVLChat, limits: ServiceLimits | None = None) -> None:
        self.model, self.limits = model, limits or ServiceLimits()
        self._admission = Admission(self.limits, self.model.components.release_memory)
        self.counts = self._admission.counts
        self._tower: Batcher[PixelValues, tuple[list[Array], list[bytes]]] = Batcher(
            self.model.encode_together, max_batch=max(1, self.model.components.batch)
        )
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """New reader threads: the parent's are not in this process."""
        self._readers = ThreadPoolExecutor(cores(), "ivl-reader")

    async def chat(
        self,
        images: Images = (),
        history: Sequence[Turn] = (),
        system: str | None = None,
        max_tiles: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> Chat:
        """As :meth:`..chat.InternVLChat.chat`, the images read on another thread.

        Tiles of the images of conversations that begin at about the same time are encoded together.

        Raises:
            BusyError: too many requests wait, or it was not done in ``timeout`` seconds.
            InputError: as there.
        """

        async def run(clock: Clock) -> BatchResult[Chat]:
            encoded = await self._encoded(images, max_tiles, clock)
            chat = self.model.conversation(*encoded.value, history, system)
            return BatchResult(chat, encoded.waited, encoded.seconds, encoded.batch)

        return (await self._admission.request(run, timeout)).value

    async def _encoded(
        self, images: Images, max_tiles: int | Sequence[int] | None, clock: Clock
    ) -> BatchResult[tuple[list[Array], list[bytes]]]:
        """Visual embeddings and digests of ``images``, encoded together with those of other requests."""
        with self._tower.coming():
            pixels = await self._read(self.model.conversation_pixels, images, max_tiles)
            encoding = self._tower.submit(pixels)
        clock.mark("read")
        return await asyncio.wrap_future(encoding)

    async def ask(
        self,
        chat: Chat,
        question: Question,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        min_new_tokens: int = 0,
        timeout: float | None = None,
    ) -> Response[str]:
        """The answer to ``question``; a conversation whose question fails stays as it was.

        Raises:
            BusyError: too many requests wait, or it was not done in ``timeout`` seconds.
            InputError, UsageError: as :meth:`..chat.Chat.stream`.
        """
        stop = chat.stop_criteria(max_new_tokens, min_new_tokens)
        with chat.exclusive():
            turn, ids = chat.prompt(question)
            decoded = await self._tokens(chat, ids, stop, sampling, timeout)
            answer = AnswerTokens(self.model.tokenizer, chat.format.template)
            said = [token for token in decoded.value if not stop.ends(token) and answer.add(token)]
            text = self.model.tokenizer.decode(said).strip()
            chat.said(turn, text)
        return Response(text, decoded.timings, decoded.batch)

    async def stream(
        self,
        chat: Chat,
        question: Question,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        min_new_tokens: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[str, None]:
        """The answer in pieces, as they are decoded; errors as :meth:`ask`, ``timeout`` is for all of it.

        Closing the generator gives up its place; the conversation keeps the pieces it gave.
        """
        stop, text = chat.stop_criteria(max_new_tokens, min_new_tokens), ""
        pieces, answer = (
            Pieces(self.model.tokenizer),
            AnswerTokens(self.model.tokenizer, chat.format.template),
        )
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[int | None] = asyncio.Queue()

        def on_token(token: int) -> None:  # by the scheduler's thread
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        with chat.exclusive():
            turn, ids = chat.prompt(question)
            task = asyncio.create_task(self._tokens(chat, ids, stop, sampling, timeout, on_token))
            task.add_done_callback(lambda _: tokens.put_nowait(None))
            try:
                while (token := await tokens.get()) is not None:
                    said = not stop.ends(token) and answer.add(token)
                    if said and (piece := pieces.add(token)):
                        text += piece
                        yield piece
                await task
                chat.said(turn, text)
            except GeneratorExit:
                chat.said(turn, text)
                raise
            finally:
                task.cancel()

    async def complete(
        self,
        turns: Sequence[Turn],
        images: Images = (),
        system: str | None = None,
        max_tiles: int | Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        timeout: float | None = None,
    ) -> AsyncGenerator[str | Completion, None]:
        """The answer to the last of ``turns`` in pieces, then how it ended: one request in all.

        Closing the generator gives up its place.

        Args:
            turns: a conversation; its last turn is open. The turns place the ``images``.
            images, system, max_tiles: as :meth:`..chat.InternVLChat.chat`.
            max_new_tokens: at most this many; None: 256, or as many as there is room for.
            sampling: how tokens are drawn; None: the likeliest.
            stop: texts that end the answer; they are not part of it.
            timeout: seconds for all of it.

        Raises:
            BusyError: too many requests wait, or it was not done in time.
            TooLongError: prompt and answer are too long for the bundle.
            InputError: an image cannot be read, or the turns show another number of images.
        """
        model, loop = self.model, asyncio.get_running_loop()
        form = model.chat_format
        if system is not None:
            form = replace(form, template=form.template.with_system(system or None))
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        async def run(clock: Clock) -> BatchResult[Completion]:
            visual: list[Array] = []
            digests: list[bytes] = []
            if len(images):
                visual, digests = (await self._encoded(images, max_tiles, clock)).value
            cache = model.cache(visual, digests)
            ids = form.encode(turns, model.tokenizer).ids
            prompt = len(ids) - len(digests) + sum(map(len, visual))
            room = model.components.spec("decoder").axis("past").max + 1 - prompt
            criteria = model.stop_criteria(max_new_tokens or max(1, min(_LENGTH, room)), 0)
            text = AnswerText(model.tokenizer, form.template, criteria.ends, stop)

            def on_token(token: int) -> bool:  # by the scheduler's thread
                if piece := text.add(token):
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
                return text.stopped

            started = await self._read(cache.started, ids, criteria)
            clock.mark("prefill")
            result = await asyncio.wrap_future(self._scheduler.submit(started, criteria, sampling, on_token))
            if rest := text.rest():
                pieces.put_nowait(rest)
            with suppress(RuntimeError):  # closed
                self._readers.submit(cache.settle)
            ended = text.stopped or criteria.ends(result.value[-1])
            finish: Literal["stop", "length"] = "stop" if ended else "length"
            done = Completion(finish, prompt, cache.recalled, len(result.value))
            return BatchResult(done, result.waited, result.seconds, result.batch)

        task = asyncio.ensure_future(self._admission.request(run, timeout))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield (await task).value
        finally:
            task.cancel()

    def close(self) -> None:
        """Refuse new requests, cancel waiting ones, finish running ones."""
        self._admission.close()
        self._tower.close()
        if "_scheduler" in self.__dict__:
            self._scheduler.close()
        self._readers.shutdown(cancel_futures=True)

    async def _tokens(
        self,
        chat: Chat,
        ids: Sequence[int],
        stop: StopCriteria,
        sampling: Sampling | None,
        timeout: float | None,
        on_token: OnToken | None = None,
    ) -> Response[list[int]]:
        scheduler = self._scheduler

        async def run(clock: Clock) -> BatchResult[list[int]]:
            started = await self._read(chat.cache.started, ids, stop)
            clock.mark("read")
            result = await asyncio.wrap_future(scheduler.submit(started, stop, sampling, on_token))
            with suppress(RuntimeError):  # closed; the next prompt settles
                self._readers.submit(chat.cache.settle)  # in the background
            return result

        return await self._admission.request(run, timeout)

    async def _read(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *arguments)

    @cached_property
    def _scheduler(self) -> Scheduler:
        components = self.model.components
        spec = components.spec("decoder")
        most = spec.axis("batch").max

        def inputs(ids: Ids) -> dict[str, Any]:
            return {
                "input_embeds": components.run_device("decoder_embed", {"input_ids": ids})["input_embeds"]
            }

        slots = min(self.limits.max_batch or most, most)
        return Scheduler(lambda feeds: components.run_device("decoder", feeds), spec, slots, inputs)
