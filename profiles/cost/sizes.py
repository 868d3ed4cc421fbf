"""Bytes of a model's weights at a precision, from its configuration alone. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...engines.memory import Load
from ...models.registry import ModelConfig, Shape, block_places, component_names, component_of, components_of
from ...quantization.attention import attentions
from ...quantization.quantize import stored_tensors
from ...quantization.recipe import LayerPlan, Recipe, for_blocks, plan_layers

_JOINED = re.compile(r"self_attn\.[qkv]_proj|cross_attn\.[kv]_proj|mlp\.(gate|up)_proj")
"""Layers that share their input: a builder joins their weights, and holds them twice."""


@dataclass(frozen=True)
class Weights:
    """Bytes of tensors by published key: kept in the base type, and quantised with their scales."""

    high: dict[str, int]
    low: dict[str, int]

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self.high.values()) + sum(self.low.values())

    @property
    def build_load(self) -> Load:
        """Memory of a TensorRT-RTX build of a component with these weights."""
        sizes = {**self.high, **self.low}
        return Load.of({key: size * (2 if _JOINED.search(key) else 1) for key, size in sizes.items()})


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear layer that components run, optional ones too, and its weight's shape [out, in]."""
    shapes = {k: s for c in components_of(config) for k, s in c.shapes(config).items()}
    return {
        key.removesuffix(".weight"): (shape[0], shape[1])
        for key, shape in shapes.items()
        if len(shape) == 2 and key.endswith(".weight") and "embed_tokens" not in key
    }


def plan_of(recipe: Recipe, config: ModelConfig) -> LayerPlan:
    """As :func:`...quantization.recipe.plan_layers`, for a model of ``config``."""
    named = for_blocks(recipe, block_places(config))
    return plan_layers(named, linear_shapes(config), attentions(config, component_names(config)))


def component_shapes(component: str, config: ModelConfig) -> dict[str, Shape]:
    """Published key to shape of the tensors that ``component`` reads."""
    return component_of(component, config).shapes(config)


def weights(
    config: ModelConfig, recipe: Recipe, layers: LayerPlan, components: Iterable[str] | None = None
) -> Weights:
    """Weights of ``components`` (None: all that are not optional), shared tensors counted once."""
    components = component_names(config) if components is None else components
    shapes = {k: s for component in components for k, s in component_shapes(component, config).items()}
    low = {
        key: sum(part.nbytes for part in stored_tensors(name, scheme, recipe.base, (shape[0], shape[1])))
        for name, scheme in layers.quantised.items()
        if (shape := shapes.get(key := f"{name}.weight"))
    }
    high = {key: 2 * math.prod(shape) for key, shape in shapes.items() if key not in low}
    return Weights(high, low)
