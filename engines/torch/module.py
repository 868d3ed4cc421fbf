"""Modules of a bundle's components: stored weights, stored 8-bit values, ``ranges.json``; FP8 attention.

A weight that several components read is one tensor in the process, as it is one in the store.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ...bundle import Bundle
from ...errors import CapabilityError, CheckpointError, IntegrityError
from ...export.weight_store import Store, open_store
from ...models.qllama import DecoderLayer
from ...models.registry import ModelConfig, component_module, config_from_published
from ...models.storage import open_reader
from ...models.vit import Block
from ...quantization.attention import attention_scales, attentions, fake_attention
from ...quantization.quantize import activation_scale, stored_names
from ...quantization.ranges import ActivationRanges
from ...quantization.recipe import Recipe
from ...quantization.schemes import SCHEMES
from .linears import Product, quantised_linear


class Fp8Attention(nn.Module):
    """FP8 attention, in place of a :class:`~ivl_export.models.layers.CoreAttention`; slow: torch has no fused
    kernel.

    Both products run on values rounded to FP8 and restored, in fp32, as ONNX Runtime runs the graph.

    Args:
        scales: of q, k and v.
        base: the recipe's base type, which the softmax's scale is rounded to.
    """

    def __init__(self, scales: tuple[float, float, float], base: str) -> None:
        super().__init__()
        self.scales, self.base = scales, base

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """As :func:`ivl_export.models.layers.attention`."""
        out = fake_attention(
            q.float(), k.float(), v.float(), mask, causal, scales=self.scales, base=self.base
        )
        return out.to(q.dtype)


STORES = "onnx/weights/"

_shared: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()
_sharing = threading.Lock()


def component_of(
    bundle: Bundle,
    component: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    product: Product | None = None,
) -> nn.Module:
    """The module of ``component``, in eval mode, without gradients.

    Args:
        bundle: an opened bundle; graphs and engines are not read.
        component: one of its components.
        dtype: compute type.
        device: of the weights.
        product: how FP8 values are multiplied; None: the best the device has.

    Raises:
        IntegrityError: the bundle lacks weights of the component.
    """
    try:
        config = config_from_published(bundle.manifest.model.config, "manifest.json")
        with torch.device("meta"):
            module = component_module(component, config)
    except CheckpointError as error:
        raise IntegrityError(error.what, error.why, "Rebuild the bundle.") from error
    weights = _Weights(bundle, dtype, device)
    recipe = Recipe.from_json(bundle.manifest.rules, "manifest.json") if bundle.manifest.rules else None
    if recipe is not None and recipe.quantises:
        rounds = recipe.attention == "fp8" or any(
            SCHEMES[rule.scheme].activation for rule in recipe.rules if rule.scheme in SCHEMES
        )
        ranges = _ranges(bundle, component) if rounds else {}
        _quantise_linears(module, recipe, ranges, weights, product)
        if recipe.attention == "fp8":
            for name in _attentions_in_fp8(component, config):
                scales = attention_scales(name, ranges, recipe.base)
                module.set_submodule(f"{name}.core", Fp8Attention(scales, recipe.base))
    for key, _ in list(module.named_parameters()):
        owner, _, leaf = key.rpartition(".")
        setattr(module.get_submodule(owner), leaf, weights.parameter(key))
    return module.eval().requires_grad_(False)


def _quantise_linears(
    module: nn.Module,
    recipe: Recipe,
    ranges: Mapping[str, float],
    weights: _Weights,
    product: Product | None,
) -> None:
    """Put stored values in the place of every linear layer that the recipe quantised."""
    for name, layer in list(module.named_modules()):
        scheme = scheme_of(recipe, name)
        if not isinstance(layer, nn.Linear) or not scheme or not weights.holds(name, scheme, recipe.base):
            continue
        values, _, scale = stored_names(name, scheme, recipe.base)
        bias = None if layer.bias is None else weights.parameter(f"{name}.bias")
        input_scale = _input_scale(scheme, ranges.get(name), recipe.base, name)
        replacement = quantised_linear(
            scheme, weights.stored(values), weights.stored(scale), bias, input_scale, product
        )
        module.set_submodule(name, replacement)


class _Weights:
    """The bundle's weights store, each tensor loaded once in the process."""

    def __init__(self, bundle: Bundle, dtype: torch.dtype, device: torch.device) -> None:
        files = [f for f in bundle.manifest.files if f.startswith(STORES) and f.endswith(".safetensors")]
        try:
            self._store: Store = open_store(*(bundle.path(file) for file in files))
        except CheckpointError as error:
            raise IntegrityError(error.what, error.why, "Copy the bundle again.") from error
        self._dtype, self._device = dtype, device
        self._readers: dict[Path, Callable[[str], Tensor]] = {}

    def holds(self, layer: str, scheme: str, base: str) -> bool:
        """Whether the weight of ``layer`` is stored as ``scheme`` says."""
        return all(name in self._store for name in stored_names(layer, scheme, base))

    def parameter(self, key: str) -> nn.Parameter:
        """A weight in the compute type."""
        loaded: nn.Parameter = self._load(key, self._dtype, lambda t: nn.Parameter(t, requires_grad=False))
        return loaded

    def stored(self, name: str) -> Tensor:
        """A tensor in its stored type."""
        loaded: Tensor = self._load(name, None, lambda t: t)
        return loaded

    def _load(self, name: str, dtype: torch.dtype | None, wrap: Callable[[Tensor], Any]) -> Any:
        if name not in self._store:
            raise IntegrityError(
                f"The bundle's weights store lacks {name}.", "Its component needs it.", "Rebuild the bundle."
            )
        ref = self._store[name]
        stat = ref.file.stat()
        key = (ref.file.resolve(), stat.st_mtime_ns, stat.st_size, name, dtype, self._device)
        with _sharing:
            tensor = _shared.get(key)
            if tensor is None:
                if ref.file not in self._readers:
                    self._readers[ref.file] = open_reader(ref.file)
                tensor = wrap(self._readers[ref.file](ref.name).to(self._device, dtype))
                _shared[key] = tensor
        return tensor


def scheme_of(recipe: Recipe, layer: str) -> str:
    """The scheme of the last rule that matches ``layer``; empty if it stays in the base type."""
    scheme = ""
    for rule in recipe.rules:
        if fnmatchcase(layer, rule.pattern):
            scheme = rule.scheme
    return scheme if scheme in SCHEMES else ""


def _attentions_in_fp8(component: str, config: ModelConfig) -> list[str]:
    shapes = attentions(config, [component])[component]
    return [name for name, shape in shapes.items() if not shape.excluded]


def _ranges(bundle: Bundle, component: str) -> Mapping[str, float]:
    ranges = ActivationRanges.load(bundle.path("ranges.json"))
    if component not in ranges.amax:
        raise CapabilityError(
            f"The bundle has no activation ranges of {component}.", "", "Rebuild the bundle with it."
        )
    return ranges.amax[component]


def _input_scale(scheme: str, amax: float | None, base: str, layer: str) -> float | None:
    kind = SCHEMES[scheme].activation
    if not kind:
        return None
    if amax is None:
        raise IntegrityError(
            f"The bundle has no activation range of layer {layer}.", "", "Rebuild the bundle."
        )
    return activation_scale(amax, kind, base)


COMPILATIONS = 64
"""Compilations of one block's code. A decoder layer has one for each component and kind of call (queries, a
text, a step; one row or several; with cross-attention or without), and torch counts them together: its own
limit of 8 is an error in ordinary use."""
COMPILER = "inductor"
"""``torch.compile``'s backend."""


def compile_blocks(module: nn.Module, mode: str | None = None, *, dynamic: bool | None = None) -> int:
    """Compile the blocks of ``module`` in place; they run through the compiled code from the first call on.

    All blocks of a tower have the same code; compiled by themselves they share one compilation, which takes
    seconds where the whole tower at once takes minutes.

    Args:
        module: a component.
        mode: ``torch.compile``'s (``max-autotune``, ...).
        dynamic: as ``torch.compile``'s: None compiles again, for all sizes, when a size changes.

    Returns:
        How many blocks there are.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, COMPILATIONS)
    blocks = [part for part in module.modules() if isinstance(part, Block | DecoderLayer)]
    for block in blocks:
        block.compile(fullgraph=True, mode=mode, dynamic=dynamic, backend=COMPILER)
    return len(blocks)
