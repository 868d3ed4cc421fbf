"""Attention pooling: many tokens to one embedding (``clip_projector``, ``clip_projector2``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import attention, split_heads


class AttentionPool(nn.Module):
    """The mean token attends to all tokens; the result is projected to ``out_width``."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width, eps=1e-5) for _ in range(3))
        self.cross_attn = PoolAttention(width, heads, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, E]."""
        query = self.norm1_q(x.mean(1, keepdim=True))
        out: Tensor = self.cross_attn(query, self.norm1_k(x), self.norm1_v(x))
        return out.squeeze(1)


class PoolAttention(nn.Module):
    """Attention whose q/k/v biases are separate parameters, as in the published files."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.proj = nn.Linear(width, out_width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, 1, D], [B, N, D], [B, N, D] -> [B, 1, E]."""
        parts = (
            F.linear(q, self.q.weight, self.q_bias),
            F.linear(k, self.k.weight, self.k_bias),
            F.linear(v, self.v.weight, self.v_bias),
        )
        out: Tensor = self.proj(attention(*(split_heads(t, self.heads) for t in parts)))
        return out
