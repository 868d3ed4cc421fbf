"""FP8 attention in torch: right, and slow, for torch has no fused kernel that takes FP8 factors.

Both products run on values rounded to FP8 and restored, in fp32, as ONNX Runtime runs the graph.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...quantization.attention import fake_attention


class Fp8Attention(nn.Module):
    """What stands in for a :class:`~ivl_export.models.layers.CoreAttention`.

    Args:
        scales: of q, k and v.
        base: the recipe's base type, which the softmax's scale is rounded to.
    """

    def __init__(self, scales: tuple[float, float, float], base: str) -> None:
        super().__init__()
        self.scales, self.base = scales, base

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """As :func:`ivl_export.models.layers.attention`."""
        out = fake_attention(
            q.float(), k.float(), v.float(), mask, causal, scales=self.scales, base=self.base
        )
        return out.to(q.dtype)
