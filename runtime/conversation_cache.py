"""The cache of one conversation: keys and values on the engine's device, and what its positions stand for.

A prompt is the whole conversation again; positions from the first one on that the cache holds already, or
that another conversation left in the :class:`~.kv_cache.PrefixCache`, are not computed again.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import InputError
from ..forks import fork_safe_lock
from ..inputs.chat_template import IMAGE_TOKEN
from ..sampling import Sampling, StopCriteria, TokenSampler
from .components import Components
from .kv_cache import BLOCK, KVCache, PrefixCache, next_capacity
from .serving.scheduler import Started


@dataclass(frozen=True)
class _Decoded:
    """Tokens and their keys and values that a scheduler made after the ``reading``-th prompt."""

    reading: int
    tokens: Sequence[int]
    held: Any


class ConversationCache:
    """One sequence on the engines ``decoder_embed`` and ``decoder``; for one caller at a time.

    Args:
        components: the engines.
        prefixes: shared with other conversations.
        visual: embeddings [I, V, H] of the conversation's images, in the order in which prompts show them.
        digests: of each image's pixels.
    """

    def __init__(
        self, components: Components, prefixes: PrefixCache, visual: Array, digests: Sequence[bytes]
    ) -> None:
        self.components, self.prefixes = components, prefixes
        self.visual, self.digests = visual, list(digests)
        self._spec = components.spec("decoder")
        self._cache: KVCache | None = None  # it comes with the first keys, on their device
        self._held: list[Hashable] = []  # what the cache's positions stand for
        self._shared = 0  # blocks of these that others can have
        self._readings = 0
        self._decoded: _Decoded | None = None
        self._lock = fork_safe_lock()

    @property
    def length(self) -> int:
        """Positions held."""
        return len(self._held)

    def tokens(
        self, ids: Sequence[int], stop: StopCriteria, sampling: Sampling
    ) -> Generator[int, None, None]:
        """New token ids after the prompt ``ids``, as :meth:`read` takes it; EOS is not among them."""
        sampler = TokenSampler(stop, sampling)
        with self._lock:
            logits = self.read(ids, stop.max_new_tokens)
            try:
                while not sampler.done:
                    token = sampler.choose(logits)
                    if token == stop.eos:
                        return
                    yield token
                    if not sampler.done:
                        logits = self._feed(self._embed([token]), [token])
            finally:
                self._share()

    def started(self, ids: Sequence[int], stop: StopCriteria) -> Started:
        """The prompt ``ids`` read, for a scheduler to go on from; it hands back the positions after it."""
        with self._lock:  # an earlier question may be given up while its prompt is being read
            logits = self.read(ids, stop.max_new_tokens)
            assert self._cache is not None
            return Started(self._cache.row(0), logits, partial(self._left, self._readings))

    def _left(self, reading: int, tokens: Sequence[int], held: Any) -> None:
        # Nothing more is done by the thread that calls, for other conversations wait for it.
        self._decoded = _Decoded(reading, tokens, held)

    def settle(self) -> None:
        """Take in what a scheduler decoded, for other conversations too; the next prompt does so itself."""
        if self._lock.acquire(blocking=False):
            try:
                self._take_decoded()
                self._share()
            finally:
                self._lock.release()

    def _take_decoded(self) -> None:
        decoded, self._decoded = self._decoded, None
        if decoded is not None and decoded.reading == self._readings:  # no other prompt was read since
            self._fit(self.length + len(decoded.tokens)).extend(decoded.held[:, :, None])
            self._held += decoded.tokens

    def read(self, ids: Sequence[int], new: int) -> Any:
        """The logits [V] after the prompt ``ids``, on the engine's device.

        Positions that this or another conversation has computed are not computed again.

        Args:
            ids: tokens, and :data:`~ivl_export.inputs.chat_template.IMAGE_TOKEN` where an image stands.
            new: tokens that may follow.

        Raises:
            InputError: prompt and answer are too long for the bundle.
        """
        keys = self._keys(ids)
        self._check(len(keys) + new - 1)
        self._take_decoded()
        self._readings += 1
        self._recall(keys[:-1])  # the last position has to be computed: its logits are wanted
        left = keys[self.length :]
        logits = self._feed(self._embedded(left), left)
        self._share()
        return logits

    def _recall(self, keys: Sequence[Hashable]) -> None:
        """Hold as many of the first ``keys`` as this or another conversation has, and nothing else."""
        pairs = enumerate(zip(keys, self._held, strict=False))
        held = next((i for i, (a, b) in pairs if a != b), min(len(keys), len(self._held)))
        blocks = self.prefixes.find(keys)
        self._shared = len(blocks)
        if self._cache is not None:
            self._cache.truncate(held)
        del self._held[held:]
        if self._cache is None and not blocks:
            return
        cache = self._fit(max(held, len(blocks) * BLOCK), *blocks[:1])
        for number in range(held // BLOCK, len(blocks)):
            start, end = len(self._held), (number + 1) * BLOCK
            cache.extend(blocks[number][..., start - end :, :])
            self._held += keys[start:end]

    def _fit(self, needed: int, like: Any = None) -> KVCache:
        """The cache, with room for ``needed`` positions; a new one is like ``like``."""
        before = 0 if self._cache is None else self._cache.capacity
        capacity = next_capacity(needed, before, self._spec.axis("past"))
        if self._cache is None:
            self._cache = KVCache.empty(like, capacity)
        elif capacity != before:
            self._cache.resize(capacity)
        return self._cache

    def _share(self) -> None:
        """Let other conversations have what this one holds."""
        if self._cache is not None and len(self._held) // BLOCK > self._shared:
            self.prefixes.store(self._held, self._cache.data)
            self._shared = len(self._held) // BLOCK

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

    def _check(self, positions: int) -> None:
        """InputError if the engine takes no past of ``positions``."""
        limit = self._spec.axis("past").max
        if positions > limit:
            raise InputError(
                "The conversation is too long for this bundle.",
                f"It needs a past of {positions} positions; the engine was built for {limit}.",
                "Ask for fewer new tokens, start again, or rebuild with a larger range.",
            )

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

    def _feed(self, embeds: Array, keys: Sequence[Hashable]) -> Any:
        """Logits [V] after new positions, on the engine's device; keys and values go into the cache."""
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
                capacity = next_capacity(part.shape[1], 0, self._spec.axis("past"))
                self._cache = KVCache.of_queries(out, len(past) // 2, capacity)
            else:
                self._fit(seen + part.shape[1]).append(out, ones)
            self._held += keys[start : start + limit]
        return out["logits"][0]

    def _past(self) -> tuple[dict[str, Any], NDArray[np.int64]]:
        """Keys and values that a step attends to, and their mask; without a cache the engine's least."""
        if self._cache is not None:
            return self._cache.feeds(), self._cache.mask
        least = self._spec.axis("past").min
        shapes = {t.name: t.shape for t in self._spec.inputs if t.name.startswith("past_")}
        past = {n: np.zeros((1, int(s[1]), least, int(s[3])), np.float32) for n, s in shapes.items()}
        return past, np.zeros((1, least), np.int64)
