"""The products, convolutions and attentions among the operators of a call, by the names of their layers.

A weight is known by its address, in compiled code as well. What takes none is named after the module it runs
in; compiled code has no modules, so there it is named by its place: the n-th of its sizes is the n-th of them
in the eager call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from ..engines.torch.attention import Fp8Attention
from ..engines.torch.linears import QuantisedLinear
from ..engines.torch.trace import Op, Operand

R = TypeVar("R")

_AFTER_BIAS = frozenset({"addmm", "addmv", "baddbmm", "_addmm_activation"})
_PRODUCTS = _AFTER_BIAS | {
    "linear",
    "matmul",
    "mm",
    "mv",
    "bmm",
    "_int_mm",
    "_scaled_mm",
    "_linear_pointwise",
}
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_ATTENTION, _KERNELS = "scaled_dot_product_attention", "_scaled_dot_product_"
_ONE_BY_ONE = "_scaled_dot_product_attention_math"


@dataclass(frozen=True)
class Run:
    """One of them: the operator that computes it, and its kind (``product``, ``convolution``, ``attention``).

    ``given`` are the tensors that the outermost operator takes, ``kernels`` what runs on a GPU.
    """

    kind: str
    op: Op
    given: tuple[Operand, ...]
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
        """What two runs of one place have in common: kind and sizes of the second factor, however it lies."""
        return (self.kind, *(tuple(sorted(factor.shape)) for factor in self.factors[1:2]))


def runs(ops: Iterable[Op]) -> Iterator[Run]:
    """Those among ``ops`` and inside them, in order; of one inside another, the outer."""
    for op in ops:
        if kind := _kind(op):
            yield Run(kind, _working(op), op.inputs, tuple(op.all_kernels()))
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


def by_layer(found: Iterable[Run], module: nn.Module) -> dict[str, list[Run]]:
    """Runs of an eager call by layer; both products of an attention that is spelled out have its name."""
    keys = addresses(module)
    parts = dict(module.named_modules())
    named: dict[str, list[Run]] = defaultdict(list)
    for run in found:
        scope = run.op.scope
        part = parts.get(scope)
        own = isinstance(part, nn.Linear | QuantisedLinear | nn.modules.conv._ConvNd)
        name = _layer(run, keys)
        if isinstance(part, Fp8Attention) or run.kind == "attention":
            name = scope.removesuffix(".core")
        named[name or (scope if own else f"{scope}/{_plain(run.op)}")].append(run)
    return named


def as_before(found: Iterable[Run], before: dict[str, list[Run]], module: nn.Module) -> dict[str, list[Run]]:
    """Runs of a compiled call by the layers of the eager one; a layer that none is like has none."""
    keys = addresses(module)
    named: dict[str, list[Run]] = {name: [] for name in before}
    rest = []
    for run in found:
        name = _layer(run, keys)
        if name in named:
            named[name].append(run)
        else:
            rest.append(run)
    missing = defaultdict(list)
    for name, old in before.items():
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


def _layer(run: Run, keys: dict[int, str]) -> str:
    """The layer whose weight ``run`` takes; empty if it takes none as it is stored."""
    found = (keys.get(operand.address, "") for operand in (*run.factors, *run.given))
    weights = (key for key in found if key and not key.endswith(("bias", "scale", ".one")))
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
