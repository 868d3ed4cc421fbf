"""The decoders of InternVL 1.1 to 3.5: one parametrised pre-norm block (see :mod:`.decoder_config`).

LLaMA's block with grouped queries, biases, norms of queries and keys, any head width, rotary
scaling, sliding windows, attention sinks and experts, each if the config has it. Keys of the
``state_dict`` are LLaMA's in every kind: fused tensors and other names are mapped on reading
(:mod:`.tiles_layout`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .decoder_config import DecoderConfig
from .generate import step_mask
from .layers import CoreAttention, GatedMLP, RMSNorm, split_heads
from .moe import SparseMLP
from .qllama import KeyValue, rotate
from .rope import Rotary


class Shared(NamedTuple):
    """Inputs that all layers of a call share: rotary tables, and masks by a layer's window."""

    rotary: tuple[Tensor, Tensor]
    masks: dict[int | None, Tensor]


class CausalDecoder(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.rope, config.head_dim)

    def forward(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        attention_mask: Tensor,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run T new positions after P past ones.

        Args:
            inputs_embeds: [B, T, H].
            positions: [B, T] rotary positions.
            attention_mask: [B, P + T], nonzero where a position may be seen.
            past: keys (rotated) and values of P positions, one pair a layer, each [B, kv_heads, P, d].

        Returns:
            Hidden states after the final norm [B, T, H], and the keys and values of the T new positions.
        """
        shared = self._shared(inputs_embeds, positions, attention_mask)
        x, new = inputs_embeds, list[KeyValue]()
        for i in range(len(self.layers)):
            x, keys_values = self._layer(i, x, shared, past[i] if past else None)
            new.append(keys_values)
        return self.norm(x), new

    def run_layer(
        self, index: int, x: Tensor, positions: Tensor, attention_mask: Tensor, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Layer ``index`` alone: [B, T, H] -> [B, T, H], new keys and values; else as :meth:`forward`."""
        return self._layer(index, x, self._shared(x, positions, attention_mask), past)

    def _shared(self, x: Tensor, positions: Tensor, attention_mask: Tensor) -> Shared:
        config = self.config
        visible = step_mask(attention_mask, x.shape[1])
        masks: dict[int | None, Tensor] = {None: visible}
        if config.sliding_window is not None:
            masks[config.sliding_window] = visible & near(positions, attention_mask, config.sliding_window)
        return Shared(self.rotary(positions, x.dtype), masks)

    def _layer(self, index: int, x: Tensor, shared: Shared, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        mask = shared.masks[self.config.window(index)]
        out: tuple[Tensor, KeyValue] = self.layers[index](x, shared.rotary, mask, past)
        return out


def near(positions: Tensor, attention_mask: Tensor, window: int) -> Tensor:
    """Which keys are at most ``window - 1`` positions back: [B, 1, T, S] of ``attention_mask`` [B, S].

    Hidden slots of a cache are ignored wherever they are: a key's position is the number of visible
    ones before it.
    """
    keys = attention_mask.ne(0).long().cumsum(1) - 1
    return (keys[:, None] > positions[:, :, None] - window)[:, None]


class DecoderBlock(nn.Module):
    """``x += attn(norm(x)); x += mlp(norm(x))``.

    Args:
        config: the decoder's.
        index: the layer's number, from 0; it decides whether there are experts.
    """

    def __init__(self, config: DecoderConfig, index: int = 0) -> None:
        super().__init__()
        self.self_attn = GroupedAttention(config)
        self.mlp = SparseMLP(config) if config.sparse(index) else _feed_forward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """[B, T, H] -> ([B, T, H], new keys and values); ``mask`` [B, 1, T, S] is True where visible."""
        attended, keys_values = self.self_attn(self.input_layernorm(x), rotary, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


def _feed_forward(config: DecoderConfig) -> GatedMLP:
    return GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)


class GroupedAttention(nn.Module):
    """Attention with rotary positions and a past; a key head is shared by a group of query heads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, d = config.hidden_size, config.head_dim
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, config.query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, config.key_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, config.key_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.query_width, width, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None
        self.core = CoreAttention()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """[B, T, H] -> ([B, T, H], new keys and values)."""
        q = rotate(self.q_norm(split_heads(self.q_proj(x), self.heads)), rotary)
        k = rotate(self.k_norm(split_heads(self.k_proj(x), self.key_heads)), rotary)
        v = split_heads(self.v_proj(x), self.key_heads)
        keys, values = (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)) if past else (k, v)
        if self.sinks is not None:
            keys, values, mask = with_sinks(keys, values, mask, self.sinks)
        out: Tensor = self.o_proj(self.core(q, keys, values, mask))
        return out, (k, v)


def with_sinks(keys: Tensor, values: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key and value of zeros, whose logit is each head's sink: it takes its share of every softmax.

    Args:
        keys, values: [B, kv_heads, S, d].
        mask: bool [B, 1, T, S].
        sinks: [heads].

    Returns:
        Keys and values of S + 1 positions, and the bias added to the logits [B, heads, T, S + 1].
    """
    heads = len(sinks)
    added = torch.zeros_like(mask, dtype=keys.dtype).masked_fill(~mask, -torch.inf)
    column = sinks.to(keys.dtype)[None, :, None, None].expand(mask.shape[0], -1, mask.shape[2], 1)
    added = torch.cat([added.expand(-1, heads, -1, -1), column], -1)
    nothing = torch.zeros_like(keys[:, :, :1])
    return torch.cat([keys, nothing], 2), torch.cat([values, nothing], 2), added
