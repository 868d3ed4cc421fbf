"""Weights to FP8 (E4M3) or INT8 per output channel, or to INT4 per block of one, some rows at a time.

The scale of a row or block is amax / 448, / 127 or / 7, rounded to the graph's compute type *first*; the
values are then divided by the rounded scale. So the bf16 graph and the fp32 graph, which read the same bytes,
dequantise to the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..dtypes import dtype_of
from ..errors import CheckpointError
from ..export.weight_store import StoredTensor
from .schemes import SCHEMES, block_size

if TYPE_CHECKING:
    import torch

LIMITS = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
"""Largest magnitude of a type's stored values; integers are symmetric, -128 and -8 are not used."""

LOWEST = {"fp8": -448.0, "int8": -128.0, "int4": -8.0}
"""Where QuantizeLinear saturates below: activations do use -128 and -8."""

CHUNK_VALUES = 1 << 22
"""Weights quantised at a time: 16 MiB in fp32, for tensors of every size."""


def stored_names(layer: str, scheme: str, base: str) -> tuple[str, str, str]:
    """Names in the weights store: the values, the scale in the base type, the same scale in float32."""
    weight = f"{layer}.weight"
    scale, scale32 = (f"{weight}.scale.{dtype_of(name).array}" for name in (base, "fp32"))
    return f"{weight}.{SCHEMES[scheme].weight}", scale, scale32


def stored_tensors(layer: str, scheme: str, base: str, shape: tuple[int, int]) -> tuple[StoredTensor, ...]:
    """Tensors that the quantised ``layer`` (weight [out, in]) has in the store.

    Two INT4 values share a byte, the first in the low bits, as in ONNX.
    """
    values, scale, scale32 = stored_names(layer, scheme, base)
    kind, scales = SCHEMES[scheme].weight, scale_shape(scheme, shape)
    packed = kind == "int4"
    return (
        StoredTensor(
            values,
            "uint8" if packed else dtype_of(kind).array,
            (shape[0], shape[1] // 2) if packed else shape,
        ),
        StoredTensor(scale, dtype_of(base).array, scales),
        StoredTensor(scale32, "float32", scales),
    )


def scale_shape(scheme: str, shape: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight [out, in]: [out], [out, blocks], or [] of the whole tensor."""
    if SCHEMES[scheme].per_tensor:
        return ()
    block = block_size(scheme, shape[1])
    return (shape[0], shape[1] // block) if block else shape[:1]


def round_scale(amax: torch.Tensor, kind: str, base: str) -> torch.Tensor:
    """``amax`` (fp32, any shape) -> fp32 scales that the base type holds exactly.

    Rows of zeros get scale 1; a scale too small for the base type's normal numbers (fp16 ends at 6.1e-5) is
    raised to the smallest, so that no division by zero or by a coarse subnormal follows.
    """
    import torch

    dtype = dtype_of(base).torch
    scale = (amax.float() / LIMITS[kind]).clamp_min(torch.finfo(dtype).tiny)
    scale = torch.where(amax > 0, scale, torch.ones_like(scale))
    return scale.to(dtype).float()


def activation_scale(amax: float, kind: str, base: str) -> float:
    """amax / 448 (fp8), / 127 (int8) or / 7 (int4), rounded to the base type as weights' scales are."""
    import torch

    return float(round_scale(torch.tensor(amax, dtype=torch.float32), kind, base))


def quantise_values(
    x: torch.Tensor, scale: torch.Tensor, kind: str, lowest: float | None = None
) -> torch.Tensor:
    """``x`` / ``scale``, rounded half to even and saturated, as float8_e4m3fn or int8 (of INT4 too).

    Negative values end at ``lowest``, which is :data:`LOWEST` for activations; None: at minus the limit.
    """
    import torch

    limit = LIMITS[kind]
    lowest = -limit if lowest is None else lowest
    scaled = x.float() / scale
    if kind == "fp8":  # torch's cast turns too large values into NaN, so saturate first
        return scaled.clamp_(lowest, limit).to(torch.float8_e4m3fn)
    return scaled.round_().clamp_(lowest, limit).to(torch.int8)


def quantise_rows(
    weight: torch.Tensor, scheme: str, base: str, name: str = "weight"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Quantise ``weight`` [out, in] a block of rows at a time.

    Yields:
        Values [rows, in] (float8_e4m3fn or int8; INT4 not packed yet) and scales [rows] or [rows, blocks]
        (fp32, exact in the base type); with one scale for the tensor, that for each row.

    Raises:
        CheckpointError: NaN or infinity in the weight.
    """
    import torch

    if scheme not in SCHEMES:
        raise ValueError(f"{scheme} quantises no weights")
    kind, block = SCHEMES[scheme].weight, block_size(scheme, weight.shape[1])
    step = max(1, CHUNK_VALUES // max(1, weight.shape[1]))
    starts = range(0, weight.shape[0], step)
    whole = torch.tensor(0.0)
    if SCHEMES[scheme].per_tensor:
        whole = torch.stack([weight[s : s + step].abs().amax().float() for s in starts]).amax()
    for start in starts:
        rows = weight[start : start + step].float()
        parts = rows.reshape(len(rows), -1, block) if block else rows
        amax = parts.abs().amax(-1)
        if not torch.isfinite(amax).all():
            row = start + int((~torch.isfinite(amax)).nonzero()[0, 0])
            raise CheckpointError(
                f"{name} holds NaN or infinity.",
                f"In output channel {row}.",
                "Check the checkpoint (a broken conversion to fp16, for example); it cannot be quantised.",
            )
        if SCHEMES[scheme].per_tensor:
            amax = whole.expand_as(amax)
        scale = round_scale(amax, kind, base)
        yield quantise_values(parts, scale[..., None], kind).reshape(rows.shape), scale


def quantise(weight: torch.Tensor, scheme: str, base: str = "bf16") -> tuple[torch.Tensor, torch.Tensor]:
    """The whole of ``weight`` [out, in]: values [out, in] and fp32 scales of :func:`scale_shape`."""
    import torch

    blocks = list(quantise_rows(weight, scheme, base))
    return torch.cat([b[0] for b in blocks]), _scales([b[1] for b in blocks], scheme)


def _scales(rows: list[torch.Tensor], scheme: str) -> torch.Tensor:
    """The scales of all rows; one, where they are the same."""
    import torch

    whole = torch.cat(rows)
    return whole[0] if SCHEMES[scheme].per_tensor else whole


def dequantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 weights from values [out, in], INT4 packed or not, and scales [out], [out, blocks] or []."""
    import torch

    if values.dtype == torch.uint8:
        values = unpack(values)
    if scale.dim() < 2:
        scale = scale.reshape(-1, 1)
    parts = values.float().reshape(*scale.shape, -1)
    return (parts * scale.float()[..., None]).reshape(values.shape)


def pack(values: torch.Tensor) -> torch.Tensor:
    """INT4 values [rows, in] (int8) as uint8 [rows, in / 2]."""
    import torch

    low, high = (values & 15).view(torch.uint8).reshape(len(values), -1, 2).unbind(2)
    packed: torch.Tensor = low | (high << 4)
    return packed


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack`."""
    import torch

    values = torch.stack((packed & 15, packed >> 4), 2).flatten(1).view(torch.int8)
    return torch.where(values > 7, values - 16, values)


Write = Callable[[str, "torch.Tensor"], None]
"""Appends rows of one stored tensor, named as in :func:`stored_names`."""


def quantise_layer(
    load: Callable[[str], torch.Tensor], write: Write, layer: str, scheme: str, base: str
) -> None:
    """Stream one layer: ``load`` gives its weight (memory-mapped: no copy), ``write`` takes blocks of rows.

    Blocks arrive in row order, values before scales of the same tensor; the two scale tensors arrive whole.
    """

    values_name, scale_name, scale32_name = stored_names(layer, scheme, base)
    scales = []
    name = f"{layer}.weight"
    for values, scale in quantise_rows(load(name), scheme, base, name):
        write(values_name, pack(values) if SCHEMES[scheme].weight == "int4" else values)
        scales.append(scale)
    whole = _scales(scales, scheme)
    write(scale_name, whole.to(dtype_of(base).torch))
    write(scale32_name, whole)
