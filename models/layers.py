"""The building blocks that InternViT and QLLaMA share: RMSNorm and attention."""

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
        q, k, v: [B, heads, T, d], [B, heads, S, d], [B, heads, S, d].
        mask: bool, broadcastable to [B, heads, T, S]; True = visible. A row that sees nothing stays finite.
        causal: each row sees itself and what stands before it (needs T == S and no ``mask``).

    Returns:
        [B, T, heads * d].
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
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
