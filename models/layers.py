"""The building blocks that towers and decoders share: RMSNorm, attention, the gated feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) over the last axis, times ``weight``; statistics in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], same dtype."""
        out: Tensor = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return out


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with heads merged again.

    Args:
        q, k, v: [B, heads, T, d], [B, kv_heads, S, d], [B, kv_heads, S, d]; each key head serves equally many
            query heads.
        mask: bool, broadcastable to [B, heads, T, S]; True = visible. A row without visible keys stays
            finite. Or a bias that is added to the logits.
        causal: each row attends to itself and earlier rows (needs T == S and no ``mask``).

    Returns:
        [B, T, heads * d].
    """
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


class CoreAttention(nn.Module):
    """:func:`attention` as a module, so that calibration can hook its inputs; no weights.

    Blocks hold it as ``core``; graphs and recipes know an attention by the name of the block's module.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """As :func:`attention`."""
        return attention(q, k, v, mask=mask, causal=causal)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
