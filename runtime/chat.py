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
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..arrays import Array, Floats, Ids
from ..bundle import Bundle, Verify
from ..engines.device import to_host
from ..errors import CapabilityError, InputError, UsageError
from ..forks import fork_safe_lock
from ..inputs.chat_template import IMAGE_TOKEN, SYSTEM, VICUNA, Question, Turn, encode
from ..sampling import Sampling, StopCriteria, check_search
from .components import Components, visual_embeds, visual_shape
from .conversation_cache import ConversationCache
from .image_batches import Images, Reading, as_images
from .kv_cache import PREFIX_BYTES, PrefixCache
from .loaded import Loaded, is_chat
from .serving.chat_service import ChatService

M = TypeVar("M", bound="InternVLChat")


class InternVLChat(Loaded):
    """A loaded chat bundle. Conversations are independent: each may be used in a thread of its own.

    Args:
        bundle, components, reading: see :meth:`load`.
        kept_bytes: for what conversations share: embeddings of images, keys and values of their first
            positions, in the memory of the engine's device; 0: nothing is shared.
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
        """Open the chat bundle in ``path``: as :meth:`.InternVL.load`; ``kept_bytes`` as of the class."""
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
        image_token_id: int = IMAGE_TOKEN,
    ) -> Ids:
        """New token ids [B, <= max_new_tokens], padded after each row's EOS; rows run one after another.

        Args:
            pixel_values: float32 [I, 3, S, S], as :meth:`pixel_values` makes them: the images of all
                placeholders, row after row.
            input_ids: int64 [B, T], as :func:`~ivl_export.inputs.chat_template.encode` makes them, with one
                placeholder for each image, or for each of its V visual embeddings.
            attention_mask: int64 [B, T], 0 at padding (either side); None: no padding.
            max_new_tokens: at most this many.
            min_new_tokens: EOS may not come before.
            sampling: how tokens are drawn, for each row as if it were alone; None: the likeliest.
            image_token_id: the placeholder.

        Raises:
            InputError: there are more or fewer images than placeholders; a prompt is too long for the bundle.
        """
        stop = self.stop_criteria(max_new_tokens, min_new_tokens)
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [ids[used.astype(bool)] for ids, used in zip(input_ids, mask, strict=True)]
        visual, digests = self.encode_images(pixel_values)
        placeholders = [ids == image_token_id for ids in prompts]
        count = sum(int(places.sum()) for places in placeholders)
        each = visual.shape[1] if count == visual.shape[0] * visual.shape[1] else 1
        if count != each * len(visual):
            raise InputError(
                f"The prompts have {count} image placeholders.", f"{len(visual)} images were given."
            )
        out = np.full((len(prompts), max_new_tokens), stop.pad, np.int64)
        longest = first = 0
        for row, (ids, places) in enumerate(zip(prompts, placeholders, strict=True)):
            shown = slice(first, first + int(places.sum()) // each)
            first = shown.stop
            # The first of an image's placeholders stands for it.
            keep = ~places | (np.cumsum(places) % each == 1 % each)
            prompt = np.where(places, IMAGE_TOKEN, ids)[keep].tolist()
            cache = ConversationCache(self.components, self.prefixes, visual[shown], digests[shown])
            new = list(cache.tokens(prompt, stop, sampling or Sampling()))
            new += [stop.eos] * (len(new) < max_new_tokens)
            out[row, : len(new)] = new
            longest = max(longest, len(new))
        return out[:, :longest]

    def stop_criteria(self, max_new_tokens: int, min_new_tokens: int) -> StopCriteria:
        """When one answer ends, with the checkpoint's ids; UsageError if the numbers cannot be right."""
        config: Any = self.bundle.manifest.model.config
        eos, pad = config.get("eos_token_id"), config.get("pad_token_id")
        stop = StopCriteria(
            self.tokenizer.eos if eos is None else int(eos),
            0 if pad is None else int(pad),
            max_new_tokens,
            min_new_tokens,
        )
        check_search(stop, 1, None)
        return stop

    def chat(self, images: Images = (), history: Sequence[Turn] = (), system: str = SYSTEM) -> Chat:
        """A conversation about ``images``.

        Args:
            images: as :class:`.model.InternVL` takes them; shown with the first question, or
                where the turns of ``history`` say.
            history: what was said before.
            system: what the prompt begins with.

        Raises:
            InputError: an image cannot be read, or ``history`` shows another number of images.
        """
        return Chat(self, images, history, system)

    async def achat(self, images: Images = (), history: Sequence[Turn] = (), system: str = SYSTEM) -> Chat:
        """As :meth:`chat`, for asyncio."""
        return await self.requests.chat(images, history, system)

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

    def encode_images(self, images: Images) -> tuple[Array, list[bytes]]:
        """Visual embeddings of images, float32 [I, V, H], and a digest of each one's pixels.

        An image that another conversation has shown is not encoded again.
        """
        rows = [np.zeros((0, *visual_shape(self.components)), np.float32)]
        digests: list[bytes] = []
        for pixels in self.pixel_batches(images):
            own = [hashlib.sha256(np.ascontiguousarray(p).data).digest() for p in pixels]
            seen = {digest: self.prefixes.image(digest) for digest in own}
            new = {digest: p for digest, p in zip(own, pixels, strict=True) if seen[digest] is None}
            if new:
                embeds = to_host(visual_embeds(self.components, np.stack(list(new.values()))))
                for digest, row in zip(new, embeds, strict=True):
                    seen[digest] = row
                    self.prefixes.store_image(digest, row)
            rows += [row[None] for digest in own if (row := seen[digest]) is not None]
            digests += own
        return np.concatenate(rows), digests


class Chat:
    """One conversation, which answers one question at a time; made by :meth:`InternVLChat.chat`."""

    def __init__(self, model: InternVLChat, images: Images, history: Sequence[Turn], system: str) -> None:
        images = as_images(images)
        shown = sum(turn.images for turn in history)
        if history and shown != len(images):
            raise InputError(f"The history shows {shown} images.", f"{len(images)} were given.")
        self.model, self.system = model, system
        self._turns = list(history)
        self.cache = ConversationCache(model.components, model.prefixes, *model.encode_images(images))
        self._lock = fork_safe_lock()

    @property
    def history(self) -> tuple[Turn, ...]:
        """The turns so far."""
        return tuple(self._turns)

    def restart(self) -> None:
        """Forget what was said. The image stays, and so do its keys and values."""
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
            question: what is asked now.
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
            try:
                for piece in self.model.tokenizer.stream(new):
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
        turn = Turn(question, None, 0 if self._turns else len(self.cache.digests))
        return turn, encode([*self._turns, turn], self.model.tokenizer, VICUNA.with_system(self.system)).ids

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
                "Hear the answer to its end, close its stream, or use another conversation.",
            )
        try:
            yield
        finally:
            self._lock.release()
