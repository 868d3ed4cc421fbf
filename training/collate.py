"""Scenes and captions to the tensors a stage is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..preprocess import CAPTION_PROMPT, Array, Tokenizer
from .batches import make_batch
from .losses import IGNORE, Stage2Batch, Text
from .presets import Stage

# Tight buckets: the captions of scenes have 8 to 20 tokens.
BUCKETS = (16, 20, 24, 28, 32)


@dataclass(frozen=True)
class Drawn:
    """A batch before normalisation: uint8 images [B, S, S, 3] and the ids of its texts."""

    images: Tensor
    summarize: Text
    positive: Text
    negative: Text
    caption: Text
    labels: Tensor

    def stage2(self, pixel_values: Tensor) -> Stage2Batch:
        """The batch of the stage-2 losses; all captions of a batch differ: each image is its own class."""
        ids = torch.arange(len(pixel_values))
        return Stage2Batch(
            pixel_values, self.positive, self.negative, self.summarize, self.caption, self.labels, ids
        )


class SceneBatches(Dataset[Drawn]):
    """Batch ``i`` of a stage: a pure function of (seed, stage, i), so that resuming is exact."""

    def __init__(self, seed: int, stage: Stage, chinese: float, size: int, tokenizer: bytes) -> None:
        self.seed, self.stage, self.chinese, self.size = seed, stage, chinese, size
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, index: int) -> Drawn:
        drawn = make_batch(
            self.seed, index, "train", self.stage.batch, self.chinese, self.size, self.stage.near
        )
        return collate(drawn.images, drawn.captions, list(drawn.languages), Tokenizer(self.tokenizer))


def collate(images: Array, captions: list[str], languages: list[str], tokenizer: Tokenizer) -> Drawn:
    """Token ids of all views of the captions. The wrong caption of a row is the next row's."""
    prompts = [CAPTION_PROMPT[lang] for lang in languages]
    ids, lengths, heads = tokenizer.encode_captions(prompts, captions, BUCKETS)
    columns = np.arange(ids.shape[1])
    spoken = (columns >= heads[:, None]) & (columns < lengths[:, None])
    width = ids.shape[1]
    return Drawn(
        torch.from_numpy(images),
        _text(*tokenizer.encode_contrastive(captions, width, (width,))),
        _text(*tokenizer.encode_contrastive(captions, width, (width,), prefix="")),
        _text(*tokenizer.encode_contrastive(captions[1:] + captions[:1], width, (width,), prefix="")),
        _text(ids, lengths),
        torch.from_numpy(np.where(spoken, ids, IGNORE)),
    )


def _text(ids: Array, lengths: Array) -> Text:
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return Text(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S], normalised per channel."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
