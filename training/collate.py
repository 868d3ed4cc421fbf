"""Collates scenes and captions into the tensors of a training batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..arrays import Array
from ..inputs.preprocess import ImageSettings, normalised
from ..inputs.tokenizer import CAPTION_PROMPT, SentencePieceTokenizer, Tokenizer
from ..synthetic.batches import make_batch
from ..synthetic.captions import LANGUAGES, caption
from ..synthetic.scenes import RELATIONS, Obj, Scene
from .losses import IGNORE, Stage2Batch, Text
from .presets import Stage

# Tight buckets: the captions of scenes have 8 to 20 tokens.
BUCKETS = (16, 20, 24, 28, 32)
# Keeps the random stream of hidden labels apart from those of the scenes.
_FOCUS_STREAM = 0xF0C


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
        stage, tokenizer = self.stage, SentencePieceTokenizer(self.tokenizer)
        drawn = make_batch(
            self.seed, index, "train", stage.batch, self.chinese, self.size, stage.near, stage.pairs
        )
        whole = collate(drawn.images, drawn.captions, list(drawn.languages), tokenizer)
        rng = np.random.default_rng([_FOCUS_STREAM, self.seed, index])
        return replace(whole, labels=focused(whole.labels, stage.focus, relation_ids(tokenizer), rng))


def relation_ids(tokenizer: Tokenizer) -> Array:
    """Ids of the pieces in which captions of different relations differ, int64."""
    ring = Obj("ring", "red", "small")
    scene = Scene((ring, ring), RELATIONS[0], "noise", 0)
    ids: set[int] = set()
    for lang in LANGUAGES:
        said = [set(tokenizer.encode_prompt(caption(replace(scene, relation=r), lang))) for r in RELATIONS]
        ids |= said[0].union(*said) - said[0].intersection(*said)
    return np.array(sorted(ids), np.int64)


def focused(labels: Tensor, share: float, keep: Array, rng: np.random.Generator) -> Tensor:
    """``labels`` [B, T] with a ``share`` of those that are not among ``keep`` set to -100."""
    hidden = torch.from_numpy(rng.random(labels.shape) < share)
    return labels.masked_fill(hidden & ~torch.isin(labels, torch.from_numpy(keep)), IGNORE)


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


def pixel_values(images: Tensor, settings: ImageSettings) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] on the same device, normalised per channel."""
    return torch.from_numpy(normalised(images.cpu().numpy(), settings)).to(images.device)
