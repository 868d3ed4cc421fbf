"""The torch backend on a GPU equals ONNX Runtime on the CPU: on every stream, compiled, from graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from ivl_export.arrays import Array
from ivl_export.bundle import Bundle
from ivl_export.engines.base import open_engine
from ivl_export.profiles.measure.inputs import random_inputs
from ivl_export.runtime import InternVL
from ivl_export.verify.torch import read_torch

WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "graphs": {"cuda_graphs": True},
    "compiled, graphs": {"compile": True, "cuda_graphs": True},
}
COSINE = {"fp32": 0.9999, "bf16": 0.995}
"""Against FP8 in ONNX Runtime: the products are the same, what is between them is in 16 bits."""


def cosine(one: Array, other: Array) -> float:
    a, b = (np.asarray(x, np.float64).ravel() for x in (one, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def reference(nano_fp8: Path) -> Iterator[InternVL]:
    with InternVL.load(nano_fp8, threads=2) as model:
        yield model


@pytest.mark.parametrize("dtype", list(COSINE))
@pytest.mark.parametrize("way", list(WAYS))
def test_every_call_equals_the_cpu(
    nano_fp8: Path, reference: InternVL, pictures: list[Array], way: str, dtype: str
) -> None:
    """In any order and at any batch: the shapes of one call are not those of the next."""
    with InternVL.load(nano_fp8, "torch", device="cuda", dtype=dtype, **WAYS[way]) as model:
        for rows in (8, 1, 3):
            for mode in ("InternVL-C", "InternVL-G"):
                want, got = (m.encode_image(pictures[:rows], mode=mode) for m in (reference, model))
                assert min(map(cosine, got, want)) > COSINE[dtype]
            want, got = (m.encode_text(["a red circle"] * rows) for m in (reference, model))
            assert min(map(cosine, got, want)) > COSINE[dtype]
            said = model.caption(pictures[:rows])
            assert len(said) == rows
            if dtype == "fp32":
                assert said == reference.caption(pictures[:rows])


@pytest.mark.parametrize("stream", ["none", "default", "legacy", "other"])
@pytest.mark.parametrize("way", ["eager", "graphs"])
def test_a_run_is_in_order_on_the_callers_stream(nano_fp8: Path, stream: str, way: str) -> None:
    bundle = Bundle.open(nano_fp8)
    spec = bundle.spec("vision")
    feeds = random_inputs(spec, {"batch": 4}, 0)
    with open_engine("torch", spec, nano_fp8, device="cuda", **WAYS[way]) as engine:
        want = engine.run(feeds)
        other = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        handle = {"none": None, "default": 0, "legacy": 1, "other": other.cuda_stream}[stream]
        place = other if stream == "other" else torch.cuda.current_stream()
        for _ in range(20):
            with torch.cuda.stream(place):
                late = {}
                for name, value in feeds.items():
                    buffer = torch.zeros(value.shape, device="cuda")
                    # The values come long after the run is enqueued.
                    torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
                    buffer.copy_(torch.from_numpy(value))
                    late[name] = buffer
                got = engine.run_tensors(late, stream=handle)
                values = {name: tensor.float().cpu().numpy() for name, tensor in got.items()}
            for name in want:
                np.testing.assert_allclose(values[name], want[name], atol=1e-5)


def test_outputs_are_written_where_the_caller_says(nano_fp8: Path) -> None:
    bundle = Bundle.open(nano_fp8)
    spec = bundle.spec("vision")
    feeds = random_inputs(spec, {"batch": 2}, 0)
    with open_engine("torch", spec, nano_fp8, device="cuda", dtype="fp32") as engine:
        want = engine.run_tensors(feeds)
        name = next(iter(want))
        mine = torch.zeros_like(want[name])
        got = engine.run_tensors(feeds, out={name: mine})
        assert got[name].data_ptr() == mine.data_ptr()
        torch.testing.assert_close(mine, want[name])


def test_two_threads_record_graphs_at_once(nano_fp8: Path, pictures: list[Array]) -> None:
    with InternVL.load(nano_fp8, "torch", device="cuda", cuda_graphs=True) as model:
        want = [model.encode_image(pictures[: n + 1]) for n in range(4)]
    with InternVL.load(nano_fp8, "torch", device="cuda", cuda_graphs=True) as model:
        got: dict[int, Array] = {}
        threads = [
            Thread(target=lambda n=n: got.update({n: model.encode_image(pictures[: n + 1])}))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for n in range(4):
        np.testing.assert_allclose(got[n], want[n], atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
def test_the_report_tells_products_in_8_bits(nano_fp8: Path, compile: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 products")
    bundle = Bundle.open(nano_fp8)
    feeds = random_inputs(bundle.spec("vision"), {"batch": 2}, 0)
    report, promised = read_torch(bundle, "vision", feeds, device="cuda", dtype="bf16", compile=compile)
    assert report.kernels > 0
    eight = [p.node for p in report.gemms if p.precision == "fp8xfp8"]
    assert len(eight) == len(promised), report.precisions
