"""The arena that ONNX Runtime's sessions share, and memory returned by it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.engines.onnxruntime.backend import open_onnxruntime
from ivl_export.engines.onnxruntime.memory import _negation, hand_back

SPEC = ComponentSpec(
    "wide",
    (TensorSpec("x", "float32", ("batch",)),),
    (TensorSpec("y", "float32", ("batch",)),),
    (Axis("batch", 1, 2, 8),),
)
ROW = 4 << 20
"""Numbers that a row of the graph computes with: 16 MiB."""
HELD = """
import sys
from pathlib import Path
from ivl_export.benchmarks.runtime.soak import resident
from ivl_export.engines.onnxruntime.memory import hand_back
from ivl_export.tests.engines.onnxruntime.test_memory import opened, x
{before}
with opened(Path(sys.argv[1])) as engine:
    engine.run({{"x": x(1)}})
    hand_back()
    least = resident()
    engine.run({{"x": x(8)}})
    most = resident()
    hand_back()
    again = engine.run({{"x": x(2)}})["y"].tolist()  # an array would keep its place in the arena
    assert again == [4 << 20, 2 * (4 << 20)], again
hand_back()
print(least, most, resident())
"""
OWN = """
import onnxruntime as ort
cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(cpu, ort.OrtArenaCfg({"max_mem": 0}))
"""


def x(rows: int) -> np.ndarray:
    return np.arange(1, rows + 1, dtype=np.float32)


def wide(path: Path) -> Path:
    """Writes a graph that spreads each number over a row and adds it up again."""
    result = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 13]>
        wide (float[batch] x) => (float[batch] y)
        <int64[1] one = {{1}}, int64[2] row = {{1, {ROW}}}>
        {{ column = Unsqueeze(x, one)
          rows = Expand(column, row)
          y = ReduceSum<keepdims = 0>(rows, one) }}""")
    onnx.checker.check_model(result)
    onnx.save(result, path)
    return path


def opened(path: Path):  # type: ignore[no-untyped-def]
    return open_onnxruntime(SPEC, path, threads=1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux")
@pytest.mark.parametrize("before", ["", OWN], ids=["ours", "the application's"])
@pytest.mark.slow
def test_memory_comes_and_goes_with_the_rows(tmp_path: Path, before: str) -> None:
    run = [sys.executable, "-c", HELD.format(before=before), str(wide(tmp_path / "wide.onnx"))]
    process = subprocess.run(run, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    least, most, last = map(int, process.stdout.split())
    if not before:  # another arena keeps to its own strategy
        assert most - least > 7 * 4 * ROW * 0.9
    assert last - least < 4 * ROW / 2


def test_returning_memory_disturbs_no_session(tmp_path: Path) -> None:
    stop = threading.Event()

    def rest() -> None:
        while not stop.is_set():
            hand_back()

    thread = threading.Thread(target=rest)
    with opened(wide(tmp_path / "wide.onnx")) as engine:
        thread.start()
        for rows in (1, 3, 2, 1, 3) * 4:
            np.testing.assert_array_equal(engine.run({"x": x(rows)})["y"], x(rows) * ROW)
        stop.set()
        thread.join()


def test_the_run_of_next_to_nothing_is_a_valid_model() -> None:
    model = onnx.load_from_string(_negation())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Neg"]
