"""Chat with images on a bundle's engines: ``InternVLChat.load(path).chat([image]).ask("...")``.

A conversation has one preallocated cache, on the engine's device. Every question is the whole conversation
again; what the cache holds of it already, from the first position on, is not computed again: the image's keys
and values are made once, however many questions follow, and so are those of earlier turns.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..conversation import IMAGE_TOKEN, SYSTEM, Turn, encode
from ..decoding import Sampling, Scores, pick
from ..engines.device import to_host
from ..errors import CapabilityError, InputError, UsageError
from ..preprocess import Array
from .cache import KVCache
from .components import Components
from .images import Images, Reading
from .loaded import Loaded, fixed

GRAIN = 256
"""A cache has a multiple of this many positions: a step computes over all of them."""
_HALF = "\ufffd"


class InternVLChat(Loaded):
    """A loaded chat bundle. Conversations are independent: each may be used in a thread of its own."""

    VISION = "vision_chat"

    def __init__(self, bundle: Bundle, components: Components, reading: Reading | None = None) -> None:
        super().__init__(bundle, components, reading)
        if "decoder" not in bundle.manifest.components:
            raise CapabilityError(
                f"{bundle.root} cannot chat.", "It has no decoder.", "Build an InternVL-Chat checkpoint."
            )

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

    def encode_images(self, images: Images) -> tuple[Array, list[bytes]]:
        """What the decoder sees of images, float32 [I, V, H], and a digest of each one's pixels."""
        shape = map(fixed, self.components.spec("vision_chat").outputs[0].shape[1:])
        rows = [np.zeros((0, *shape), np.float32)]
        digests: list[bytes] = []
        for pixels in self.pixel_batches(images):
            rows.append(self.components.run("vision_chat", {"pixel_values": pixels})["visual_embeds"])
            digests += [hashlib.sha256(p.tobytes()).digest() for p in pixels]
        return np.concatenate(rows).astype(np.float32, copy=False), digests


class Chat:
    """One conversation, which answers one question at a time; made by :meth:`InternVLChat.chat`."""

    def __init__(self, model: InternVLChat, images: Images, history: Sequence[Turn], system: str) -> None:
        if isinstance(images, str | bytes | Path):
            raise InputError("One image was given.", "A sequence of images is needed.", "Use [image].")
        shown = sum(turn.images for turn in history)
        if history and shown != len(images):
            raise InputError(f"The history shows {shown} images.", f"{len(images)} were given.")
        self.model, self.system = model, system
        self._visual, self._digests = model.encode_images(images)
        self._turns = list(history)
        self._spec = model.components.spec("decoder")
        self._cache: KVCache | None = None  # it comes with the first keys, on their device
        self._held: list[Hashable] = []  # what the cache's positions stand for
        self._lock = threading.Lock()

    @property
    def history(self) -> tuple[Turn, ...]:
        """What was said so far."""
        return tuple(self._turns)

    def restart(self) -> None:
        """Forget what was said. The image stays, and so do its keys and values."""
        with self._alone():
            self._turns = []

    def ask(self, question: str, max_new_tokens: int = 256, sampling: Sampling | None = None) -> str:
        """The answer to ``question``; greedy unless ``sampling`` says otherwise. Errors as :meth:`stream`."""
        return "".join(self.stream(question, max_new_tokens, sampling)).strip()

    def stream(
        self, question: str, max_new_tokens: int = 256, sampling: Sampling | None = None
    ) -> Generator[str, None, None]:
        """The answer in pieces, as they are found; whoever stops listening ends it there.

        Raises:
            InputError: the conversation is too long for the bundle; it stays as it was.
            UsageError: another answer is being heard.
        """
        if max_new_tokens < 1:
            raise UsageError("max_new_tokens must be at least 1.", f"It is {max_new_tokens}.")
        turn = Turn(question, None, 0 if self._turns else len(self._digests))
        encoded = encode([*self._turns, turn], self.model.tokenizer, self.system)
        said: list[int] = []
        text, answered = "", False
        with self._alone():
            try:
                for token in self.tokens(encoded.ids, max_new_tokens, sampling or Sampling()):
                    said.append(token)
                    whole = self.model.tokenizer.decode(said).rstrip(_HALF)
                    if len(whole) > len(text):  # no character is given out before it is whole
                        piece, text = whole[len(text) :], whole
                        yield piece
                answered = True
            except GeneratorExit:  # nobody listens any more
                answered = True
                raise
            finally:
                if answered:
                    self._turns.append(replace(turn, answer=text.strip()))

    def tokens(self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """New token ids after the prompt ``ids`` (with :data:`~ivl_export.conversation.IMAGE_TOKEN`), no eos.

        What the cache holds of the prompt is not computed again.
        """
        eos = self._eos
        rng = np.random.default_rng(sampling.seed)
        keys = self._keys(ids)
        room = self._room(len(keys) + max_new_tokens - 1)
        same = next((i for i, (a, b) in enumerate(zip(keys, self._held, strict=False)) if a != b), None)
        kept = min(len(self._held), len(keys) - 1) if same is None else min(same, len(keys) - 1)
        if self._cache is not None:
            self._cache.truncate(kept)
            if room > self._cache.capacity:
                self._cache.grow(room)
        del self._held[kept:]
        logits = self._feed(self._embedded(keys[kept:]), keys[kept:], room)
        for number in range(max_new_tokens):
            token = pick(logits[0], sampling, rng)
            if token == eos:
                return
            yield token
            if number + 1 < max_new_tokens:
                logits = self._feed(self._embed([token]), [token], room)

    @contextmanager
    def _alone(self) -> Iterator[None]:
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

    @property
    def _eos(self) -> int:
        config: Any = self.model.bundle.manifest.model.config
        found = config.get("eos_token_id")
        return self.model.tokenizer.eos if found is None else int(found)

    def _keys(self, ids: Sequence[int]) -> list[Hashable]:
        """What each position stands for: a token, or a row of an image."""
        places = iter(range(len(self._digests)))
        if sum(i == IMAGE_TOKEN for i in ids) != len(self._digests):
            raise InputError(f"The prompt does not show the {len(self._digests)} images that were given.")
        keys: list[Hashable] = []
        for token in ids:
            if token == IMAGE_TOKEN:
                image = next(places)
                keys += [(self._digests[image], image, row) for row in range(self._visual.shape[1])]
            else:
                keys.append(int(token))
        return keys

    def _room(self, positions: int) -> int:
        """Capacity of a cache for ``positions``."""
        limit = self._spec.axis("past").max
        if positions > limit:
            raise InputError(
                "The conversation is too long for this bundle.",
                f"It needs a past of {positions} positions; the engine was built for {limit}.",
                "Ask for fewer new tokens, start again, or rebuild with a larger range.",
            )
        return min(limit, -(-positions // GRAIN) * GRAIN)

    def _embedded(self, keys: Sequence[Hashable]) -> Array:
        """Embeddings [1, T, H] of positions: text looked up in one go, images put between."""
        is_text = np.array([isinstance(key, int) for key in keys])
        out = np.empty((1, len(keys), self._visual.shape[2]), np.float32)
        text = [key for key in keys if isinstance(key, int)]
        if text:
            out[:, is_text] = self._embed(text)
        rows = [self._visual[key[1], key[2]] for key in keys if isinstance(key, tuple)]
        if rows:
            out[:, ~is_text] = np.stack(rows)
        return out

    def _embed(self, tokens: Sequence[int]) -> Array:
        limit = self.model.components.spec("decoder_embed").axis("text").max
        ids = np.array([tokens], np.int64)
        parts = [
            self.model.components.run("decoder_embed", {"input_ids": ids[:, start : start + limit]})
            for start in range(0, ids.shape[1], limit)
        ]
        return np.concatenate([part["input_embeds"] for part in parts], 1)

    def _feed(self, embeds: Array, keys: Sequence[Hashable], room: int) -> Scores:
        """Logits [1, V] behind new positions, whose keys and values go into the cache."""
        limit, logits = self._spec.axis("text").max, np.zeros((1, 0), np.float32)
        for start in range(0, len(keys), limit):
            part = embeds[:, start : start + limit]
            seen, ones = len(self._held), np.ones((1, part.shape[1]), np.int64)
            past, mask = self._past()
            feeds = {
                "input_embeds": np.ascontiguousarray(part),
                "positions": np.arange(seen, seen + part.shape[1], dtype=np.int64)[None],
                "attention_mask": np.concatenate([mask, ones], 1),
                **past,
            }
            out = self.model.components.run_device("decoder", feeds)
            if self._cache is None:
                self._cache = KVCache.of_queries(out, len(past) // 2, room)
            else:
                self._cache.append(out, ones)
            self._held += keys[start : start + limit]
            logits = to_host(out["logits"]).astype(np.float32, copy=False)
        return logits

    def _past(self) -> tuple[dict[str, Any], NDArray[np.int64]]:
        """Keys and values that a step sees, and their mask; without a cache as few as an engine takes."""
        if self._cache is not None:
            return self._cache.feeds(), self._cache.mask
        least = self._spec.axis("past").min
        shapes = {t.name: t.shape for t in self._spec.inputs if t.name.startswith("past_")}
        past = {n: np.zeros((1, int(s[1]), least, int(s[3])), np.float32) for n, s in shapes.items()}
        return past, np.zeros((1, least), np.int64)
