"""Linear layers that compute as a build will quantise them, and that can be trained (QAT).

The values are those of the graph: weights as :func:`..quantization.quantize.quantise` stores them, inputs
as QuantizeLinear
and DequantizeLinear make them, both with scales that the base type holds. Gradients go straight through the
rounding (Bengio et al. 2013) and stop where a value saturates; those of the scales are LSQ's (Esser et al.
2020, equation 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError
from ..models.internvl import InternVLModel
from ..models.qllama import component_running
from ..quantization.quantize import LIMITS, LOWEST, quantise_values, round_scale
from ..quantization.schemes import SCHEMES, block_size, folded_layers

CLIP = (0.2, 1.0)
"""Share of a weight's largest magnitude that learned scales may cover. At most all of it: then the largest
value of every row or block is stored as the type's limit, and quantising the restored weight gives the same
integers and the same scale again."""

STRETCH = (0.02, 4.0)
"""How much of the calibrated range of its inputs a layer may cover, where scales are learned."""

M = TypeVar("M", bound=nn.Module)

STACKED = ("qllama_text", "qllama_text", "qllama_step")
"""Whose ranges the texts of stage 2 take, third by third: matching (those of ``qllama_itm`` are not trained),
contrastive and generation. Their queries run as in ``qllama_query``."""


POOLED = re.compile(r"clip_projector2?\.cross_attn\.[qkv]")
"""Layers whose weights the pooling heads multiply by themselves, with separate biases."""


class _FakeQuantise(torch.autograd.Function):
    """``x`` -> round(x / scale) * scale, saturated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, kind: str, lowest: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.kind, ctx.lowest = kind, lowest
        return quantise_values(x, scale, kind, lowest).float() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale = ctx.saved_tensors
        scaled = x / scale
        inside = (scaled >= ctx.lowest) & (scaled <= LIMITS[ctx.kind])
        for_x = torch.where(inside, grad, 0.0) if ctx.needs_input_grad[0] else None
        for_scale = None
        if ctx.needs_input_grad[1]:
            values = quantise_values(x, scale, ctx.kind, ctx.lowest).float()
            for_scale = (grad * torch.where(inside, values - scaled, values)).sum_to_size(scale.shape)
        return for_x, for_scale, None, None


def fake_quantise(x: Tensor, scale: Tensor, kind: str, lowest: float) -> Tensor:
    """``x`` rounded to ``kind`` and back, differentiable in ``x`` and ``scale`` (broadcastable to ``x``)."""
    result: Tensor = _FakeQuantise.apply(x.float(), scale, kind, lowest)  # type: ignore[no-untyped-call]
    return result


def learnable_scale(amax: Tensor, kind: str, base: str) -> Tensor:
    """:func:`..quantization.quantize.round_scale`, differentiable in ``amax``."""
    exact = amax / LIMITS[kind]
    return exact + (round_scale(amax.detach(), kind, base) - exact).detach()


@dataclass
class Place:
    """Which component's ranges QLLaMA's layers take now.

    Args:
        component: the one that runs; empty in a pass of stage 2, which stacks several.
        queries: leading positions that are queries, in a pass of stage 2.
    """

    component: str = "qllama_text"
    queries: int = 0

    def enter(self, _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Forward pre-hook of :class:`..models.qllama.QLlama`: notes which pass this is, by its arguments."""
        self.component, self.queries = component_running(args, keywords)


class FakeQuantLinear(nn.Linear):
    """A linear layer that takes the place of another one and shares its parameters.

    ``clip`` [rows, blocks, 1] (one for each scale of the weight) and ``stretch`` [components] are there where
    scales are learned.

    Args:
        linear: the layer it replaces.
        scheme: one of :data:`..quantization.schemes.SCHEMES`.
        base: ``bf16`` or ``fp16``.
        amax: component -> calibrated range of the inputs; empty for weight-only schemes.
        place: says which component runs.
        learn: whether scales are learned.
    """

    def __init__(
        self, linear: nn.Linear, scheme: str, base: str, amax: Mapping[str, float], place: Place, learn: bool
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scheme, self.base, self.place = scheme, base, place
        self.components = tuple(amax)
        # Values that share a scale: a block of a row, a row, or all of the weight.
        whole = SCHEMES[scheme].per_tensor
        block = linear.weight.numel() if whole else block_size(scheme, linear.in_features)
        self.rows, self.block = 1 if whole else linear.out_features, block or linear.in_features
        self.amax: Tensor
        self.register_buffer("amax", torch.tensor(list(amax.values())), persistent=False)
        self.clip: nn.Parameter | None = None
        self.stretch: nn.Parameter | None = None
        if learn:
            blocks = linear.weight.numel() // self.rows // self.block
            self.clip = nn.Parameter(torch.ones(self.rows, blocks, 1))
            self.stretch = nn.Parameter(torch.ones(len(amax))) if amax else None

    @property
    def learns(self) -> bool:
        """Whether its weight or the weight's scales are trained."""
        return self.weight.requires_grad or (self.clip is not None and self.clip.requires_grad)

    def quantised_weight(self) -> Tensor:
        """The weight as the graph dequantises it [out, in], fp32."""
        kind = SCHEMES[self.scheme].weight
        parts = self.weight.float().reshape(self.rows, -1, self.block)
        amax = parts.detach().abs().amax(-1, keepdim=True)
        if self.clip is not None:
            amax = amax * self.clip.clamp(*CLIP)
        scale = learnable_scale(amax, kind, self.base)
        return fake_quantise(parts, scale, kind, -LIMITS[kind]).reshape(self.weight.shape)

    def input_scales(self) -> Tensor:
        """Scale of the inputs in each component [components]."""
        amax = self.amax if self.stretch is None else self.amax * self.stretch.clamp(*STRETCH)
        return learnable_scale(amax, SCHEMES[self.scheme].activation, self.base)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        kind = SCHEMES[self.scheme].activation
        if kind:
            scales = self._scales_of(x)
            if scales is not None:
                x = fake_quantise(x, scales, kind, LOWEST[kind])
        return F.linear(x, self.quantised_weight(), self.bias)

    def _scales_of(self, x: Tensor) -> Tensor | None:
        """The scale that each row of ``x`` takes; None in a component where the layer has no range."""
        scales, place = self.input_scales(), self.place
        if len(self.components) == 1:
            return scales[0]
        if place.component:
            active = place.component in self.components
            return scales[self.components.index(place.component)] if active else None
        third, texts = len(x) // len(STACKED), x.shape[1] - place.queries
        rows = [scales[self.components.index(name)].expand(third) for name in STACKED]
        query = scales[self.components.index("qllama_query")].expand(len(x), place.queries)
        return torch.cat([query, torch.cat(rows)[:, None].expand(-1, texts)], 1)[..., None]


def fake_quantised(
    model: M,
    schemes: Mapping[str, str],
    base: str,
    amax: Mapping[str, Mapping[str, float]],
    *,
    learn: bool = False,
) -> M:
    """Replace the layers of ``schemes`` in place, so that ``model`` computes as its quantised components do.

    Args:
        model: in fp32, of any form. All ways through it are simulated: embeddings, generation, the stages'
            losses. Where QLLaMA's layers run in several components, each pass takes its component's ranges.
        schemes: quantised layer -> one of :data:`..quantization.schemes.SCHEMES`.
        base: the recipe's base.
        amax: component -> layer -> range, as in ``ranges.json``.
        learn: whether scales are learned with the weights.

    Raises:
        UsageError: a layer that cannot be trained so.
    """
    check_trainable(schemes)
    place = Place()
    shared: dict[tuple[str, tuple[float, ...]], nn.Parameter] = {}
    for name, scheme in schemes.items():
        owner, _, leaf = name.rpartition(".")
        parent = model.get_submodule(owner)
        ranges = {component: layers[name] for component, layers in amax.items() if name in layers}
        used = ranges if SCHEMES[scheme].activation else {}
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = FakeQuantLinear(linear, scheme, base, used, place, learn)
        if layer.stretch is not None:
            # Equal ranges of neighbours: q/k/v or gate/up, which share an input. With one scale they share
            # a Q/DQ pair, and the engine merges their products.
            layer.stretch = shared.setdefault((owner, tuple(used.values())), layer.stretch)
        setattr(parent, leaf, layer)
    if isinstance(model, InternVLModel):
        model.qllama.register_forward_pre_hook(place.enter, with_kwargs=True)
    return model


def check_trainable(schemes: Mapping[str, str]) -> None:
    """UsageError where a layer of ``schemes`` cannot be trained quantised."""
    if folded := folded_layers(schemes):
        raise UsageError(
            f"{folded[0]} cannot be fine-tuned with {schemes[folded[0]]}.",
            "A build would move factors between its channels again afterwards.",
            "Use the scheme without: training finds weights that need no such help.",
        )
    for name in schemes:
        if POOLED.fullmatch(name):
            raise UsageError(
                f"{name} cannot be fine-tuned quantised.",
                "The pooling heads use this weight without its layer.",
                "Take it out of the recipe.",
            )


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, FakeQuantLinear]]:
    """The layers that :func:`fake_quantised` replaced, by name."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            yield name, module


@torch.no_grad()
def keep_in_bounds(model: nn.Module) -> None:
    """Move learned scales that left :data:`CLIP` or :data:`STRETCH` back: outside they have no gradient."""
    for _, layer in quantised_layers(model):
        if layer.clip is not None:
            layer.clip.clamp_(*CLIP)
        if layer.stretch is not None:
            layer.stretch.clamp_(*STRETCH)


@torch.no_grad()
def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in published names and fp32; quantised weights have the values that the graph will
    dequantise.

    Quantising those again gives the same integers and scales, bit for bit. Frozen weights are as they were:
    quantising them gives what was simulated.
    """
    state = {k: v.float() for k, v in model.state_dict().items()}
    for name, layer in quantised_layers(model):
        state.pop(f"{name}.clip", None)
        state.pop(f"{name}.stretch", None)
        if layer.learns:
            state[f"{name}.weight"] = layer.quantised_weight()
    return state


@torch.no_grad()
def trained_ranges(model: nn.Module, amax: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """``amax`` with the ranges that were learned: limit times scale, which gives the same scale again."""
    ranges = {component: dict(layers) for component, layers in amax.items()}
    for name, layer in quantised_layers(model):
        if layer.stretch is None:
            continue
        limit = LIMITS[SCHEMES[layer.scheme].activation]
        for component, scale in zip(layer.components, layer.input_scales().tolist(), strict=True):
            ranges[component][name] = limit * scale
    return ranges
