"""Products of 16-bit values that are computed in fp32 are those of 16-bit arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ivl_export.training.products import ProductsInFp32

DTYPES = (torch.bfloat16, torch.float16)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight, bias = (drawn(*shape).to(dtype) for shape in ((3, 40), (24, 40), (24,)))
    with ProductsInFp32():
        got = torch.nn.functional.linear(x, weight, bias)
        named = F.linear(x, weight, bias=bias)
    assert got.dtype == dtype
    want = F.linear(x.double(), weight.double(), bias.double())
    assert_rounded_once(got, want)
    torch.testing.assert_close(named, got, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_of_an_optimizer(dtype: torch.dtype) -> None:
    a, b = drawn(24, 40).to(dtype), drawn(40, 24).to(dtype)
    with ProductsInFp32():
        product, update = a @ a.T, torch.addmm(b, b, a @ b, beta=3.4, alpha=-2)
        inner = a @ b
    assert_rounded_once(product, a.double() @ a.double().T)
    assert_rounded_once(update, 3.4 * b.double() - 2 * b.double() @ inner.double())


def assert_rounded_once(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within half a unit in the last place of ``got``'s type, and the noise of sums in fp32."""
    place = torch.finfo(got.dtype).eps * want.abs()
    assert ((got.double() - want).abs() <= 0.5 * place + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_takes_masks_and_flags_as_before(dtype: torch.dtype) -> None:
    q, k, v = drawn(1, 4, 5, 8).to(dtype), drawn(1, 2, 5, 8).to(dtype), drawn(1, 2, 5, 8).to(dtype)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with ProductsInFp32():
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        biased = F.scaled_dot_product_attention(q, k, v, mask.to(dtype).log(), enable_gqa=True)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
    for got in (masked, causal, biased):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_fp32_and_other_operators_are_left_alone() -> None:
    x, weight = drawn(3, 8), drawn(4, 8)
    plain, sums = F.linear(x, weight), x.bfloat16() + 1
    with ProductsInFp32():
        torch.testing.assert_close(F.linear(x, weight), plain, rtol=0, atol=0)
        torch.testing.assert_close(x.bfloat16() + 1, sums, rtol=0, atol=0)
