"""Torch modules of InternVL 1.1 to 3.5's components. Each has only the weights it reads."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from torch import Tensor, nn

from .decoder import CausalDecoder
from .decoder_config import DecoderConfig
from .pixel_shuffle import pixel_shuffle, tile_projector
from .tiles_config import TilesConfig
from .vit import InternViT


class TileVision(nn.Module):
    """The blocks of the tower that a chat model reads, pixel shuffle and projector."""

    def __init__(self, config: TilesConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = InternViT(config.vision, config.vision_blocks)
        self.mlp1 = tile_projector(config.projector_width, config.decoder.hidden_size)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """[B, 3, S, S] -> visual_embeds [B, V, H]."""
        return (self.project(self.vision_model(pixel_values)),)

    def project(self, state: Tensor) -> Tensor:
        """The tower's state [B, N, D], class token first -> visual_embeds [B, V, H]."""
        features = pixel_shuffle(state[:, 1:], self.config.factor, self.config.shuffle)
        out: Tensor = self.mlp1(features)
        return out


class TileEmbed(nn.Module):
    """The token embeddings, apart from the decoder."""

    def __init__(self, config: TilesConfig) -> None:
        super().__init__()
        c = config.decoder
        self.language_model = Embeddings(c.vocab_size, c.hidden_size)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H]."""
        out: Tensor = self.language_model.model(input_ids)
        return out

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        """[B, T] -> [B, T, H]."""
        return (self.embed(input_ids),)


class Embeddings(nn.Module):
    """Token embeddings where a decoder has them."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(OrderedDict(embed_tokens=nn.Embedding(count, width)))


class TileStep(nn.Module):
    """New positions over a cache of keys and values.

    Dynamic NTK is left out: it acts beyond the positions that the model was published for.
    """

    def __init__(self, config: TilesConfig) -> None:
        super().__init__()
        c = config.decoder
        c = replace(c, rope=c.rope.within(c.max_position_embeddings))
        self.language_model = LanguageModel(c)
        del self.language_model.model.embed_tokens

    def forward(
        self, input_embeds: Tensor, positions: Tensor, attention_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """[B, T, H], [B, T], [B, P + T], 2 L x [B, heads, P, d] -> [B, V], 2 L x [B, heads, T, d]."""
        pairs = list(zip(past[::2], past[1::2], strict=True))
        hidden, new = self.language_model.model(input_embeds, positions, attention_mask, pairs)
        logits = self.language_model.lm_head(hidden[:, -1:]).squeeze(1)
        return (logits, *(tensor for pair in new for tensor in pair))


class LanguageModel(nn.Module):
    """A decoder and its lm_head (a separate module, for the published key names)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.model = CausalDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
