"""Conversations about images as training batches: of drawn scenes, or a file in LLaVA's layout."""

from __future__ import annotations

import json
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
from ..files.text import read_text
from ..inputs.chat_template import IGNORE, IMAGE_TOKEN, ChatFormat, Encoded, Turn, encode
from ..inputs.preprocess import ImageSettings, preprocess_images, read_images
from ..inputs.sources import ImageInput
from ..inputs.tokenizer import SentencePieceTokenizer, Tokenizer
from ..synthetic.dialogues import conversation, dialogue
from ..synthetic.render import render
from ..synthetic.scenes import near_copy, sample_scene
from .presets import Stage

_STREAM = 0x7A3
_ORDER_STREAM = 0x0DE
PLACEHOLDER = "<image>"
EXAMPLE = (
    'Write [{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, '
    '{"from": "gpt", "value": "A panda."}]}].'
)


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
class LlavaFile:
    """A file of conversations in LLaVA's layout, read in a new order of ``seed`` each epoch."""

    samples: tuple[tuple[tuple[Path, ...], tuple[Turn, ...]], ...]
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
    ) -> None:
        """Batches of ``source``.

        Args:
            source: conversations.
            stage: gives the number of batches, and the rows of each.
            settings: of images.
            tokenizer: a ``tokenizer.model``, or the model's.
            longest: positions of a conversation at most; it is cut there.
            chat: how the model is prompted; None: as LLaVA.
        """
        self.source, self.stage, self.settings, self.longest = source, stage, settings, longest
        self.tokenizer, self.chat = tokenizer, chat or ChatFormat()

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, index: int) -> ChatBatch:
        rows = self.source(index, self.stage.batch)
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
    """Read conversations in LLaVA's layout: a JSON list, or one object a line (``.jsonl``).

        {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                             {"from": "gpt", "value": "A ring."}]}

    Args:
        path: the file. ``image`` may be left out (text alone) or be a list.
        images: the folder that image names are relative to; None: the file's own.
        seed: of the order.

    Raises:
        InputError: the file, a conversation or an image name cannot be used; the first fault is named.
    """
    folder = (images or path.parent).resolve()
    try:
        text = read_text(path)
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {path}.", str(error), "Give a JSON list, or JSONL.") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"{path} holds no conversations.",
            "It must be a list that is not empty.",
            EXAMPLE,
        )
    return LlavaFile(tuple(_sample(row, f"{path}, entry {i}", folder) for i, row in enumerate(rows)), seed)


def _sample(row: Any, where: str, folder: Path) -> tuple[tuple[Path, ...], tuple[Turn, ...]]:
    said = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(said, list) or len(said) < 2:
        raise InputError(
            f"{where} is not a conversation.",
            "It needs 'conversations' of at least two messages.",
            EXAMPLE,
        )
    names = row.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{where}: 'image' is not a file name.", f"It is {names!r:.200}.", EXAMPLE)
    paths = tuple((folder / name).resolve() for name in names)
    for file in paths:
        if not file.is_relative_to(folder) or not file.is_file():
            raise InputError(
                f"{where}: no image {file.name}.",
                f"Looked for it in {folder}.",
                "Check -O images, or leave the conversation out.",
            )
    texts = []
    for i, message in enumerate(said[: len(said) // 2 * 2]):
        want = ("human", "user") if i % 2 == 0 else ("gpt", "assistant")
        if not isinstance(message, dict) or message.get("from") not in want:
            raise InputError(
                f"{where}: message {i + 1} is not from {want[0]}.",
                "They must take turns.",
                "Put them in turns, or leave the conversation out.",
            )
        if not isinstance(message.get("value"), str):
            raise InputError(
                f"{where}: message {i + 1} has no text.", fix="Write one, or leave the conversation out."
            )
        texts.append(message["value"])
    turns = tuple(
        Turn(question.replace(PLACEHOLDER, "").strip(), answer.strip(), question.count(PLACEHOLDER))
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    )
    shown = sum(turn.images for turn in turns)
    if shown != len(paths):
        raise InputError(
            f"{where} has {shown} placeholders {PLACEHOLDER} and {len(paths)} images.",
            fix=f"Write {PLACEHOLDER} once for each image.",
        )
    return paths, turns
