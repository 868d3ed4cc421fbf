"""Chat models in calibration: conversations about the images of a set, and how they are run.

A conversation runs as a service runs it: the prompt with its image at once, then behind its cache the tokens
of the last answer. Those go in together (teacher forcing): the activations are those of one token a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..inputs.chat_template import IGNORE, IMAGE_TOKEN, Turn, encode
from ..inputs.preprocess import Array, ImageSettings
from ..inputs.tokenizer import SentencePieceTokenizer
from .dataset import MAX_STEP, CalibrationSet, Sample

if TYPE_CHECKING:
    from ..models.config import QLlamaConfig

QUESTION = "Describe this image."
"""Asked about images that come with a caption, which is the answer."""
SCENE_TURNS = 3
LONGEST = 512
"""Text tokens of a prompt; longer ones are cut."""


@dataclass(frozen=True)
class Dialogue:
    """Token ids: the prompt ``before`` and ``after`` its image, and the last ``answer`` without eos."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class ChatBatch:
    """Inputs of a chat model.

    Args:
        pixel_values: float32 [B, 3, S, S].
        dialogues: one for each image.
        decoder: sizes of the decoder's cache.
    """

    pixel_values: Array
    dialogues: tuple[Dialogue, ...]
    decoder: QLlamaConfig


@dataclass(frozen=True)
class Run:
    """Rows of a batch whose dialogues have the same lengths: their prompts, or their answers.

    Args:
        rows: which samples of the batch.
        ids: text tokens, int64 [R, T].
        cut: how many of them stand before the image; None for answers, which follow their prompt's cache.
    """

    rows: list[int]
    ids: Array
    cut: int | None

    def length(self, visual: int) -> int:
        """Positions of a row, with ``visual`` for the image."""
        return int(self.ids.shape[1]) + (0 if self.cut is None else visual)


def dialogue_of(sample: Sample, tokenizer: SentencePieceTokenizer) -> Dialogue:
    """A conversation about ``sample``, always the same: of its scene, or its caption as an answer."""
    turns = [Turn(QUESTION, sample.text, 1)]
    if not _is_file(sample):
        from ..synthetic import dialogues

        rng = np.random.default_rng(int(sample.digest[:16], 16))
        turns = dialogues.conversation(dialogues.dialogue(rng, sample.image, SCENE_TURNS))  # type: ignore[arg-type]
    ids, labels = encode(turns, tokenizer)
    last = len(ids) - next(i for i, label in enumerate([*reversed(labels), IGNORE]) if label == IGNORE)
    cut = ids.index(IMAGE_TOKEN)
    answer = ids[last:-1][:MAX_STEP] or ids[last:]
    return Dialogue(tuple(ids[:cut]), tuple(ids[cut + 1 : last][-LONGEST:]), tuple(answer))


def chat_batches(
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: SentencePieceTokenizer,
    llama: QLlamaConfig,
    size: int,
) -> Iterator[ChatBatch]:
    """Preprocessed batches, one in memory at a time."""
    pixels = chosen.pixels(settings, size)
    for said, images in zip(dialogues_of(chosen, tokenizer, size), pixels, strict=True):
        yield ChatBatch(images, said, llama)


def dialogues_of(
    chosen: CalibrationSet, tokenizer: SentencePieceTokenizer, size: int
) -> Iterator[tuple[Dialogue, ...]]:
    """The dialogues of each batch; no image is read."""
    for start in range(0, len(chosen), size):
        yield tuple(dialogue_of(sample, tokenizer) for sample in chosen.samples[start : start + size])


def runs(dialogues: Sequence[Dialogue]) -> Iterator[Run]:
    """All runs of a batch; the answers of a group come right behind its prompts."""
    sizes = [(len(d.before), len(d.after), len(d.answer)) for d in dialogues]
    for size in sorted(set(sizes)):
        rows = [i for i, own in enumerate(sizes) if own == size]
        yield Run(rows, np.array([[*dialogues[i].before, *dialogues[i].after] for i in rows]), size[0])
        yield Run(rows, np.array([dialogues[i].answer for i in rows]), None)


def step_inputs(rows: int, length: int, past: int) -> dict[str, Array]:
    """Positions and mask of ``length`` new positions behind ``past`` ones.

    An engine takes at least one past position: of a prompt (``past`` 0) it is empty and hidden.
    """
    mask = np.ones((rows, max(past, 1) + length), np.int64)
    mask[:, :1] = past > 0
    positions = np.tile(np.arange(past, past + length, dtype=np.int64), (rows, 1))
    return {"positions": positions, "attention_mask": mask}


def empty_past(rows: int, llama: QLlamaConfig) -> dict[str, Array]:
    """The one hidden position of :func:`step_inputs`, in every layer."""
    zero = np.zeros((rows, llama.num_attention_heads, 1, llama.head_dim), np.float32)
    return {f"past_{kind}.{i}": zero for i in range(llama.num_hidden_layers) for kind in ("key", "value")}


def visual_of(made: Mapping[str, Array]) -> Array:
    """Visual embeddings [B, V, H] among components' outputs: those of queries, if there are any, first."""
    seen = [made[name] for name in ("query_embeds", "visual_embeds") if name in made]
    return np.concatenate(seen, 1)


def splice(embeds: Array, visual: Array, cut: int | None) -> Array:
    """Text embeddings [R, T, H] with images [R, V, H] behind the first ``cut`` tokens; None: no image."""
    return embeds if cut is None else np.concatenate([embeds[:, :cut], visual, embeds[:, cut:]], 1)


def _is_file(sample: Sample) -> bool:
    from pathlib import Path

    return isinstance(sample.image, Path)
