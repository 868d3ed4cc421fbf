"""Adapts the PyTorch model to the evaluation tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arrays import Array
from ..inputs.preprocess import ImageSettings, normalised
from ..inputs.tokenizer import CAPTION_PROMPT, Tokenizer
from ..models.internvl import InternVLModel
from ..synthetic.captions import Language
from ..synthetic.render import Image8
from ..synthetic.tasks import BothHeads
from .collate import BUCKETS


class TorchModel(BothHeads):
    """Adapts a model, its tokenizer and its image settings to :class:`..synthetic.tasks.Model`; any dtype."""

    def __init__(self, model: InternVLModel, tokenizer: Tokenizer, settings: ImageSettings) -> None:
        super().__init__(self._both)
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    @torch.no_grad()
    def _both(self, images: Image8) -> dict[str, Array]:
        tokens = self.model.vision(self.pixel_values(images))
        queries = self.model.query_pass(tokens)[0]
        return {
            "InternVL-C": _numpy(self.model.pool_image(tokens, None)),
            "InternVL-G": _numpy(self.model.pool_image(tokens, queries)),
        }

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Array:
        """Embeddings [B, E] in float32."""
        ids, _ = self.tokenizer.encode_contrastive(texts, buckets=BUCKETS)
        return _numpy(self.model.encode_text(torch.from_numpy(ids)))

    def caption(self, images: Image8, lang: Language) -> list[str]:
        """Greedy captions."""
        prompt = torch.tensor([self.tokenizer.encode_prompt(CAPTION_PROMPT[lang])] * len(images))
        ids = self.model.generate(self.pixel_values(images), prompt, torch.ones_like(prompt))
        return [self.tokenizer.decode(row) for row in ids.tolist()]

    def pixel_values(self, images: Image8) -> torch.Tensor:
        """The model's input of images [B, H, W, 3] in uint8: [B, 3, S, S]."""
        return torch.from_numpy(normalised(images, self.settings))


def _numpy(x: torch.Tensor) -> Array:
    out: Array = x.float().numpy()
    return out
