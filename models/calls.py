"""A sample set as calls: which component runs on which rows and inputs. Plain data, no torch.

A *call* is one run of one component on some rows of a batch, which have the same lengths: no padding, because
padded rows never reach an embedding or a token and so must not widen a range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..arrays import Array

Arrays: TypeAlias = "dict[str, Array]"

LONGEST_STEP = 32
"""Tokens of prompt and caption, or of an answer, that one decoding step of calibration is given."""
LONGEST_PROMPT = 512
"""Text tokens of a chat prompt."""


@dataclass(frozen=True)
class Call:
    """One run of a component.

    Args:
        component: its name.
        batch: number of the batch.
        rows: which samples of the batch.
        inputs: inputs from the samples: ids, lengths, positions, mask; no pixels, no outputs of other
            components.
        shape: of its hidden states, [B, T, H]; T is 0 for a component without blocks.
        cut: of a chat prompt, number of text tokens before the image.
        keeps: whether later calls continue its keys and values.
        continues: rows of the keys and values last kept that this call continues, in its order; None: none.
        place: index of its hidden states among those of its tower; counted by the caller.
    """

    component: str
    batch: int
    rows: list[int]
    inputs: Arrays
    shape: tuple[int, int, int]
    cut: int | None = None
    keeps: bool = False
    continues: list[int] | None = None
    place: int = 0


@dataclass(frozen=True)
class Texts:
    """Texts of one batch.

    Args:
        input_ids, lengths: contrastive texts, int64 [B, T] and [B].
        caption_ids: for each sample the tokens a caption decoder is fed: bos, prompt, caption (no eos).
        match_ids, match_lengths: plain captions to match the images with, int64 [B, T] and [B]; as in
            training half of them are wrong: those of the next sample.
    """

    input_ids: Array
    lengths: Array
    caption_ids: tuple[tuple[int, ...], ...]
    match_ids: Array
    match_lengths: Array


@dataclass(frozen=True)
class Dialogue:
    """Token ids: the prompt ``before`` and ``after`` its image, and the last ``answer`` without eos.

    ``scored``: the first 1, 2, 4, ... tokens of the answer are separate calls, for their logits.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]
    scored: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        """How many tokens of the answer each of its calls is given."""
        some = (1 << power for power in range(len(self.answer).bit_length())) if self.scored else ()
        return (*(n for n in some if n < len(self.answer)), len(self.answer))


class SampleBatch(Protocol):
    """Some samples of a set, as a family reads them; each input is made when it is read."""

    @property
    def number(self) -> int:
        """Which batch of the set, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many samples."""
        ...

    @property
    def digests(self) -> tuple[str, ...]:
        """A hash of each sample, 64 hex digits: a seed for inputs that a set does not have."""
        ...

    @property
    def texts(self) -> Texts:
        """Captions as tokens."""
        ...

    @property
    def dialogues(self) -> tuple[Dialogue, ...]:
        """Conversations about the images as tokens."""
        ...


@dataclass(frozen=True)
class Run:
    """Rows of a batch whose dialogues have the same lengths: their prompts, or their answers.

    Args:
        rows: which samples of the batch.
        ids: text tokens, int64 [R, T].
        cut: number of them before the image; None for answers, which follow their prompt's cache.
    """

    rows: list[int]
    ids: Array
    cut: int | None

    def length(self, visual: int) -> int:
        """Positions of a row, with ``visual`` for the image."""
        return int(self.ids.shape[1]) + (0 if self.cut is None else visual)


def runs(dialogues: Sequence[Dialogue]) -> Iterator[Run]:
    """All runs of a batch; the answers of a group come right after its prompts."""
    sizes = [(len(d.before), len(d.after), len(d.answer)) for d in dialogues]
    for size in sorted(set(sizes)):
        rows = [i for i, own in enumerate(sizes) if own == size]
        yield Run(rows, np.array([[*dialogues[i].before, *dialogues[i].after] for i in rows]), size[0])
        for count in dialogues[rows[0]].steps:
            yield Run(rows, np.array([dialogues[i].answer[:count] for i in rows]), None)


def groups(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Rows of equal length together: (rows, length), shortest first."""
    return [([i for i, n in enumerate(lengths) if n == length], length) for length in sorted(set(lengths))]


def step_inputs(rows: int, length: int, past: int) -> Arrays:
    """Positions [R, T] and mask [R, past + T] of ``length`` new positions after ``past`` ones.

    An engine takes at least one past position: of a prompt (``past`` 0) it is empty and hidden.
    """
    mask = np.ones((rows, max(past, 1) + length), np.int64)
    mask[:, :1] = past > 0
    positions = np.tile(np.arange(past, past + length, dtype=np.int64), (rows, 1))
    return {"positions": positions, "attention_mask": mask}


def side_by_side(rows: Any, count: int) -> Any:
    """Array or tensor: ``count`` rows one after another [R count, V, H] become one [R, count V, H]."""
    return rows.reshape(len(rows) // count, count * rows.shape[1], *rows.shape[2:])


def splice(embeds: Array, visual: Any, cut: int | None) -> Array:
    """Text embeddings [R, T, H] with images [R, V, H] after the first ``cut`` tokens; None: no image."""
    return embeds if cut is None else np.concatenate([embeds[:, :cut], visual, embeds[:, cut:]], 1)
