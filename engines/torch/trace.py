"""Operators that one call of a module really executes, with their inner operators and kernels.

Torch's profiler records it: types, sizes and addresses of each operator's inputs. An operator without
a kernel shows those that it calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

MODULE = "module "
"""Ranges of :func:`named_ranges` are called by this and the module's name."""


_RUNTIME = re.compile(r"cuda[A-Z]|cu[A-Z]|Mem(cpy|set)\b")
"""Calls of CUDA's runtime and driver, and copies; kernels may be called ``cudnn_...`` or ``cutlass_...``."""
_EMITTED = "cpp_fused_"
"""In the names of the kernels that ``torch.compile`` writes for a CPU."""

_VIEWS = frozenset(
    {"_reshape_alias", "alias", "as_strided", "chunk", "contiguous", "detach", "empty", "empty_like"}
    | {"empty_strided", "expand", "expand_as", "flatten", "narrow", "permute", "reshape", "resolve_conj"}
    | {"resize_", "result_type", "select", "slice", "split", "squeeze", "t", "to", "transpose", "type_as"}
    | {"unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"}
)
"""Operators that by themselves only look at memory, or ask for it."""


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator takes; ``address`` is that of its storage, whichever view of it this is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    address: int


@dataclass(frozen=True)
class Op:
    """An operator of a call.

    Args:
        name: ``aten::mm``.
        scope: the module that was running; empty: the outermost, or unknown (compiled code has no modules).
        inputs: its tensors, in the order of its arguments.
        inner: the operators that it calls.
        kernels: kernels that it launched on a GPU itself.
    """

    name: str
    scope: str
    inputs: tuple[Operand, ...]
    inner: tuple[Op, ...]
    kernels: tuple[str, ...] = ()

    def all_kernels(self) -> Iterator[str]:
        """Kernels that it and its inner operators launch."""
        yield from self.kernels
        for op in self.inner:
            yield from op.all_kernels()

    @property
    def work(self) -> int:
        """How many operators in it compute or copy, on a GPU how many kernels it launches."""
        inner = sum(op.work for op in self.inner)
        own = len(self.kernels) or (not inner and self.name.removeprefix("aten::") not in _VIEWS)
        return inner + own


@contextmanager
def named_ranges(module: nn.Module) -> Iterator[None]:
    """Inside, the profiler records a range ``module <name>`` around the call of each part of ``module``."""
    open_ranges: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            open_ranges.append(record_function(f"{MODULE}{name}"))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            hooks.enter_context(part.register_forward_pre_hook(enter(name)))
            hooks.enter_context(part.register_forward_hook(leave))
        yield


def traced(call: Callable[[], object], device: torch.device) -> tuple[Op, ...]:
    """The operators of one ``call`` on ``device``. Call it once before: set-up is then not recorded."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.no_grad(), profile(activities=kinds, record_shapes=True) as recorded:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    return tuple(operators(recorded.profiler.kineto_results.experimental_event_tree()))


def operators(events: Sequence[Any], scope: str = "", inside: bool = False) -> Iterator[Op]:
    """The operators of ``events``; ranges are looked through.

    What is launched outside of operators (``inside`` is false), as compiled code does, is one by itself.
    """
    for event in events:
        kind, fields = event.typed
        if event.name.startswith(MODULE):
            yield from operators(event.children, event.name.removeprefix(MODULE), inside)
        elif kind.name == "TorchOp" and ("::" in event.name or _EMITTED in event.name):
            inputs = tuple(
                Operand(operand.dtype, tuple(operand.sizes), operand.storage_data_ptr)
                for operand in fields.inputs
                if hasattr(operand, "storage_data_ptr")
            )
            inner = tuple(operators(event.children, scope, inside=True))
            yield Op(event.name, scope, inputs, inner, tuple(_kernels(event.children)))
        elif not inside and kind.name == "Kineto" and _RUNTIME.match(event.name):
            yield from (Op(name, scope, (), (), (name,)) for name in _kernels(event.children))
        else:
            yield from operators(event.children, scope, inside)


def _kernels(events: Sequence[Any]) -> Iterator[str]:
    """Kernels of a GPU below ``events``, not below their operators."""
    for event in events:
        if event.typed[0].name == "TorchOp":
            continue
        # The calls of the runtime that launch a kernel are its parents, and are recorded alike.
        if event.typed[0].name == "Kineto" and not _RUNTIME.match(event.name):
            yield event.name
        yield from _kernels(event.children)
