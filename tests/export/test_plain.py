"""Plain graphs with copied and with linked weights, against torch; refusals, and what errors leave."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint
from ivl_export.cli import main
from ivl_export.cli.progress import Bars
from ivl_export.errors import BuildError, CapabilityError, CheckpointError, UsageError
from ivl_export.export.concurrent import Check, concurrent
from ivl_export.export.unquantized import STORE, ExportSteps, export_plain, weight_keys
from ivl_export.models import InternVLConfig, QLlamaConfig, VisionConfig
from ivl_export.models.checkpoint import Checkpoint, load_state, open_checkpoint
from ivl_export.models.registry import component_module, expected_shapes

pytestmark = pytest.mark.numeric

Array = np.ndarray[Any, Any]
# Five blocks, of which one is traced; a vocabulary with room for the tokenizer.
SMALL = InternVLConfig(
    VisionConfig(80, 5, 5, 128, 56, 14),
    QLlamaConfig(64, 2, 4, 96, 1200),
    clip_embed_dim=20,
    attn_pool_num_heads=4,
    num_query_token=5,
)
BOTH = ("vision", "qllama_text")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards or more, bf16. Tests must not change it."""
    folder = tmp_path_factory.mktemp("source")
    assert len(make_checkpoint(folder, SMALL, shard_bytes=400_000)) > 2
    return folder


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "shards"))


class Steps:
    """Records steps: started, advanced, ended."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.threads: set[threading.Thread] = set()

    def started(self, step: str, total: int | None, unit: str = "") -> None:
        self._call(step, f"of {total} {unit}".strip())

    def advanced(self, done: int, total: int | None = None, detail: str = "") -> None:
        self._call("", done)

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        self._call(step, "ended")

    def _call(self, step: str, what: object) -> None:
        self.calls.append((step, what))
        self.threads.add(threading.current_thread())


class Stopping(Steps):
    """Is interrupted at the end of a step."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        super().finished(step, seconds, reused)
        if step == self.step:
            raise KeyboardInterrupt


def inputs(name: str) -> dict[str, Array]:
    random = np.random.default_rng(0)
    if name == "vision":
        return {"pixel_values": random.standard_normal((2, 3, 56, 56)).astype(np.float32)}
    return {"input_ids": random.integers(3, 1200, (2, 7)), "lengths": np.array([7, 4])}


def torch_outputs(checkpoint: Checkpoint, name: str) -> list[Array]:
    with torch.device("meta"):
        module = component_module(name, checkpoint.config)
    load_state(module, checkpoint, torch.float32)
    with torch.no_grad():
        return [out.numpy() for out in module(*map(torch.from_numpy, inputs(name).values()))]


def assert_equals_torch(checkpoint: Checkpoint, name: str, graph: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    for got, want in zip(session.run(None, inputs(name)), torch_outputs(checkpoint, name), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def locations(graph: Path) -> set[str]:
    model = onnx.load(graph, load_external_data=False)
    return {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}


@pytest.mark.slow
def test_zero_copy_equals_torch_and_writes_only_graphs(shards: Path) -> None:
    before = {p.name: p.read_bytes() for p in shards.iterdir() if p.is_file()}
    checkpoint = open_checkpoint(shards)
    export = export_plain(checkpoint, shards, BOTH, "fp32", zero_copy=True)
    assert export.store is None
    assert set(export.graphs) == set(BOTH)
    after = {p.name: p.read_bytes() for p in shards.iterdir() if p.is_file()}
    assert set(after) - set(before) == {"vision.fp32.onnx", "qllama_text.fp32.onnx"}
    assert all(after[name] == content for name, content in before.items())
    assert export.bytes_written == sum(len(after[name]) for name in set(after) - set(before))
    assert export.bytes_referred > export.bytes_written
    for name, graph in export.graphs.items():
        assert locations(graph) <= set(before)
        assert_equals_torch(checkpoint, name, graph)


@pytest.mark.slow
def test_a_copy_equals_torch_and_needs_no_checkpoint(source: Path, tmp_path: Path) -> None:
    steps = Steps()
    checkpoint = open_checkpoint(source)
    out = tmp_path / "new" / "out"
    export = export_plain(checkpoint, out, BOTH, "fp32", progress=steps)
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    assert {p.relative_to(moved).as_posix() for p in moved.rglob("*") if p.is_file()} == {
        "vision.fp32.onnx", "qllama_text.fp32.onnx", "weights/weights.safetensors",
    }  # fmt: skip
    assert [p.name for p in out.parent.iterdir()] == []
    stored = load_file(moved / STORE)
    assert set(stored) == set(weight_keys(checkpoint, BOTH))
    assert all(torch.equal(value, checkpoint.load(key)) for key, value in stored.items())
    for name, graph in export.graphs.items():
        assert locations(moved / graph.name) == {STORE.as_posix()}
        assert_equals_torch(checkpoint, name, moved / graph.name)
    megabytes = -(-sum(t.nbytes for t in stored.values()) // 10**6)
    assert steps.calls[0] == ("weights", f"of {megabytes} MB")
    assert ("", megabytes) in steps.calls
    ended = [step for step, what in steps.calls if what == "ended"]
    assert sorted(ended) == sorted(["weights", *BOTH])
    assert [step for step in ended if step != "weights"] == [*BOTH]


@pytest.mark.slow
def test_bf16_graphs_use_the_shards_as_they_are(shards: Path, tmp_path: Path) -> None:
    linked = export_plain(open_checkpoint(shards), shards, ["vision"], "bf16", zero_copy=True)
    copied = export_plain(open_checkpoint(shards), tmp_path / "copy", ["vision"], "bf16")
    a, b = (onnx.load(result.graphs["vision"]) for result in (linked, copied))  # with its weights
    assert [n.op_type for n in a.graph.node] == [n.op_type for n in b.graph.node]
    assert "Cast" not in {
        n.op_type for n in a.graph.node if n.input[0] in {t.name for t in a.graph.initializer}
    }
    weights = [
        {t.name: (t.data_type, t.raw_data) for t in m.graph.initializer if len(t.dims) > 1} for m in (a, b)
    ]
    assert weights[0] == weights[1]
    assert {kind for kind, _ in weights[0].values()} == {onnx.TensorProto.BFLOAT16}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_torch_archives_are_copied_not_linked(source: Path, tmp_path: Path, suffix: str) -> None:
    whole = open_checkpoint(source)
    folder = tmp_path / "torch"
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    if suffix == ".bin":  # as many shards, and tensors in another layout than read
        places = {key: ref.file.stem + ".bin" for key, ref in whole.tensors.items()}
        for shard in set(places.values()):
            tensors = {key: whole.load(key) for key, place in places.items() if place == shard}
            torch.save(
                {k: t.T.contiguous().T if t.dim() == 2 else t for k, t in tensors.items()}, folder / shard
            )
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        checkpoint = open_checkpoint(folder)
    else:
        keys = expected_shapes(replace(SMALL, contrastive_only=True))
        torch.save({key: whole.load(key) for key in keys}, folder / "old.pth")
        checkpoint = open_checkpoint(folder / "old.pth")
    with pytest.raises(CapabilityError, match="torch archive, which does not say at which byte"):
        export_plain(checkpoint, folder, ["vision"], "fp32", zero_copy=True)
    assert not list(folder.glob("*.onnx"))
    names = BOTH if suffix == ".bin" else BOTH[:1]
    export = export_plain(checkpoint, tmp_path / "out", names, "fp32")
    assert_equals_torch(whole, "vision", export.graphs["vision"])
    shown = export_plain(whole, tmp_path / "whole", names, "fp32")
    for name in (STORE.as_posix(), *(graph.name for graph in shown.graphs.values())):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_links_that_runtimes_refuse_are_refused_with_the_reason(shards: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shards)
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(UsageError, match="Runtimes refuse external data outside the folder") as refused:
        export_plain(checkpoint, outside, ["vision"], zero_copy=True)
    assert str(shards) in refused.value.fix
    # A hub cache: the shards are links to blobs elsewhere.
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (p for p in shards.iterdir() if p.is_file()):
        (snapshot / file.name).symlink_to(file)
    with pytest.raises(UsageError, match="is a link to"):
        export_plain(open_checkpoint(snapshot), snapshot, ["vision"], zero_copy=True)
    for file in shards.glob("*.safetensors"):
        os.link(file, tmp_path / f"second-{file.name}")
    with pytest.raises(CapabilityError, match="second name"):
        export_plain(checkpoint, shards, ["vision"], zero_copy=True)
    assert not [*tmp_path.rglob("*.onnx")]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path: Path) -> None:
    # A sparse file: terabytes on paper, nothing on the disk.
    config = replace(SMALL, qllama=replace(SMALL.qllama, vocab_size=1 << 35))
    entries, end = {}, 0
    for key, shape in expected_shapes(config).items():
        begin, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(entries).encode()
    source = tmp_path / "huge"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config.to_published()))
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    with pytest.raises(BuildError, match=r"4398\.\d GB are needed, [\d.]+ GB are free"):
        export_plain(open_checkpoint(source), tmp_path / "out", ["qllama_text"])
    assert [p.name for p in tmp_path.iterdir()] == ["huge"]


def test_nothing_stays_after_an_error_and_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(source), tmp_path / "out"

    left = tmp_path / ".out.export" / "weights"
    left.mkdir(parents=True)
    (left / "half.tmp").write_bytes(b"of a killed run")
    with pytest.raises(KeyboardInterrupt):
        export_plain(checkpoint, out, ["vision"], "fp32", progress=Stopping("vision"))
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="is there already"):
        export_plain(checkpoint, out, ["vision"], "fp32")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("failing", ["weights", "vision"])
def test_what_fails_stops_the_other_and_leaves_nothing(source: Path, tmp_path: Path, failing: str) -> None:
    checkpoint, steps = open_checkpoint(source), Stopping(failing)
    with pytest.raises(KeyboardInterrupt):
        export_plain(checkpoint, tmp_path / "out", BOTH, "bf16", progress=steps)
    assert not list(tmp_path.iterdir())
    threads = steps.threads
    assert [thread for thread in threads if thread.is_alive()] == [threading.current_thread()]
    assert len(threads) > 1, "weights are copied in several threads"


def test_a_shard_cut_short_meanwhile_is_said(shards: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shards)
    os.truncate(max(ref.file for ref in checkpoint.tensors.values()), 5000)
    with pytest.raises(CheckpointError, match="has become shorter"):
        export_plain(checkpoint, tmp_path / "out", dtype="bf16")
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


def test_16_bit_stores_of_wider_checkpoints_are_rounded_while_tracing(source: Path, tmp_path: Path) -> None:
    narrow = open_checkpoint(source)
    wide = tmp_path / "wide"
    wide.mkdir()
    shutil.copyfile(source / "config.json", wide / "config.json")
    save_file({k: narrow.load(k).float() * 1.001 for k in narrow.tensors}, wide / "model.safetensors")
    checkpoint = open_checkpoint(wide)
    export = export_plain(checkpoint, tmp_path / "out", ["vision"], "bf16")
    stored = load_file(tmp_path / "out" / STORE)
    assert export.bytes_referred == 2 * sum(t.nbytes for t in stored.values())
    assert all(torch.equal(t, checkpoint.load(k, torch.bfloat16)) for k, t in stored.items())


def test_concurrent_work_ends_with_the_block() -> None:
    def for_ever(go_on: Check) -> None:
        while True:
            go_on()

    with pytest.raises(KeyboardInterrupt), concurrent(for_ever):
        raise KeyboardInterrupt

    def failing(go_on: Check) -> None:
        raise CheckpointError("broken")

    with pytest.raises(CheckpointError, match="broken"), concurrent(failing) as sound:
        for_ever(sound)
    with pytest.raises(CheckpointError, match="broken"), concurrent(failing):
        pass
    steps: list[int] = []
    with concurrent(lambda go_on: steps.append(1)) as sound:
        sound()
    assert steps == [1]


def test_components_that_end_while_weights_are_copied_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars() as bars:
        steps = ExportSteps(bars)
        for text in [
            ("weights", 0, 9), ("a", 0, 1), ("a", 1, 1), ("weights", 5, 9), ("b", 0, 1), ("weights", 9, 9),
            ("b", 1, 1), ("c", 0, 1), ("c", 1, 1),
        ]:  # fmt: skip
            steps(*text)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["done", name] for name in ("a", "weights", "b", "c")]


def test_tensors_that_components_share_are_counted_once(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    text, step = (weight_keys(checkpoint, [name]) for name in ("qllama_text", "qllama_step"))
    both = weight_keys(checkpoint, ["qllama_text", "qllama_step"])
    assert len(both) == len(set(both)) == len({*text, *step}) < len(text) + len(step)


def test_faulty_arguments(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    with pytest.raises(UsageError, match="Unknown dtype 'fp8'"):
        export_plain(checkpoint, tmp_path / "out", dtype="fp8")
    with pytest.raises(UsageError, match="Unknown component 'visoin'"):
        export_plain(checkpoint, tmp_path / "out", ["visoin"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_verb(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["export", "--model", str(shards), "--components", "vision", "--dtype", "fp32"]
    assert main([*args, "--zero-copy", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["graphs"] == {"vision": str(shards / "vision.fp32.onnx")}
    assert printed["store"] is None
    assert printed["zero_copy"] is True
    assert main([*args, "--out", str(tmp_path / "copy")]) == 0
    shown = capsys.readouterr()
    assert "weights.safetensors" in shown.out.replace("\n", "")
    assert "done weights" in shown.err
    assert "done vision" in shown.err
    assert (tmp_path / "copy" / STORE).is_file()
    assert main([*args, "--out", str(tmp_path), "--zero-copy", "--json"]) == 0, "a folder above will do"
    assert main([*args, "--out", str(tmp_path / "copy"), "--zero-copy", "--json"]) == UsageError.exit_code


@pytest.mark.slow
def test_shipped_models_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["export", "--model", "nano-chat", "--components", "decoder_embed", "--dtype", "fp32", "--json"]
    assert main(args) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"].values()
    assert graph == "onnx/internvl-nano-chat-fp32/decoder_embed.fp32.onnx"
    assert (tmp_path / graph).is_file()
