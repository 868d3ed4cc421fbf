"""The cache of one conversation: keys and values on the engine's device, and the content of each position.

A prompt is the whole conversation again; positions from the first one on that the cache holds already, or
that another conversation left in the :class:`~.kv_cache.PrefixCache`, are not computed again.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import InputError, TooLongError
from ..forks import fork_safe_lock
from ..inputs.chat_template import IMAGE_TOKEN
from ..models.registry import is_cache
from ..sampling import Sampling, StopCriteria, TokenSampler
from .components import Components
from .kv_cache import BLOCK, KVCache, PrefixCache, next_capacity
from .serving.scheduler import Started

if TYPE_CHECKING:
    from ..bundle.spec import ComponentSpec


class _Row(NamedTuple):
    """Content of a position: a row of an image's visual embeddings."""

    digest: bytes
    image: int
    row: int


class _Turned(NamedTuple):
    """Content of a position of a sequence beyond the turning point: its keys are rotated in another way,
    so that none of a shorter sequence can be taken for them."""

    key: Hashable


@dataclass(frozen=True)
class _Decoded:
    """Tokens and their keys and values that a scheduler made after the ``reading``-th prompt."""

    reading: int
    tokens: Sequence[int]
    data: Any


class ConversationCache:
    """One sequence on the engines ``decoder_embed`` and ``decoder``; for one caller at a time.

    Args:
        components: the engines.
        prefixes: shared with other conversations.
        visual: embeddings of the conversation's images, each [rows, H], in the order in which prompts show
            them; several tiles give several times as many rows.
        digests: of each image's pixels.
        turning_point: see :meth:`..models.registry.Family.turning_point`.
    """

    def __init__(
        self,
        components: Components,
        prefixes: PrefixCache,
        visual: Sequence[Array],
        digests: Sequence[bytes],
        turning_point: int = 0,
    ) -> None:
        self.components, self.prefixes = components, prefixes
        self.visual, self.digests = visual, list(digests)
        self.turning_point = turning_point
        self._spec = components.spec("decoder")
        self._cache: KVCache | None = None  # made with the first keys, on their device
        self._contents: list[Hashable] = []  # content of the cache's positions
        self._shared = 0  # blocks of these that are in the prefix cache
        self._readings = 0
        self.recalled = 0
        """Positions of the last prompt that had been computed before."""
        self._decoded: _Decoded | None = None
        self._lock = fork_safe_lock()

    @property
    def length(self) -> int:
        """Positions held."""
        return len(self._contents)

    def tokens(
        self, ids: Sequence[int], stop: StopCriteria, sampling: Sampling
    ) -> Generator[int, None, int | None]:
        """New token ids after the prompt ``ids``, as :meth:`read` takes it; what ends them is not among them.

        Returns:
            The token that ended the answer; None: it was as long as it may be.
        """
        sampler = TokenSampler(stop, sampling)
        with self._lock:
            logits = self.read(ids, stop.max_new_tokens)
            try:
                while not sampler.done:
                    token = sampler.choose(logits)
                    if stop.ends(token):
                        return token
                    yield token
                    if not sampler.done:
                        logits = self._feed(self._embed([token]), self._turned([token], self.length + 1))
                return None
            finally:
                self._share()

    def started(self, ids: Sequence[int], stop: StopCriteria) -> Started:
        """The prompt ``ids`` read, for a scheduler to continue; it returns the positions of the answer."""
        with self._lock:  # an earlier question may be given up while its prompt is being read
            logits = self.read(ids, stop.max_new_tokens)
            assert self._cache is not None
            return Started(self._cache.row(0), logits, partial(self._left, self._readings))

    def _left(self, reading: int, tokens: Sequence[int], data: Any) -> None:
        # No work on the scheduler's thread: other conversations wait for it.
        self._decoded = _Decoded(reading, tokens, data)

    def settle(self) -> None:
        """Append the positions that a scheduler decoded, and share them; else the next prompt does."""
        if self._lock.acquire(blocking=False):
            try:
                self._take_decoded()
                self._share()
            finally:
                self._lock.release()

    def _take_decoded(self) -> None:
        decoded, self._decoded = self._decoded, None
        if decoded is not None and decoded.reading == self._readings:  # no other prompt was read since
            self._fit(self.length + len(decoded.tokens)).extend(decoded.data[:, :, None])
            for token in decoded.tokens:  # each was rotated as the last of a sequence
                self._contents += self._turned([token], self.length + 1)

    def read(self, ids: Sequence[int], new: int) -> Any:
        """The logits [V] after the prompt ``ids``, on the engine's device.

        Positions that this or another conversation has computed are not computed again.

        Args:
            ids: tokens, and :data:`~ivl_export.inputs.chat_template.IMAGE_TOKEN` in place of each image.
            new: tokens that may follow.

        Raises:
            InputError: prompt and answer are too long for the bundle.
        """
        keys = self._turned(keys := self._keys(ids), len(keys))
        check_length(self._spec, len(keys), new, [len(rows) for rows in self.visual])
        self._take_decoded()
        self._readings += 1
        self._recall(keys[:-1])  # the last position has to be computed: its logits are needed
        self.recalled = self.length
        left = keys[self.length :]
        logits = self._feed(self._embedded(left), left, len(keys))
        self._share()
        return logits

    def _recall(self, keys: Sequence[Hashable]) -> None:
        """Cut the cache to its common prefix with ``keys``, then append blocks of other conversations."""
        pairs = enumerate(zip(keys, self._contents, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(keys), len(self._contents)))
        blocks = self.prefixes.find(keys)
        self._shared = len(blocks)
        if self._cache is not None:
            self._cache.truncate(common)
        del self._contents[common:]
        if self._cache is None and not blocks:
            return
        cache = self._fit(max(common, len(blocks) * BLOCK), *blocks[:1])
        for number in range(common // BLOCK, len(blocks)):
            start, end = len(self._contents), (number + 1) * BLOCK
            cache.extend(blocks[number][..., start - end :, :])
            self._contents += keys[start:end]

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
        """Copy this conversation's full blocks to the prefix cache."""
        if self._cache is not None and len(self._contents) // BLOCK > self._shared:
            self.prefixes.store(self._contents, self._cache.data)
            self._shared = len(self._contents) // BLOCK

    def _keys(self, ids: Sequence[int]) -> list[Hashable]:
        """Content of each position: a token, or a row of an image."""
        places = iter(range(len(self.digests)))
        if sum(i == IMAGE_TOKEN for i in ids) != len(self.digests):
            raise InputError(f"The prompt does not show the {len(self.digests)} images that were given.")
        keys: list[Hashable] = []
        for token in ids:
            if token == IMAGE_TOKEN:
                image = next(places)
                keys += [_Row(self.digests[image], image, row) for row in range(len(self.visual[image]))]
            else:
                keys.append(int(token))
        return keys

    def _turned(self, keys: Sequence[Hashable], length: int) -> list[Hashable]:
        """``keys`` of a sequence that is rotated as one of ``length`` positions."""
        return [_Turned(key) for key in keys] if 0 < self.turning_point < length else list(keys)

    def _embedded(self, keys: Sequence[Hashable]) -> Array:
        """Embeddings [1, T, H] of positions: text looked up in one go, images put between."""
        plain = [key.key if isinstance(key, _Turned) else key for key in keys]
        is_text = np.array([isinstance(key, int) for key in plain])
        width = next(t.shape[-1] for t in self._spec.inputs if t.name == "input_embeds")
        out = np.empty((1, len(plain), int(width)), np.float32)
        text = [key for key in plain if isinstance(key, int)]
        if text:
            out[:, is_text] = self._embed(text)
        rows = [self.visual[key.image][key.row] for key in plain if isinstance(key, _Row)]
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

    def _feed(self, embeds: Array, keys: Sequence[Hashable], length: int = 0) -> Any:
        """Logits [V] after new positions, on the engine's device; keys and values go into the cache.

        ``length``: of the whole prompt; 0: its last position is the last of ``keys``.
        """
        limit = self._spec.axis("text").max
        turned = 0 < self.turning_point < length
        step = max(1, limit - 1) if turned else limit
        out: dict[str, Any] = {}
        for start in range(0, len(keys), step):
            part = embeds[:, start : start + step]
            seen, count = len(self._contents), part.shape[1]
            past, mask = self._past()
            positions = np.arange(seen, seen + count, dtype=np.int64)[None]
            ones = hidden = np.ones((1, count), np.int64)
            # The graph rotates a call by its last position: a hidden one represents the rest of the prompt.
            hint = turned and seen + count <= self.turning_point
            if hint:
                part = np.concatenate([part, np.zeros_like(part[:, :1])], 1)
                positions = np.append(positions, [[length - 1]], 1)
                hidden = np.append(ones, [[0]], 1)
            feeds = {
                "input_embeds": np.ascontiguousarray(part),
                "positions": positions,
                "attention_mask": np.concatenate([mask, hidden], 1),
                **past,
            }
            out = self.components.run_device("decoder", feeds)
            outputs: dict[str, Any] = dict(out)
            if hint:
                outputs = {n: a[:, :, :count] if is_cache(n) else a for n, a in outputs.items()}
            if self._cache is None:
                capacity = next_capacity(count, 0, self._spec.axis("past"))
                self._cache = KVCache.of_queries(outputs, len(past) // 2, capacity)
            else:
                self._fit(seen + count).append(outputs, ones)
            self._contents += keys[start : start + step]
        return out["logits"][0]

    def _past(self) -> tuple[dict[str, Any], NDArray[np.int64]]:
        """Keys and values that a step attends to, and their mask; without a cache the engine's least."""
        if self._cache is not None:
            return self._cache.feeds(), self._cache.mask
        least = self._spec.axis("past").min
        shapes = {t.name: t.shape for t in self._spec.inputs if t.name.startswith("past_")}
        past = {n: np.zeros((1, int(s[1]), least, int(s[3])), np.float32) for n, s in shapes.items()}
        return past, np.zeros((1, least), np.int64)


def check_length(decoder: ComponentSpec, prompt: int, new: int, images: Sequence[int]) -> None:
    """TooLongError if the decoder takes no past of ``prompt`` positions and ``new`` ones but the last.

    ``images``: how many of the prompt's positions each of its images has.
    """
    limit, positions = decoder.axis("past").max, prompt + new - 1
    if positions > limit:
        of_images = f" (of {len(images)} images {sum(images)})" if images else ""
        raise TooLongError(
            "The conversation is too long for this bundle.",
            f"A prompt of {prompt} positions{of_images} and {new} new tokens need a past of {positions} "
            f"positions; the engine was built for {limit}.",
            "Ask for fewer new tokens"
            + (", show fewer images or fewer tiles of each (max_tiles)" if images else "")
            + ", start again, or rebuild with a larger range where the model's context allows it.",
        )
