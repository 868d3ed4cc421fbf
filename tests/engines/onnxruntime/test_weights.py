"""Weights that sessions share: the same bits, one copy on disk and in memory, and failures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ivl_export.bundle import Bundle
from ivl_export.engines.onnxruntime import weights as ort_weights
from ivl_export.engines.onnxruntime.weights import shared_weights
from ivl_export.engines.protobuf import delimited, fields, rewritten
from ivl_export.errors import CapabilityError
from ivl_export.runtime import InternVL

Usage = namedtuple("Usage", "total used free")

WIDTH = 2048
PRODUCTS = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IVL_EXPORT_CACHE_SIZE", raising=False)
    return tmp_path / "cache"


def answers(bundle: Path, share: bool | None) -> list[Any]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (60, 50, 3), dtype=np.uint8) for _ in range(3)]
    with InternVL.load(bundle, threads=1, share_weights=share) as model:
        results = [model.encode_image(images, mode) for mode in ("InternVL-C", "InternVL-G")]
        return [*results, model.encode_text(["a ring", "two blue stars"]), np.array(model.caption(images))]


def kept(cache: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in cache.glob("weights/*/*")}


@pytest.mark.slow
def test_shared_weights_give_the_same_bits_and_are_written_once(tiny_bundle: Path, cache: Path) -> None:
    alone = answers(tiny_bundle, False)
    assert not cache.exists()
    for _ in range(2):
        shared = answers(tiny_bundle, True)
        assert all(np.array_equal(a, b) for a, b in zip(alone, shared, strict=True))
        written = kept(cache)
        assert {n for n in written if n.endswith(".onnx")} == {
            f"{c}.fp32.onnx" for c in ("vision", "qllama_query", "qllama_text", "qllama_step")
        }
    assert kept(cache) == written
    assert not list(cache.glob("weights/*/.making"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights are shared too."""
    monkeypatch.setattr(ort_weights, "LEAST_TENSOR", 1024)


@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_equal_weights_are_one_file(tiny_bundle: Path, cache: Path) -> None:
    answers(tiny_bundle, True)
    used: dict[str, set[str]] = {}
    for path in cache.glob("weights/*/*.onnx"):
        model = onnx.load(path, load_external_data=False)
        places = (e.value for t in model.graph.initializer for e in t.external_data if e.key == "location")
        used[path.name] = set(places)
    files = {p.name for p in cache.glob("weights/*/*.bin")}
    assert set.union(*used.values()) == files
    common = used["qllama_text.fp32.onnx"] & used["qllama_step.fp32.onnx"] & used["qllama_query.fp32.onnx"]
    assert len(common) > 20, {name: len(places) for name, places in used.items()}


@pytest.mark.slow
def test_sharing_by_default_needs_savings_and_room(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert shared_weights(bundle, None) is None
    assert shared_weights(bundle, True) is not None
    monkeypatch.setattr(ort_weights, "LEAST_STORED", 0)
    monkeypatch.setattr(ort_weights, "LEAST_TENSOR", 1024)
    assert shared_weights(bundle, None) is None
    monkeypatch.setattr(ort_weights, "LEAST_SAVED", 100_000)
    assert shared_weights(bundle, None) is not None
    assert shared_weights(bundle, False) is None
    monkeypatch.setenv("IVL_EXPORT_CACHE_SIZE", "100K")
    assert shared_weights(bundle, None) is None
    assert shared_weights(bundle, True) is not None


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def flipped(data: bytes) -> bytes:
    at = 2 * len(data) // 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("files", ["*.bin", "*.onnx", "*.seal", "*"])
@pytest.mark.parametrize("damage", [halved, zeros, flipped, None])
@pytest.mark.parametrize("times", ["kept", "new"])
def test_damaged_files_are_rebuilt(
    tiny_bundle: Path, cache: Path, files: str, damage: Callable[[bytes], bytes] | None, times: str
) -> None:
    """Zeros of the right length are the result of a power cut: a session would take them for weights."""
    before = texts(tiny_bundle)
    sound = {p.name: p.read_bytes() for p in cache.glob("weights/*/*") if p.suffix != ".seal"}
    paths = sorted(cache.glob(f"weights/*/{files}"))
    assert paths
    for path in paths:
        state = path.stat()
        if damage is None:
            path.unlink()
            continue
        path.write_bytes(damage(path.read_bytes()))
        if times == "kept":  # as a copy or a backup leaves them
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert np.array_equal(before, texts(tiny_bundle))
    assert {p.name: p.read_bytes() for p in cache.glob("weights/*/*") if p.suffix != ".seal"} == sound


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("files", ["*.onnx", "*.bin", "*.seal"])
def test_folders_in_place_of_files_are_rebuilt(tiny_bundle: Path, cache: Path, files: str) -> None:
    before = texts(tiny_bundle)
    paths = sorted(cache.glob(f"weights/*/{files}"))
    assert paths
    for path in paths:
        path.unlink()
        path.mkdir()
    assert np.array_equal(before, texts(tiny_bundle))
    assert all(path.is_file() for path in paths)


@pytest.mark.usefixtures("small")
def test_a_copied_cache_is_read_once_and_not_rebuilt(
    tiny_bundle: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = texts(tiny_bundle)
    shutil.copytree(cache, tmp_path / "copy")
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "copy"))
    content = {p: p.stat().st_ino for p in (tmp_path / "copy").glob("weights/*/*") if p.suffix != ".seal"}
    (seal,) = (tmp_path / "copy").glob("weights/*/*.seal")
    copied = seal.read_bytes()
    assert np.array_equal(before, texts(tiny_bundle))
    renewed = seal.read_bytes()
    assert renewed != copied
    assert np.array_equal(before, texts(tiny_bundle))
    assert seal.read_bytes() == renewed
    assert {p: p.stat().st_ino for p in content} == content


def texts(bundle: Path) -> Any:
    with InternVL.load(bundle, threads=1, share_weights=True) as model:
        return model.encode_text(["a ring", "two blue stars"])


def test_where_nothing_can_be_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "file"))
    with (
        InternVL.load(tiny_bundle, threads=1, share_weights=True) as model,
        pytest.raises(CapabilityError, match="cannot be shared"),
    ):
        model.encode_text(["a"])
    monkeypatch.setattr(ort_weights, "LEAST_STORED", 0)
    monkeypatch.setattr(ort_weights, "LEAST_SAVED", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 40, 0, 1 << 40))
    assert shared_weights(Bundle.open(tiny_bundle), None) is not None
    answers(tiny_bundle, None)


def graph_of_products(path: Path, order: list[int]) -> None:
    """Products by bf16 weights in ``weights``, as components have them: cast, transposed, multiplied."""
    nodes, values = [], []
    x = "x"
    for i in order:
        value = TensorProto(
            name=f"w{i}", data_type=TensorProto.BFLOAT16, dims=[WIDTH, WIDTH], data_location="EXTERNAL"
        )
        size = 2 * WIDTH * WIDTH
        for key, text in (("location", "weights"), ("offset", str(i * size)), ("length", str(size))):
            value.external_data.add(key=key, value=text)
        values.append(value)
        nodes += [
            helper.make_node("Cast", [f"w{i}"], [f"c{i}"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", [f"c{i}"], [f"t{i}"], perm=[1, 0]),
            helper.make_node("MatMul", [x, f"t{i}"], [f"y{i}"]),
        ]
        x = f"y{i}"
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux")
def test_three_sessions_hold_the_weights_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with (tmp_path / "weights").open("wb") as file:
        for _ in range(PRODUCTS):
            rows = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5
            file.write(rows.astype(ml_dtypes.bfloat16).tobytes())
    for i in range(3):
        graph_of_products(tmp_path / f"{i}.onnx", [(i + k) % PRODUCTS for k in range(PRODUCTS)])
    code = f"""
import sys
from pathlib import Path
import numpy as np
import onnxruntime
from ivl_export.engines.onnxruntime.backend import open_onnxruntime
from ivl_export.engines.onnxruntime.weights import SharedWeights
from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec

def held():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

share = SharedWeights(Path({str(tmp_path / "shared")!r}), True) if sys.argv[1] == "shared" else None
x = np.ones((2, {WIDTH}), np.float32)
before, engines = held(), []
for i in range(3):
    shape = ("batch", {WIDTH})
    spec = ComponentSpec(
        "products", (TensorSpec("x", "float", shape),),
        (TensorSpec(f"y{{(i + {PRODUCTS} - 1) % {PRODUCTS}}}", "float", shape),), (Axis("batch", 1, 2, 4),)
    )
    path = Path({str(tmp_path)!r}) / f"{{i}}.onnx"
    engines.append(open_onnxruntime(spec, path, threads=1, share=share))
    engines[-1].run({{"x": x}})
print((held() - before) / {4 * PRODUCTS * WIDTH * WIDTH})
"""

    def ratio(how: str) -> float:
        process = subprocess.run(
            [sys.executable, "-c", code, how], capture_output=True, text=True, check=True
        )
        return float(process.stdout)

    assert ratio("alone") > 2.9
    for _ in range(2):  # the process that makes the files, and one that finds them
        assert 0.95 < ratio("shared") < 1.15


@given(st.lists(st.tuples(st.integers(1, 20), st.binary(max_size=200)), max_size=8), st.binary(max_size=300))
def test_rewriting_changes_only_the_given_fields(parts: list[tuple[int, bytes]], new: bytes) -> None:
    data = b"".join(delimited(number, value) for number, value in parts)
    assert rewritten(memoryview(data), (7,), bytes) == data
    result = rewritten(memoryview(data), (7,), lambda _: new)
    expected = [(number, new if number == 7 else value) for number, value in parts]
    assert [(n, bytes(v)) for n, v in fields(memoryview(result)) if not isinstance(v, int)] == expected


def test_rewriting_keeps_all_else_of_a_model(tmp_path: Path) -> None:
    graph_of_products(tmp_path / "g.onnx", [2, 0, 1])
    data = (tmp_path / "g.onnx").read_bytes()

    def renamed(entry: memoryview) -> bytes:
        return bytes(entry).replace(b"weights", b"elsewhere").replace(b"\x12\x07else", b"\x12\x09else")

    model, expected = onnx.ModelProto(), onnx.ModelProto()
    model.ParseFromString(rewritten(memoryview(data), (7, 5, 13), renamed))
    expected.ParseFromString(data)
    for tensor in expected.graph.initializer:
        tensor.external_data[0].value = "elsewhere"
    assert model == expected
    with pytest.raises(ValueError, match="truncated"):
        rewritten(memoryview(data[:-10]), (7, 5), bytes)
