"""Chat with images on a bundle's engines: ``InternVLChat.load(path).chat([image]).ask("...")``.

A conversation has one cache, on the engine's device. Every question is the whole conversation
again; positions from the first one on that the cache holds already are not computed again: the image's keys
and values are made once, however many questions follow, and so are those of earlier turns. A conversation
that begins as another one did, with the same image, starts from the blocks that the other one left in the
:class:`~.kv_cache.PrefixCache`.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Floats, Ids
from ..bundle import Bundle, Verify
from ..engines.device import to_host
from ..errors import CapabilityError, InputError, UsageError
from ..forks import cached_property, fork_safe_lock
from ..inputs.chat_template import IMAGE_TOKEN, AnswerTokens, ChatFormat, Question, Turn, framed
from ..inputs.preprocess import PixelValues
from ..inputs.sources import sequence_of, text_sequence
from ..inputs.video import FRAMES, Video, chat_places, frames_of
from ..sampling import Sampling, StopCriteria, check_search
from .components import Components, visual_embeds, visual_shape
from .conversation_cache import ConversationCache, check_length
from .image_batches import Images, Reading, as_images, check_pixel_values
from .kv_cache import PREFIX_BYTES, PrefixCache
from .loaded import Loaded, family_of_bundle, is_chat
from .serving.chat_service import ChatService

M = TypeVar("M", bound="InternVLChat")


class InternVLChat(Loaded):
    """A loaded chat bundle. Conversations are independent: each may be used in its own thread.

    Args:
        bundle, components, reading: see :func:`ivl_export.load`.
        kept_bytes: memory for data that conversations share: embeddings of images, keys and values of their
            first positions, in the memory of the engine's device; 0: nothing is shared.
    """

    def __init__(
        self,
        bundle: Bundle,
        components: Components,
        reading: Reading | None = None,
        kept_bytes: int = PREFIX_BYTES,
    ) -> None:
        super().__init__(bundle, components, reading)
        self.prefixes = PrefixCache(kept_bytes)
        if not is_chat(bundle):
            raise CapabilityError(
                f"{bundle.root} cannot chat.", "It has no decoder.", "Build an InternVL-Chat checkpoint."
            )

    @classmethod
    def load(
        cls: type[M],
        path: Path | str,
        backend: str = "onnxruntime",
        components: Iterable[str] | None = None,
        threads: int | None = None,
        target: str | None = None,
        batch: int | None = None,
        verify: Verify | None = "size",
        reading: Reading | None = None,
        share_weights: bool | None = None,
        device: str | None = None,
        provider: str | None = None,
        dtype: str | None = None,
        compile: bool | str | None = None,
        cuda_graphs: bool | None = None,
        backend_options: Mapping[str, Any] | None = None,
        kept_bytes: int = PREFIX_BYTES,
    ) -> M:
        """Open the chat bundle in ``path``; arguments and errors as of :func:`ivl_export.load`."""
        model = super().load(
            path,
            backend,
            components,
            threads,
            target,
            batch,
            verify,
            reading,
            share_weights,
            device,
            provider,
            dtype,
            compile,
            cuda_graphs,
            backend_options,
        )
        model.prefixes = PrefixCache(kept_bytes)
        return model

    def generate(
        self,
        pixel_values: Floats,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        sampling: Sampling | None = None,
        image_token_id: int | None = None,
    ) -> Ids:
        """New token ids [B, <= max_new_tokens], padded after each row's EOS; rows run one after another.

        Args:
            pixel_values: float32 [I, 3, S, S], as :meth:`pixel_values` makes them: the images (or tiles) of
                all placeholders, row after row.
            input_ids: int64 [B, T], as :func:`~ivl_export.inputs.chat_template.encode` makes them, with one
                placeholder for each image or tile, or for each of its V visual embeddings.
            attention_mask: int64 [B, T], 0 at padding (either side); None: no padding.
            max_new_tokens: at most this many.
            min_new_tokens: EOS may not come before.
            sampling: how tokens are drawn, for each row as if it were alone; None: the likeliest.
            image_token_id: the placeholder, which is never an answer's token; None: the checkpoint's.

        Raises:
            InputError: there are more or fewer images than placeholders; an id is not the model's; a prompt
                is too long for the bundle.
        """
        token = self.chat_format.images.context if image_token_id is None else image_token_id
        stop = replace(self._stop(max_new_tokens, min_new_tokens, self.chat_format.eos), never=_real(token))
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [ids[used.astype(bool)] for ids, used in zip(input_ids, mask, strict=True)]
        pixels, of_image = self.read_pixels(pixel_values), visual_shape(self.components)[0]
        placeholders = [ids == token for ids in prompts]
        self._check_ids(prompts, placeholders)
        count, rows = (sum(int(places.sum()) for places in placeholders), of_image * len(pixels.values))
        each = of_image if count == rows else 1
        if count != each * len(pixels):
            raise InputError(
                f"The prompts have {count} image placeholders (id {token}).",
                f"{len(pixels)} images or tiles were given, of {rows} visual embeddings together.",
                "Write one placeholder for each, or one for each of their visual embeddings.",
            )
        for places in placeholders:
            images = [of_image] * (int(places.sum()) // each)
            prompt = int((~places).sum()) + sum(images)
            check_length(self.components.spec("decoder"), prompt, max_new_tokens, images)
        visual, digests = self.encode_together([pixels])[0]
        out = np.full((len(prompts), max_new_tokens), stop.pad, np.int64)
        longest = first = 0
        for row, (ids, places) in enumerate(zip(prompts, placeholders, strict=True)):
            shown = slice(first, first + int(places.sum()) // each)
            first = shown.stop
            # An image is known by the first of its placeholders.
            keep = ~places | (np.cumsum(places) % each == 1 % each)
            prompt = np.where(places, IMAGE_TOKEN, ids)[keep].tolist()
            cache = self.cache(visual[shown], digests[shown])
            new, end = _drained(cache.tokens(prompt, stop, sampling or Sampling()))
            new += [] if end is None else [end]
            out[row, : len(new)] = new
            longest = max(longest, len(new))
        return out[:, :longest]

    def _check_ids(self, prompts: Sequence[Ids], placeholders: Sequence[NDArray[np.bool_]]) -> None:
        size = family_of_bundle(self.bundle).vocabulary(self.config)
        texts = [ids[~places] for ids, places in zip(prompts, placeholders, strict=True)]
        if any(len(ids) and (ids.min() < 0 or ids.max() >= size) for ids in texts):
            raise InputError(
                "The prompt holds a token that the decoder does not have.",
                f"Its tokens are 0 to {size - 1}.",
                "Use the tokenizer that was published with these weights.",
            )

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How the checkpoint is prompted, and when its answers end."""
        return ChatFormat.from_json(self.bundle.manifest.model.chat, f"The manifest of {self.bundle.root}")

    def stop_criteria(self, max_new_tokens: int, min_new_tokens: int) -> StopCriteria:
        """When one answer ends, with the checkpoint's ids; UsageError if the numbers cannot be right."""
        ends = self.chat_format.stops(self.tokenizer)
        return replace(
            self._stop(max_new_tokens, min_new_tokens, ends), never=_real(self.chat_format.images.context)
        )

    def _stop(self, max_new_tokens: int, min_new_tokens: int, ends: Sequence[int]) -> StopCriteria:
        first, *more = ends or (-1,)
        stop = StopCriteria(first, self.chat_format.pad, max_new_tokens, min_new_tokens, tuple(more))
        check_search(stop, 1, None)
        return stop

    def chat(
        self,
        images: Images = (),
        history: Sequence[Turn] = (),
        system: str | None = None,
        max_tiles: int | Sequence[int] | None = None,
    ) -> Chat:
        """A conversation about ``images``.

        Args:
            images: as :class:`.model.InternVL` takes them; shown with the first question, or
                where the turns of ``history`` place them.
            history: earlier questions and answers.
            system: the message at the beginning of the prompt; None: the template's; empty: none.
            max_tiles: the most tiles of every image, or of each; None: the checkpoint's number.

        Raises:
            InputError: an image cannot be read, the images alone are too long for the bundle, or ``history``
                shows another number of images.
        """
        pixels = self.conversation_pixels(images, max_tiles)
        return self.conversation(*self.encode_together([pixels])[0], history, system)

    def conversation(
        self,
        visual: Sequence[Array],
        digests: Sequence[bytes],
        history: Sequence[Turn] = (),
        system: str | None = None,
    ) -> Chat:
        """As :meth:`chat`, about images that :meth:`encode_images` has encoded."""
        return Chat(self, visual, digests, history, system)

    def chat_video(self, video: Video, frames: int = FRAMES, system: str | None = None) -> Chat:
        """A conversation about a video: ``frames`` of it, one tile each, as the published code shows them.

        Raises:
            InputError, CapabilityError: as :func:`~ivl_export.inputs.video.frames_of`.
        """
        pixels = self.conversation_pixels(frames_of(video, frames, places=chat_places), 1)
        return Chat(self, *self.encode_together([pixels])[0], (), system, frames=True)

    async def achat(
        self,
        images: Images = (),
        history: Sequence[Turn] = (),
        system: str | None = None,
        max_tiles: int | Sequence[int] | None = None,
    ) -> Chat:
        """As :meth:`chat`, for asyncio."""
        return await self.requests.chat(images, history, system, max_tiles)

    @cached_property
    def requests(self) -> ChatService:
        """Questions of many conversations at once; the ``a...`` methods go through it.

        For other limits, make a :class:`~ivl_export.runtime.serving.chat_service.ChatService` of your own.
        """
        return ChatService(self)

    def close(self) -> None:
        """Free the engines; the model cannot be used afterwards."""
        if "requests" in self.__dict__:
            self.requests.close()
        super().close()

    def read_pixels(self, images: Images, max_tiles: int | Sequence[int] | None = None) -> PixelValues:
        """``images`` read, each as one tile or several; of ready ``pixel_values`` each row is an image."""
        chosen = as_images(images)
        if isinstance(chosen, np.ndarray):
            check_pixel_values(chosen)
            return PixelValues(chosen, (1,) * len(chosen))
        return chosen if isinstance(chosen, PixelValues) else self.read_images(chosen, None, None, max_tiles)

    def conversation_pixels(
        self, images: Images, max_tiles: int | Sequence[int] | None = None
    ) -> PixelValues:
        """As :meth:`read_pixels`; InputError where no prompt that shows all of them fits in the bundle."""
        pixels = self.read_pixels(images, max_tiles)
        shown = [tiles * visual_shape(self.components)[0] for tiles in pixels.tiles]
        check_length(self.components.spec("decoder"), sum(shown), 1, shown)
        return pixels

    def encode_images(
        self, images: Images, max_tiles: int | Sequence[int] | None = None
    ) -> tuple[list[Array], list[bytes]]:
        """Visual embeddings of each image, float32 [rows, H], and a digest of its pixels.

        An image that another conversation has shown is not encoded again.
        """
        return self.encode_together([self.read_pixels(images, max_tiles)])[0]

    def encode_together(self, requests: Sequence[PixelValues]) -> list[tuple[list[Array], list[bytes]]]:
        """As :meth:`encode_images` of each request; the tiles of all go through the tower together."""
        images = [request[[i]].values for request in requests for i in range(len(request))]
        digests = [hashlib.sha256(np.ascontiguousarray(p).data).digest() for p in images]
        seen = {digest: self.prefixes.image(digest) for digest in digests}
        new = {digest: p for digest, p in zip(digests, images, strict=True) if seen[digest] is None}
        if new:
            tiles, size = np.concatenate(list(new.values())), self.components.batch
            parts = [
                to_host(visual_embeds(self.components, tiles[start : start + size]))
                for start in range(0, len(tiles), size)
            ]
            embeds, first = np.concatenate(parts), 0
            for digest, pixels in new.items():
                rows = embeds[first : first + len(pixels)].reshape(-1, embeds.shape[-1])
                first += len(pixels)
                seen[digest] = rows
                self.prefixes.store_image(digest, rows)
        pairs = iter(zip([seen[digest] for digest in digests], digests, strict=True))
        each = [[next(pairs) for _ in range(len(request))] for request in requests]
        return [([rows for rows, _ in own if rows is not None], [d for _, d in own]) for own in each]

    def cache(self, visual: Sequence[Array], digests: Sequence[bytes]) -> ConversationCache:
        """An empty cache for a conversation about images of these embeddings and digests."""
        turning_point = family_of_bundle(self.bundle).turning_point(self.config)
        return ConversationCache(self.components, self.prefixes, visual, digests, turning_point)

    def encode_tiles(self, images: Images, max_tiles: int | Sequence[int] | None = None) -> list[Floats]:
        """An embedding of each tile of each image, [tiles, H]: the mean of its visual embeddings.

        For retrieval among images of one model. Chat models are not trained contrastively: these embeddings
        are by-products of answering questions, and those of texts (:meth:`encode_text`) are not aligned with
        them. For retrieval by text use an InternVL-C or InternVL-G.
        """
        each, _ = visual_shape(self.components)
        visual, _ = self.encode_images(images, max_tiles)
        return [rows.reshape(-1, each, rows.shape[-1]).mean(1) for rows in visual]

    def encode_image(self, images: Images, max_tiles: int | Sequence[int] | None = None) -> Floats:
        """An embedding [I, H] of each image, the mean over its tiles; see :meth:`encode_tiles`."""
        rows = [tiles.mean(0) for tiles in self.encode_tiles(images, max_tiles)]
        return np.stack(rows) if rows else np.zeros((0, visual_shape(self.components)[1]), np.float32)

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """An embedding [B, H] of each text: the mean of its tokens' embeddings, as the decoder takes them.

        Not trained contrastively, see :meth:`encode_tiles`. InputError: an empty text.
        """
        rows = []
        limit = self.components.spec("decoder_embed").axis("text").max
        for text in text_sequence(texts):
            ids = self.tokenizer.encode(text)
            if not ids:
                raise InputError("An empty text has no embedding.", "It has no tokens.", "Leave it out.")
            parts = [np.array([ids[start : start + limit]], np.int64) for start in range(0, len(ids), limit)]
            embedded = [
                self.components.run("decoder_embed", {"input_ids": p})["input_embeds"][0] for p in parts
            ]
            rows.append(np.concatenate(embedded).mean(0))
        return np.stack(rows) if rows else np.zeros((0, visual_shape(self.components)[1]), np.float32)


def _real(token: int) -> tuple[int, ...]:
    """``token``, if it is one of the decoder's."""
    return (token,) if token >= 0 else ()


def _drained(tokens: Generator[int, None, int | None]) -> tuple[list[int], int | None]:
    """Values of a generator, and its return value."""
    out: list[int] = []
    try:
        while True:
            out.append(next(tokens))
    except StopIteration as done:
        return out, done.value


class Chat:
    """One conversation, which answers one question at a time; made by :meth:`InternVLChat.chat`."""

    def __init__(
        self,
        model: InternVLChat,
        visual: Sequence[Array],
        digests: Sequence[bytes],
        history: Sequence[Turn] = (),
        system: str | None = None,
        frames: bool = False,
    ) -> None:
        history = sequence_of(history, "turn")
        for number, turn in enumerate(history):
            if not isinstance(turn, Turn):
                raise InputError(
                    f"Number {number + 1} of {len(history)} turns is not a turn.",
                    f"It is of type {type(turn).__name__}.",
                    "Give chat_template.Turn(question, answer, images); ask(question) asks one.",
                )
        shown = sum(turn.images for turn in history)
        if history and shown != len(digests):
            raise InputError(f"The history shows {shown} images.", f"{len(digests)} were given.")
        self.model, self.system, self._frames = model, system, frames
        self._turns = list(history)
        self.cache = model.cache(visual, digests)
        self._lock = fork_safe_lock()

    @cached_property
    def format(self) -> ChatFormat:
        """The checkpoint's, with this conversation's system message."""
        own = self.model.chat_format
        if self.system is None:
            return own
        return replace(own, template=own.template.with_system(self.system or None))

    @property
    def history(self) -> tuple[Turn, ...]:
        """The turns so far."""
        return tuple(self._turns)

    def restart(self) -> None:
        """Clear the history. The image and its keys and values stay."""
        with self.exclusive():
            self._turns = []

    def ask(
        self,
        question: Question,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        min_new_tokens: int = 0,
    ) -> str:
        """The answer to ``question``; arguments and errors as :meth:`stream`."""
        return "".join(self.stream(question, max_new_tokens, sampling, min_new_tokens)).strip()

    def stream(
        self,
        question: Question,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        min_new_tokens: int = 0,
    ) -> Generator[str, None, None]:
        """The answer in pieces, as they are decoded; closing the generator ends it there.

        Args:
            question: the next question.
            max_new_tokens: at most this many.
            sampling: how tokens are drawn; None: the likeliest.
            min_new_tokens: the answer may not end before.

        Raises:
            InputError: the conversation is too long for the bundle; it stays as it was.
            UsageError: another answer of this conversation is being decoded.
        """
        stop, text, answered = self.stop_criteria(max_new_tokens, min_new_tokens), "", False
        with self.exclusive():
            turn, ids = self.prompt(question)
            new = self.cache.tokens(ids, stop, sampling or Sampling())
            answer = AnswerTokens(self.model.tokenizer, self.format.template)
            try:
                for piece in self.model.tokenizer.stream(token for token in new if answer.add(token)):
                    text += piece
                    yield piece
                answered = True
            except GeneratorExit:  # closed by the caller
                answered = True
                raise
            finally:
                new.close()
                if answered:
                    self.said(turn, text)

    async def aask(
        self, question: Question, max_new_tokens: int = 256, sampling: Sampling | None = None
    ) -> str:
        """As :meth:`ask`, for asyncio: decoded together with the answers of other conversations."""
        return (await self.model.requests.ask(self, question, max_new_tokens, sampling)).value

    def astream(
        self, question: Question, max_new_tokens: int = 256, sampling: Sampling | None = None
    ) -> AsyncGenerator[str, None]:
        """As :meth:`stream`, for asyncio: ``async for piece in chat.astream(question)``."""
        return self.model.requests.stream(self, question, max_new_tokens, sampling)

    def stop_criteria(self, max_new_tokens: int, min_new_tokens: int) -> StopCriteria:
        """When one answer ends; UsageError if the numbers cannot be right."""
        return self.model.stop_criteria(max_new_tokens, min_new_tokens)

    def prompt(self, question: Question) -> tuple[Turn, list[int]]:
        """The turn that ``question`` opens, and the ids of the conversation up to its answer."""
        shown = 0 if self._turns else len(self.cache.digests)
        if self._frames and shown and isinstance(question, str):
            turn = framed(question, shown)
        else:
            turn = Turn(question, None, shown)
        return turn, self.format.encode([*self._turns, turn], self.model.tokenizer).ids

    def said(self, turn: Turn, answer: str) -> None:
        """``turn`` was answered."""
        self._turns.append(replace(turn, answer=answer.strip()))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The conversation is one caller's inside the ``with`` block; UsageError if it is another's."""
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "This conversation is answering already.",
                "A question follows from the answers before it.",
                "Read the answer to its end, close its stream, or use another conversation.",
            )
        try:
            yield
        finally:
            self._lock.release()
