"""One table of the element types of tensors: their names in this package, numpy, torch, files and engines.

numpy and torch are not imported here: :attr:`DType.numpy` and :attr:`DType.torch` look a type up on use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch


@dataclass(frozen=True)
class DType:
    """An element type.

    Args:
        name: its name in this package: recipes, receipts, options and messages: ``fp8``.
        array: its name in numpy (with ml_dtypes) and torch: ``float8_e4m3fn``.
        safetensors: its name in safetensors headers: ``F8_E4M3``; empty where the format has none.
        onnx: its name among ONNX' ``TensorProto.DataType``: ``FLOAT8E4M3FN``.
        onnx_number: its number there: 17.
        tensorrt: its name among TensorRT's ``DataType``: ``FP8``; empty where it has none.
        bits: the size of one element.
    """

    name: str
    array: str
    safetensors: str
    onnx: str
    onnx_number: int
    tensorrt: str
    bits: int

    def nbytes(self, count: int) -> int:
        """Bytes of ``count`` elements; two of 4 bits share one."""
        return -(-count * self.bits // 8)

    @property
    def numpy(self) -> numpy.dtype[Any]:
        """numpy's type; of those that it lacks, ml_dtypes'."""
        import numpy

        try:
            dtype: numpy.dtype[Any] = numpy.dtype(self.array)
        except TypeError:
            import ml_dtypes

            dtype = numpy.dtype(getattr(ml_dtypes, self.array))
        return dtype

    @property
    def torch(self) -> torch.dtype:
        """torch's type; AttributeError for the 4-bit types, which torch does not compute with."""
        import torch

        dtype: torch.dtype = getattr(torch, self.array)
        return dtype


TABLE = (
    #     name        array            safetensors ONNX                  TensorRT  bits
    DType("fp64",     "float64",       "F64",     "DOUBLE",       11, "",      64),
    DType("fp32",     "float32",       "F32",     "FLOAT",         1, "FLOAT", 32),
    DType("fp16",     "float16",       "F16",     "FLOAT16",      10, "HALF",  16),
    DType("bf16",     "bfloat16",      "BF16",    "BFLOAT16",     16, "BF16",  16),
    DType("fp8",      "float8_e4m3fn", "F8_E4M3", "FLOAT8E4M3FN", 17, "FP8",    8),
    DType("fp8_e5m2", "float8_e5m2",   "F8_E5M2", "FLOAT8E5M2",   19, "",       8),
    DType("int64",    "int64",         "I64",     "INT64",         7, "INT64", 64),
    DType("int32",    "int32",         "I32",     "INT32",         6, "INT32", 32),
    DType("int8",     "int8",          "I8",      "INT8",          3, "INT8",   8),
    DType("uint8",    "uint8",         "U8",      "UINT8",         2, "UINT8",  8),
    DType("int4",     "int4",          "",        "INT4",         22, "INT4",   4),
    DType("uint4",    "uint4",         "",        "UINT4",        21, "",       4),
    DType("bool",     "bool",          "BOOL",    "BOOL",          9, "BOOL",   8),
)  # fmt: skip
"""Every type that this package reads, writes or names; ``fp8`` is E4M3 without infinities."""

COMPUTE = ("fp32", "bf16", "fp16")
"""Types that graphs compute in where nothing is quantised."""

_SPELLINGS: dict[str | int, DType] = {
    spelling: dtype
    for dtype in TABLE
    for spelling in (
        dtype.name, dtype.array, dtype.safetensors, dtype.onnx, dtype.onnx_number, dtype.tensorrt
    )
    if spelling != ""
}  # fmt: skip


def find_dtype(spelling: str | int) -> DType | None:
    """The type of that name or ONNX number, in any of the table's spellings; None if there is none."""
    return _SPELLINGS.get(spelling)


def dtype_of(spelling: str | int) -> DType:
    """As :func:`find_dtype`; KeyError if there is no such type."""
    return _SPELLINGS[spelling]


def name_of_torch(dtype: torch.dtype) -> str:
    """This package's name of a torch type; torch's own where the table has none."""
    spelling = str(dtype).removeprefix("torch.")
    known = find_dtype(spelling)
    return known.name if known else spelling
