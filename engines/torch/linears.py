"""Quantised linear layers from stored values and scales: a graph's Q/DQ pairs in torch's kernels.

``x`` is rounded with the one scale of the layer's input, the product is taken of 8-bit values, and the result
takes both scales: ``y[m, n] = (sum_k xq[m, k] wq[n, k]) * sx * sw[n] + b[n]``. Weight-only schemes leave
``x`` alone and multiply by the restored weight.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...quantization.quantize import LOWEST, dequantise, quantise_values, unpack
from ...quantization.schemes import SCHEMES

Product = Literal["rowwise", "tensorwise", "restored"]
"""How FP8 values are multiplied: by ``torch._scaled_mm``, which applies the weight's scales itself
(``rowwise``) or leaves them for a multiplication after it (``tensorwise``); or as values restored to the
compute type."""

_MOST_ROWS = 1 << 16
"""Rows whose scales are in memory: 255 images of 257 tokens."""
_MIN_ROWS = 17
"""Rows that ``torch._int_mm`` needs on a GPU; fewer are padded."""


class QuantisedLinear(nn.Module):
    """The replacement of an ``nn.Linear``; :func:`quantised_linear` makes one.

    Args:
        values: the stored weight, [out, in] (INT4: two values a byte).
        scale: fp32 [out], [out, blocks], or [] of the whole weight.
        bias: in the compute type, or None.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale if scale.dim() else scale.repeat(values.shape[0]))
        self.register_buffer("bias", bias)

    def extra_repr(self) -> str:
        """Shown in the module's representation."""
        return f"{list(self.values.shape)} {self.values.dtype}, bias={self.bias is not None}"


class Fp8Linear(QuantisedLinear):
    """FP8 (E4M3) times FP8.

    Args:
        values, scale, bias: see :class:`QuantisedLinear`.
        input_scale: of ``x``.
        product: see :data:`Product`; None: the best that the tensors' device has.
        fast_accumulation: let the tensor cores sum in their own, shorter format; TensorRT does so too.
    """

    input_scale: Tensor
    factor: Tensor
    ones: Tensor

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_scale: float,
        product: Product | None = None,
        fast_accumulation: bool = True,
    ) -> None:
        super().__init__(values, scale, bias)
        self.register_buffer("input_scale", torch.tensor(input_scale, device=values.device))
        # The input's scale is taken with the weight's: a scale for each row would be one kernel more a layer.
        self.register_buffer("factor", (self.scale * input_scale).unsqueeze(0), persistent=False)
        self.register_buffer("ones", row_ones(values.device), persistent=False)
        self.product: Product = product or best_product(values.device)
        self.fast_accumulation = fast_accumulation and values.device.type == "cuda"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], same dtype."""
        rows = rounded(x, self.input_scale, "fp8").reshape(-1, x.shape[-1])
        bias = self.bias
        # On a GPU the rowwise product gives bf16 only.
        rowwise = self.product == "rowwise" and (x.dtype == torch.bfloat16 or not x.is_cuda)
        if self.product == "restored":
            y = F.linear(
                restored(rows, self.input_scale, x.dtype), dequantise(self.values, self.scale).to(x.dtype)
            )
        elif rowwise:
            # Added in the product a bias costs neither a pass nor a rounding; GPUs do so in bf16 only.
            inside, bias = (bias, None) if x.is_cuda else (None, bias)
            y = torch._scaled_mm(
                rows,
                self.values.t(),
                scale_a=self._ones_of(rows.shape[0]),
                scale_b=self.factor,
                bias=inside,
                out_dtype=x.dtype,
                use_fast_accum=self.fast_accumulation,
            )
        else:
            y = torch._scaled_mm(
                rows,
                self.values.t(),
                scale_a=self.input_scale,
                scale_b=self.ones.select(0, 0).squeeze(0),
                # Without the weight's scales sums reach hundreds of times their size: too large for fp16.
                out_dtype=torch.float32 if x.dtype == torch.float16 else x.dtype,
                use_fast_accum=self.fast_accumulation,
            )
            y = (y * self.scale).to(x.dtype)
        y = y if bias is None else y + bias
        return y.reshape(*x.shape[:-1], -1)

    def _ones_of(self, rows: int) -> Tensor:
        """[rows, 1]: a view, which no kernel makes, unless there are more than :data:`_MOST_ROWS`."""
        return self.ones.narrow(0, 0, rows) if rows <= _MOST_ROWS else self.ones.new_ones(rows, 1)


class Int8Linear(QuantisedLinear):
    """INT8 times INT8, summed in 32 bits. INT4 values are unpacked first: torch multiplies none as they are.

    Args:
        values, scale, bias: see :class:`QuantisedLinear`.
        input_scale: of ``x``.
        kind: the type ``x`` is rounded to, ``int8`` or ``int4``.
    """

    factor: Tensor
    input_scale: Tensor

    def __init__(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, input_scale: float, kind: str = "int8"
    ) -> None:
        super().__init__(values, scale, bias)
        self.register_buffer("input_scale", torch.tensor(input_scale, device=values.device))
        self.register_buffer("factor", self.scale * input_scale)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], same dtype."""
        rows = rounded(x, self.input_scale, self.kind).reshape(-1, x.shape[-1])
        values = unpack(self.values) if self.values.dtype == torch.uint8 else self.values
        count = rows.shape[0]
        if x.is_cuda and count < _MIN_ROWS:
            rows = F.pad(rows, (0, 0, 0, _MIN_ROWS - count))
        y = torch._int_mm(rows, values.t())[:count] * self.factor
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


class RestoredLinear(QuantisedLinear):
    """A weight stored in 8 or 4 bits and restored for every product, which runs in the compute type."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], same dtype."""
        return F.linear(x, dequantise(self.values, self.scale).to(x.dtype), self.bias)


def quantised_linear(
    scheme: str,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: float | None,
    product: Product | None = None,
) -> QuantisedLinear:
    """The layer of ``scheme`` (:data:`~ivl_export.quantization.schemes.SCHEMES`).

    ``input_scale`` is needed where the scheme rounds the layer's input; ``product`` is of FP8 layers.
    """
    if not SCHEMES[scheme].activation:
        return RestoredLinear(values, scale, bias)
    if input_scale is None:
        raise ValueError(f"{scheme} needs the scale of the layer's input")
    kind = SCHEMES[scheme].activation
    if kind == "fp8":
        return Fp8Linear(values, scale, bias, input_scale, product)
    return Int8Linear(values, scale, bias, input_scale, kind)


@cache
def row_ones(device: torch.device) -> Tensor:
    """The scales of rows whose values have none of their own, [:data:`_MOST_ROWS`, 1], once for a device."""
    return torch.ones(_MOST_ROWS, 1, device=device)


def rounded(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """QuantizeLinear: ``x / scale`` rounded half to even and saturated, as float8_e4m3fn or int8."""
    return quantise_values(x, scale, kind, LOWEST[kind])


def restored(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """DequantizeLinear of a whole tensor with one scale."""
    return (values.float() * scale).to(dtype)


def best_product(device: torch.device) -> Product:
    """The best method for FP8 products on this device.

    Tensor cores take FP8 from compute capability 8.9 on, with scales of rows from 9.0 on; a CPU where this
    torch has the kernel.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "rowwise" if capability >= (9, 0) else "tensorwise" if capability >= (8, 9) else "restored"
    return "rowwise" if device.type == "cpu" and _cpu_has_fp8() else "restored"


@cache
def _cpu_has_fp8() -> bool:
    values = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = torch._scaled_mm(
                values, values.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32
            )
    except (RuntimeError, NotImplementedError):
        return False
    return bool((got == 16).all())
