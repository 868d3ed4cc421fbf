"""Weights to FP8 (E4M3) or INT8, per output channel, a block of rows at a time.

The scale of a row is amax / 448 or amax / 127, rounded to the graph's compute type *first*; the row is then
divided by the rounded scale. So the bf16 graph and the fp32 graph, which read the same bytes, dequantise to
the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..export.weights import StoredTensor
from .schemes import SCHEMES

if TYPE_CHECKING:
    import torch

LIMITS = {"fp8": 448.0, "int8": 127.0}
"""Largest magnitude of a scheme's stored values; INT8 is symmetric, -128 is not used."""

BASE_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

CHUNK_VALUES = 1 << 22
"""Weights quantised at a time: 16 MiB in fp32, whatever the size of the tensor."""


def stored_names(layer: str, scheme: str, base: str) -> tuple[str, str, str]:
    """Names in the weights store: the values, the scale in the base type, the same scale in float32."""
    base_dtype = BASE_DTYPES[base]
    weight = f"{layer}.weight"
    return f"{weight}.{scheme}", f"{weight}.scale.{base_dtype}", f"{weight}.scale.float32"


def stored_tensors(layer: str, scheme: str, base: str, shape: tuple[int, int]) -> tuple[StoredTensor, ...]:
    """What quantising ``layer`` (weight [out, in]) puts into the store."""
    values, scale, scale32 = stored_names(layer, scheme, base)
    return (
        StoredTensor(values, "float8_e4m3fn" if scheme == "fp8" else "int8", shape),
        StoredTensor(scale, BASE_DTYPES[base], shape[:1]),
        StoredTensor(scale32, "float32", shape[:1]),
    )


def round_scale(amax: torch.Tensor, scheme: str, base: str) -> torch.Tensor:
    """``amax`` (fp32, any shape) -> fp32 scales that the base type holds exactly.

    Rows of zeros get scale 1; a scale too small for the base type's normal numbers (fp16 ends at 6.1e-5) is
    raised to the smallest, so that no division by zero or by a coarse subnormal follows.
    """
    import torch

    dtype = getattr(torch, BASE_DTYPES[base])
    scale = (amax.float() / LIMITS[scheme]).clamp_min(torch.finfo(dtype).tiny)
    scale = torch.where(amax > 0, scale, torch.ones_like(scale))
    return scale.to(dtype).float()


def quantise_values(x: torch.Tensor, scale: torch.Tensor, scheme: str) -> torch.Tensor:
    """``x`` / ``scale``, rounded half to even and saturated, as float8_e4m3fn or int8."""
    import torch

    limit = LIMITS[scheme]
    scaled = x.float() / scale
    if scheme == "fp8":  # torch's cast turns what is too large into NaN, so saturate first
        return scaled.clamp_(-limit, limit).to(torch.float8_e4m3fn)
    return scaled.round_().clamp_(-limit, limit).to(torch.int8)


def quantise_rows(
    weight: torch.Tensor, scheme: str, base: str, name: str = "weight"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Quantise ``weight`` [out, in] a block of rows at a time.

    Yields:
        Values [rows, in] (float8_e4m3fn or int8) and scales [rows] (fp32, exact in the base type).

    Raises:
        CheckpointError: NaN or infinity in the weight.
    """
    import torch

    if scheme not in SCHEMES:
        raise ValueError(f"{scheme} stores no 8-bit weights")
    step = max(1, CHUNK_VALUES // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float()
        amax = rows.abs().amax(1)
        if not torch.isfinite(amax).all():
            row = start + int((~torch.isfinite(amax)).nonzero()[0])
            raise CheckpointError(
                f"{name} holds NaN or infinity.",
                f"In output channel {row}.",
                "Check the checkpoint (a broken conversion to fp16, for example); it cannot be quantised.",
            )
        scale = round_scale(amax, scheme, base)
        yield quantise_values(rows, scale[:, None], scheme), scale


def quantise(weight: torch.Tensor, scheme: str, base: str = "bf16") -> tuple[torch.Tensor, torch.Tensor]:
    """The whole of ``weight`` [out, in]: values [out, in] and fp32 scales [out]."""
    import torch

    blocks = list(quantise_rows(weight, scheme, base))
    return torch.cat([b[0] for b in blocks]), torch.cat([b[1] for b in blocks])


def dequantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 weights from values [out, in] and scales [out]."""
    return values.float() * scale.float()[:, None]


Write = Callable[[str, "torch.Tensor"], None]
"""Appends rows of one stored tensor, named as in :func:`stored_names`."""


def quantise_layer(
    read: Callable[[str], torch.Tensor], write: Write, layer: str, scheme: str, base: str
) -> None:
    """Stream one layer: ``read`` gives its weight (memory-mapped: no copy), ``write`` takes blocks of rows.

    Blocks arrive in row order, values before scales of the same tensor; the two scale tensors arrive whole.
    """
    import torch

    values_name, scale_name, scale32_name = stored_names(layer, scheme, base)
    scales = []
    name = f"{layer}.weight"
    for values, scale in quantise_rows(read(name), scheme, base, name):
        write(values_name, values)
        scales.append(scale)
    whole = torch.cat(scales)
    write(scale_name, whole.to(getattr(torch, BASE_DTYPES[base])))
    write(scale32_name, whole)
