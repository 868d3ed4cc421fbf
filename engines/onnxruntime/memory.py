"""The memory arena of ONNX Runtime's sessions on the CPU: one for a process, handed back when idle.

By default each session has an arena that doubles whenever it is full, and never shrinks.
Components run one after another: in one arena, extended by the bytes needed, a bundle takes less memory
(docs/embedding.md), and a service stops growing at the largest batches that met. Memory that closed sessions
leave in it has to be handed back, and ONNX Runtime does that at the end of a run only: hence a run of next to
nothing.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from typing import Any

from ..protobuf import delimited

_SHARED = {"session.use_env_allocators": "1"}


def arena_settings() -> dict[str, str]:
    """Session settings by which a session computes in the shared arena."""
    _register()
    return _SHARED


def hand_back() -> None:
    """Return idle arena memory and malloc's free memory to the system.

    It is taken again, page by page, by the next call: for when nothing is to be done. Safe while others run.
    """
    if _register.cache_info().currsize:
        run, feeds, options = _nothing()
        run(None, feeds, options)
    with suppress(OSError, TypeError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _register() -> None:
    """Make the arena. An application that has made its own keeps it: sessions compute in that one then."""
    import onnxruntime as ort

    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested, default = 1, -1
    arena = ort.OrtArenaCfg(
        {
            "max_mem": 0,
            "arena_extend_strategy": as_requested,
            "initial_chunk_size_bytes": default,
            "max_dead_bytes_per_chunk": default,
        }
    )
    with suppress(RuntimeError):  # there is one
        ort.create_and_register_allocator(where, arena)


@cache
def _nothing() -> tuple[Any, Any, Any]:
    """A session of one negation, and the options by which the arena shrinks when it has run."""
    import numpy as np
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    for key, value in _SHARED.items():
        settings.add_session_config_entry(key, value)
    session = ort.InferenceSession(_negation(), settings, providers=["CPUExecutionProvider"])
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return session.run, {"x": np.zeros(1, np.float32)}, options


def _negation() -> bytes:
    """An ONNX model, opset 13: ``y = -x``, float32 [1]."""

    def number(field: int, value: int) -> bytes:
        return bytes((field << 3, value))

    def value_info(name: bytes) -> bytes:
        shape = delimited(1, number(1, 1))
        return delimited(1, name) + delimited(2, delimited(1, number(1, 1) + delimited(2, shape)))

    node = delimited(1, b"x") + delimited(2, b"y") + delimited(4, b"Neg")
    graph = delimited(1, node) + delimited(2, b"negation")
    graph += delimited(11, value_info(b"x")) + delimited(12, value_info(b"y"))
    return number(1, 8) + delimited(8, number(2, 13)) + delimited(7, graph)
