"""Multiply-accumulates of a component from the configuration alone (:mod:`...models.macs`).

The independent count that the graph's own (:mod:`.flops`) is checked against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...models.config import InternVLConfig
from ...models.registry import Macs, ModelConfig, component_of


@dataclass(frozen=True)
class Towers:
    """MACs of one sample as papers count them: without pooling heads, text projection and lm_head."""

    vit: int
    qllama_image: int
    qllama_text: int


def towers(config: InternVLConfig, text_tokens: int = 80) -> Towers:
    """MACs of one image through InternViT and QLLaMA's queries, and of one text of ``text_tokens``."""
    counts = (
        component_macs("vision", config, {}),
        component_macs("qllama_query", config, {}),
        component_macs("qllama_text", config, {"text": text_tokens}),
    )
    prefixes = ("vision_model.", "qllama.model.")
    return Towers(*(sum(n for key, n in macs.items() if key.startswith(prefixes)) for macs in counts))


def component_macs(name: str, config: ModelConfig, sizes: Mapping[str, int]) -> Macs:
    """Layer type to MACs of one call of component ``name``.

    ``sizes`` are its dynamic axes: ``batch`` (1 if not given), ``text``, ``past``. UsageError for an unknown
    component, KeyError for a size that is missing.
    """
    macs = component_of(name, config).macs(config, sizes)
    return {key: count * sizes.get("batch", 1) for key, count in macs.items()}
