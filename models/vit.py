"""InternViT (InternVL paper section 3.2): a plain pre-norm ViT with LayerScale, in two published forms.

The 6B has RMSNorms and norms of queries and keys, the 300M LayerNorms and biases of q, k and v.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import VisionConfig
from .layers import CoreAttention, RMSNorm, split_heads


class InternViT(nn.Module):
    """Pixels to tokens. No norm before or after the blocks, no pooler.

    Args:
        config: sizes.
        blocks: how many blocks, where fewer than the config's are run.
    """

    def __init__(self, config: VisionConfig, blocks: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = Encoder(config, config.num_hidden_layers if blocks is None else blocks)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] normalised pixels -> [B, 1 + (H / patch) (W / patch), D], class token first."""
        x: Tensor = self.embeddings(pixel_values)
        for block in self.encoder.layers:
            x = block(x)
        return x

    def features(self, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`forward`, and the outputs of the config's ``feature_blocks``, each [B, N, D]."""
        x: Tensor = self.embeddings(pixel_values)
        features = []
        for number, block in enumerate(self.encoder.layers, 1):
            x = block(x)
            if number in self.config.feature_blocks:
                features.append(x)
        return x, features

    def hidden_states(self, pixel_values: Tensor) -> list[Tensor]:
        """The embeddings and the output of every block: L + 1 tensors [B, N, D]."""
        states = [self.embeddings(pixel_values)]
        for block in self.encoder.layers:
            states.append(block(states[-1]))
        return states


class PatchEmbeddings(nn.Module):
    """Patch convolution, class token and learned positions, resized to the image's grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_tokens, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        patches = self.patch_embedding(pixel_values)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1) + resize_positions(self.position_embedding, grid)


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubic resize of a [1, 1 + g*g, D] position embedding to ``grid``; the class position is kept.

    fp32, ``align_corners=False``, no antialias, as the published code does.
    """
    stored = round((positions.shape[1] - 1) ** 0.5)
    if grid == (stored, stored):
        return positions
    first, rest = positions[:, :1], positions[:, 1:]
    image = rest.reshape(1, stored, stored, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([first, image.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


class Encoder(nn.Module):
    """The stack of blocks (a separate module, for the published key names)."""

    def __init__(self, config: VisionConfig, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(blocks))


class Block(nn.Module):
    """``x += attn(norm1(x)) * ls1; x += mlp(norm2(x)) * ls2``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(config)
        self.mlp = MLP(width, config.intermediate_size)
        norm = RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((width,), 0.1))
        self.ls2 = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.norm1(x)) * self.ls1
        out: Tensor = x + self.mlp(self.norm2(x)) * self.ls2
        return out


class Attention(nn.Module):
    """Self-attention; QK-norm is one RMSNorm over the full width of all heads, before the split."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.core = CoreAttention()
        norm, eps = config.qk_normalization, config.qk_norm_eps
        self.q_norm = RMSNorm(width, eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(width, eps) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        qkv: Tensor = self.qkv(x)
        if isinstance(self.q_norm, nn.Identity):
            # Heads before q, k, v: if nothing else is between, TensorRT cuts the weight in three
            # instead, and drops FP8 and INT8.
            q, k, v = qkv.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = qkv.chunk(3, dim=-1)
            q, k, v = (split_heads(t, self.heads) for t in (self.q_norm(q), self.k_norm(k), v))
        out: Tensor = self.proj(self.core(q, k, v))
        return out


class MLP(nn.Module):
    """fc1, exact erf GELU, fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out
