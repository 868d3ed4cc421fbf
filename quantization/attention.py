"""FP8 attention: both products of ``softmax(q k^T) v`` on FP8 factors.

    q * d^-0.5          -> Q -> DQ -+
    k -> Transpose      -> Q -> DQ -+-> MatMul -> [mask] -> Softmax -> Q -> DQ -+
    v                   -> Q -> DQ ---------------------------------------------+-> MatMul

Scales are per tensor; that of the softmax is fixed at 1/448, for its values end at 1. TensorRT-RTX makes one
kernel of it that takes fp8, fp8, fp8. Here is its arithmetic in torch; :mod:`.qdq_attention` writes it into
graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models.registry import ModelConfig, component_of
from .quantize import activation_scale, quantise_values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FP8_ATTENTION = "fp8-attention"
"""Its name among the schemes of layers."""

OPERANDS = ("q", "k", "v")
SOFTMAX_AMAX = 1.0

HEAD_MULTIPLE = 16
"""Head sizes that TensorRT documents for FP8 attention are multiples of this."""

FEWEST_KEYS = 32
"""TensorRT-RTX 1.7 fuses FP8 attention only where its shapes promise that many key positions."""


@dataclass(frozen=True)
class AttentionShape:
    """One attention of a component: the size of a head, and its smallest number of key positions."""

    head: int
    keys: int

    @property
    def excluded(self) -> str:
        """Why it cannot run in FP8; empty if it can."""
        if self.head % HEAD_MULTIPLE:
            return f"its head size {self.head} is not a multiple of {HEAD_MULTIPLE}"
        if self.keys < FEWEST_KEYS:
            return f"it may see {self.keys} keys, the fused FP8 kernel needs {FEWEST_KEYS}"
        return ""


Attentions = Mapping[str, Mapping[str, AttentionShape]]
"""component -> attention -> its shape."""


def attentions(config: ModelConfig, components: Iterable[str]) -> dict[str, dict[str, AttentionShape]]:
    """The attentions in the blocks of ``components``; pooling heads, whose one query is the mean, are not."""
    return {
        name: {
            attention: AttentionShape(size.head, size.keys)
            for attention, size in component_of(name, config).attentions(config).items()
        }
        for name in components
    }


def operand_names(attention: str) -> tuple[str, str, str]:
    """Keys of the ranges of an attention's inputs: ``<attention>.q`` (scaled), ``.k``, ``.v``."""
    q, k, v = (f"{attention}.{operand}" for operand in OPERANDS)
    return q, k, v


def attention_scales(attention: str, amax: Mapping[str, float], base: str) -> tuple[float, float, float]:
    """Scales of q, k and v, exact in the ``base`` type."""
    q, k, v = (activation_scale(amax[name], "fp8", base) for name in operand_names(attention))
    return q, k, v


def core_attentions(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The attentions of ``module`` that can be quantised, by the names that graphs and recipes use."""
    from ..models.layers import CoreAttention

    cores = ((name, part) for name, part in module.named_modules() if isinstance(part, CoreAttention))
    return {name.removesuffix(".core"): part for name, part in cores}


def fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    *,
    scales: tuple[float, float, float],
    base: str,
) -> Tensor:
    """As :func:`..models.layers.attention`, in the arithmetic of :mod:`.qdq_attention`'s graph.

    Args:
        q, k, v, mask, causal: as there.
        scales: of :func:`attention_scales`.
        base: type that the softmax's scale is rounded to.
    """
    import torch

    def rounded(x: Tensor, scale: float) -> Tensor:
        factor = torch.tensor(scale, device=x.device)
        return quantise_values(x, factor, "fp8").float() * factor

    groups = q.shape[1] // k.shape[1]  # query heads that share a key head
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = rounded(q * q.shape[-1] ** -0.5, scales[0]) @ rounded(k, scales[1]).transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:  # it has the logits of sinks
        scores = scores + mask
    weights = rounded(scores.softmax(-1), activation_scale(SOFTMAX_AMAX, "fp8", base))
    return (weights @ rounded(v, scales[2])).transpose(1, 2).flatten(2)
