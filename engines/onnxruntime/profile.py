"""ONNX Runtime's own profile of a graph: when each node began, and how long it took."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from ...arrays import Array
from ...bundle.spec import ComponentSpec
from ..layer_times import Event, TimedCall
from ..onnx_graph import read_graph
from .backend import OnnxRuntimeEngine
from .providers import placement
from .session import make_session

_NODE = "_kernel_time"
_CALL = "model_run"


def profiled_calls(
    spec: ComponentSpec,
    path: Path,
    inputs: dict[str, Array],
    calls: int,
    *,
    threads: int | None = None,
    warmup: int = 2,
) -> tuple[tuple[TimedCall, ...], dict[str, Array]]:
    """Run the graph ``path`` on the CPU ``calls`` times after ``warmup`` calls, each node timed.

    Returns:
        The calls, and the outputs of the last one.

    Timing every node costs time: calls take longer than without it.

    Raises:
        CapabilityError, IntegrityError, BuildError: as opening and running the engine.
    """
    with tempfile.TemporaryDirectory(prefix="ivl-ort-") as folder:
        placed = placement(spec, None, None)
        session = make_session(
            path, read_graph(path), threads=threads, settings={}, profile=Path(folder) / "profile"
        )
        with OnnxRuntimeEngine(spec, session, placed) as engine:
            for _ in range(warmup + calls):
                outputs = engine.run(inputs)
        records = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    timed: list[TimedCall] = []
    events: list[Event] = []
    for record in sorted(records, key=lambda r: float(r.get("ts", 0)) + float(r.get("dur", 0))):
        name, length = str(record.get("name", "")), float(record.get("dur", 0))
        if record.get("cat") == "Node" and name.endswith(_NODE):
            op = str(record.get("args", {}).get("op_name", ""))
            events.append(Event(name.removesuffix(_NODE), op, float(record["ts"]), length))
        elif name == _CALL:  # ends after its nodes
            begin = float(record["ts"])
            timed.append(TimedCall(length, tuple(replace(e, start_us=e.start_us - begin) for e in events)))
            events = []
    return tuple(timed[warmup:]), outputs
