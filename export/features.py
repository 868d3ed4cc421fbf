"""Dense features: blocks of the vision tower whose outputs a bundle has besides the last, ``tokens``.

Segmentation heads read several depths of InternViT (InternVL paper, section 4.2.1). The choice is part of the
config, so that contract, graph, engines and the torch modules follow from it; block ``k`` is the output
``features.<k>`` of ``vision``, ``hidden_states[k]`` of the published model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..bundle.spec import block_number
from ..models.checkpoint import Checkpoint
from ..models.registry import family_of


def with_features(checkpoint: Checkpoint, blocks: Iterable[int]) -> Checkpoint:
    """``checkpoint`` whose vision component gives out ``blocks``, 1 to its depth; -1 is the last, as ever.

    Raises:
        UsageError: the tower has no such block.
        CapabilityError: the tower of its family ends in something else than features.
    """
    family, config = family_of(checkpoint.model), checkpoint.model
    depth = family.feature_depth(config)
    chosen = {block_number(block, depth) for block in blocks} - {depth} if depth else set(blocks)
    if not chosen:
        return checkpoint
    return replace(checkpoint, model=family.with_features(config, tuple(sorted(chosen))))
