"""Verification of the torch backend: products of one real call, from the profiler's record.

An operator without a kernel shows the operators that it calls: where a CPU has no FP8 products,
``_scaled_mm`` restores both factors and calls ``mm`` in fp32.

A layer is known by the address of its weight, in compiled code as well. An operator without a weight is named
after the module it runs in; compiled code has no modules, so there it is named by its place: the n-th
operator of some sizes is the n-th of these sizes in the eager call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..bundle import Bundle
from ..dtypes import COMPUTE, name_of_torch
from ..engines.products import FACTORS, Product, factors, why_not_8_bits
from ..engines.torch.engine import compute_type, device_of
from ..engines.torch.linears import Product as Way
from ..engines.torch.linears import QuantisedLinear
from ..engines.torch.module import Fp8Attention, compile_blocks, component_of, scheme_of
from ..engines.torch.trace import Op, Operand, named_ranges, traced
from ..quantization.recipe import Recipe
from ..quantization.schemes import promise
from .expectations import CPU_KERNELS
from .report import VerificationReport, VerifiedAttention, VerifiedProduct

R = TypeVar("R")

_AFTER_BIAS = frozenset({"addmm", "addmv", "baddbmm", "_addmm_activation"})
_PRODUCTS = _AFTER_BIAS | {
    "linear", "matmul", "mm", "mv", "bmm", "_int_mm", "_scaled_mm", "_linear_pointwise",
}  # fmt: skip
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_ATTENTION, _KERNELS = "scaled_dot_product_attention", "_scaled_dot_product_"
_ONE_BY_ONE = "_scaled_dot_product_attention_math"
_FLOATS = frozenset({*COMPUTE, "fp64"})
_NOWHERE = "no operator of the compiled call is it: it is part of another kernel"


def read_torch(
    bundle: Bundle,
    component: str,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    *,
    device: str = "cpu",
    dtype: str | None = None,
    compile: bool = False,
    product: Way | None = None,
) -> tuple[VerificationReport, dict[str, str]]:
    """Run ``component`` once and read the precision of its products.

    Args:
        bundle: an opened bundle.
        component: one of its components.
        inputs: by the names of its spec; the report is for calls of their shapes.
        device, dtype, compile, product: as for :func:`..engines.torch.engine.open_torch`.

    Returns:
        The report, and the recipe's promises: layer or attention -> scheme. A product that is found in no
        operator, which compiled code may have taken into another kernel, has no precision.

    Raises: as :func:`..engines.torch.engine.open_torch`.
    """
    place = device_of(device)
    computes = compute_type(bundle, place, dtype)
    module = component_of(bundle, component, dtype=computes, device=place, product=product)
    tensors = [torch.tensor(inputs[tensor.name]) for tensor in bundle.spec(component).inputs]
    feeds = [value.to(place, computes if value.is_floating_point() else None) for value in tensors]

    def call() -> None:
        with torch.no_grad():
            module(*feeds)

    call()
    with named_ranges(module):
        ops = traced(call, place)
    by_name = eager = by_layer(runs(ops), module)
    if compile:
        with emitted_kernels_named():
            compile_blocks(module)
            call()
        ops = traced(call, place)
        by_name = as_before(runs(ops), eager, module)
    promised = _promised(bundle, module)
    cores = {n.removesuffix(".core") for n, p in module.named_modules() if isinstance(p, Fp8Attention)}
    attention = {n for n, r in eager.items() if n in cores or r[0].kind == "attention"}
    products = [_product(n, r, module, promised.get(n, "")) for n, r in by_name.items() if n not in attention]
    report = VerificationReport(
        backend="torch",
        profiles=1,
        kernels=sum(op.work for op in ops),
        gemms=tuple(p for p in products if p.op != "Conv"),
        attention=tuple(_attention(n, r, n in cores) for n, r in by_name.items() if n in attention),
        casts=tuple(f"{op.scope or 'compiled code'}/{word}" for op, word in casts(ops, _cast)),
        convolutions=tuple(p for p in products if p.op == "Conv"),
        constant_bytes=sum(t.nbytes for t in module.state_dict().values()),
    )
    return report, promised


def enforceable(promised: Mapping[str, str], device: str, dtype: str | None = None) -> dict[str, str]:
    """The promises that torch has kernels for on ``device``; the rest is reported, not enforced.

    INT8 products everywhere (of INT4 factors too), FP8 products on GPUs from compute capability 8.9 on,
    stored weights of 16-bit products. Torch has no attention of FP8.
    """
    place = device_of(device)
    native = dict(CPU_KERNELS["torch"])
    if place.type == "cuda" and torch.cuda.get_device_capability(place) >= (8, 9):
        native["fp8"] = "fp8"
    if (dtype or ("fp32" if place.type == "cpu" else "")) != "fp32":
        native |= {scheme: scheme for scheme in ("int8-weight", "int4-weight")}
    return {name: native[s] for name, s in promised.items() if s in native and not name.endswith("attn")}


def _promised(bundle: Bundle, module: nn.Module) -> dict[str, str]:
    if not bundle.manifest.rules:
        return {}
    recipe = Recipe.from_json(bundle.manifest.rules, "manifest.json")
    parts = dict(module.named_modules())
    layers = {n: promise(scheme_of(recipe, n)) for n, p in parts.items() if isinstance(p, QuantisedLinear)}
    attention = {n.removesuffix(".core"): "fp8" for n, p in parts.items() if isinstance(p, Fp8Attention)}
    return layers | attention


def _product(name: str, own: Sequence[LayerRun], module: nn.Module, scheme: str) -> VerifiedProduct:
    tensors = module.state_dict(keep_vars=True)
    weight = next((k for k in (f"{name}.weight", f"{name}.values", name) if k in tensors), "")
    shape = tuple(tensors[weight].shape) if weight else ()
    if weight and tensors[weight].dtype == torch.uint8:  # two INT4 values a byte
        shape = (shape[0], 2 * shape[1])
    activation, stored = FACTORS.get(scheme, ("", scheme.removesuffix("-weight")))
    product = Product(name, weight, activation=activation, stored=stored)
    precision = "|".join(dict.fromkeys(_precision(run, product) for run in own))
    cause = _cause(product, precision, getattr(module.get_submodule(name), "product", "") if scheme else "")
    return VerifiedProduct(
        name,
        weight,
        product.scheme,
        precision,
        ", ".join(dict.fromkeys(run.name for run in own)),
        cause=cause if own else _NOWHERE,
        op="Conv" if any(run.kind == "convolution" for run in own) else "MatMul",
        shape=shape,
        weight_bytes=tensors[weight].nbytes if weight else 0,
    )


def _precision(run: LayerRun, product: Product) -> str:
    """Types of both factors; of a weight that is restored or unpacked for the product, the stored type."""
    first, second = (name_of_torch(factor.dtype) for factor in run.factors)
    as_stored = product.stored and (not product.activation or product.stored == "int4")
    return f"{first}x{product.stored if as_stored else second}"


def _cause(product: Product, precision: str, way: str) -> str:
    if product.scheme == "fp8" and precision != factors("fp8"):
        if way == "restored":
            return "both factors are restored before the product: product='restored', or a GPU without FP8"
        return (
            "torch has no FP8 kernel for this CPU: its _scaled_mm restores both factors and multiplies them"
        )
    if product.scheme == "w4a4":
        return "torch has no INT4 products: it multiplies the values as INT8"
    return why_not_8_bits(product, precision)


def _attention(name: str, own: Sequence[LayerRun], spelled_out: bool) -> VerifiedAttention:
    operands = [operand for run in own for operand in run.factors]
    if spelled_out:
        operands[2:] = operands[3:]  # q, k; softmax, v
    types = tuple(name_of_torch(operand.dtype) for operand in operands[:3])
    fused = bool(own) and not spelled_out and own[0].fused
    cause = "torch runs its products one by one"
    if spelled_out:
        cause = "torch has no attention of FP8 factors: it multiplies the rounded values one by one"
    kernel = ", ".join(dict.fromkeys(run.name for run in own))
    head = operands[0].shape[-1] if operands else 0
    return VerifiedAttention((name,), fused, kernel, types, head, "" if fused else cause if own else _NOWHERE)


def _cast(target: Operand, source: Operand) -> str | None:
    """How a copy converts between float types; None if it does not, or converts one number."""
    types = [name_of_torch(operand.dtype) for operand in (source, target)]
    converts = len(set(types)) == 2 and _FLOATS.issuperset(types) and target.shape
    return "->".join(types) if converts else None


@contextmanager
def emitted_kernels_named() -> Iterator[None]:
    """Inside, ``torch.compile`` writes CPU kernels that the profiler records."""
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


@dataclass(frozen=True)
class LayerRun:
    """The operator that computes a layer, and its kind (``product``, ``convolution``, ``attention``).

    ``inputs`` are the tensors that the outermost operator takes, ``kernels`` those that run on a GPU.
    """

    kind: str
    op: Op
    inputs: tuple[Operand, ...]
    kernels: tuple[str, ...]

    @property
    def name(self) -> str:
        """The operator, or the kernels of a GPU."""
        return ", ".join(dict.fromkeys(self.kernels)) or self.op.name

    @property
    def factors(self) -> tuple[Operand, ...]:
        """Both factors; of an attention q, k and v."""
        if self.kind == "attention":
            return self.op.inputs[:3]
        return self.op.inputs[1:3] if _plain(self.op) in _AFTER_BIAS else self.op.inputs[:2]

    @property
    def fused(self) -> bool:
        """Of an attention: whether it is one kernel."""
        return _plain(self.op) not in (_ATTENTION, _ONE_BY_ONE)

    @property
    def sizes(self) -> tuple[object, ...]:
        """Key of two runs of one place: kind and sizes of the second factor, in any layout."""
        return (self.kind, *(tuple(sorted(factor.shape)) for factor in self.factors[1:2]))


def runs(ops: Iterable[Op]) -> Iterator[LayerRun]:
    """Layers among ``ops`` and inside them, in order; of one inside another, the outer."""
    for op in ops:
        if kind := _kind(op):
            yield LayerRun(kind, _working(op), op.inputs, tuple(op.all_kernels()))
        else:
            yield from runs(op.inner)


def casts(ops: Iterable[Op], named: Callable[[Operand, Operand], R | None]) -> Iterator[tuple[Op, R]]:
    """Copies outside of all runs for whose target and source ``named`` has a word, and that word."""
    for op in ops:
        if _kind(op):
            continue
        word = named(*op.inputs[:2]) if op.name == "aten::copy_" and len(op.inputs) == 2 else None
        if word is not None:
            yield op, word
        yield from casts(op.inner, named)


def by_layer(layer_runs: Iterable[LayerRun], module: nn.Module) -> dict[str, list[LayerRun]]:
    """Runs of an eager call by layer; both products of an attention that is spelled out have its name."""
    keys = addresses(module)
    parts = dict(module.named_modules())
    named: dict[str, list[LayerRun]] = defaultdict(list)
    for run in layer_runs:
        scope = run.op.scope
        part = parts.get(scope)
        own = isinstance(part, nn.Linear | QuantisedLinear | nn.modules.conv._ConvNd)
        name = _layer(run, keys)
        if isinstance(part, Fp8Attention) or run.kind == "attention":
            name = scope.removesuffix(".core")
        named[name or (scope if own else f"{scope}/{_plain(run.op)}")].append(run)
    return named


def as_before(
    layer_runs: Iterable[LayerRun], eager: dict[str, list[LayerRun]], module: nn.Module
) -> dict[str, list[LayerRun]]:
    """Runs of a compiled call by the layers of the eager one; a layer that none is like has none."""
    keys = addresses(module)
    named: dict[str, list[LayerRun]] = {name: [] for name in eager}
    rest = []
    for run in layer_runs:
        name = _layer(run, keys)
        if name in named:
            named[name].append(run)
        else:
            rest.append(run)
    missing = defaultdict(list)
    for name, old in eager.items():
        for run in old[len(named[name]) :]:
            missing[run.sizes].append(name)
    for run in rest:
        if missing[run.sizes]:
            named[missing[run.sizes].pop(0)].append(run)
    return named


def addresses(module: nn.Module) -> dict[int, str]:
    """Address of the storage -> name, of every parameter and buffer."""
    tensors = module.state_dict(keep_vars=True)
    return {tensor.untyped_storage().data_ptr(): key for key, tensor in tensors.items()}


def _layer(run: LayerRun, keys: dict[int, str]) -> str:
    """The layer whose weight ``run`` takes; empty if it takes none as it is stored."""
    names = (keys.get(operand.address, "") for operand in (*run.factors, *run.inputs))
    weights = (key for key in names if key and not key.endswith(("bias", "scale", ".one")))
    return next((key.removesuffix(".weight").removesuffix(".values") for key in weights), "")


def _kind(op: Op) -> str:
    name = _plain(op)
    if name == _ATTENTION or name.startswith(_KERNELS):
        return "attention"
    if "convolution" in name or name in _CONVOLUTIONS:
        return "convolution"
    return "product" if name in _PRODUCTS else ""


def _working(op: Op) -> Op:
    """The operator inside ``op`` that does its work."""
    if _plain(op) == _ONE_BY_ONE:
        return op
    return next((run.op for run in runs(op.inner)), op)


def _plain(op: Op) -> str:
    return op.name.rpartition("::")[2]
