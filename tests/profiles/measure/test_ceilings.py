"""Ceilings and the floors under them, by hand; and that this machine's can be measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ivl_export.profiles.measure.ceilings import CPU, Ceilings, floor_of, measure_ceilings
from ivl_export.profiles.measure.device_timing import has_gpu
from ivl_export.profiles.measure.timing import StopRule
from ivl_export.tests.profiles.made_profiles import CEILINGS, made_case, made_cost


def test_a_type_without_kernels_is_held_to_the_one_in_its_place() -> None:
    ort = {kind: CEILINGS.gflops("onnxruntime", kind) for kind in ("fp32", "bf16", "fp8", "int8", "int4")}
    assert ort == {"fp32": 100.0, "bf16": 100.0, "fp8": 100.0, "int8": 400.0, "int4": 100.0}
    assert CEILINGS.gflops("PyTorch", "bf16") == CEILINGS.gflops("torch", "fp8") == 200.0
    gpu = replace(CEILINGS, device="NVIDIA L40S")
    assert gpu.gflops("tensorrt", "fp8") is None  # not measured there, and no other is taken


def test_small_copies_are_held_to_the_caches() -> None:
    assert [CEILINGS.gbps(n << 20) for n in (0, 1, 15, 16, 300)] == [100.0, 100.0, 100.0, 50.0, 20.0]
    assert Ceilings(CPU, (), ()).gbps(1) is None


def test_a_floor_by_hand() -> None:
    cost = made_cost()  # 110 MMAC in fp8, 14,000 bytes
    floor = floor_of(made_case(), [cost], CEILINGS)
    assert floor is not None
    assert floor.compute_ms == pytest.approx(2 * 110e6 / 100e9 * 1e3)
    assert floor.memory_ms == pytest.approx(14_000 / 100e9 * 1e3)
    assert (floor.ms, floor.bound) == (floor.compute_ms, "compute")
    twice = replace(made_case(), calls=(replace(made_case().calls[0], count=2),))
    doubled = floor_of(twice, [cost], CEILINGS)
    assert doubled is not None
    assert doubled.ms == pytest.approx(2 * floor.ms)
    large = replace(cost, weight_bytes=10 << 30)
    slow = floor_of(made_case(), [large], CEILINGS)
    assert slow is not None
    assert slow.bound == "memory"
    assert slow.ms == pytest.approx(large.bytes / 20e9 * 1e3)


def test_no_floor_without_all_of_its_parts() -> None:
    assert floor_of(made_case(), [made_cost("other")], CEILINGS) is None
    assert floor_of(replace(made_case(), calls=()), [made_cost()], CEILINGS) is None
    assert floor_of(made_case(), [made_cost()], replace(CEILINGS, products=())) is None
    assert floor_of(made_case(), [made_cost()], replace(CEILINGS, copies=())) is None


@pytest.mark.slow
def test_this_machine() -> None:
    ceilings = measure_ceilings(threads=1, rule=StopRule(seconds=0.02, min_samples=2))
    assert ceilings.device == CPU
    assert {product.kind for product in ceilings.products} == {"fp32", "int8", "bf16"}
    assert all(product.gflops > 0.1 for product in ceilings.products)
    assert all(copied.gbps > 0.01 for copied in ceilings.copies)
    assert ceilings.notes == ()


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_its_ceilings_are_said_to_be_missing() -> None:
    ceilings = measure_ceilings(gpu=True)
    assert not ceilings.products
    assert not ceilings.copies
    assert "torch finds none" in ceilings.notes[0]
