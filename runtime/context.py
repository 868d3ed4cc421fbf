"""What a decoder has read of a conversation: a cache of keys and values, and what its positions stand for."""

from __future__ import annotations

import threading
from collections.abc import Generator, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..conversation import IMAGE_TOKEN
from ..decoding import Chooser, Limits, Sampling
from ..errors import InputError
from ..preprocess import Array
from .cache import KVCache
from .components import Components
from .picking import pick
from .prefixes import BLOCK, Prefixes
from .scheduler import Started

GRAIN = 256
"""A cache has a multiple of this many positions: a step computes over all of them."""


class Context:
    """One sequence before the engines ``decoder_embed`` and ``decoder``; for one caller at a time.

    Args:
        components: the engines.
        prefixes: what other conversations left, and are left.
        visual: embeddings [I, V, H] of the conversation's images, in the order in which prompts show them.
        digests: what tells each image from others.
    """

    def __init__(
        self, components: Components, prefixes: Prefixes, visual: Array, digests: Sequence[bytes]
    ) -> None:
        self.components, self.prefixes = components, prefixes
        self.visual, self.digests = visual, list(digests)
        self._spec = components.spec("decoder")
        self._cache: KVCache | None = None  # it comes with the first keys, on their device
        self._held: list[Hashable] = []  # what the cache's positions stand for
        self._lock = threading.Lock()

    @property
    def length(self) -> int:
        """Positions held."""
        return len(self._held)

    def tokens(self, ids: Sequence[int], limits: Limits, sampling: Sampling) -> Generator[int, None, None]:
        """New token ids after the prompt ``ids``, as :meth:`read` takes it; EOS is not among them."""
        logits = self.read(ids, limits.max_new_tokens)
        room, chooser = (
            self._room(len(self._held) + limits.max_new_tokens - 1),
            Chooser(limits, sampling, pick),
        )
        try:
            while not chooser.done:
                token = chooser.choose(logits)
                if token == limits.eos:
                    return
                yield token
                if not chooser.done:
                    logits = self._feed(self._embed([token]), [token], room)
        finally:
            self._share()

    def started(self, ids: Sequence[int], limits: Limits) -> Started:
        """The prompt ``ids`` read, for others to decode. The answer is read anew with the next question."""
        with self._lock:  # an earlier question may be given up while its prompt is being read
            logits = self.read(ids, limits.max_new_tokens)
            assert self._cache is not None
            return Started(self._cache.row(0), logits)

    def read(self, ids: Sequence[int], new: int) -> Any:
        """The logits [V] behind the prompt ``ids``, where the engine left them.

        What this or another conversation has computed of it is not computed again, and others have what was.

        Args:
            ids: tokens, and :data:`~ivl_export.conversation.IMAGE_TOKEN` where an image stands.
            new: tokens that may follow.

        Raises:
            InputError: prompt and answer are too long for the bundle.
        """
        keys = self._keys(ids)
        room = self._room(len(keys) + new - 1)
        self._recall(keys[:-1], room)  # the last position has to be computed: its logits are wanted
        left = keys[len(self._held) :]
        logits = self._feed(self._embedded(left), left, room)
        self._share()
        return logits

    def _recall(self, keys: Sequence[Hashable], room: int) -> None:
        """Hold as many of the first ``keys`` as this or another conversation has, and nothing else."""
        pairs = enumerate(zip(keys, self._held, strict=False))
        held = next((i for i, (a, b) in pairs if a != b), min(len(keys), len(self._held)))
        blocks = self.prefixes.find(keys)
        if self._cache is not None:
            self._cache.truncate(held)
            if room > self._cache.capacity:
                self._cache.grow(room)
        elif blocks:
            self._cache = KVCache.empty(blocks[0], room)
        del self._held[held:]
        if self._cache is None:
            return
        for number in range(held // BLOCK, len(blocks)):
            start, end = len(self._held), (number + 1) * BLOCK
            self._cache.extend(blocks[number][..., start - end :, :])
            self._held += keys[start:end]

    def _share(self) -> None:
        """Let other conversations have what this one holds."""
        if self._cache is not None:
            self.prefixes.keep(self._held, self._cache.data)

    def _keys(self, ids: Sequence[int]) -> list[Hashable]:
        """What each position stands for: a token, or a row of an image."""
        places = iter(range(len(self.digests)))
        if sum(i == IMAGE_TOKEN for i in ids) != len(self.digests):
            raise InputError(f"The prompt does not show the {len(self.digests)} images that were given.")
        keys: list[Hashable] = []
        for token in ids:
            if token == IMAGE_TOKEN:
                image = next(places)
                keys += [(self.digests[image], image, row) for row in range(self.visual.shape[1])]
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
        out = np.empty((1, len(keys), self.visual.shape[2]), np.float32)
        text = [key for key in keys if isinstance(key, int)]
        if text:
            out[:, is_text] = self._embed(text)
        rows = [self.visual[key[1], key[2]] for key in keys if isinstance(key, tuple)]
        if rows:
            out[:, ~is_text] = np.stack(rows)
        return out

    def _embed(self, tokens: Sequence[int]) -> Array:
        limit = self.components.spec("decoder_embed").axis("text").max
        ids = np.array([tokens], np.int64)
        parts = [
            self.components.run("decoder_embed", {"input_ids": ids[:, start : start + limit]})
            for start in range(0, ids.shape[1], limit)
        ]
        return np.concatenate([part["input_embeds"] for part in parts], 1)

    def _feed(self, embeds: Array, keys: Sequence[Hashable], room: int) -> Any:
        """Logits [V] behind new positions, where the engine left them; keys and values go into the cache."""
        limit = self._spec.axis("text").max
        out: dict[str, Any] = {}
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
            out = self.components.run_device("decoder", feeds)
            if self._cache is None:
                self._cache = KVCache.of_queries(out, len(past) // 2, room)
            else:
                self._cache.append(out, ones)
            self._held += keys[start : start + limit]
        return out["logits"][0]

    def _past(self) -> tuple[dict[str, Any], NDArray[np.int64]]:
        """Keys and values that a step sees, and their mask; without a cache as few as an engine takes."""
        if self._cache is not None:
            return self._cache.feeds(), self._cache.mask
        least = self._spec.axis("past").min
        shapes = {t.name: t.shape for t in self._spec.inputs if t.name.startswith("past_")}
        past = {n: np.zeros((1, int(s[1]), least, int(s[3])), np.float32) for n, s in shapes.items()}
        return past, np.zeros((1, least), np.int64)
