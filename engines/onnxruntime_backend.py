"""ONNX Runtime on the CPU: the backend that runs everywhere.

Settings follow from the graph, each for a fault or a limit of ONNX Runtime 1.31:

* FP8: its Q/DQ fusion makes an invalid graph (microsoft/onnxruntime#22269), so
  ``session.disable_quant_qdq`` is set; products then run in fp32 on values rounded to FP8. A Relu before an
  FP8 QuantizeLinear is dropped as if the zero point were unsigned, so that rewrite is off.
* INT8: x86 processors without VNNI saturate the 16-bit sums of int8 products;
  ``session.x64quantprecision`` avoids it at half the speed and is set only there. MatMul and Add of plain
  matrices would become Gemm, for which there is no such INT8 kernel, so that fusion is off.
* INT8 and INT4 weights alone: its kernel (``MatMulNBits``) would round the inputs to INT8 as well;
  ``session.qdq_matmulnbits_accuracy_level`` keeps them in fp32.
"""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import BuildError, CapabilityError, IntegrityError, UsageError
from ..specs import ComponentSpec
from .graph import Graph, Node, read_graph
from .protocol import Array

_FLOAT_INPUTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class OnnxRuntimeEngine:
    """A component in an ONNX Runtime session. See :class:`~ivl_export.engines.protocol.Engine`."""

    def __init__(self, spec: ComponentSpec, session: Any) -> None:
        self.spec = spec
        self._session = session
        self._names = [t.name for t in spec.outputs]
        self._floats = {
            i.name: _FLOAT_INPUTS[i.type] for i in session.get_inputs() if i.type in _FLOAT_INPUTS
        }

    def run(self, inputs: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; see :meth:`~ivl_export.engines.protocol.Engine.run`."""
        if self._session is None:
            raise UsageError(f"Component {self.spec.name} is closed.", "", "Open it again.")
        self.spec.check(inputs)
        names = list(self._names if outputs is None else outputs)
        unknown = [name for name in names if name not in self._names]
        if unknown:
            raise UsageError(
                f"Component {self.spec.name} has no output {unknown[0]!r}.",
                f"It has {', '.join(self._names)}.",
            )
        feeds = {
            k: v.astype(self._floats[k], copy=False) if k in self._floats else v for k, v in inputs.items()
        }
        try:
            values = self._session.run(names, feeds)
        except Exception as error:  # its exceptions share no base class but this
            raise BuildError(
                f"Component {self.spec.name} failed in ONNX Runtime.",
                _first_line(error),
                "Rebuild the bundle.",
            ) from error
        return {
            name: value.astype(np.float32) if value.dtype in (np.float16, np.float64) else value
            for name, value in zip(names, values, strict=True)
        }

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_onnxruntime(
    spec: ComponentSpec, path: Path, *, threads: int | None = None, settings: dict[str, str] | None = None
) -> OnnxRuntimeEngine:
    """Open the ONNX graph ``path`` (its weights beside it) on the CPU.

    Args:
        spec: the component's contract.
        path: a graph that computes in fp32 (there are no bf16 kernels on the CPU).
        threads: threads for one operator; ONNX Runtime's choice if None.
        settings: further session settings (``session.…``), which win over the ones chosen here.

    Raises:
        CapabilityError: onnxruntime is not installed, or has no kernels for the graph's element types.
        IntegrityError: the graph or its weights are missing or damaged, or belong to another component.
    """
    session = _session(path, read_graph(path), threads=threads, settings=settings or {})
    have = {i.name for i in session.get_inputs()}, {o.name for o in session.get_outputs()}
    want = {t.name for t in spec.inputs}, {t.name for t in spec.outputs}
    if have[0] != want[0] or not want[1] <= have[1]:
        raise IntegrityError(
            f"{path} is not the graph of component {spec.name}.",
            f"It has inputs {sorted(have[0])} and outputs {sorted(have[1])}.",
            "Rebuild the bundle.",
        )
    return OnnxRuntimeEngine(spec, session)


def optimized_nodes(path: Path) -> tuple[Node, ...]:
    """The nodes ONNX Runtime really runs for the graph ``path`` on this CPU, after its own optimisation.

    Weights that it folds are written to a temporary file. Raises as :func:`open_onnxruntime`.
    """
    graph = read_graph(path)
    with tempfile.TemporaryDirectory(prefix="ivl-ort-") as folder:
        copy = Path(folder) / "optimized.onnx"
        settings = {
            "session.optimized_model_external_initializers_file_name": "optimized.weights",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        _session(path, graph, threads=1, settings=settings, save=copy)
        return read_graph(copy).nodes


def optimized_ops(path: Path) -> dict[str, int]:
    """Operator -> how often ONNX Runtime runs it for the graph ``path``, after its own optimisation.

    INT8 products are ``MatMulIntegerToFloat``, ``QLinearMatMul`` or ``QGemm``; ``MatMul`` and ``Gemm`` run in
    fp32.
    """
    return dict(Counter(node.op for node in optimized_nodes(path)).most_common())


def _session(
    path: Path, graph: Graph, *, threads: int | None, settings: dict[str, str], save: Path | None = None
) -> Any:
    try:
        import onnxruntime as ort
    except (ImportError, OSError) as error:
        raise CapabilityError(
            "onnxruntime is not installed.", str(error), "Install it: pip install onnxruntime"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    if save is not None:
        options.optimized_model_filepath = str(save)
    for key, value in {**_settings(graph.element_types), **settings}.items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(
            str(path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_disabled(graph.element_types),
        )
    except Exception as error:  # its exceptions share no base class but this
        message = _first_line(error)
        if "NOT_IMPLEMENTED" in message or "INVALID_GRAPH" in message:
            raise CapabilityError(
                f"ONNX Runtime {ort.__version__} cannot run {path.name} on the CPU.",
                message,
                "Use the fp32 graph, or install a newer release: pip install -U onnxruntime",
            ) from error
        raise IntegrityError(
            f"ONNX Runtime cannot load {path}.", message, "Rebuild the bundle, or copy it again."
        ) from error


def _settings(types: frozenset[str]) -> dict[str, str]:
    settings = {}
    if types & {"fp8", "fp8_e5m2"}:
        settings["session.disable_quant_qdq"] = "1"
    if "int8" in types and not _exact_int8():
        settings["session.x64quantprecision"] = "1"
    if types & {"int8", "int4"}:
        settings["session.qdq_matmulnbits_accuracy_level"] = "1"
    return settings


def _disabled(types: frozenset[str]) -> set[str]:
    return ({"MatMulAddFusion"} if "int8" in types else set()) | (
        {"ReluQuantRewrite"} if "fp8" in types else set()
    )


def _exact_int8() -> bool:
    """Whether int8 products are summed without saturation: not on x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64", "x86", "i386", "i686"):
        return True
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # unknown: right before fast


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
