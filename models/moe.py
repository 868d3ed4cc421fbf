"""Mixture-of-experts feed-forward: Qwen3-MoE's, and GPT-OSS's with biases and clamped gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .decoder_config import DecoderConfig, MoEConfig
from .layers import GatedMLP


class SparseMLP(nn.Module):
    """Every token is routed to ``per_token`` of the experts; their outputs are added, weighted by the router.

    Experts are separate modules: their keys are then those of most published files, and a mapped file is
    read without a copy. Traced, all experts compute all tokens, with weight 0 where the router did not choose
    them: the same sum, of static shape.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.config = config.moe
        self.gate = nn.Linear(config.hidden_size, self.config.experts, bias=self.config.gpt_oss)
        width, count = config.hidden_size, self.config.experts
        self.experts = nn.ModuleList(_expert(width, self.config) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        weights, chosen = self.route(self.gate(x))
        if x.is_meta or torch.compiler.is_compiling():
            # [B, T, H] throughout: of rows alone layers with biases become Gemms, which are not quantised.
            share = torch.zeros_like(x[..., :1]).expand(-1, -1, self.config.experts)
            share = share.scatter(-1, chosen, weights)
            parts = (expert(x) * share[..., i, None] for i, expert in enumerate(self.experts))
            return torch.stack(list(parts)).sum(0)
        rows, weights, chosen = (tensor.flatten(0, 1) for tensor in (x, weights, chosen))
        out = torch.zeros_like(rows)
        for number in sorted(set(chosen.flatten().tolist())):
            row, place = torch.where(chosen == number)
            part = self.experts[number](rows[row]) * weights[row, place, None]
            out.index_add_(0, row, part.to(out.dtype))  # under autocast it is in 16 bits
        return out.reshape(x.shape)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits [..., E] -> weights and numbers of each token's experts, both [..., per_token]."""
        config = self.config
        if config.gpt_oss:
            best, chosen = logits.topk(config.per_token, dim=-1)
            return best.softmax(-1), chosen
        shares, chosen = logits.float().softmax(-1).topk(config.per_token, dim=-1)
        if config.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(logits.dtype), chosen


def _expert(width: int, moe: MoEConfig) -> nn.Module:
    return ClampedMLP(width, moe) if moe.gpt_oss else GatedMLP(width, moe.width)


class ClampedMLP(nn.Module):
    """GPT-OSS's expert: down((up + 1) * gate * sigmoid(alpha * gate)), gate and up clamped first."""

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.limit, self.alpha = moe.limit, moe.alpha
        self.gate_proj = nn.Linear(width, moe.width)
        self.up_proj = nn.Linear(width, moe.width)
        self.down_proj = nn.Linear(moe.width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        gate = self.gate_proj(x).clamp(max=self.limit)
        up = self.up_proj(x).clamp(min=-self.limit, max=self.limit)
        out: Tensor = self.down_proj((up + 1) * gate * torch.sigmoid(gate * self.alpha))
        return out
