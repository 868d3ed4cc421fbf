from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ivl_export.dtypes import COMPUTE, dtype_of
from ivl_export.errors import BuildError, CheckpointError
from ivl_export.export import copying
from ivl_export.export.binding import bind, save_graph, unbound
from ivl_export.export.weight_store import ALIGNMENT, StoredTensor, StoreWriter, open_store, plan_store
from ivl_export.export.weights import write_store
from ivl_export.models.checkpoint import open_checkpoint

TINY = Path(__file__).parents[1] / "goldens" / "tiny"
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")


def filled(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 20).to(getattr(torch, dtype))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=12), st.randoms(use_true_random=False))
def test_any_layout_reads_back_with_the_safetensors_library(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, tuple[int, ...]]], random: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "store.safetensors"
    tensors = {f"t.{i}": filled(dtype, shape, i) for i, (dtype, shape) in enumerate(plan)}
    listed = [StoredTensor(f"t.{i}", dtype, shape) for i, (dtype, shape) in enumerate(plan)]
    pieces = {name: list(torch.split(t, 7)) if t.dim() else [t] for name, t in tensors.items()}
    with StoreWriter(path, listed) as store:
        while left := [name for name, rows in pieces.items() if rows]:
            name = random.choice(left)
            store.write(name, pieces[name].pop(0))
    back = load_file(path)
    assert set(back) == set(tensors)
    assert all(same(back[name], tensor) for name, tensor in tensors.items())
    planned = plan_store(path, listed)
    assert planned.refs == open_store(path)
    assert planned.size == path.stat().st_size
    for name, ref in planned.refs.items():
        assert ref.offset is not None
        whole = min(tensors[name].nbytes & -tensors[name].nbytes, ALIGNMENT)
        assert ref.offset % whole == 0, "as aligned as its size allows"
        assert path.read_bytes()[ref.offset : ref.offset + ref.nbytes] == (
            tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )


def test_large_tensors_start_on_pages(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    plan = [StoredTensor("bias", "bfloat16", (3,)), StoredTensor("weight", "bfloat16", (64, 96))]
    with StoreWriter(path, plan) as store:
        for t in plan:
            store.write(t.name, filled(t.dtype, t.shape))
    refs = open_store(path)
    assert refs["weight"].offset == ALIGNMENT
    assert refs["bias"].offset == ALIGNMENT + 64 * 96 * 2


def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), StoreWriter(path, [StoredTensor("a", "int8", (4,))]):
        raise KeyboardInterrupt
    with pytest.raises(BuildError, match="1 tensors of the weights store are incomplete"):
        half_written(path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def half_written(path: Path) -> None:
    with StoreWriter(path, [StoredTensor("a", "int8", (4,))]) as store:
        store.write("a", torch.zeros(3, dtype=torch.int8))


@pytest.mark.parametrize(
    "values", [torch.zeros(5, dtype=torch.int8), torch.zeros(4), torch.zeros(4, dtype=torch.uint8)]
)
def test_wrong_values_are_refused(values: torch.Tensor, tmp_path: Path) -> None:
    path, right = tmp_path / "s.safetensors", torch.ones(4, dtype=torch.int8)
    with StoreWriter(path, [StoredTensor("a", "int8", (4,))]) as store:
        with pytest.raises(BuildError, match="wrong values for a"):
            store.write("a", values)
        store.write("a", right)
    assert same(load_file(path)["a"], right)


def test_names_are_listed_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="listed twice"):
        StoreWriter(tmp_path / "s", [StoredTensor("a", "int8", (4,)), StoredTensor("a", "int8", (4,))])


@contextmanager
def files_no_larger_than(nbytes: int) -> Iterator[None]:
    """The system refuses to make files larger, as it does where the disk is full."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(BuildError, match=r"s\.safetensors cannot be written\. File too large"),
        files_no_larger_than(1 << 20),
        StoreWriter(tmp_path / "s.safetensors", [StoredTensor("a", "int8", (1 << 21,))]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be written"):
        write_store(open_checkpoint(TINY), ["logit_scale"], tmp_path / "file" / "s.safetensors", "fp32")


@pytest.mark.parametrize("dtype", COMPUTE)
def test_checkpoint_tensors_are_stored_once_in_the_requested_type(dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY)
    keys = [
        "text_projection",
        "logit_scale",
        "text_projection",
        "vision_model.embeddings.patch_embedding.weight",
    ]
    write_store(checkpoint, keys, tmp_path / "s.safetensors", dtype)
    back = load_file(tmp_path / "s.safetensors")
    assert set(back) == set(keys)
    for key, tensor in back.items():
        assert same(tensor, checkpoint.load(key, dtype_of(dtype).torch))


def test_absent_and_overflowing_tensors(tmp_path: Path) -> None:
    tensors = load_file(TINY / "model.safetensors")
    tensors["logit_scale"] = torch.tensor(1e6)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    checkpoint, path = open_checkpoint(tmp_path), tmp_path / "s.safetensors"
    with pytest.raises(CheckpointError, match=r"logit_scale holds values too large for float16\. .*1e\+06"):
        write_store(checkpoint, ["logit_scale"], path, "fp16")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors\. nothing"):
        write_store(checkpoint, ["nothing"], path, "fp32")
    assert not path.exists()


def graph_of(name: str, shape: tuple[int, ...], dtype: str) -> ir.Model:
    """One unbound initializer added to itself."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType[dtype]))
    node = ir.node("Add", [value, value], name="add")
    node.outputs[0].name = "out"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType[dtype]), ir.Shape(shape)
    graph = ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 24}, name="small")
    graph.initializers.add(value)
    return ir.Model(graph, ir_version=10)


def store_of(folder: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Path:
    path = folder / "weights" / f"{name}.safetensors"
    with StoreWriter(path, [StoredTensor(name, dtype, shape)]) as store:
        store.write(name, filled(dtype, shape))
    return path


def test_binding_casts_between_float_types_only(tmp_path: Path) -> None:
    store = open_store(store_of(tmp_path, "w", "bfloat16", (6,)))
    model = graph_of("w", (6,), "FLOAT")
    assert unbound(model) == ["w"]
    bind(model, store, tmp_path)
    assert unbound(model) == []
    save_graph(model, tmp_path / "m.onnx")
    assert [n.op_type for n in ir.load(tmp_path / "m.onnx").graph] == ["Cast", "Add"]

    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], 2 * filled("bfloat16", (6,)).float().numpy())

    with pytest.raises(BuildError, match=r"differ in w\. The graph has INT8"):
        bind(graph_of("w", (6,), "INT8"), store, tmp_path)
    with pytest.raises(BuildError, match=r"The graph has FLOAT \[5\], the store BFLOAT16 \[6\]"):
        bind(graph_of("w", (5,), "FLOAT"), store, tmp_path)
    with pytest.raises(BuildError, match=r"needs v\. It is not in the weights store"):
        bind(graph_of("v", (6,), "FLOAT"), store, tmp_path)


def test_fp8_and_int8_are_bound_as_they_are(tmp_path: Path) -> None:
    for dtype, kind in (("int8", "INT8"), ("float8_e4m3fn", "FLOAT8E4M3FN")):
        model = graph_of(kind, (4,), kind)
        bind(model, open_store(store_of(tmp_path, kind, dtype, (4,))), tmp_path)
        tensor = model.graph.initializers[kind].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.tobytes() == filled(dtype, (4,)).view(torch.uint8).numpy().tobytes()
        assert str(tensor.location) == f"weights/{kind}.safetensors"


def test_a_store_outside_the_folder_is_refused(tmp_path: Path) -> None:
    store = open_store(store_of(tmp_path, "w", "float32", (2,)))
    with pytest.raises(BuildError, match="Write the store below the graphs"):
        bind(graph_of("w", (2,), "FLOAT"), store, tmp_path / "onnx")


def test_one_name_in_two_stores(tmp_path: Path) -> None:
    path = store_of(tmp_path, "w", "float32", (2,))
    other = path.with_name("other.safetensors")
    other.write_bytes(path.read_bytes())
    with pytest.raises(BuildError, match="1 tensors are in two weights stores"):
        open_store(path, other)


def test_unbound_and_invalid_graphs_are_not_saved(tmp_path: Path) -> None:
    model, path = graph_of("w", (2,), "FLOAT"), tmp_path / "m.onnx"
    with pytest.raises(BuildError, match=r"1 weights without data\. w"):
        save_graph(model, path)
    bind(model, open_store(store_of(tmp_path, "w", "float32", (2,))), tmp_path)
    model.graph[0].op_type = "Nonsense"
    with pytest.raises(BuildError, match="not valid ONNX"):
        save_graph(model, path)
    assert not list(tmp_path.glob("*.onnx*"))
    assert not list(tmp_path.glob(".*"))


def test_a_file_cut_short_is_said(tmp_path: Path) -> None:
    big = torch.randn(3, 700_001, generator=torch.Generator().manual_seed(0))
    save_file({"small": torch.ones(3), "big": big}, tmp_path / "source.safetensors")
    ref = open_store(tmp_path / "source.safetensors")["big"]
    layout, path, heard = [StoredTensor("copy", "float32", (3, 700_001))], tmp_path / "s.safetensors", [0]
    with StoreWriter(path, layout) as store:
        store.copy("copy", ref, heard.append)
    assert torch.equal(load_file(path)["copy"], big)
    assert sum(heard) == ref.nbytes
    path.unlink()
    with (tmp_path / "source.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="has become shorter"), StoreWriter(path, layout) as store:
        store.copy("copy", ref, heard.append)
    (tmp_path / "source.safetensors").unlink()
    with (
        pytest.raises(CheckpointError, match=r"cannot be read\. No such file"),
        StoreWriter(path, layout) as store,
    ):
        store.copy("copy", ref, heard.append)
    with pytest.raises(ValueError, match="cannot be copied"), StoreWriter(path, layout) as store:
        store.copy("copy", replace(ref, offset=None), heard.append)
    assert not path.exists()


def test_the_first_error_of_several_copies_ends_them() -> None:
    steps: list[str] = []
    names = [f"{i}" for i in range(200)]
    copying.in_threads(steps.append, names)
    assert sorted(steps) == sorted(names)
    steps.clear()

    def copy(name: str) -> None:
        if name == "1":
            raise CheckpointError("broken")
        time.sleep(0.001)
        steps.append(name)

    with pytest.raises(CheckpointError, match="broken"):
        copying.in_threads(copy, names)
    assert len(steps) < 100


@pytest.mark.parametrize("direct", [True, False])
@given(begin=st.integers(0, 9000), at=st.integers(0, 9000), nbytes=st.integers(0, 60_000))
def test_ranges_are_copied_whichever_way(direct: bool, begin: int, at: int, nbytes: int) -> None:
    data = np.random.default_rng(0).bytes(80_000)
    heard: list[int] = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if not direct:  # as on systems without it
            patch.delattr(os, "O_DIRECT", raising=False)
        patch.setattr(copying, "BLOCK_BYTES", 3 * copying.PAGE)
        patch.setattr(copying, "DIRECT_BYTES", copying.PAGE)
        source, path = Path(folder) / "source", Path(folder) / "target"
        source.write_bytes(data)
        with io.FileIO(path, "w") as target:
            copying.reserve(target, at + nbytes + 10)
            copying.copy_bytes(source, begin, target, at, nbytes, heard.append)
        assert path.read_bytes() == bytes(at) + data[begin : begin + nbytes] + bytes(10)
    assert sum(heard) == nbytes
    assert all(size <= 3 * copying.PAGE for size in heard)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs direct writes")
def test_large_copies_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    source = tmp_path / "source"
    source.write_bytes(np.random.default_rng(0).bytes(3 * copying.DIRECT_BYTES))
    written: list[int] = []
    pwrite = os.pwrite

    def counted(file: int, data: memoryview, at: int) -> int:
        size = pwrite(file, data, at)
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            written.append(size)
        return size

    monkeypatch.setattr(os, "pwrite", counted)
    with io.FileIO(tmp_path / "target", "w") as target:
        at, nbytes = 2 * copying.PAGE - 5, 2 * copying.DIRECT_BYTES
        copying.copy_bytes(source, 1, target, at, nbytes, lambda size: None)
    if not written:
        pytest.skip("this file system writes through the page cache only")
    assert sum(written) == nbytes - copying.PAGE


def test_what_stops_a_copy_is_said(tmp_path: Path) -> None:
    source, heard = tmp_path / "source", list[int]()
    source.write_bytes(bytes(5000))
    with io.FileIO(tmp_path / "target", "w") as target:
        with pytest.raises(CheckpointError, match=r"has become shorter\. 277 bytes are gone"):
            copying.copy_bytes(source, 4277, target, 0, 1000, heard.append)
        with pytest.raises(OSError, match="File too large"), files_no_larger_than(4096):
            copying.copy_bytes(source, 0, target, 4000, 500, heard.append)
        with pytest.raises(KeyboardInterrupt):
            copying.copy_bytes(source, 0, target, 0, 5000, interrupt)
    with (
        pytest.raises(OSError, match=r"not open for writing|Bad file descriptor"),
        io.FileIO(tmp_path / "target") as target,
    ):
        copying.copy_bytes(source, 0, target, 0, 10, heard.append)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs direct writes")
def test_a_full_disk_is_noticed_past_the_page_cache(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(2 * copying.DIRECT_BYTES))
    with (
        pytest.raises(OSError, match="File too large"),
        io.FileIO(tmp_path / "target", "w") as target,
        files_no_larger_than(copying.DIRECT_BYTES),
    ):
        copying.copy_bytes(source, 0, target, 0, 2 * copying.DIRECT_BYTES, lambda size: None)


def interrupt(_: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that a read fails on")
def test_the_side_that_failed_is_named(tmp_path: Path) -> None:
    # Nothing is mapped at address 0: reading there fails with an input/output error, as from a broken disk.
    source = Path("/proc/self/mem")
    with (
        pytest.raises(CheckpointError, match=r"/proc/self/mem cannot be read\. Input/output error"),
        io.FileIO(tmp_path / "target", "w") as target,
    ):
        copying.copy_bytes(source, 0, target, 0, 4096, lambda size: None)
