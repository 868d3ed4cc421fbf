"""The torch modules behind the components. Each holds just the weights it reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.config import InternVLConfig
from ..models.generate import step_mask
from ..models.heads import AttentionPool
from ..models.qllama import KeyValue, QLlama, Visible
from ..models.vit import InternViT


class Vision(nn.Module):
    """InternViT and the InternVL-C head."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.vision_model = InternViT(config.vision)
        self.clip_projector = AttentionPool(
            config.vision.hidden_size, config.attn_pool_num_heads, config.clip_embed_dim
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> tokens [B, N, D], image_embed [B, E]."""
        tokens = self.vision_model(pixel_values)
        return tokens, self.clip_projector(tokens)


class Query(nn.Module):
    """The query pass (all queries see each other, so no mask) and the InternVL-G head."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        width = config.qllama.hidden_size
        self.qllama = QLlama(config, lm_head=False)
        del self.qllama.model.embed_tokens  # queries are not looked up
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_token, width))
        self.clip_projector2 = AttentionPool(width, config.attn_pool_num_heads, config.clip_embed_dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """[B, N, D] -> query_hidden [B, Q, H], query_embed [B, E], then key and value of every layer."""
        count = self.query_tokens.shape[1]
        queries = self.query_tokens.expand(tokens.shape[0], -1, -1)
        positions = torch.arange(count, device=tokens.device)[None]
        hidden, new = self.qllama(queries, positions, Visible(), tokens, count)
        return (hidden, self.clip_projector2(hidden), *_flat(new))


class Text(nn.Module):
    """A causal LLaMA over right-padded text, read at its last token.

    Padding stands behind every token that is read, so causal attention alone hides it: no mask input.
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.qllama = QLlama(config, lm_head=False, cross_attention=False)
        self.text_projection = nn.Parameter(torch.empty(config.qllama.hidden_size, config.clip_embed_dim))

    def forward(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor]:
        """[B, T], [B] -> text_embed [B, E]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden, _ = self.qllama(self.qllama.embed(input_ids), positions, Visible(causal=True))
        last = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return ((hidden.gather(1, last) @ self.text_projection).squeeze(1),)


class Step(nn.Module):
    """New text tokens over a cache of keys and values: plain LLaMA, no cross-attention."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.qllama = QLlama(config, cross_attention=False)

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """[B, T], [B, T], [B, P + T], 2 L x [B, heads, P, d] -> logits [B, V], 2 L x [B, heads, T, d]."""
        visible = Visible(step_mask(attention_mask, input_ids.shape[1]))
        pairs = list(zip(past[::2], past[1::2], strict=True))
        hidden, new = self.qllama(self.qllama.embed(input_ids), positions, visible, past=pairs)
        return (self.qllama.lm_head(hidden[:, -1:]).squeeze(1), *_flat(new))


def _flat(pairs: list[KeyValue]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]
