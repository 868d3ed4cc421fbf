"""Calls into TensorRT, checked against the names and signatures of 10.16, 11.4 and RTX (no library runs).

The real RTX library is used by ``test_build.py`` and ``test_options.py``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ivl_export.engines import gpu
from ivl_export.engines.gpu import Gpu
from ivl_export.engines.tensorrt import config as trt_config
from ivl_export.engines.tensorrt import library as trt
from ivl_export.engines.tensorrt import network as trt_network
from ivl_export.engines.tensorrt import timing_cache
from ivl_export.engines.tensorrt.options import BuildOptions
from ivl_export.errors import BuildError, CapabilityError, UsageError
from ivl_export.tests.sources import ROOT, sources, tree

from ..fake_tensorrt import RTX, SURFACES, TRT10, TRT11, Fake

RELEASES = (TRT10, TRT11, RTX)
H100 = Gpu("NVIDIA H100", "sm90")
Make = Callable[..., tuple[Fake, trt.Library]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(release, {"Class.name": behaviour})``: the fake, also as an imported library."""

    def build(surface: str, behaviours: dict[str, Any] | None = None) -> tuple[Fake, trt.Library]:
        fake = Fake(surface, behaviours)
        backend = trt.RTX if surface == RTX else trt.TENSORRT
        monkeypatch.setitem(__import__("sys").modules, trt._MODULES[backend], fake.module)
        return fake, trt.library(backend)

    return build


def network(lib: trt.Library) -> trt_network.Network:
    return trt_network.parse_network(lib, Path("vision.onnx"))


def attention(fake: Fake) -> dict[str, Any]:
    """Behaviours of a network with one attention, one input and one output."""
    types, layers = fake.module.DataType, []
    for kind in ("CONSTANT", "ATTENTION_INPUT"):
        layers.append(object.__new__(fake.module.ILayer))
        layers[-1].kind = fake.module.LayerType[kind]
    return {
        "INetworkDefinition.num_layers": lambda self: 2,
        "INetworkDefinition.get_layer": lambda self, index: layers[index],
        "INetworkDefinition.num_inputs": lambda self: 1,
        "INetworkDefinition.get_input": lambda self, index: SimpleNamespace(name="x", dtype=types.BF16),
        "INetworkDefinition.num_outputs": lambda self: 1,
        "INetworkDefinition.get_output": lambda self, index: SimpleNamespace(name="y", dtype=types.INT64),
        "ILayer.type": lambda self: self.kind,
    }


@pytest.mark.parametrize("release", RELEASES)
def test_a_network_is_parsed_strongly_typed(make: Make, release: str) -> None:
    fake, lib = make(release)
    fake.behaviours |= attention(fake)
    parsed = network(lib)
    flag = fake.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert fake.named("Builder.create_network") == [(1 << int(flag),)]
    assert fake.named("OnnxParser.parse_from_file") == [("vision.onnx",)]
    assert fake.named("IAttention.decomposable") == [(True,)]
    assert parsed.inputs == {"x": "bf16"}
    assert parsed.outputs == {"y": "int64"}
    trt_network.check_types(parsed, {"x": "bf16"}, {"y": "int64"})
    with pytest.raises(BuildError, match="x is bf16 in the network and fp32 in the graph"):
        trt_network.check_types(parsed, {"x": "fp32"}, {"y": "int64"})
    with pytest.raises(BuildError, match="z is missing in the network and bf16 in the graph"):
        trt_network.check_types(parsed, {"x": "bf16"}, {"y": "int64", "z": "bf16"})


def test_a_weakly_typed_network_is_refused(make: Make) -> None:
    """Only TensorRT 10 can make one; 11 and RTX have no precision flags at all."""
    typed = {"INetworkDefinition.get_flag": lambda self, flag: False}
    with pytest.raises(BuildError, match="weakly typed"):
        network(make(TRT10, typed)[1])
    for release in (TRT11, RTX):
        network(make(release, typed)[1])


def test_what_the_parser_refuses_is_named(make: Make) -> None:
    for release in RELEASES:
        fake, lib = make(release)
        error = fake.module.ParserError
        fake.behaviours |= {
            "OnnxParser.parse_from_file": lambda self, path: False,
            "OnnxParser.num_errors": lambda self: 1,
            "OnnxParser.get_error": lambda self, index, error=error: object.__new__(error),
            "ParserError.node": lambda self: 7,
            "ParserError.node_name": lambda self: "act",
            "ParserError.node_operator": lambda self: "Frob",
            "ParserError.desc": lambda self: "no such operator\n",
        }
        with pytest.raises(BuildError, match=r"Node 7 'act' \(Frob\): no such operator"):
            network(lib)


@pytest.mark.parametrize("release", RELEASES)
def test_every_option_reaches_the_builder(make: Make, release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_config, "gpus", lambda: (H100,))
    fake, lib = make(release)
    options = BuildOptions(
        optimization_level=4,
        workspace_bytes=1 << 20,
        tactic_sources=("jit-convolutions", "edge-mask-convolutions"),
        tiling="moderate",
        l2_bytes=4096,
        weight_streaming=True,
        refit=True,
        strip_plan=True,
        hardware=None if release == RTX else "ampere+",
        version_compatible=release != RTX,
    )
    shapes: dict[str, tuple[trt_config.Shape, trt_config.Shape, trt_config.Shape]]
    shapes = {"x": ((1, 3), (2, 3), (4, 3))}
    config = trt_config.builder_config(network(lib), ["sm89"] if release == RTX else [], [shapes], options)
    module = fake.module
    flags = {flag.name for (flag,) in fake.named("IBuilderConfig.set_flag")}
    expected = {"WEIGHT_STREAMING", "REFIT", "STRIP_PLAN"}
    assert flags == expected | ({"VERSION_COMPATIBLE"} if release != RTX else set())
    assert config.builder_optimization_level == 4
    assert config.l2_limit_for_tiling == 4096
    assert config.tiling_optimization_level == module.TilingOptimizationLevel.MODERATE
    assert fake.named("IBuilderConfig.set_memory_pool_limit") == [(module.MemoryPoolType.WORKSPACE, 1 << 20)]
    sources = module.TacticSource
    bits = (1 << sources.JIT_CONVOLUTIONS) | (1 << sources.EDGE_MASK_CONVOLUTIONS)
    assert fake.named("IBuilderConfig.set_tactic_sources") == [(bits,)]
    assert fake.named("IOptimizationProfile.set_shape") == [("x", (1, 3), (2, 3), (4, 3))]
    assert len(fake.named("IBuilderConfig.add_optimization_profile")) == 1
    if release == RTX:
        assert config.num_compute_capabilities == 1
        assert fake.named("IBuilderConfig.set_compute_capability") == [(module.ComputeCapability.SM89, 0)]
    else:
        assert config.hardware_compatibility_level == module.HardwareCompatibilityLevel.AMPERE_PLUS


def test_defaults_set_nothing(make: Make) -> None:
    for release in RELEASES:
        fake, lib = make(release)
        parsed = network(lib)
        before = len(fake.calls)
        trt_config.builder_config(parsed, [], [])
        set_ = [] if release == RTX else ["IBuilderConfig.profiling_verbosity"]  # for the inspector
        assert [name for name, _ in fake.calls[before:]] == ["Builder.create_builder_config", *set_]


def test_a_stripped_plan_takes_back_the_same_weights(make: Make) -> None:
    for release in (TRT10, TRT11):
        fake, lib = make(release)
        trt_config.builder_config(network(lib), [], [], BuildOptions(strip_plan=True))
        assert {f.name for (f,) in fake.named("IBuilderConfig.set_flag")} == {"STRIP_PLAN", "REFIT_IDENTICAL"}


@pytest.mark.parametrize(
    ("release", "options", "what", "fix"),
    [
        (RTX, {"hardware": "same-cc"}, "-O hardware-compatible", "--targets"),
        (RTX, {"version_compatible": True}, "-O version-compatible", "--backend tensorrt"),
        (RTX, {"refit": True}, "-O refit", "machine with one"),
        (RTX, {"strip_plan": True}, "-O strip-plan", "machine with one"),
        (RTX, {"tactic_sources": ("cublas",)}, "-O tactic-sources=cublas", "TensorRT 10"),
        (TRT11, {"tactic_sources": ("cudnn",)}, "-O tactic-sources=cudnn", "TensorRT 10"),
    ],
)
def test_what_a_release_cannot_do_says_where_it_can_be_had(
    make: Make, release: str, options: dict[str, Any], what: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_config, "gpus", lambda: ())
    _, lib = make(release)
    with pytest.raises(CapabilityError) as caught:
        trt_config.builder_config(network(lib), [], [], BuildOptions(**options))
    assert f"{lib} cannot do {what}" in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.why


def test_tensorrt_10_has_every_tactic_source_and_11_3_no_refit(make: Make) -> None:
    fake, lib = make(TRT10)
    trt_config.builder_config(
        network(lib), [], [], BuildOptions(tactic_sources=("cublas", "cudnn"), refit=True)
    )
    assert fake.named("IBuilderConfig.set_tactic_sources")
    fake, lib = make(TRT11)
    lib = trt.Library(lib.backend, lib.module, "11.3.0.1")
    with pytest.raises(CapabilityError, match="lose biases"):
        trt_config.builder_config(network(lib), [], [], BuildOptions(refit=True))


@pytest.mark.parametrize("release", [TRT10, TRT11])
def test_targets_are_for_builders_that_cross(make: Make, release: str) -> None:
    _, lib = make(release)
    assert not lib.cross_builds
    with pytest.raises(CapabilityError, match="GPU of this machine only"):
        trt_config.builder_config(network(lib), ["sm89"], [])
    _, lib = make(RTX)
    assert lib.cross_builds
    with pytest.raises(CapabilityError, match=r"cannot build for sm90.*SM89"):
        trt_config.builder_config(network(lib), ["sm90"], [])


@pytest.mark.parametrize("release", RELEASES)
def test_engines_are_streamed_or_written_at_once(make: Make, release: str) -> None:
    def stream(self: Any, network: Any, config: Any, writer: Any) -> bool:
        return bool(writer.write(b"abc") == 3 and writer.write(b"de") == 2)

    fake, lib = make(release, {"Builder.build_serialized_network_to_stream": stream})
    out, parsed = BytesIO(), network(lib)
    assert trt_network.write_engine(parsed, None, out) == 5
    assert out.getvalue() == b"abcde"
    fake.behaviours["Builder.build_serialized_network_to_stream"] = lambda *args: False
    with pytest.raises(BuildError, match="gave no reason"):
        trt_network.write_engine(parsed, None, BytesIO())
    # 10.11 and 10.12 have no streams.
    del fake.module.Builder.build_serialized_network_to_stream
    fake.behaviours["Builder.build_serialized_network"] = lambda self, network, config: b"whole"
    assert trt_network.write_engine(parsed, None, out) == 5
    fake.behaviours["Builder.build_serialized_network"] = lambda self, network, config: None
    with pytest.raises(BuildError):
        trt_network.write_engine(parsed, None, out)


def test_a_full_disk_comes_out_of_the_stream(make: Make) -> None:
    def stream(self: Any, network: Any, config: Any, writer: Any) -> bool:
        return bool(writer.write(b"abc") or writer.write(b"abc"))

    def full(data: bytes) -> int:
        raise OSError(28, "No space left on device")

    _, lib = make(RTX, {"Builder.build_serialized_network_to_stream": stream})
    with pytest.raises(OSError, match="No space"):
        trt_network.write_engine(network(lib), None, SimpleNamespace(write=full))  # type: ignore[arg-type]


def test_the_missing_driver_is_reported_only_as_the_reason() -> None:
    driver = "Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"
    assert trt.reasons(SimpleNamespace(errors=[driver, "bad node", "bad node"])) == "bad node"
    assert trt.reasons(SimpleNamespace(errors=[driver])) == driver


def test_the_logger_keeps_errors_only(make: Make) -> None:
    for release in RELEASES:
        fake, _ = make(release)
        logger = trt.make_logger(fake.module)
        logger.log(fake.module.Logger.ERROR, " bad ")
        logger.log(fake.module.Logger.WARNING, "odd")
        logger.log(fake.module.Logger.INTERNAL_ERROR, "worse")
        assert logger.errors == ["bad", "worse"]


class Times:
    """A timing cache: a set of names, as text."""

    def __init__(self, fake: Fake) -> None:
        self.refused: set[bytes] = set()
        fake.behaviours |= {
            "IBuilderConfig.create_timing_cache": self.create,
            "IBuilderConfig.set_timing_cache": self.attach,
            "IBuilderConfig.get_timing_cache": lambda config: self.attached,
            "ITimingCache.combine": self.combine,
            "ITimingCache.serialize": lambda cache: b",".join(sorted(cache.names)),
        }
        self.cls = fake.module.ITimingCache
        self.caches: list[Any] = []
        self.attached: Any = None

    def attach(self, config: Any, cache: Any, ignore: bool) -> bool:
        if cache.kept in self.refused:
            return False
        self.attached = cache
        return True

    def create(self, config: Any, kept: bytes) -> Any:
        cache = object.__new__(self.cls)
        cache.kept, cache.names = kept, {name for name in kept.split(b",") if name}
        self.caches.append(cache)
        return cache

    def combine(self, cache: Any, other: Any, ignore: bool) -> bool:
        cache.names |= other.names
        return True


@pytest.mark.parametrize("release", [TRT10, TRT11])
def test_times_are_kept_for_a_release_and_a_gpu(
    make: Make, release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path))
    fake, lib = make(release)
    times = Times(fake)
    config = network(lib).builder.create_builder_config()
    path = timing_cache.timing_file(lib, H100)
    assert path == tmp_path / "timing" / f"tensorrt-{lib.release}-sm90-nvidia-h100.timing"
    with timing_cache.timing_cache(lib, config, H100):
        times.caches[0].names.add(b"gemm")
        path.write_bytes(b"other")  # another build ended meanwhile
    assert path.read_bytes() == b"gemm,other"
    with timing_cache.timing_cache(lib, config, H100):
        assert times.caches[-1].names == {b"gemm", b"other"}
    times.refused.add(b"gemm,other")
    with timing_cache.timing_cache(lib, config, H100):
        assert times.caches[-1].names == set(), "refused by the library: started empty"
    with pytest.raises(BuildError), timing_cache.timing_cache(lib, config, H100):
        raise BuildError("no")
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".lock", ".timing"]


def test_rtx_and_disabled_builds_touch_no_timing_cache(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With RTX these calls do nothing and ask for a GPU."""
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path))
    for release, enabled in ((RTX, True), (TRT11, False)):
        fake, lib = make(release)
        config = network(lib).builder.create_builder_config()
        with timing_cache.timing_cache(lib, config, H100, enabled=enabled):
            pass
        assert not fake.named("IBuilderConfig.create_timing_cache")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_cache(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "file"))
    _, lib = make(TRT11)
    with timing_cache.timing_cache(lib, network(lib).builder.create_builder_config(), H100):
        pass


def test_an_unknown_builder_is_a_usage_error() -> None:
    for ask in (trt.library, trt.installed_release):
        with pytest.raises(UsageError, match="Known: tensorrt-rtx, tensorrt"):
            ask("openvino")


@pytest.mark.slow
def test_only_one_module_imports_tensorrt() -> None:
    files = [p for p in sources("tests") if p.parent != ROOT]
    importers = [p.name for p in files if "tensorrt_rtx" in _imported(p)]
    assert importers == []
    by_name = [p.name for p in files if "import_module(_MODULES" in p.read_text(encoding="utf-8")]
    assert by_name == ["library.py"]


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def test_every_hasattr_name_is_in_some_releases_only() -> None:
    """A branch that no release takes, or all of them, would be dead."""
    surfaces = [json.loads(path.read_text()) for path in SURFACES.values()]
    names = [
        {m for members in s["enums"].values() for m in members}
        | {a for attributes in s["classes"].values() for a in attributes}
        for s in surfaces
    ]
    always = {"build_serialized_network_to_stream"}  # in these three, not in 10.11 and 10.12
    hasattr_names = set()
    for name in ("library.py", "network.py", "config.py"):
        for node in ast.walk(ast.parse((Path(trt.__file__).parent / name).read_text(encoding="utf-8"))):
            guard = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if guard and node.func.id == "hasattr" and isinstance(node.args[1], ast.Constant):  # type: ignore[attr-defined]
                hasattr_names.add(str(node.args[1].value))  # type: ignore[attr-defined]
    assert hasattr_names == {"set_compute_capability", "FP16", "build_serialized_network_to_stream"}
    for name in hasattr_names:
        have = [name in known for known in names]
        assert any(have), f"{name} is in no release"
        assert not all(have) or name in always, f"{name} needs no branch"


def test_there_is_no_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRIVER", "libabsent-cuda.so")
    gpu.gpus.cache_clear()
    assert gpu.gpus() == ()
    gpu.gpus.cache_clear()


def test_gpus_come_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """libcuda with one working and one failing GPU."""

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:
            count._obj.value = 2
            return 0

        def cuDeviceGet(self, device: Any, number: int) -> int:
            device._obj.value = number
            return number * 100

        def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
            name.value = b"NVIDIA L40S"
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
            value._obj.value = {75: 8, 76: 9}[attribute]
            return 0

    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    gpu.gpus.cache_clear()
    try:
        assert [str(g) for g in gpu.gpus()] == ["NVIDIA L40S (sm89)", "GPU 1 (unknown generation)"]
    finally:
        gpu.gpus.cache_clear()
