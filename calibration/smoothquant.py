"""SmoothQuant (arXiv 2211.10438): difficulty moves from inputs to weights, so that both fit into INT8.

Factors are powers of two: the folded model computes the same values, and 16-bit stores hold it as exactly as
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.checkpoint import Checkpoint
from .dataset import CalibrationSet
from .folding import groups, watch_inputs

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = 0.5
"""How much of the difficulty moves from inputs (1: all) to weights (0: none)."""


def channel_ranges(
    checkpoint: Checkpoint,
    components: Sequence[str],
    layers: Iterable[str],
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Tensor]:
    """Largest input magnitude of every in feature of ``layers`` [in], over all components.

    Arguments as :func:`.folding.watch_inputs`.
    """
    ranges: dict[str, Tensor] = {}

    def see(layer: str, x: Tensor) -> None:
        peak = x.abs().reshape(-1, x.shape[-1]).amax(0)
        ranges[layer] = torch.maximum(ranges[layer], peak) if layer in ranges else peak

    run = (checkpoint, components, chosen, settings, tokenizer, folder)
    watch_inputs(see, layers, *run, batch_size=batch_size, progress=progress)
    return ranges


def factors(
    checkpoint: Checkpoint, ranges: Mapping[str, Tensor], layers: Iterable[str], alpha: float = ALPHA
) -> dict[str, Tensor]:
    """Source -> divisor s [in] of its channels, powers of two (fp32).

    ``input amax ** alpha / weight amax ** (1 - alpha)`` of each channel (equation 4), over the layers that
    share the source; 1 where either is zero. Layers without ``ranges`` did not run and are left alone.
    """
    factors_of = {}
    for source, members in groups(layers).items():
        seen = [ranges[m] for m in members if m in ranges]
        if not seen:
            continue
        inputs = torch.stack(seen).amax(0)
        weights = torch.stack([checkpoint.load(f"{m}.weight").float().abs().amax(0) for m in members]).amax(0)
        alive = (inputs > 0) & (weights > 0)
        exact = torch.where(alive, inputs, 1.0) ** alpha / torch.where(alive, weights, 1.0) ** (1 - alpha)
        factors_of[source] = torch.where(alive, torch.exp2(exact.log2().round()), 1.0)
    return factors_of
