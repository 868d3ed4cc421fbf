"""Buffers: read in place through DLPack, outputs bound, the same values as on host arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.engines.base import open_engine
from ivl_export.engines.chain import ChainedEngine
from ivl_export.engines.cuda_graphs import WARM_CALLS, capture
from ivl_export.engines.device import (
    as_tensor,
    concatenate,
    deliver,
    off_default_stream,
    on_stream,
    to_host,
)
from ivl_export.engines.onnxruntime.providers import placement
from ivl_export.errors import CapabilityError, InputError, UsageError

if TYPE_CHECKING:
    import torch

    from .conftest import Make
else:
    torch = pytest.importorskip("torch")


class OnlyDLPack:
    """An array of another library."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.shape = tensor, tuple(tensor.shape)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tensor.__dlpack__(*args, **kwargs)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def test_buffers_are_read_in_place() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    array = tensor.numpy()
    for buffer in (tensor, array, OnlyDLPack(tensor), torch.nn.Parameter(tensor)):
        assert as_tensor(buffer).data_ptr() == tensor.data_ptr()
        assert to_host(buffer).ctypes.data == tensor.data_ptr()


def test_what_cannot_be_read_in_place_is_copied_or_refused() -> None:
    frozen = np.arange(4.0, dtype=np.float32)
    frozen.flags.writeable = False
    copy = as_tensor(frozen[::-1])
    np.testing.assert_array_equal(copy.numpy(), frozen[::-1])
    assert to_host(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    with pytest.raises(InputError, match="str cannot be read"):
        as_tensor("no array")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        as_tensor(np.array(["a"], object))
    if not torch.cuda.is_available():
        with pytest.raises(CapabilityError, match="torch cannot use cuda"):
            as_tensor(np.zeros(1), "cuda")


def test_deliver_fills_the_buffers_it_is_given() -> None:
    calls = {"y": torch.arange(4.0), "z": torch.ones(1)}
    target = torch.zeros(4, dtype=torch.bfloat16)
    got = deliver(calls, {"y": target})
    assert got["y"].data_ptr() == target.data_ptr()
    assert got["z"] is calls["z"]
    assert target.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="wrong shape"):
        deliver(calls, {"y": torch.zeros(5)})
    with pytest.raises(InputError, match="no output"):
        deliver(calls, {"x": target})
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        deliver(calls, {"y": frozen})


def test_concatenate_keeps_the_kind() -> None:
    assert isinstance(concatenate([np.ones(1), np.ones(2)]), np.ndarray)
    assert concatenate([torch.ones(1), torch.ones(2)]).tolist() == [1, 1, 1]


def test_onnxruntime_runs_on_tensors_and_into_bound_buffers(make: Make) -> None:
    sample = make("mlp")
    x = np.random.default_rng(1).standard_normal((3, 5, 64)).astype(np.float32)
    with open_engine("onnxruntime", sample.spec, sample.path, threads=1) as engine:
        assert engine.device == "cpu"
        want = engine.run({"x": x})["y"]
        for buffer in (torch.from_numpy(x), OnlyDLPack(torch.from_numpy(x)), x, torch.from_numpy(x).double()):
            np.testing.assert_array_equal(engine.run_tensors({"x": buffer})["y"].numpy(), want)
        bound = torch.empty(want.shape)
        got = engine.run_tensors({"x": torch.from_numpy(x)}, ["y"], out={"y": bound})["y"]
        assert got.data_ptr() == bound.data_ptr()
        np.testing.assert_array_equal(bound.numpy(), want)
        # A buffer that the session cannot write itself, and one in numpy.
        half = torch.empty(want.shape, dtype=torch.float16)
        engine.run_tensors({"x": x}, out={"y": half})
        np.testing.assert_array_equal(half.numpy(), want.astype(np.float16))
        array = np.empty_like(want)
        engine.run_tensors({"x": x}, out={"y": array})
        np.testing.assert_array_equal(array, want)
        with pytest.raises(InputError, match="wrong shape"):
            engine.run_tensors({"x": x}, out={"y": torch.empty(2)})
        with pytest.raises(UsageError, match="no output 'z'"):
            engine.run_tensors({"x": x}, ["z"])
        with pytest.raises(InputError):
            engine.run_tensors({"x": x[0]})


def test_a_chain_hands_tensors_on_and_binds_the_last_output() -> None:
    shape = ("batch", "text", 64)
    axes = (Axis("batch", 1, 2, 4), Axis("text", 1, 5, 8))

    def spec(name: str, inputs: str, outputs: str) -> ComponentSpec:
        one = (TensorSpec(inputs, "float", shape),)
        return ComponentSpec(name, one, (TensorSpec(outputs, "float", shape),), axes)

    class Shift:
        """An engine that adds one, as tensors or arrays come."""

        device = "cpu"

        def __init__(self, own: ComponentSpec) -> None:
            self.spec, self.seen = own, 0
            self.names = own.inputs[0].name, own.outputs[0].name

        def run(self, inputs: Any, outputs: Any = None) -> Any:
            return {self.names[1]: inputs[self.names[0]] + 1}

        def run_tensors(
            self, inputs: Any, outputs: Any = None, *, out: Any = None, stream: Any = None
        ) -> Any:
            self.seen = inputs[self.names[0]].data_ptr()
            return deliver({self.names[1]: inputs[self.names[0]] + 1}, out)

        def close(self) -> None: ...

    first, last = Shift(spec("c.0", "x", "h")), Shift(spec("c.1", "h", "y"))
    chain = ChainedEngine(spec("c", "x", "y"), [first, last])  # type: ignore[list-item]
    x, bound = torch.zeros(2, 3, 64), torch.empty(2, 3, 64)
    got = chain.run_tensors({"x": x}, out={"y": bound})
    assert first.seen == x.data_ptr()
    assert got["y"].data_ptr() == bound.data_ptr()
    assert bool((bound == 2).all())
    np.testing.assert_array_equal(chain.run({"x": x.numpy()})["y"], bound.numpy())


def test_placements(make: Make) -> None:
    spec = make("mlp").spec
    assert placement(spec).providers() == [("CPUExecutionProvider", {})]
    cuda = placement(spec, "cuda:1", stream=7)
    assert cuda.device == "cuda:1"
    assert cuda.providers()[0] == (
        "CUDAExecutionProvider",
        {"device_id": "1", "has_user_compute_stream": "1", "user_compute_stream": "7", "use_tf32": "0"},
    )
    rt = placement(spec, provider="tensorrt", cache=Path("c"), options={"trt_max_workspace_size": "1"})
    names = [name for name, _ in rt.providers()]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    options = rt.providers()[0][1]
    assert options["trt_max_workspace_size"] == "1"
    assert options["trt_engine_cache_path"] == "c"
    smallest = "x".join(map(str, spec.shape(spec.inputs[0], "min")))
    assert options["trt_profile_min_shapes"] == f"{spec.inputs[0].name}:{smallest}"
    for wrong in (("tpu", None), ("cpu", "cuda"), ("cuda", "cpu"), ("cuda:x", None)):
        with pytest.raises(UsageError):
            placement(spec, *wrong)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there(make: Make, provider: str) -> None:
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has it")
    sample = make("mlp")
    with pytest.raises(CapabilityError) as caught:
        open_engine("onnxruntime", sample.spec, sample.path, provider=provider)
    assert "ivl-export[gpu]" in caught.value.fix


def test_fp8_is_not_for_the_tensorrt_provider(make: Make) -> None:
    sample = make("vit", scheme="fp8")
    with pytest.raises(CapabilityError, match="does not run the FP8 products of") as caught:
        open_engine("onnxruntime", sample.spec, sample.path, provider="tensorrt")
    assert "--backend tensorrt" in caught.value.fix


class Streams:
    """``torch.cuda`` without a GPU: streams have handles, and what is asked of them is written down."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.entered = [self.stream(0)]

    def stream(self, handle: int) -> Any:
        def wait(other: Any) -> None:
            self.log.append(f"{handle} waits for {other.cuda_stream}")

        return SimpleNamespace(cuda_stream=handle, wait_stream=wait)

    @contextmanager
    def inside(self, stream: Any) -> Iterator[None]:
        self.entered.append(stream)
        yield
        self.entered.pop()

    @property
    def module(self) -> SimpleNamespace:
        return SimpleNamespace(
            device=lambda name: nullcontext(),
            current_stream=lambda: self.entered[-1],
            default_stream=lambda device: self.stream(0),
            ExternalStream=lambda handle, device: self.stream(handle),
            stream=self.inside,
            Stream=lambda: self.stream(5),
            CUDAGraph=object,
            graph=self.recording,
        )

    @contextmanager
    def recording(self, graph: object, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"recorded on {stream.cuda_stream}, errors {capture_error_mode}")
        with self.inside(stream):
            yield


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    faked = Streams()
    monkeypatch.setattr(torch, "cuda", faked.module)
    return faked


@pytest.mark.parametrize(
    ("stream", "current"),
    [(None, 0), (0, 0), (1, 0), (0x7F00, 0x7F00)],
)
def test_a_run_is_on_the_stream_that_was_named(streams: Streams, stream: int | None, current: int) -> None:
    """``ExternalStream(0)`` would be one of torch's pool."""
    with on_stream("cuda:0", stream):
        assert streams.entered[-1].cuda_stream == current
    assert len(streams.entered) == 1


def test_the_per_thread_stream_is_refused(streams: Streams) -> None:
    with pytest.raises(InputError, match="per-thread stream"), on_stream("cuda:0", 2):
        pass


def test_an_engine_leaves_the_default_stream_in_its_order(streams: Streams) -> None:
    with off_default_stream("cuda:0", lambda: streams.stream(9)) as handle:
        assert handle == streams.entered[-1].cuda_stream == 9
        assert streams.log == ["9 waits for 0"]
    assert streams.log == ["9 waits for 0", "0 waits for 9"]
    with on_stream("cuda:0", 77), off_default_stream("cuda:0", lambda: streams.stream(9)) as handle:
        assert handle == 77
    assert len(streams.log) == 2
    with pytest.raises(KeyError), off_default_stream("cuda:0", lambda: streams.stream(9)):
        raise KeyError
    assert streams.log[2:] == ["9 waits for 0", "0 waits for 9"], "the caller waits after a failure, too"


def test_a_graph_is_recorded_on_a_stream_of_its_own(streams: Streams) -> None:
    where: list[int] = []

    def call() -> str:
        where.append(streams.entered[-1].cuda_stream)
        return "outputs"

    assert capture(call)[1] == "outputs"
    assert where == [5] * (WARM_CALLS + 1)
    assert streams.log == ["5 waits for 0", "0 waits for 5", "recorded on 5, errors thread_local"]
