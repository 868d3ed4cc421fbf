"""Sessions of ONNX Runtime.

Settings follow from the graph, each for a fault or a limit of ONNX Runtime 1.31:

* FP8: its Q/DQ fusion makes an invalid graph (microsoft/onnxruntime#22269), so
  ``session.disable_quant_qdq`` is set; products then run in fp32 on values rounded to FP8. A Relu before an
  FP8 QuantizeLinear is dropped as if the zero point were unsigned, so that rewrite is off.
* INT8: x86 processors without VNNI saturate the 16-bit sums of int8 products;
  ``session.x64quantprecision`` avoids it at half the speed and is set only there. MatMul and Add of plain
  matrices would become Gemm, for which there is no such INT8 kernel, so that fusion is off.
* INT8 and INT4 weights alone: its kernel (``MatMulNBits``) would round the inputs to INT8 as well;
  ``session.qdq_matmulnbits_accuracy_level`` keeps them in fp32.

Each session has its own threads, which spin for a while after a run in case another follows. The next run
is another component's, on the same cores: ``session.force_spinning_stop`` ends the spinning with the run, so
that chained components do not take each other's time (docs/runtime.md has figures).
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from ...errors import CapabilityError, IntegrityError
from ...forks import no_fork
from ...host import core_limit
from ..device import HOST
from ..onnx_graph import Graph
from .memory import arena_settings, hand_back
from .providers import Placement


def make_session(
    path: Path,
    graph: Graph,
    *,
    threads: int | None,
    settings: dict[str, str],
    save: Path | None = None,
    profile: Path | None = None,
    where: Placement = Placement(),  # noqa: B008 - frozen
    optimised: bool = False,
) -> Any:
    """A session of the graph ``path`` (``graph`` as read).

    Args:
        path, graph: the ONNX file.
        threads: threads for one operator; None: ONNX Runtime's choice, but as many as this process may use.
        settings: further session settings.
        save: where the optimised graph is written.
        profile: begin of the name of the file that the session writes each node's times to when it ends.
        where: device and provider.
        optimised: the file was written by ``save``: ``graph`` is its source.

    Raises: as :func:`.backend.open_onnxruntime`.
    """
    try:
        import onnxruntime as ort
    except (ImportError, OSError) as error:
        raise CapabilityError(
            "onnxruntime is not installed.", str(error), "Install it: pip install 'ivl-export[cpu]'"
        ) from error
    where.check(ort)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions
    options.intra_op_num_threads = threads or core_limit() or 0  # 0: its own choice
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    arena = arena_settings() if where.device == HOST else {}
    for key, value in {**arena, **_settings(graph.element_types), **settings}.items():
        options.add_session_config_entry(key, value)
    try:
        with no_fork:
            session = ort.InferenceSession(
                str(path),
                options,
                providers=where.providers(),
                disabled_optimizers=_disabled(graph.element_types),
            )
    except Exception as error:  # its exceptions share no base class but this
        message = first_line(error)
        if "NOT_IMPLEMENTED" in message or "INVALID_GRAPH" in message:
            raise CapabilityError(
                f"ONNX Runtime {ort.__version__} cannot run {path.name} with its {where.provider} provider.",
                message,
                "Use the fp32 graph, or install a newer release: pip install -U onnxruntime",
            ) from error
        raise IntegrityError(
            f"ONNX Runtime cannot load {path}.", message, "Rebuild the bundle, or copy it again."
        ) from error
    where.check_used(session)
    hand_back()  # glibc would keep the weights as they were before they were packed
    return session


def _settings(types: frozenset[str]) -> dict[str, str]:
    settings = {"session.force_spinning_stop": "1"}
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


def first_line(error: Exception) -> str:
    """ONNX Runtime's message, without its trace."""
    return str(error).strip().split("\n", 1)[0]
