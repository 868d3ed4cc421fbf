"""What a chat bundle's decoder sees of images, chained over its vision components."""

from __future__ import annotations

from ..engines.device import Buffer, concatenate
from .components import Components
from .loaded import fixed

OUTPUTS = {"query_chat": "query_embeds", "vision_chat": "visual_embeds"}
"""Components, and their rows for the decoder, in its order; only models with queries have the first."""


def visual_shape(components: Components) -> tuple[int, int]:
    """Rows of one image, and their width."""
    specs = [components.spec(name) for name in OUTPUTS if name in components.bundle.manifest.components]
    shapes = [t.shape for spec in specs for t in spec.outputs if t.name in OUTPUTS.values()]
    return sum(fixed(shape[1]) for shape in shapes), fixed(shapes[0][2])


def visual_embeds(components: Components, pixel_values: Buffer) -> Buffer:
    """[I, 3, S, S] -> [I, V, H], on the engines' device."""
    queries = "query_chat" in components.bundle.manifest.components
    outputs = ["visual_embeds", *(["tokens"] if queries else [])]
    made = components.run_device("vision_chat", {"pixel_values": pixel_values}, outputs)
    if queries:
        made |= components.run_device("query_chat", {"tokens": made["tokens"]})
    whole: Buffer = concatenate([made[name] for name in OUTPUTS.values() if name in made], 1)
    return whole
