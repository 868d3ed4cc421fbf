"""QLLaMA (InternVL paper section 3.2): a LLaMA whose first rows are learnable queries that see the image.

Between self-attention and MLP of every ``cross_attention_frequency``-th layer the query rows attend to the
vision tokens, ungated. Text alone skips that: the same weights are then a plain causal LLaMA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import InternVLConfig, QLlamaConfig
from .layers import CoreAttention, GatedMLP, RMSNorm, split_heads

KeyValue = tuple[Tensor, Tensor]
"""Keys (rotated) and values of one layer, each [B, heads, S, d]."""


class Visible(NamedTuple):
    """Visibility: a bool ``mask`` [B, 1, T, S] (True = visible), or None with or without ``causal``."""

    mask: Tensor | None = None
    causal: bool = False


class QLlama(nn.Module):
    """The decoder stack and its untied ``lm_head``."""

    def __init__(self, config: InternVLConfig, lm_head: bool = True, cross_attention: bool = True) -> None:
        super().__init__()
        llama = config.qllama
        crossing = [
            config.vision.hidden_size if cross_attention and config.has_cross_attention(i) else None
            for i in range(llama.num_hidden_layers)
        ]
        self.model = Decoder(llama, crossing)
        if lm_head:
            self.lm_head = nn.Linear(llama.hidden_size, llama.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] token ids -> [B, T, H]."""
        out: Tensor = self.model.embed_tokens(input_ids)
        return out

    def forward(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        visible: Visible,
        vision: Tensor | None = None,
        num_queries: int = 0,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the stack.

        Args:
            inputs_embeds: [B, T, H].
            positions: [B, T] or [1, T] rotary positions.
            visible: attention pattern over the S = past + T keys.
            vision: [B, N, D] vision tokens for the first ``num_queries`` rows; None skips cross-attention.
            num_queries: how many leading rows are queries.
            past: keys and values of earlier positions, one pair a layer.

        Returns:
            Hidden states after the final norm [B, T, H], and the keys and values of the T new positions.
        """
        return run_layers(self.model, inputs_embeds, positions, visible, vision, num_queries, past)


def component_running(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, int]:
    """Which component a call of :meth:`QLlama.forward` belongs to, by its arguments, and how many queries
    lead.

    The name is empty for a pass of stage 2 of the training, which stacks several.
    """
    names = ("inputs_embeds", "positions", "visible", "vision", "num_queries", "past")
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    queries = int(call.get("num_queries", 0))
    if call.get("past") is not None:
        return "qllama_step", queries
    if call.get("vision") is None:
        return "qllama_text", queries
    return "qllama_query" if queries == call["inputs_embeds"].shape[1] else "", queries


def query_pass(qllama: QLlama, query_tokens: Tensor, tokens: Tensor) -> tuple[Tensor, list[KeyValue]]:
    """The queries over vision tokens; all queries attend to each other, so there is no mask.

    Args:
        qllama: with its cross-attention.
        query_tokens: [1, Q, H].
        tokens: [B, N, D].

    Returns:
        Query rows after the final norm [B, Q, H], and their keys and values.
    """
    count = query_tokens.shape[1]
    positions = torch.arange(count, device=tokens.device)[None]
    queries = query_tokens.expand(tokens.shape[0], -1, -1)
    out: tuple[Tensor, list[KeyValue]] = qllama(queries, positions, Visible(), tokens, count)
    return out


def run_layers(
    decoder: Decoder,
    x: Tensor,
    positions: Tensor,
    visible: Visible,
    vision: Tensor | None = None,
    num_queries: int = 0,
    past: list[KeyValue] | None = None,
) -> tuple[Tensor, list[KeyValue]]:
    """All layers and the final norm; arguments and result as :meth:`QLlama.forward`."""
    rotary = rotary_tables(positions, decoder.config, x.dtype)
    new: list[KeyValue] = []
    for i, layer in enumerate(decoder.layers):
        x, keys_values = layer(x, rotary, visible, vision, num_queries, past[i] if past else None)
        new.append(keys_values)
    out: Tensor = decoder.norm(x)
    return out, new


class Decoder(nn.Module):
    """Embeddings, layers and final norm (a separate module, for the published key names)."""

    def __init__(self, config: QLlamaConfig, crossing: Sequence[int | None]) -> None:
        """``crossing``: for each layer, the width of the vision tokens it attends to, or None."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, width) for width in crossing)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DecoderLayer(nn.Module):
    """Pre-norm LLaMA layer; cross-attention is between self-attention and MLP."""

    def __init__(self, config: QLlamaConfig, vision_width: int | None) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config, vision_width) if vision_width else None
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Visible,
        vision: Tensor | None,
        num_queries: int,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """[B, T, H] -> ([B, T, H], new keys and values)."""
        attended, keys_values = self.self_attn(self.input_layernorm(x), rotary, visible, past)
        x = x + attended
        if self.cross_attn is not None and vision is not None:
            queries = x[:, :num_queries]
            queries = queries + self.cross_attn(queries, vision)
            # Without text rows the cat would only copy, and stay in the traced graph.
            x = queries if num_queries == x.shape[1] else torch.cat([queries, x[:, num_queries:]], dim=1)
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class SelfAttention(nn.Module):
    """Multi-head attention with half-split rotary positions and an optional past."""

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.core = CoreAttention()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """[B, T, H] -> ([B, T, H], new keys and values)."""
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotary), rotate(k, rotary)
        keys, values = (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)) if past else (k, v)
        out: Tensor = self.o_proj(self.core(q, keys, values, visible.mask, visible.causal))
        return out, (k, v)


class CrossAttention(nn.Module):
    """Query rows attend to the raw vision tokens: own norms on both sides, no mask, no rotary, no bias."""

    def __init__(self, config: QLlamaConfig, vision_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1 = RMSNorm(width, config.rms_norm_eps)
        self.norm2 = RMSNorm(vision_width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(vision_width, width, bias=False)
        self.v_proj = nn.Linear(vision_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.core = CoreAttention()

    def forward(self, queries: Tensor, vision: Tensor) -> Tensor:
        """[B, Q, H], [B, N, D] -> [B, Q, H]."""
        vision = self.norm2(vision)
        parts = (self.q_proj(self.norm1(queries)), self.k_proj(vision), self.v_proj(vision))
        out: Tensor = self.o_proj(self.core(*(split_heads(t, self.heads) for t in parts)))
        return out


def rotary_tables(positions: Tensor, config: QLlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [B, 1, T, head_dim] of integer positions [B, T], computed in fp32."""
    half = config.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions[:, None, :, None].float() * config.rope_theta**-exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, half-split: pairs are (i, i + d/2)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
