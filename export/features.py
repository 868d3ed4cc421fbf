"""Dense features: blocks of the vision tower whose outputs a bundle gives out beside the last, ``tokens``.

Segmentation heads read several depths of InternViT (InternVL paper, section 4.2.1). What is chosen stands in
the config, so that contract, graph, engines and the torch modules follow from it; block ``k`` is the output
``features.<k>`` of ``vision``, ``hidden_states[k]`` of the published model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..bundle.spec import block_number
from ..errors import CapabilityError
from ..models.checkpoint import Checkpoint
from ..models.config import ChatConfig


def with_features(checkpoint: Checkpoint, blocks: Iterable[int]) -> Checkpoint:
    """``checkpoint`` whose vision component gives out ``blocks``, 1 to its depth; -1 is the last, as ever.

    Raises:
        UsageError: the tower has no such block.
        CapabilityError: a chat model, whose tower ends in its projector.
    """
    model, vision = checkpoint.model, checkpoint.model.vision
    chosen = {block_number(block, vision.num_hidden_layers) for block in blocks} - {vision.num_hidden_layers}
    if not chosen:
        return checkpoint
    if isinstance(model, ChatConfig):
        raise CapabilityError(
            "A chat model gives no features of single blocks.",
            "Its vision component ends in the projector to the decoder.",
            "Take the features from the InternVL or InternViT checkpoint that it was made of.",
        )
    vision = replace(vision, feature_blocks=tuple(sorted(chosen)))
    return replace(checkpoint, model=replace(model, vision=vision))
