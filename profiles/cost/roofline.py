"""The roofline: the least time that a GPU's arithmetic and memory allow, and the time to expect.

The floor is strict: all FLOPs at the published peak of their type, or all bytes that no kernel can avoid at
the published bandwidth, whichever takes longer. The expected time adds up layer by layer, at the efficiencies
given, and also moves each layer's activations through memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ...dtypes import dtype_of
from ...errors import CapabilityError
from ...models.config import InternVLConfig
from ...models.registry import Macs, ModelConfig, component_of, component_spec
from ...quantization.attention import FP8_ATTENTION
from ...quantization.recipe import LayerPlan, Recipe
from ...quantization.schemes import SCHEMES
from .flops import ComponentCost, LayerCost, layer_type
from .gpus import GpuPeaks
from .sizes import component_shapes

LOW = ("fp8", "int8", "int4")
"""Types whose share of the peak is not that of 16-bit arithmetic."""


@dataclass(frozen=True)
class Arithmetic:
    """Factor types of each layer: ``base``, or its (weight, activation) types by layer type."""

    base: str
    low: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, recipe: Recipe, layers: LayerPlan) -> Arithmetic:
        """The arithmetic of a recipe on the layers of its plan."""
        schemes = {layer_type(name): SCHEMES[scheme] for name, scheme in layers.quantised.items()}
        low = {k: (s.weight, s.activation or recipe.base) for k, s in schemes.items()}
        # One arithmetic serves all components: an attention counts as FP8 where it is so in each of them.
        wide = tuple(e.layer.rpartition(" ")[2] for e in layers.exclusions if e.scheme == FP8_ATTENTION)
        for name in (name for names in layers.attention.values() for name in names):
            if name.rpartition(".")[2] not in wide:
                low[f"{layer_type(name)}/Attention"] = ("fp8", "fp8")
        return cls(recipe.base, low)

    def weight(self, layer: str) -> str:
        """The type that the weight of ``layer`` is stored in."""
        return self.low.get(layer, (self.base, self.base))[0]

    def product(self, layer: str) -> str:
        """The type that ``layer`` multiplies in: that of its activations."""
        return self.low.get(layer, (self.base, self.base))[1]

    @property
    def products(self) -> tuple[str, ...]:
        """Every type it multiplies in."""
        return tuple(dict.fromkeys((self.base, *(activation for _, activation in self.low.values()))))


@dataclass(frozen=True)
class Efficiency:
    """Shares of the published peaks that are reached: 16-bit and 8-bit products, and memory."""

    wide: float
    low: float
    memory: float

    def of(self, kind: str) -> float:
        """The share for products in ``kind``."""
        return self.low if kind in LOW else self.wide


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of all layers of one type in one call.

    ``floor_ms`` is the larger of products at peak and weights at full bandwidth, ``expected_ms`` at the
    efficiencies and with activations; ``bound`` says which of ``compute`` and ``memory`` decides it.
    """

    layer: str
    kind: str
    gmacs: float
    floor_ms: float
    expected_ms: float
    bound: str


@dataclass(frozen=True)
class ComponentTime:
    """Milliseconds of one call of a component at ``sizes``.

    ``floor_ms`` is strict (see the module), so it may be below the sum of its layers' floors.
    """

    component: str
    sizes: dict[str, int]
    gmacs: float
    floor_ms: float
    expected_ms: float
    bound: str
    layers: tuple[LayerTime, ...]


def peak(gpu: GpuPeaks, kind: str) -> tuple[float, str]:
    """TFLOP/s of ``gpu`` in ``kind``, and its assumption (empty: it is published).

    Raises:
        CapabilityError: no figure for ``kind``, nor one that it follows from.
    """
    published = gpu.tflops(kind)
    if published is not None:
        return published, ""
    if kind == "bf16" and gpu.sm != "sm75":
        if gpu.fp16 is not None:
            return gpu.fp16, f"{gpu.title}: no published bf16 peak; that of fp16 is taken."
        if gpu.int8 is not None:
            return gpu.int8 / 2, f"{gpu.title}: no published bf16 peak; half of int8's is taken."
    if kind == "int4" and gpu.int8 is not None:
        return gpu.int8, f"{gpu.title}: no int4 peak was looked up; that of int8 is taken."
    if kind == "fp16" and gpu.int8 is not None:
        return gpu.int8 / 2, f"{gpu.title}: no published fp16 peak; half of int8's is taken."
    has = [k for k in ("fp16", "bf16", "fp8", "int8") if gpu.tflops(k) is not None]
    raise CapabilityError(
        f"No {kind} peak is known for {gpu.title} ({gpu.sm}).",
        f"Its GPU lacks the type, or no vendor document was found. Known: {', '.join(has)}.",
        "Give another --precision or --gpu.",
    )


def component_cost(
    name: str, config: ModelConfig, sizes: Mapping[str, int], arithmetic: Arithmetic
) -> ComponentCost:
    """FLOPs and bytes of one call of a component, from the configuration alone.

    Layers, MACs and boundary are those that :func:`.flops.graph_cost` finds in the graph. Norms, biases and
    other small weights are in the component's bytes only.

    Args:
        name: the component.
        config: the model's sizes.
        sizes: its dynamic axes, as :func:`.roofline.component_macs` takes them.
        arithmetic: types of weights and products.
    """
    base_bits = dtype_of(arithmetic.base).bits
    sizes = {"batch": 1, **sizes}
    shapes = component_shapes(name, config)
    types = {key: layer_type(key.removesuffix(".weight")) for key in shapes}
    counts = Counter(types.values())
    matrices = {types[key]: shape for key, shape in shapes.items()}
    layers = []
    for layer, macs in component_macs(name, config, sizes).items():
        if layer.endswith("/Attention"):
            owner = layer.removesuffix("/Attention")
            count = counts[f"{owner}.proj"] or counts[f"{owner}.q_proj"]
            values = component_of(name, config).attention_values(config, layer, sizes) * sizes["batch"]
            moved = values * base_bits // 8
            layers.append(LayerCost(layer, "Attention", count, macs, 0, count * moved, arithmetic.base))
            continue
        out, *inner = matrices[layer]
        count, weight = counts[layer], out * math.prod(inner)
        rows = macs // (weight * count)
        moved = rows * (math.prod(inner) * dtype_of(arithmetic.product(layer)).bits + out * base_bits) // 8
        nbytes = weight * dtype_of(arithmetic.weight(layer)).bits // 8
        kind = arithmetic.product(layer)
        layers.append(LayerCost(layer, "MatMul", count, macs, count * nbytes, count * moved, kind))
    total = 0
    for key, shape in shapes.items():
        values = math.prod(shape)
        if key.endswith("embed_tokens.weight"):
            values = min(values, sizes["batch"] * sizes["text"] * shape[1])
        total += values * dtype_of(arithmetic.weight(types[key])).bits // 8
    spec = component_spec(name, config)
    axes = {"total": sizes.get("past", 0) + sizes.get("text", 0), **sizes}
    way = [
        sum(
            math.prod(axes[d] if isinstance(d, str) else d for d in t.shape)
            * dtype_of(arithmetic.base if t.dtype == "float" else t.dtype).bits
            // 8
            for t in tensors
        )
        for tensors in (spec.inputs, spec.outputs)
    ]
    return ComponentCost(name, arithmetic.base, dict(sizes), tuple(layers), total, *way)


def component_time(
    cost: ComponentCost, gpu: GpuPeaks, arithmetic: Arithmetic, efficiency: Efficiency
) -> ComponentTime:
    """Floor and expected time of one call on ``gpu``; CapabilityError as :func:`peak`."""
    layers = tuple(_layer_time(layer, gpu, arithmetic, efficiency) for layer in cost.layers)
    compute = sum(
        2e3 * layer.macs / (1e12 * peak(gpu, arithmetic.product(layer.layer))[0]) for layer in cost.layers
    )
    memory = _ms(cost.bytes, gpu)
    # Tensors outside the counted layers (norms, biases, embedding rows) are read as well.
    rest = max(0, cost.weight_bytes - sum(layer.weight_bytes for layer in cost.layers))
    expected = sum(t.expected_ms for t in layers) + _ms(rest, gpu) / efficiency.memory
    slow = sum(t.expected_ms for t in layers if t.bound == "memory")
    return ComponentTime(
        cost.component,
        cost.sizes,
        cost.macs / 1e9,
        max(compute, memory),
        expected,
        "memory" if slow > expected / 2 else "compute",
        layers,
    )


def _layer_time(layer: LayerCost, gpu: GpuPeaks, arithmetic: Arithmetic, efficiency: Efficiency) -> LayerTime:
    kind = arithmetic.product(layer.layer)
    compute = 2e3 * layer.macs / (1e12 * peak(gpu, kind)[0])
    traffic = _ms(layer.weight_bytes + layer.activation_bytes, gpu) / efficiency.memory
    products = compute / efficiency.of(kind)
    return LayerTime(
        layer.layer,
        kind,
        layer.macs / 1e9,
        max(compute, _ms(layer.weight_bytes, gpu)),
        max(products, traffic),
        "compute" if products >= traffic else "memory",
    )


def _ms(nbytes: int, gpu: GpuPeaks) -> float:
    return 1e3 * nbytes / (1e9 * gpu.memory_gbps)


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
