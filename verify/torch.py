"""The proof of the torch backend: what one call really runs, by the profiler's record of it.

An operator without a kernel of its own shows what it is made of: where a CPU has no FP8 products,
``_scaled_mm`` restores both factors and calls ``mm`` in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..bundle import Bundle
from ..engines.products import FACTORS, Product, factors, why_not_8_bits
from ..engines.torch.attention import Fp8Attention
from ..engines.torch.compiled import compile_blocks
from ..engines.torch.engine import DTYPES, compute_type, device_of
from ..engines.torch.linears import Product as Way
from ..engines.torch.linears import QuantisedLinear
from ..engines.torch.module import component_of, scheme_of
from ..engines.torch.trace import Operand, named_ranges, traced
from ..quantization.recipe import Recipe
from ..quantization.schemes import promise
from .report import AttentionProof, KernelReport, ProductProof
from .torch_runs import Run, as_before, by_layer, casts, runs

_TYPES = {dtype: name for name, dtype in DTYPES.items()}
_TYPES |= {torch.float8_e4m3fn: "fp8", torch.int8: "int8", torch.uint8: "uint8", torch.float64: "fp64"}
_FLOATS = frozenset({*DTYPES, "fp64"})
_NOWHERE = "no operator of the compiled call is it: it is part of another kernel"


def proof_from_torch(
    bundle: Bundle,
    component: str,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    *,
    device: str = "cpu",
    dtype: str | None = None,
    compile: bool = False,
    product: Way | None = None,
) -> tuple[KernelReport, dict[str, str]]:
    """Run ``component`` and read what ran.

    Args:
        bundle: an opened bundle.
        component: one of its components.
        inputs: by the names of its spec; what is read holds for calls of their shapes.
        device, dtype, compile, product: as for :func:`..engines.torch.engine.open_torch`.

    Returns:
        The report, and what the recipe promises: layer or attention -> scheme. A product that is found in no
        operator, which compiled code may have taken into a kernel of its own, has no precision.

    Raises: as :func:`..engines.torch.engine.open_torch`.
    """
    place = device_of(device)
    computes = compute_type(bundle, place, dtype)
    module = component_of(bundle, component, dtype=computes, device=place, product=product)
    given = [torch.tensor(inputs[tensor.name]) for tensor in bundle.spec(component).inputs]
    feeds = [value.to(place, computes if value.is_floating_point() else None) for value in given]

    def call() -> None:
        with torch.no_grad():
            module(*feeds)

    call()
    with named_ranges(module):
        ops = traced(call, place)
    found = before = by_layer(runs(ops), module)
    if compile:
        with emitted_kernels_named():
            compile_blocks(module)
            call()
        ops = traced(call, place)
        found = as_before(runs(ops), before, module)
    promised = _promised(bundle, module)
    cores = {n.removesuffix(".core") for n, p in module.named_modules() if isinstance(p, Fp8Attention)}
    attention = {n for n, r in before.items() if n in cores or r[0].kind == "attention"}
    products = [_product(n, r, module, promised.get(n, "")) for n, r in found.items() if n not in attention]
    report = KernelReport(
        backend="torch",
        profiles=1,
        kernels=sum(op.work for op in ops),
        gemms=tuple(p for p in products if p.op != "Conv"),
        attention=tuple(_attention(n, r, n in cores) for n, r in found.items() if n in attention),
        casts=tuple(f"{op.scope or 'compiled code'}/{word}" for op, word in casts(ops, _cast)),
        convolutions=tuple(p for p in products if p.op == "Conv"),
        constant_bytes=sum(t.nbytes for t in module.state_dict().values()),
    )
    return report, promised


def held(promised: Mapping[str, str], device: str, dtype: str | None = None) -> dict[str, str]:
    """What of ``promised`` torch has kernels for on ``device``; the rest is told, not held.

    INT8 products everywhere (of INT4 factors too), FP8 products on GPUs from compute capability 8.9 on,
    stored weights of 16-bit products. Torch has no attention of FP8.
    """
    place = device_of(device)
    kept = {"int8": "int8", "w4a8": "w4a8", "w4a4": "w4a8"}
    if place.type == "cuda" and torch.cuda.get_device_capability(place) >= (8, 9):
        kept["fp8"] = "fp8"
    if (dtype or ("fp32" if place.type == "cpu" else "")) != "fp32":
        kept |= {scheme: scheme for scheme in ("int8-weight", "int4-weight")}
    return {name: kept[s] for name, s in promised.items() if s in kept and not name.endswith("attn")}


def _promised(bundle: Bundle, module: nn.Module) -> dict[str, str]:
    if not bundle.manifest.recipe:
        return {}
    recipe = Recipe.from_json(bundle.manifest.recipe, "manifest.json")
    parts = dict(module.named_modules())
    layers = {n: promise(scheme_of(recipe, n)) for n, p in parts.items() if isinstance(p, QuantisedLinear)}
    attention = {n.removesuffix(".core"): "fp8" for n, p in parts.items() if isinstance(p, Fp8Attention)}
    return layers | attention


def _product(name: str, found: Sequence[Run], module: nn.Module, scheme: str) -> ProductProof:
    tensors = module.state_dict(keep_vars=True)
    weight = next((k for k in (f"{name}.weight", f"{name}.values", name) if k in tensors), "")
    shape = tuple(tensors[weight].shape) if weight else ()
    if weight and tensors[weight].dtype == torch.uint8:  # two INT4 values a byte
        shape = (shape[0], 2 * shape[1])
    activation, stored = FACTORS.get(scheme, ("", scheme.removesuffix("-weight")))
    asked = Product(name, weight, activation=activation, stored=stored)
    precision = "|".join(dict.fromkeys(_precision(run, asked) for run in found))
    cause = _cause(asked, precision, getattr(module.get_submodule(name), "product", "") if scheme else "")
    return ProductProof(
        name,
        weight,
        asked.scheme,
        precision,
        ", ".join(dict.fromkeys(run.name for run in found)),
        cause=cause if found else _NOWHERE,
        op="Conv" if any(run.kind == "convolution" for run in found) else "MatMul",
        shape=shape,
        weight_bytes=tensors[weight].nbytes if weight else 0,
    )


def _precision(run: Run, asked: Product) -> str:
    """Types of both factors; of a weight that is restored or unpacked for the product, the stored type."""
    first, second = (_TYPES.get(factor.dtype, str(factor.dtype)) for factor in run.factors)
    kept = asked.stored and (not asked.activation or asked.stored == "int4")
    return f"{first}x{asked.stored if kept else second}"


def _cause(asked: Product, precision: str, way: str) -> str:
    if asked.scheme == "fp8" and precision != factors("fp8"):
        if way == "restored":
            return "both factors are restored before the product: product='restored', or a GPU without FP8"
        return (
            "torch has no FP8 kernel for this CPU: its _scaled_mm restores both factors and multiplies them"
        )
    if asked.scheme == "w4a4":
        return "torch has no INT4 products: it multiplies the values as INT8"
    return why_not_8_bits(asked, precision)


def _attention(name: str, found: Sequence[Run], spelled_out: bool) -> AttentionProof:
    operands = [operand for run in found for operand in run.factors]
    if spelled_out:
        operands[2:] = operands[3:]  # q, k; softmax, v
    types = tuple(_TYPES.get(operand.dtype, str(operand.dtype)) for operand in operands[:3])
    fused = bool(found) and not spelled_out and found[0].fused
    cause = "torch runs its products one by one"
    if spelled_out:
        cause = "torch has no attention of FP8 factors: it multiplies the rounded values one by one"
    kernel = ", ".join(dict.fromkeys(run.name for run in found))
    head = operands[0].shape[-1] if operands else 0
    return AttentionProof((name,), fused, kernel, types, head, "" if fused else cause if found else _NOWHERE)


def _cast(target: Operand, source: Operand) -> str | None:
    """How a copy converts between float types; None if it does not, or converts one number."""
    types = [_TYPES.get(operand.dtype, "") for operand in (source, target)]
    converts = len(set(types)) == 2 and _FLOATS.issuperset(types) and target.shape
    return "->".join(types) if converts else None


@contextmanager
def emitted_kernels_named() -> Iterator[None]:
    """Inside, ``torch.compile`` writes CPU kernels that the profiler sees."""
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield
