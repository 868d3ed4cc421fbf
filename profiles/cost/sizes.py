"""What a model's weights take at a precision, from its configuration: nothing is opened, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...engines.memory import Load
from ...models.config import ChatConfig, Whole
from ...models.layout import CHAT_TOWER, Shape, components_of, expected_shapes
from ...quantization.attention import attentions
from ...quantization.quantize import stored_tensors
from ...quantization.recipe import LayerPlan, Recipe, plan_layers

_TEXT = r"qllama\.model\.(layers\.\d+\.(self_attn|mlp|input_layernorm|post_attention_layernorm)\.|norm\.)"
_TOWER = re.escape(CHAT_TOWER)
_TENSORS = {
    "vision": r"vision_model\.|clip_projector\.",
    "qllama_query": rf"query_tokens|{_TEXT}|qllama\.model\.layers\.\d+\.cross_attn\.|clip_projector2\.",
    "qllama_text": rf"{_TEXT}|qllama\.model\.embed_tokens\.|text_projection",
    "qllama_itm": rf"query_tokens|{_TEXT}|qllama\.model\.(layers\.\d+\.cross_attn|embed_tokens)\.|itm_head\.",
    "qllama_step": rf"{_TEXT}|qllama\.model\.embed_tokens\.|qllama\.lm_head\.",
    "vision_chat": rf"{_TOWER}(vision_model\.)?(embeddings|encoder)\.|model\.mm_projector\.(mlp1\.)?\d\.",
    "query_chat": rf"{_TOWER}(query_tokens|{_TEXT}|qllama\.model\.layers\.\d+\.cross_attn\.)"
    r"|model\.mm_projector\.mlp2\.",
    "decoder_embed": r"model\.embed_tokens\.",
    "decoder": r"model\.(layers|norm)\.|lm_head\.",
}
_CHAT_BLOCK = re.compile(rf"{_TOWER}(?:vision_model\.)?encoder\.layers\.(\d+)\.")
_CHAT_UNUSED = f"{CHAT_TOWER}qllama.lm_head."
_JOINED = re.compile(r"self_attn\.[qkv]_proj|cross_attn\.[kv]_proj|mlp\.(gate|up)_proj")
"""Layers that share their input: a builder joins their weights, and holds them twice."""


@dataclass(frozen=True)
class Weights:
    """Bytes of tensors by published key: kept in the base type, and quantised with their scales."""

    kept: dict[str, int]
    low: dict[str, int]

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self.kept.values()) + sum(self.low.values())

    @property
    def build_load(self) -> Load:
        """What a TensorRT-RTX build of a component with these weights holds."""
        held = {**self.kept, **self.low}
        return Load.of({key: size * (2 if _JOINED.search(key) else 1) for key, size in held.items()})


def linear_shapes(config: Whole) -> dict[str, tuple[int, int]]:
    """Every linear layer of the model and its weight's shape [out, in]."""
    return {
        key.removesuffix(".weight"): (shape[0], shape[1])
        for key, shape in _shapes(config).items()
        if len(shape) == 2 and key.endswith(".weight") and "embed_tokens" not in key
    }


def plan_of(recipe: Recipe, config: Whole) -> LayerPlan:
    """What ``recipe`` means for a model of ``config``; as :func:`...quantization.recipe.plan_layers`."""
    return plan_layers(recipe, linear_shapes(config), attentions(config, components_of(config)))


def component_shapes(component: str, config: Whole) -> dict[str, Shape]:
    """Published key to shape of the tensors that ``component`` reads."""
    pattern = re.compile(_TENSORS[component])
    return {key: shape for key, shape in _shapes(config).items() if pattern.match(key)}


def weights(
    config: Whole, recipe: Recipe, layers: LayerPlan, components: Iterable[str] | None = None
) -> Weights:
    """What ``components`` (None: all that are not optional) store together, tensors that they share once."""
    components = components_of(config) if components is None else components
    shapes = {k: s for component in components for k, s in component_shapes(component, config).items()}
    low = {
        key: sum(part.nbytes for part in stored_tensors(name, scheme, recipe.base, (shape[0], shape[1])))
        for name, scheme in layers.quantised.items()
        if (shape := shapes.get(key := f"{name}.weight"))
    }
    kept = {key: 2 * math.prod(shape) for key, shape in shapes.items() if key not in low}
    return Weights(kept, low)


def _shapes(config: Whole) -> dict[str, Shape]:
    """Published key to shape, without what a chat model has and does not run."""
    shapes = expected_shapes(config)
    if not isinstance(config, ChatConfig):
        return shapes
    blocks = {key: _CHAT_BLOCK.match(key) for key in shapes}
    unread = {key for key, block in blocks.items() if block and int(block[1]) >= config.vision_blocks}
    return {k: s for k, s in shapes.items() if k not in unread and not k.startswith(_CHAT_UNUSED)}
