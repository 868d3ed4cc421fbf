"""Measured ceilings of this machine: large matrix products in each type, and copies through memory.

The roof over every measured time. On the CPU the products are ONNX Runtime's own kernels (and torch's, for
the PyTorch baseline), copies numpy's, both on as many threads as the engines had. On a GPU everything is
torch's. The best of the repetitions counts: a ceiling is the possible rate, not the usual one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...dtypes import COMPUTE, dtype_of
from ...host import core_limit, cores
from ..cost.flops import ComponentCost
from .cases import Case, EngineCalls, Floor
from .device_timing import event_timer, has_gpu
from .timing import StopRule, measure

SIDE = 1024
GPU_SIDE = 8192
COPY_BYTES = (1 << 20, 16 << 20, 256 << 20)
_RULE = StopRule(seconds=0.5, min_samples=10, warmup_calls=2)
CPU = "CPU"
_ON_CPU = {"onnxruntime": {"bf16": "fp32", "fp16": "fp32", "fp8": "fp32", "int4": "fp32"}}
_TORCH_ON_CPU = {"fp16": "bf16", "fp8": "bf16", "int8": "bf16", "int4": "bf16"}
"""Types that CPU backends multiply in, for types without kernels."""


@dataclass(frozen=True)
class ProductSpeed:
    """10^9 operations per second of one product of two square matrices, ``side`` a side, in ``kind``."""

    kind: str
    gflops: float
    side: int
    by: str


@dataclass(frozen=True)
class CopySpeed:
    """10^9 bytes per second, read and written, of copying a buffer of ``nbytes``."""

    nbytes: int
    gbps: float


@dataclass(frozen=True)
class Ceilings:
    """Ceilings measured on ``device``; ``notes`` name those that could not be."""

    device: str
    products: tuple[ProductSpeed, ...]
    copies: tuple[CopySpeed, ...]
    notes: tuple[str, ...] = ()

    def gflops(self, backend: str, kind: str) -> float | None:
        """The ceiling for products of ``kind`` by ``backend``; None if it was not measured.

        On the CPU, a type without kernels is held to the type that takes its place.
        """
        if self.device == CPU:
            kind = _ON_CPU.get(backend, _TORCH_ON_CPU).get(kind, kind)
        rates = [p.gflops for p in self.products if p.kind == kind]
        return max(rates, default=None)

    def gbps(self, nbytes: int) -> float | None:
        """The copying ceiling for ``nbytes`` in all: of the largest buffer measured that is not larger.

        Data that fits into a cache is not bounded by the memory's bandwidth.
        """
        smaller = [c for c in self.copies if c.nbytes <= nbytes] or list(self.copies[:1])
        return max(smaller, key=lambda c: c.nbytes).gbps if smaller else None

    def floor(self, backend: str, work: Iterable[tuple[EngineCalls, ComponentCost]]) -> Floor | None:
        """The floor of calls made one after another; None if a ceiling that it needs is missing."""
        compute_ms = memory_ms = total = 0.0
        for call, cost in work:
            bandwidth = self.gbps(cost.bytes)
            rates = [(layer.macs, self.gflops(backend, layer.kind)) for layer in cost.layers]
            if bandwidth is None or any(rate is None for _, rate in rates):
                return None
            compute = sum(2 * macs / rate / 1e6 for macs, rate in rates if rate is not None)
            memory = cost.bytes / bandwidth / 1e6
            compute_ms += call.count * compute
            memory_ms += call.count * memory
            total += call.count * max(compute, memory)
        if total == 0:
            return None
        return Floor(total, "compute" if compute_ms >= memory_ms else "memory", compute_ms, memory_ms)


def floor_of(case: Case, costs: Iterable[ComponentCost], ceilings: Ceilings) -> Floor | None:
    """The floor of ``case``; None without calls, or where the cost of one of them was not counted."""
    known = {(c.component, *sorted(c.sizes.items())): c for c in costs}
    work = [(call, known.get((call.component, *sorted(call.sizes.items())))) for call in case.calls]
    counted = [(call, cost) for call, cost in work if cost is not None]
    if not work or len(counted) < len(work):
        return None
    return ceilings.floor(case.backend, counted)


def measure_ceilings(threads: int | None = None, rule: StopRule = _RULE, gpu: bool = False) -> Ceilings:
    """Measure this machine's ceilings.

    Args:
        threads: of products and copies on the CPU; None: as many as there are cores.
        rule: when each measurement ends.
        gpu: measure the GPU through torch instead of the CPU.
    """
    if gpu:
        return _gpu_ceilings(rule)
    notes: list[str] = []
    products = [*_onnxruntime_products(threads, rule, notes), *_torch_products(threads, rule, notes)]
    return Ceilings(CPU, tuple(products), tuple(_copies(threads, rule)), tuple(notes))


def _best_seconds(
    call: Callable[[], object], rule: StopRule, sample: Callable[[], int] | None = None
) -> float:
    return measure(call, rule, sample=sample).summary.min_ms / 1e3


def _copies(threads: int | None, rule: StopRule) -> list[CopySpeed]:
    count = threads or cores()
    speeds = []
    with ThreadPoolExecutor(count) as pool:
        for nbytes in COPY_BYTES:
            size = nbytes // count
            pieces = [(np.zeros(size, np.uint8), np.ones(size, np.uint8)) for _ in range(count)]
            seconds = _best_seconds(partial(_copy, pool, pieces), rule)
            speeds.append(CopySpeed(nbytes, 2 * nbytes / seconds / 1e9))
    return speeds


def _copy(pool: ThreadPoolExecutor, pieces: list[tuple[Any, Any]]) -> None:
    """Each piece's second array into its first, a thread each."""
    if len(pieces) == 1:
        np.copyto(*pieces[0])
    else:
        list(pool.map(lambda piece: np.copyto(*piece), pieces))


def _onnxruntime_products(threads: int | None, rule: StopRule, notes: list[str]) -> list[ProductSpeed]:
    """fp32 and INT8, each a graph of one operator."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        notes.append(f"Ceilings of ONNX Runtime were not measured: {error}.")
        return []
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or core_limit() or 0
    helper, types = onnx.helper, onnx.TensorProto
    speeds = []
    # Which of signed and unsigned activations are fast depends on the CPU; the better one is the ceiling.
    for kind, op, element, result, dtype, values in (
        ("fp32", "MatMul", types.FLOAT, types.FLOAT, np.float32, np.float32),
        ("int8", "MatMulInteger", types.INT8, types.INT32, np.int8, np.int8),
        ("int8", "MatMulInteger", types.UINT8, types.INT32, np.int8, np.uint8),
    ):
        weight, left = np.ones((SIDE, SIDE), dtype), np.ones((SIDE, SIDE), values)
        graph = helper.make_graph(
            [helper.make_node(op, ["x", "w"], ["y"])],
            "product",
            [helper.make_tensor_value_info("x", element, [SIDE, SIDE])],
            [helper.make_tensor_value_info("y", result, [SIDE, SIDE])],
            [onnx.numpy_helper.from_array(weight, "w")],  # constant, so that it may be packed as weights are
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            seconds = _best_seconds(partial(session.run, None, {"x": left}), rule)
        except Exception as error:  # its exceptions share no base class but this
            notes.append(f"ONNX Runtime's {kind} ceiling was not measured: {str(error).splitlines()[0]}")
            continue
        speeds.append(
            ProductSpeed(kind, 2 * SIDE**3 / seconds / 1e9, SIDE, f"onnxruntime {op}, {values.__name__}")
        )
    return speeds


def _torch_products(threads: int | None, rule: StopRule, notes: list[str]) -> list[ProductSpeed]:
    """bf16, for the baseline."""
    from .baseline import torch_threads

    try:
        import torch
    except ImportError:
        notes.append("The bf16 ceiling was not measured: torch is not installed.")
        return []
    with torch_threads(threads), torch.inference_mode():
        left = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
        seconds = _best_seconds(partial(torch.mm, left, left), rule)
    return [ProductSpeed("bf16", 2 * SIDE**3 / seconds / 1e9, SIDE, "torch mm")]


def _gpu_ceilings(rule: StopRule) -> Ceilings:
    """The first CUDA device, timed by CUDA events."""
    if not has_gpu():
        return Ceilings("GPU", (), (), ("The GPU's ceilings were not measured: torch finds none.",))
    import torch

    device, notes, products = "cuda", [], []
    for kind, make in _gpu_products().items():
        try:
            call = make(torch, device)
            seconds = _best_seconds(call, rule, event_timer(call))
        except (
            RuntimeError,
            AttributeError,
            TypeError,
        ) as error:  # this GPU or torch lacks the type
            notes.append(f"The {kind} ceiling was not measured: {str(error).splitlines()[0]}")
            continue
        products.append(ProductSpeed(kind, 2 * GPU_SIDE**3 / seconds / 1e9, GPU_SIDE, "torch"))
    copies = []
    for nbytes in COPY_BYTES:
        source = torch.ones(nbytes, dtype=torch.uint8, device=device)
        copy = partial(torch.empty_like(source).copy_, source)
        copies.append(CopySpeed(nbytes, 2 * nbytes / _best_seconds(copy, rule, event_timer(copy)) / 1e9))
    return Ceilings(torch.cuda.get_device_name(), tuple(products), tuple(copies), tuple(notes))


def _gpu_products() -> dict[str, Callable[[Any, str], Callable[[], object]]]:
    """Type -> factory of its product; the second matrix is column-major, as 8-bit kernels need it.

    Values are random: equal ones draw less power, and run faster than any model's. FP8 sums as engines do,
    in the tensor cores' shorter format.
    """

    def values(torch: Any, device: str) -> Any:
        torch.manual_seed(0)
        return torch.randn(GPU_SIDE, GPU_SIDE, device=device)

    def plain(name: str, torch: Any, device: str) -> Callable[[], object]:
        left = values(torch, device).to(dtype_of(name).torch)
        return partial(torch.mm, left, left.t())

    def fp8(torch: Any, device: str) -> Callable[[], object]:
        left = values(torch, device).to(torch.float8_e4m3fn)
        scale = torch.ones((), device=device)
        scales = {"scale_a": scale, "scale_b": scale}
        return partial(
            torch._scaled_mm, left, left.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def int8(torch: Any, device: str) -> Callable[[], object]:
        left = (40 * values(torch, device)).clamp(-127, 127).to(torch.int8)
        return partial(torch._int_mm, left, left.t())

    return {
        **{name: partial(plain, name) for name in COMPUTE},
        "fp8": fp8,
        "int8": int8,
    }
