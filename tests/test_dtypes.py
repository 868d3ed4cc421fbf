"""The table of element types agrees with the libraries whose names it gives."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ivl_export.dtypes import COMPUTE, TABLE, DType, dtype_of, find_dtype, name_of_torch


@pytest.mark.parametrize("dtype", TABLE, ids=lambda d: d.name)
def test_every_spelling_names_one_type(dtype: DType) -> None:
    names: set[str | int] = {
        dtype.name,
        dtype.array,
        dtype.safetensors,
        dtype.onnx,
        dtype.onnx_number,
        dtype.tensorrt,
    }
    assert {dtype_of(name) for name in names - {""}} == {dtype}


@pytest.mark.parametrize("dtype", TABLE, ids=lambda d: d.name)
def test_numpy_and_onnx_have_it(dtype: DType) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("ml_dtypes")
    assert onnx.TensorProto.DataType.Value(dtype.onnx) == dtype.onnx_number
    assert onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx_number) == dtype.numpy
    assert dtype.numpy.itemsize == max(1, dtype.bits // 8)


@pytest.mark.parametrize("dtype", [d for d in TABLE if d.safetensors], ids=lambda d: d.name)
def test_torch_and_safetensors_have_it(dtype: DType) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    header = save({"x": torch.zeros(3, dtype=dtype.torch)})
    assert f'"dtype":"{dtype.safetensors}"'.encode() in header
    assert dtype.torch.itemsize == dtype.nbytes(1) == dtype.bits // 8
    assert name_of_torch(dtype.torch) == dtype.name


def test_what_is_not_in_the_table() -> None:
    torch = pytest.importorskip("torch")
    assert find_dtype("") is None
    assert find_dtype("float") is None
    assert find_dtype(0) is None
    assert name_of_torch(torch.complex64) == "complex64"
    with pytest.raises(KeyError):
        dtype_of("fp7")


def test_two_values_of_4_bits_share_a_byte() -> None:
    assert [dtype_of("int4").nbytes(n) for n in range(4)] == [0, 1, 1, 2]
    assert dtype_of("fp32").numpy == np.float32
    assert set(COMPUTE) <= {d.name for d in TABLE}


def test_importing_the_table_loads_neither_numpy_nor_torch() -> None:
    code = "import sys; import ivl_export.dtypes; sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
