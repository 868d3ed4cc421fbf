"""From a tile's features to its embeddings in the decoder: pixel shuffle, then a two-layer projector."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import InputError


def pixel_shuffle(features: Tensor, factor: int, version: str = "v2") -> Tensor:
    """Space to depth: ``factor`` x ``factor`` patches become one token, ``factor^2`` times as wide.

    With f features g[row, column, channel] of a tile and factor 2, version v2 gives

        out[i, j, (2 * dy + dx) * C + c] = g[2 * i + dy, 2 * j + dx, c],  tokens row by row.

    v1 (InternVL-Chat 1.1 and 1.2) gives the same vectors, tokens column by column.

    Args:
        features: [B, side * side, C], row by row, without a class token.
        factor: 1 / ``downsample_ratio``.
        version: ``v1`` or ``v2``.

    Returns:
        [B, (side / factor)^2, factor^2 * C].

    Raises:
        InputError: the patches are not a square that splits by ``factor``.
    """
    batch, count, width = features.shape
    side = round(count**0.5)
    if side * side != count or side % factor:
        raise InputError(
            f"{count} patches of a tile cannot be shuffled.",
            f"Needed is a square whose side is a multiple of {factor}.",
            "Give square tiles of the size that the model was trained with.",
        )
    cells = features.view(batch, side // factor, factor, side // factor, factor, width)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return cells.permute(order).reshape(batch, (side // factor) ** 2, factor * factor * width)


def tile_projector(width: int, out: int) -> nn.Sequential:
    """LayerNorm (eps 1e-5), Linear, exact GELU, Linear: [..., width] -> [..., out]; keys as in ``mlp1``."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
