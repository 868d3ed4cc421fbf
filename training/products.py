"""16-bit arithmetic that is fast on any CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_NARROW = (torch.bfloat16, torch.float16)
_PRODUCTS = (F.linear, F.scaled_dot_product_attention, torch.addmm, torch.Tensor.__matmul__)


class ProductsInFp32(TorchFunctionMode):
    """Inside, products of 16-bit values in the CPU's memory are computed in fp32, and rounded once.

    These are linear layers, attentions, ``addmm`` and ``@``. Sums are in fp32 without it too, so only the
    order of additions differs. A CPU without 16-bit instructions takes ten times as long for the product of
    16-bit matrices as for one of fp32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls ``func``, with 16-bit tensors widened where it is a product."""
        options = dict(kwargs or {})
        if func not in _PRODUCTS or not _is_narrow(args[0]):
            return func(*args, **options)
        dtype = args[0].dtype
        wide = {key: value.float() if _is_narrow(value) else value for key, value in options.items()}
        result: torch.Tensor = func(*(x.float() if _is_narrow(x) else x for x in args), **wide)
        return result.to(dtype)


def _is_narrow(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in _NARROW and x.device.type == "cpu"
