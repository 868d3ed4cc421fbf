"""Conversations about images as training batches: of drawn scenes, or a file in LLaVA's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..arrays import Array
from ..errors import InputError
from ..inputs.chat_template import IGNORE, IMAGE_TOKEN, ChatFormat, Encoded, Turn, encode
from ..inputs.conversations import Conversation, read_conversations
from ..inputs.preprocess import ImageSettings, preprocess_images, read_images
from ..inputs.sources import ImageInput
from ..inputs.tokenizer import SentencePieceTokenizer, Tokenizer
from ..synthetic import sign_questions
from ..synthetic.dialogues import conversation, dialogue
from ..synthetic.render import render
from ..synthetic.scenes import near_copy, sample_scene
from ..synthetic.signs import draw
from .presets import Stage

_STREAM = 0x7A3
_ORDER_STREAM = 0x0DE


@dataclass(frozen=True)
class ChatBatch:
    """B conversations, padded on the right, and the images of all their placeholders, row after row.

    ``pixel_values`` [I, 3, S, S]; ``input_ids``, ``labels`` (-100 where nothing is learnt), ``mask`` [B, T].
    """

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    mask: Tensor


class Source(Protocol):
    """Where conversations come from: row ``row`` of batch ``batch`` is a pure function of both."""

    def __call__(self, batch: int, rows: int) -> list[tuple[list[ImageInput], list[Turn]]]:
        """Images and turns of each row of a batch."""
        ...


@dataclass(frozen=True)
class SceneDialogues:
    """Dialogues of one to ``turns`` questions about drawn scenes."""

    seed: int
    size: int
    turns: int = 5
    near: float = 0.5
    pairs: float = 0.6

    def __call__(self, batch: int, rows: int) -> list[tuple[list[ImageInput], list[Turn]]]:
        """Rows of batch ``batch``; a share of ``near`` shows nearly the scene of the row before."""
        rng = np.random.default_rng([_STREAM, self.seed, batch])
        rows_made: list[tuple[list[ImageInput], list[Turn]]] = []
        scene = None
        for _ in range(rows):
            copied = rng.random() < self.near
            if scene is None or not copied:
                scene = sample_scene(rng, "train", pairs=self.pairs)
            else:
                scene = near_copy(rng, scene)
            questions = dialogue(rng, scene, 1 + int(rng.integers(self.turns)))
            rows_made.append(([render(scene, self.size)], conversation(questions)))
        return rows_made


@dataclass(frozen=True)
class SignQuestions:
    """Dialogues of one to ``turns`` questions about drawn signs."""

    seed: int
    turns: int = 4

    def __call__(self, batch: int, rows: int) -> list[tuple[list[ImageInput], list[Turn]]]:
        """Rows of batch ``batch``."""
        drawn = sign_questions.dialogues(self.seed, batch, rows, "train", self.turns)
        return [([draw(sign) for sign in row.signs], sign_questions.conversation(row)) for row in drawn]


@dataclass(frozen=True)
class LlavaFile:
    """A file of conversations in LLaVA's layout, read in a new order of ``seed`` each epoch."""

    samples: tuple[Conversation, ...]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, batch: int, rows: int) -> list[tuple[list[ImageInput], list[Turn]]]:
        """Rows of batch ``batch``; epochs follow each other without a gap."""
        samples: list[tuple[list[ImageInput], list[Turn]]] = []
        for place in range(batch * rows, (batch + 1) * rows):
            epoch, index = divmod(place, len(self.samples))
            order = np.random.default_rng([_ORDER_STREAM, self.seed, epoch]).permutation(len(self.samples))
            images, turns = self.samples[order[index]]
            samples.append((list(images), list(turns)))
        return samples


class ChatBatches(Dataset[ChatBatch]):
    """Batch ``i`` of stage 3: a pure function of ``i``, so that resuming is exact."""

    def __init__(
        self,
        source: Source,
        stage: Stage,
        settings: ImageSettings,
        tokenizer: bytes | Tokenizer,
        longest: int,
        chat: ChatFormat | None = None,
        own: slice = slice(None),
    ) -> None:
        """Batches of ``source``.

        Args:
            source: conversations.
            stage: gives the number of batches, and the rows of each.
            settings: of images.
            tokenizer: a ``tokenizer.model``, or the model's.
            longest: positions of a conversation at most; it is cut there.
            chat: how the model is prompted; None: as LLaVA.
            own: the rows of each batch that are made: those of this process.
        """
        self.source, self.stage, self.settings, self.longest = source, stage, settings, longest
        self.own = own
        self.tokenizer, self.chat = tokenizer, chat or ChatFormat()

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, index: int) -> ChatBatch:
        rows = self.source(index, self.stage.batch)[self.own]
        given = self.tokenizer
        tokenizer = SentencePieceTokenizer(given) if isinstance(given, bytes) else given
        context, template = self.chat.images.context, self.chat.template
        if context == IMAGE_TOKEN:
            said = [self._cut(encode(turns, tokenizer, template)) for _, turns in rows]
            images = [
                image
                for (shown, _), row in zip(rows, said, strict=True)
                for image in shown[: row.ids.count(context)]
            ]
            return collate(preprocess_images(images, self.settings), said)
        pixels = read_images([image for shown, _ in rows for image in shown], self.settings)
        tiles = iter(pixels.tiles)
        whole = [
            encode(turns, tokenizer, template, self.chat.images, [next(tiles) for _ in shown])
            for shown, turns in rows
        ]
        said = [self._cut(row) for row in whole]
        for row, uncut in zip(said, whole, strict=True):
            if row.ids.count(context) != uncut.ids.count(context):
                raise InputError(
                    f"A conversation's images take over {self.longest} positions.",
                    f"They have {uncut.ids.count(context)} visual embeddings, the context is no longer.",
                    "Train on fewer or smaller images, or lower max_dynamic_patch in config.json.",
                )
        return collate(pixels.values, said)

    def _cut(self, row: Encoded) -> Encoded:
        return Encoded(row.ids[: self.longest], row.labels[: self.longest])


def context_for_text(config: Any, chat: ChatFormat) -> int:
    """Positions of a conversation that a chat model of ``config`` takes, as its ids are counted.

    Where an image is one placeholder, room for its embeddings is left out.
    """
    longest: int = config.decoder.max_position_embeddings
    return longest - config.num_visual if chat.images.context == IMAGE_TOKEN else longest


def collate(pixel_values: Array, rows: Sequence[Encoded]) -> ChatBatch:
    """Pad conversations on the right into one batch."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length], labels[i, :length] = torch.tensor(row.ids), torch.tensor(row.labels)
        mask[i, :length] = 1
    return ChatBatch(torch.from_numpy(pixel_values), ids, labels, mask)


def read_llava(path: Path, images: Path | None = None, seed: int = 0) -> LlavaFile:
    """The conversations of :func:`..inputs.conversations.read_conversations`, in the order of ``seed``.

    Raises:
        InputError: the file, a conversation or an image name cannot be used; the first fault is named.
    """
    return LlavaFile(read_conversations(path, images), seed)
