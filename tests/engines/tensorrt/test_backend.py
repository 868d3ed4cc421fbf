"""Running TensorRT engines: refusals before the library, and the order of calls into it.

The library is the recording fake of ``fake_tensorrt``; no engine runs here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_export.bundle.manifest import Built, Component, EngineFile, Manifest, Model
from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.engines import compatibility as loadable
from ivl_export.engines import cuda_graphs
from ivl_export.engines.base import open_engine
from ivl_export.engines.compatibility import check_loadable, fitting_target, rebuild_line
from ivl_export.engines.gpu import Gpu, gpus
from ivl_export.engines.tensorrt import library as trt
from ivl_export.engines.tensorrt.backend import MAX_GRAPHS, TensorRTEngine, open_tensorrt
from ivl_export.engines.tensorrt.shapes import profiles_of
from ivl_export.errors import BuildError, CapabilityError, InputError, IntegrityError, UsageError

from ..fake_tensorrt import RTX, TRT10, TRT11, Fake

torch = pytest.importorskip("torch")

SPEC = ComponentSpec(
    "qllama_step",
    (TensorSpec("ids", "int64", ("batch", "text")), TensorSpec("past", "float", ("batch", "past", 2))),
    (TensorSpec("logits", "float", ("batch", 3)), TensorSpec("key", "float", ("batch", "text", 2))),
    (Axis("batch", 1, 2, 4), Axis("text", 1, 1, 32), Axis("past", 1, 4, 8)),
)
KINDS = {"ids": "INT64", "past": "BF16", "logits": "BF16", "key": "BF16"}
ADA, HOPPER = Gpu("NVIDIA L40S", "sm89"), Gpu("NVIDIA H100", "sm90")
LINE = "ivl-export build --precision fp8"


def engine_file(backend: str = trt.RTX, target: str = "sm89", **built: Any) -> EngineFile:
    result = Built(**{"dtype": "bf16", "profiles": profiles_of(SPEC), "options": {}, **built})
    return EngineFile("qllama_step", backend, target, "engines/x.engine", "1.7.1", 0, result)


def here(monkeypatch: pytest.MonkeyPatch, release: str | None, *gpus: Gpu) -> None:
    monkeypatch.setattr(trt, "installed_release", lambda backend: release)
    monkeypatch.setattr(loadable, "gpus", lambda: gpus)


def test_the_same_release_and_target_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "1.7.1", ADA)
    assert check_loadable(engine_file(), LINE) == ADA
    assert check_loadable(engine_file(target="sm120+sm89"), LINE) == ADA


@pytest.mark.parametrize(
    ("file", "release", "gpu", "says"),
    [
        (engine_file(), None, ADA, ["which is not installed", "pip install tensorrt-rtx==1.7.1"]),
        (engine_file(), "1.8.0", ADA, ["tensorrt-rtx 1.7.1; 1.8.0 is installed", LINE]),
        (engine_file(), "1.7.1", HOPPER, ["built for sm89; this GPU is NVIDIA H100 (sm90)", LINE]),
        (engine_file(), "1.7.1", None, ["built for sm89; there is no GPU 0", "--backend onnxruntime"]),
        (engine_file(trt.TENSORRT, "native", gpu="NVIDIA H100", sm="sm90"), "1.7.1", ADA,
         ["built for NVIDIA H100 (sm90); this GPU is NVIDIA L40S", LINE]),
        (engine_file(trt.TENSORRT, "native", gpu="NVIDIA H200", sm="sm90"), "1.7.1", HOPPER,
         ["built for NVIDIA H200 (sm90)", LINE]),
        (engine_file(options={"version_compatible": True}), "1.6.9", ADA, ["1.6.9 is installed", LINE]),
    ],
)  # fmt: skip
def test_another_release_gpu_or_target_is_refused_before_the_library(
    file: EngineFile,
    release: str | None,
    gpu: Gpu | None,
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here(monkeypatch, release, *([gpu] if gpu else []))
    monkeypatch.setattr(trt, "library", lambda backend: pytest.fail("the library was called"))
    with pytest.raises(CapabilityError) as caught:
        open_engine(file.backend, SPEC, tmp_path / "x.engine", record=file, rebuild=LINE)
    assert all(text in str(caught.value) for text in says)


def test_a_gpu_it_was_not_built_for_can_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "1.7.1", HOPPER)
    assert check_loadable(engine_file(), LINE, any_gpu=True) == HOPPER
    here(monkeypatch, "1.8.0", HOPPER)
    with pytest.raises(CapabilityError):
        check_loadable(engine_file(), LINE, any_gpu=True)


def test_compatible_engines_load_on_what_they_are_compatible_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def native(hardware: str) -> EngineFile:
        options = {"hardware": hardware, "version_compatible": True}
        return engine_file(trt.TENSORRT, "native", options=options, gpu="NVIDIA H200", sm="sm90")

    here(monkeypatch, "1.8.0", HOPPER)
    assert check_loadable(native("same-cc"), LINE) == HOPPER
    here(monkeypatch, "1.7.1", ADA)
    assert check_loadable(native("ampere+"), LINE) == ADA
    with pytest.raises(CapabilityError):
        check_loadable(native("same-cc"), LINE)
    here(monkeypatch, "1.7.1", Gpu("T4", "sm75"))
    with pytest.raises(CapabilityError):
        check_loadable(native("ampere+"), LINE)


def test_devices_are_gpus() -> None:
    assert [loadable.gpu_number(text) for text in ("cuda", "cuda:0", "cuda:3")] == [0, 0, 3]
    for text in ("cpu", "cuda:x", ""):
        with pytest.raises(UsageError, match="-O device=cuda:0"):
            loadable.gpu_number(text)


def test_an_engine_without_its_record_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="manifest"):
        open_engine(trt.RTX, SPEC, tmp_path / "x.engine")


def test_an_option_of_another_backend_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="have no option 'threads'"):
        open_engine(trt.RTX, SPEC, tmp_path / "x.engine", record=engine_file(), threads=1)


@pytest.mark.skipif(bool(gpus()), reason="for machines without a GPU")
def test_this_machine_says_what_it_lacks(tmp_path: Path) -> None:
    release = trt.installed_release(trt.RTX)
    if release is None:
        pytest.skip("tensorrt-rtx is not installed")
    file = replace(engine_file(), release=release)
    with pytest.raises(CapabilityError, match="no GPU 0, or no driver"):
        open_engine(trt.RTX, SPEC, tmp_path / "x.engine", record=file, rebuild=LINE)


def test_of_several_targets_the_one_of_the_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    files = tuple(engine_file(target=target) for target in ("sm86", "sm89", "sm120"))
    manifest = Manifest(Model("m", "m", {}, {}, 0.0, 1), "fp8", "bfloat16", {}, None, {}, files)
    here(monkeypatch, None, ADA, HOPPER)
    assert fitting_target(manifest, trt.RTX) == "sm89"
    assert fitting_target(manifest, trt.RTX, 1) is None
    assert fitting_target(manifest, trt.RTX, 2) is None
    assert fitting_target(manifest, trt.TENSORRT) is None


def test_the_rebuild_command_has_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("m", "weights/14B", {}, {}, 0.0, 1)
    profiles = profiles_of(SPEC, "latency", {"past": (2, 2, 6)})
    file = engine_file(
        profiles=profiles,
        options={"refit": True, "workspace_bytes": 4096, "hardware": "ampere+", "tactic_sources": []},
    )
    components = {"qllama_step": Component(SPEC, {})}
    manifest = Manifest(model, "fp8", "bfloat16", {}, None, components, (file,))
    here(monkeypatch, None, Gpu("NVIDIA RTX 5090", "sm120"))
    line = (
        "ivl-export build --model weights/14B --precision fp8 --backend tensorrt-rtx --targets sm120 "
        "-O workspace=4096 -O tactic-sources=none -O refit -O hardware-compatible=ampere+ "
        "--shapes qllama_step.batch=1:1:4 --shapes qllama_step.past=2:2:6"
    )
    assert rebuild_line(manifest, file) == line
    assert rebuild_line(manifest, file, 1) == line.replace("sm120", "sm89"), "there is no second GPU"
    here(monkeypatch, None, HOPPER)
    assert rebuild_line(manifest, file) == line.replace("tensorrt-rtx --targets sm120", "tensorrt")
    shipped = replace(manifest, model=replace(model, source="internvl-nano (shipped)"))
    native = engine_file(trt.TENSORRT, "native")
    assert rebuild_line(shipped, native) == "ivl-export build --precision fp8 --backend tensorrt"


@pytest.fixture(params=[TRT10, TRT11, RTX])
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``opened(options, kinds)``: the fake, and the engine that was opened through it."""

    def build(kinds: dict[str, str] | None = None, **options: Any) -> tuple[Fake, TensorRTEngine]:
        fake, text = Fake(request.param), kinds or KINDS
        types, names = fake.module.DataType, list(text)
        fake.behaviours |= {
            "ICudaEngine.num_io_tensors": lambda self: len(names),
            "ICudaEngine.get_tensor_name": lambda self, index: names[index],
            "ICudaEngine.get_tensor_dtype": lambda self, name: types[text[name]],
            "Runtime.deserialize_cuda_engine": lambda self, data: (
                object.__new__(fake.module.ICudaEngine) if bytes(data[:4]) == b"good" else None
            ),
        }
        backend = trt.RTX if request.param == RTX else trt.TENSORRT
        monkeypatch.setitem(__import__("sys").modules, trt._MODULES[backend], fake.module)
        here(monkeypatch, "1.7.1", ADA)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", lambda number: nullcontext())
        path = tmp_path / "x.engine"
        path.write_bytes(options.pop("data", b"good engine"))
        file = engine_file(backend, options=options.pop("built", {}))
        engine = open_engine(backend, SPEC, path, record=file, rebuild=LINE, **options)
        assert isinstance(engine, TensorRTEngine)
        assert engine.device == "cuda:0"
        engine.device = "cpu"  # where the fake's buffers are
        return fake, engine

    return build


def feeds(text: int, batch: int = 2) -> dict[str, Any]:
    return {"ids": np.ones((batch, text), np.int64), "past": np.ones((batch, 3, 2), np.float32)}


def test_calls_come_in_the_order_the_library_wants(opened: Any) -> None:
    fake, engine = opened()
    out = engine.run(feeds(1), ["logits"])
    assert out["logits"].shape == (2, 3)
    assert out["logits"].dtype == np.float32
    assert list(out) == ["logits"]
    start = [name for name, _ in fake.calls].index("ICudaEngine.create_execution_context")
    calls = [(name.partition(".")[2], args) for name, args in fake.calls[start:]]
    addresses = [args for name, args in calls if name == "set_tensor_address"]
    assert [name for name, _ in calls] == [
        "create_execution_context", "set_optimization_profile_async",
        "set_input_shape", "set_tensor_address", "set_input_shape", "set_tensor_address",
        "set_tensor_address", "set_tensor_address", "execute_async_v3",
    ]  # fmt: skip
    by_profile = fake.module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    assert calls[0][1] == (by_profile,), "the memory of its profile, not of the largest"
    assert calls[1][1] == (0, 0), "one position: the decode profile"
    assert [args for name, args in calls if name == "set_input_shape"] == [
        ("ids", (2, 1)),
        ("past", (2, 3, 2)),
    ]
    assert [name for name, _ in addresses] == ["ids", "past", "logits", "key"]
    assert all(address for _, address in addresses), "every output has memory, requested or not"


def test_a_profile_is_chosen_by_shape_and_its_context_kept(opened: Any) -> None:
    fake, engine = opened()
    for text in (1, 16, 4, 32, 1):
        engine.run(feeds(text))
    assert fake.named("IExecutionContext.set_optimization_profile_async") == [(0, 0), (1, 0)]
    assert len(fake.named("ICudaEngine.create_execution_context")) == 2
    assert len(fake.named("IExecutionContext.execute_async_v3")) == 5
    with pytest.raises(InputError):
        engine.run(feeds(33))
    with pytest.raises(UsageError):
        engine.run(feeds(1), ["nothing"])
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run(feeds(1))


def test_buffers_of_the_caller_are_used_in_place(opened: Any) -> None:
    fake, engine = opened()
    past = torch.ones((2, 3, 2), dtype=torch.bfloat16)
    logits = torch.zeros((2, 3), dtype=torch.bfloat16)
    key = torch.zeros((2, 1, 2), dtype=torch.float32)  # of another type: written into afterwards
    result = engine.run_tensors({**feeds(1), "past": past}, out={"logits": logits, "key": key})
    addresses = dict(fake.named("IExecutionContext.set_tensor_address"))
    assert addresses["past"] == past.data_ptr()
    assert addresses["logits"] == logits.data_ptr() == result["logits"].data_ptr()
    assert addresses["key"] != key.data_ptr()
    assert result["key"] is key or result["key"].data_ptr() == key.data_ptr()


@pytest.mark.parametrize(
    "call", ["set_optimization_profile_async", "set_input_shape", "set_tensor_address", "execute_async_v3"]
)
def test_what_the_library_refuses_is_an_error(opened: Any, call: str) -> None:
    fake, engine = opened()
    fake.behaviours[f"IExecutionContext.{call}"] = lambda *args: False
    with pytest.raises(BuildError, match="TensorRT refuses"):
        engine.run(feeds(1))


def test_a_wrong_engine_is_not_opened(opened: Any) -> None:
    with pytest.raises(IntegrityError, match="past is fp32 in it and should be bf16"):
        opened({**KINDS, "past": "FLOAT"})
    with pytest.raises(IntegrityError, match="key is missing in it"):
        opened({k: v for k, v in KINDS.items() if k != "key"})
    with pytest.raises(IntegrityError, match="It has extra"):
        opened({**KINDS, "extra": "BF16"})
    with pytest.raises(IntegrityError, match="refuses"):
        opened(data=b"bad")
    with pytest.raises(IntegrityError, match="cannot be read"):
        opened(data=b"")


def test_stripped_streamed_and_compatible_engines(opened: Any, tmp_path: Path) -> None:
    fake, _ = opened(built={"strip_plan": True}, graph=tmp_path / "x.onnx")
    assert fake.named("OnnxParserRefitter.refit_from_file") == [(str(tmp_path / "x.onnx"),)]
    assert len(fake.named("Refitter.refit_cuda_engine")) == 1
    with pytest.raises(IntegrityError, match="no graph"):
        opened(built={"strip_plan": True})
    fake, _ = opened(built={"weight_streaming": True}, weight_budget=1 << 20)
    assert fake.named("ICudaEngine.weight_streaming_budget_v2") == [(1 << 20,)]
    fake, _ = opened(weight_budget=1 << 20)
    assert not fake.named("ICudaEngine.weight_streaming_budget_v2")
    for allowed in (False, True):
        fake, _ = opened(built={"version_compatible": True}, host_code=allowed)
        assert fake.named("Runtime.engine_host_code_allowed") == ([(True,)] if allowed else [])


def test_the_inspector_returns_json(opened: Any) -> None:
    fake, engine = opened()
    fake.behaviours["EngineInspector.get_engine_information"] = lambda self, kind: f"[{kind.name}]"
    assert engine.layers() == "[JSON]"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Captures without a GPU: a graph remembers its call, and a replay makes it again into its outputs."""
    graphs: list[Any] = []

    class Graph:
        def __init__(self, call: Callable[[], Any]) -> None:
            call()
            self.call, self.made = call, call()
            graphs.append(self)

        def replay(self) -> None:
            for static, fresh in zip(self.made, self.call(), strict=True):
                static.copy_(fresh)

    def capture(call: Callable[[], Any]) -> tuple[Any, Any]:
        graph = Graph(call)
        return graph, graph.made

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return graphs


def test_runs_are_recorded_once_for_each_shapes(opened: Any, recorded: list[Any]) -> None:
    fake, engine = opened(cuda_graphs=True)
    written: list[int] = []
    contexts: list[Any] = []

    def run(context: Any, stream: int) -> bool:
        written.append(1)
        contexts.append(context)
        return True

    fake.behaviours["IExecutionContext.execute_async_v3"] = run
    if hasattr(fake.module, "CudaGraphStrategy"):  # the library records them itself
        (config,) = fake.named("IRuntimeConfig.cuda_graph_strategy")
        assert config == (fake.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,)
        by_profile = fake.module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        assert fake.named("IRuntimeConfig.set_execution_context_allocation_strategy") == [(by_profile,)]
        engine.run(feeds(1))
        ((inputs,),) = fake.named("ICudaEngine.create_execution_context")
        assert isinstance(inputs, fake.module.IRuntimeConfig)
        assert not recorded
        return
    shapes = [(1, 2), (4, 2), (16, 2), (1, 2), (4, 2), (1, 3)]
    for text, batch in shapes:
        out = engine.run(feeds(text, batch))
        assert out["key"].shape == (batch, text, 2)
    assert len(recorded) == len(set(shapes)) == 4
    assert len(fake.named("ICudaEngine.create_execution_context")) == 4, "each graph has its own context"
    assert len({id(context) for context in contexts}) == 4
    for text in range(5, 5 + MAX_GRAPHS):
        engine.run(feeds(text))
    assert len(engine._graphs._recorded) == MAX_GRAPHS
    engine.run(feeds(1))  # was let go of in between
    assert len(recorded) == 4 + MAX_GRAPHS + 1
    engine.close()
    assert not engine._graphs._recorded
    with pytest.raises(UsageError, match="closed"):
        engine.run(feeds(1))


def test_what_a_replay_gives_is_the_callers_own(opened: Any, recorded: list[Any]) -> None:
    fake, engine = opened(cuda_graphs=True)
    if hasattr(fake.module, "CudaGraphStrategy"):
        pytest.skip("the library records graphs itself")
    count = iter(range(1, 100))
    addresses: dict[str, int] = {}

    def place(context: Any, name: str, memory: int) -> bool:
        addresses[name] = memory
        return True

    def run(context: Any, stream: int) -> bool:  # writes a number into the logits, as a kernel would
        raw = (ctypes.c_uint16 * 6).from_address(addresses["logits"])
        value = torch.tensor(float(next(count))).to(torch.bfloat16).view(torch.uint16).item()
        raw[:] = [value] * 6
        return True

    fake.behaviours |= {
        "IExecutionContext.set_tensor_address": place, "IExecutionContext.execute_async_v3": run
    }  # fmt: skip
    first = engine.run_tensors(feeds(1))["logits"]
    copy = first.clone()
    mine = torch.zeros((2, 3), dtype=torch.bfloat16)
    second = engine.run_tensors(feeds(1), out={"logits": mine})["logits"]
    assert torch.equal(first, copy)
    assert second.data_ptr() == mine.data_ptr()
    assert (mine > copy).all()


def test_layers_are_timed_in_a_context_of_their_own(opened: Any) -> None:
    fake, engine = opened()

    def report(context: Any) -> bool:
        assert context.enqueue_emits_profile is False
        for name, ms in (("fc1", 0.5), ("Reformat", 0.25)):
            context.profiler.report_layer_time(name, ms)
        return True

    fake.behaviours["IExecutionContext.report_to_profiler"] = report
    times, outputs = engine.profiled(feeds(1), calls=3, warmup=1)
    assert [layers for _, layers in times] == [[("fc1", 0.5), ("Reformat", 0.25)]] * 3
    assert all(length > 0 for length, _ in times)
    assert outputs["logits"].shape == (2, 3)
    engine.run(feeds(1))
    assert len(fake.named("ICudaEngine.create_execution_context")) == 2
    assert len(fake.named("IExecutionContext.profiler")) == 1, "other runs are not slowed down"
    fake.behaviours["IExecutionContext.report_to_profiler"] = lambda context: False
    with pytest.raises(BuildError, match="refuses the layers' times"):
        engine.profiled(feeds(1), calls=1)


def test_with_graphs_shares_the_engine(opened: Any) -> None:
    fake, engine = opened()
    other = engine.with_graphs()
    assert other.spec is engine.spec
    assert len(fake.named("Runtime.deserialize_cuda_engine")) == 1
    other.close()
    engine.run(feeds(1))


def test_torch_without_cuda_is_named(opened: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here(monkeypatch, "1.7.1", ADA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CapabilityError, match="torch with CUDA"):
        open_tensorrt(SPEC, tmp_path / "x", record=engine_file(), rebuild=LINE)
