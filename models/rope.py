"""Rotary embeddings of a :class:`.rope_config.RopeConfig`: cosines and sines of positions.

``angle[p, i] = p * frequency[i]``. Where the frequencies depend on the sequence's length (dynamic NTK,
LongRoPE), the length is that of each row up to the last position of the call: a prompt is rotated by its own
length, and keys that a later step finds in the cache keep the rotation they were stored with, as in the
published code. Unlike there, rows of one batch do not change each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .rope_config import RopeConfig


class Rotary(nn.Module):
    """The rotary embeddings of a decoder; it has no weights.

    Args:
        rope: which ones.
        head_dim: width of a head.
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        # Numbers, not tensors: a model is built and traced on the meta device, where tensors have none.
        self.frequencies = fixed_frequencies(rope, head_dim)
        self.long = fixed_frequencies(rope, head_dim, long=True) if rope.scaling == "longrope" else ()

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables [B, 1, T, head_dim] of integer positions [B, T], computed in fp32."""
        rope, device = self.rope, positions.device
        frequencies = _vector(self.frequencies, device)
        if rope.scaling == "dynamic":
            length = positions.amax(1, keepdim=True) + 1
            raised = _dynamic(rope, self.head_dim, length, device)
            frequencies = torch.where(length > rope.original, raised, frequencies)[:, None]
        elif self.long != self.frequencies and self.long:
            length = positions.amax(1, keepdim=True) + 1
            frequencies = torch.where(length > rope.original, _vector(self.long, device), frequencies)[
                :, None
            ]
        angles = positions[..., None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if rope.attention_factor != 1:
            cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
        return cos.to(dtype), sin.to(dtype)


def fixed_frequencies(rope: RopeConfig, head_dim: int, long: bool = False) -> tuple[float, ...]:
    """The frequencies [head_dim / 2], in fp32, that do not depend on a sequence's length.

    Args:
        rope: the rotary embeddings.
        head_dim: width of a head.
        long: ``longrope``: those of sequences beyond ``original``.
    """
    with torch.device("cpu"):
        powers = torch.tensor(rope.theta) ** _exponents(head_dim)
        if rope.scaling == "linear":
            values = 1.0 / powers / rope.factor
        elif rope.scaling == "longrope":
            values = 1.0 / (torch.tensor(rope.long_factor if long else rope.short_factor) * powers)
        elif rope.scaling == "llama3":
            values = _llama3(rope, 1.0 / powers)
        elif rope.scaling == "yarn":
            values = _yarn(rope, powers, head_dim)
        else:
            values = 1.0 / powers
        return tuple(values.tolist())


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim


def _dynamic(rope: RopeConfig, head_dim: int, length: Tensor, device: torch.device) -> Tensor:
    """Frequencies [B, head_dim / 2] of rows of ``length`` [B, 1] positions."""
    grown = rope.factor * length.float() / rope.original - (rope.factor - 1)
    base = rope.theta * grown.clamp(min=1.0) ** (head_dim / max(head_dim - 2, 1))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return 1.0 / base**exponents


def _llama3(rope: RopeConfig, values: Tensor) -> Tensor:
    """Slow frequencies divided by the factor, fast ones as they are, a ramp between."""
    turns = rope.original * values / (2 * math.pi)  # over the original context
    ramp = (turns - rope.slow) / (rope.fast - rope.slow)
    between = (1 - ramp) * values / rope.factor + ramp * values
    return torch.where(
        turns < rope.slow, values / rope.factor, torch.where(turns > rope.fast, values, between)
    )


def _yarn(rope: RopeConfig, powers: Tensor, head_dim: int) -> Tensor:
    """As ``llama3``, with a ramp over the dimensions between ``fast`` and ``slow`` turns."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.fast), dimension(rope.slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    share = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - share) + 1.0 / powers * share


def _vector(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``values`` as a tensor whose content a graph traced on the meta device has, too."""
    if device.type != "meta":
        return torch.tensor(values, device=device)
    return torch.stack([torch.full((), value, device=device) for value in values])
