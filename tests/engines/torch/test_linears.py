"""Quantised linears against the values that Q/DQ would multiply, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ivl_export.engines.torch.linears import (
    Fp8Linear,
    Int8Linear,
    Product,
    best_product,
    quantised_linear,
    rounded,
    row_ones,
)
from ivl_export.quantization.quantize import dequantise, pack, quantise
from ivl_export.quantization.schemes import SCHEMES

pytestmark = pytest.mark.numeric

SCALES = {"fp8": 4.0 / 448, "int8": 4.0 / 127, "w4a8": 4.0 / 127, "w4a4": 4.0 / 7}
SCALES |= {f"{kind}-tensor": SCALES[kind] for kind in ("fp8", "int8")}


def sample(scheme: str, rows: int, out: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, stored values, scales."""
    generator = torch.Generator().manual_seed(rows + out + width)
    x = torch.randn(rows, width, generator=generator)
    values, scale = quantise(torch.randn(out, width, generator=generator), scheme)
    return x, pack(values) if SCHEMES[scheme].weight == "int4" else values, scale


def exact(scheme: str, x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if scheme in SCALES:
        kind = SCHEMES[scheme].activation
        x = rounded(x, torch.tensor(SCALES[scheme]), kind).double() * SCALES[scheme]
    return x.double() @ dequantise(values, scale).double().T


@pytest.mark.parametrize("scheme", [*SCALES, "int8-weight", "int4-weight"])
@settings(max_examples=15)
@given(rows=st.integers(1, 40), out=st.integers(1, 5), width=st.integers(1, 5), bias=st.booleans())
def test_products_are_exact_in_fp32(scheme: str, rows: int, out: int, width: int, bias: bool) -> None:
    x, values, scale = sample(scheme, rows, 16 * out, 32 * width)
    added = torch.randn(16 * out) if bias else None
    layer = quantised_linear(scheme, values, scale, added, SCALES.get(scheme))
    want = exact(scheme, x, values, scale) + (0 if added is None else added.double())
    got = layer(x.reshape(1, rows, -1))
    assert got.shape == (1, rows, 16 * out)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want, atol=2e-5 * width, rtol=1e-5)


@pytest.mark.parametrize("value", [127, -127])
def test_int8_sums_do_not_saturate(value: int) -> None:
    """The largest products: kernels that add pairs of them in 16 bits would show here."""
    values, codes = (
        torch.full((16, 64), value, dtype=torch.int8),
        torch.tensor([[127.0], [-128.0]]).expand(2, 64),
    )
    layer = quantised_linear("int8", values, torch.ones(16), None, 1.0)
    assert torch.equal(layer(codes), torch.tensor([[127.0], [-128.0]]) * value * 64 * torch.ones(16))


@pytest.mark.parametrize("product", ["rowwise", "tensorwise", "restored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_way_to_multiply_fp8(product: Product, dtype: torch.dtype) -> None:
    x, values, scale = sample("fp8", 24, 48, 64)
    layer = Fp8Linear(values, scale, None, SCALES["fp8"], product)
    got, want = layer(x.to(dtype)), exact("fp8", x.to(dtype), values, scale)
    assert got.dtype == dtype
    cosine = torch.nn.functional.cosine_similarity(got.double().flatten(), want.flatten(), 0)
    assert cosine > (1 - 1e-6 if dtype == torch.float32 else 1 - 2e-5)


def test_fp16_sums_do_not_overflow() -> None:
    _, values, scale = sample("fp8", 4, 16, 320)
    layer = Fp8Linear(values, scale, None, SCALES["fp8"], "tensorwise")
    large = 3.9 * torch.sign(layer.values[0].float()).half()[None]
    got, want = layer(large), exact("fp8", large.float(), values, scale)
    assert float(rounded(large, layer.input_scale, "fp8").float() @ values[0].float()) * SCALES["fp8"] > 65504
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=0.1)


def test_values_out_of_range_saturate() -> None:
    big = torch.tensor([[1e9, -1e9, float(2**-20)]])
    assert rounded(big, torch.tensor(1.0), "fp8").float().tolist()[0][:2] == [448, -448]
    assert rounded(big, torch.tensor(1.0), "int8").tolist() == [[127, -128, 0]]
    assert rounded(big, torch.tensor(1.0), "int4").tolist() == [[7, -8, 0]]


def test_a_missing_scale_is_an_error() -> None:
    _, values, scale = sample("int8", 1, 16, 32)
    with pytest.raises(ValueError, match="needs the scale"):
        quantised_linear("int8", values, scale, None, None)
    assert "int8" in repr(Int8Linear(values, scale, None, 1.0))


def test_this_cpu_multiplies_fp8_values_themselves() -> None:
    assert best_product(torch.device("cpu")) in ("rowwise", "restored")
    assert best_product(torch.device("meta")) == "restored"


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operators that launch something, with their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view:
            names = [argument.name for argument in func._schema.arguments]
            named = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls.append((func.overloadpacket.__name__, named))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def a_gpus_shapes() -> Iterator[None]:
    """Tensors of a GPU that is not here: operators check their types and shapes, and compute nothing."""
    row_ones.cache_clear()
    torch._C._ensureCUDADeviceGuardSet()
    with FakeTensorMode():
        yield
    row_ones.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 257, 70_000])
def test_a_gpu_adds_no_kernel_for_scales_and_bias(a_gpus_shapes: None, dtype: torch.dtype, rows: int) -> None:
    values = torch.empty(64, 32, device="cuda").to(torch.float8_e4m3fn)
    scale, bias = torch.empty(64, device="cuda"), torch.empty(64, device="cuda", dtype=dtype)
    layer = Fp8Linear(values, scale, bias, 0.5, "rowwise")
    rounding, product = Launches(), Launches()
    x = torch.empty(1, rows, 32, device="cuda", dtype=dtype)
    with rounding:
        rounded(x, layer.input_scale, "fp8")
    with product:
        y = layer(x)
    assert (y.shape, y.dtype, y.device.type) == ((1, rows, 64), dtype, "cuda")
    after = product.calls[len(rounding.calls) :]
    if dtype == torch.bfloat16:
        made = ["new_ones"] * (rows > 1 << 16)
        assert [name for name, _ in after] == [*made, "_scaled_mm"]
        assert after[-1][1]["bias"] is bias
        assert after[-1][1]["scale_a"].shape == (rows, 1)
    else:  # a GPU's rowwise product gives bf16 only, and adds no other bias
        assert "_scaled_mm" in [name for name, _ in after]
        assert after[0][1].get("bias") is None
