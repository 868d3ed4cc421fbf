"""Buffers: read in place through DLPack, outputs bound, the same values as on host arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.engines.base import open_engine
from ivl_export.engines.chain import ChainedEngine
from ivl_export.engines.device import as_tensor, concatenate, deliver, to_host
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
