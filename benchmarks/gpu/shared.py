"""Shared by the GPU scripts: a receipt that is rewritten after every row, times, the peak, models, FP8."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivl_export.bundle.spec import TensorSpec
from ivl_export.engines.torch.linears import Fp8Linear, Product
from ivl_export.engines.torch.module import scheme_of
from ivl_export.files.write import write_text
from ivl_export.models.config import InternVLConfig, QLlamaConfig, VisionConfig
from ivl_export.models.registry import component_module, component_spec
from ivl_export.profiles.measure.machine import commit, machine, versions
from ivl_export.quantization.quantize import quantise, round_scale
from ivl_export.quantization.recipe import load_recipe
from ivl_export.quantization.schemes import excluded

TINY = InternVLConfig(
    vision=VisionConfig(64, 2, 4, 128, image_size=28, patch_size=14),
    qllama=QLlamaConfig(64, 2, 4, 96, vocab_size=128),
    clip_embed_dim=32,
    attn_pool_num_heads=4,
    num_query_token=8,
)
"""Runs in a second on a CPU: size for tests of the scripts."""

TEXT_TOKENS = 80
Inputs = tuple[Tensor, ...]


class Receipt:
    """Rows of figures with the machine, versions and commit; the file is whole after every row."""

    def __init__(self, title: str, out: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._out = out
        self._head = {
            "title": title,
            "machine": asdict(machine()),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "versions": versions() | {"cuda": torch.version.cuda},
            "commit": commit(),
        }
        self._goals: dict[str, str] = {}
        print(title, self._head["gpu"] or "on the CPU", f"torch {torch.__version__}", flush=True)

    def add(self, **row: Any) -> None:
        """Print one row, and keep it."""
        self.rows.append(row)
        shown = (
            f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v is not None
        )
        print("  ".join(shown), flush=True)
        self._write()

    def goal(self, text: str, met: bool | None) -> None:
        """Say whether a goal is met; None: it was not measured."""
        self._goals[text] = "not measured" if met is None else "met" if met else "missed"
        print(f"goal: {text}: {self._goals[text]}", flush=True)
        self._write()

    def _write(self) -> None:
        if self._out is None:
            return
        data = {**self._head, "goals": self._goals, "rows": self.rows}
        write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", self._out)


class Budget:
    """Seconds that a script may take; what no longer fits is left out, and said."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, needed: float = 0.0) -> bool:
        """Whether ``needed`` more seconds are there."""
        return time.monotonic() + needed < self._end


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a model of a second on a CPU, to try the script")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON)")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for everything")
    return parser


def median_ms(call: Callable[[], object], device: str, seconds: float = 1.0, least: int = 5) -> float:
    """Median milliseconds of one call, for about ``seconds``; kernels are timed by events on the GPU."""
    cuda = device.startswith("cuda")
    call()
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < least or (time.perf_counter() - start < seconds and len(samples) < 1000):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end))
        else:
            before = time.perf_counter()
            call()
            samples.append((time.perf_counter() - before) * 1e3)
    return statistics.median(samples)


def matmul_peak(kind: str, device: str, tiny: bool = False) -> float:
    """FLOP/s of the fastest of a few large products in ``bf16`` or ``fp8``: this GPU's current rate."""
    best = 0.0
    for size in (64,) if tiny else (4096, 8192, 12288):
        a = torch.randn(size, size, device=device).to(torch.bfloat16)
        b = torch.randn(size, size, device=device).to(torch.bfloat16)
        call: Callable[[], object]
        if kind == "fp8":
            a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            one = torch.ones((), device=device)

            def call(a8: Tensor = a8, b8: Tensor = b8, one: Tensor = one) -> object:
                return torch._scaled_mm(
                    a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
                    use_fast_accum=a8.is_cuda,
                )  # fmt: skip
        else:

            def call(a: Tensor = a, b: Tensor = b) -> object:
                return a @ b.t()

        best = max(best, 2 * size**3 / median_ms(call, device, 0.1 if tiny else 0.5) * 1e3)
    return best


def random_component(name: str, config: InternVLConfig, device: str, dtype: torch.dtype) -> nn.Module:
    """Component ``name`` with newly drawn weights, of a trained model's size (0.02)."""
    with torch.device("meta"):
        module = component_module(name, config)
    module = module.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for key, parameter in module.named_parameters():
        with torch.no_grad():
            if key.endswith(("bias", "class_embedding")) or "_bias" in key:
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(0.1 if key.endswith((".ls1", ".ls2")) else 1.0)
            else:
                parameter.normal_(0, 0.02)
    return module.eval().requires_grad_(False)


def random_inputs(name: str, config: InternVLConfig, batch: int, device: str, dtype: torch.dtype) -> Inputs:
    """Inputs of component ``name``: drawn pixels and vision tokens, texts of 80 tokens."""
    generator = torch.Generator(device).manual_seed(1)
    sizes = {"batch": batch, "text": TEXT_TOKENS}

    def drawn(tensor: TensorSpec) -> torch.Tensor:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        if tensor.dtype == "float":
            return torch.randn(shape, device=device, generator=generator).to(dtype)
        if len(shape) == 1:
            return torch.full(shape, TEXT_TOKENS, device=device)
        return torch.randint(3, config.qllama.vocab_size, shape, device=device, generator=generator)

    return tuple(map(drawn, component_spec(name, config).inputs))


def to_fp8(module: nn.Module, inputs: Inputs, product: Product | None = None, fast: bool = True) -> int:
    """Quantise ``module`` in place as the shipped FP8 recipe says, its ranges measured on ``inputs``.

    Returns:
        How many linear layers are in FP8 now.
    """
    recipe, amax = load_recipe("fp8"), dict[str, Tensor]()
    linears = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and scheme_of(recipe, name) == "fp8"
        and not excluded("fp8", layer.out_features, layer.in_features)
    }

    def observe(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: amax.__setitem__(name, args[0].abs().amax())

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in linears.items()]
    with torch.no_grad():
        module(*inputs)
    for handle in handles:
        handle.remove()
    for name, layer in linears.items():
        values, scale = quantise(layer.weight, "fp8")
        top = float(round_scale(amax[name].float(), "fp8", recipe.base))
        module.set_submodule(name, Fp8Linear(values, scale, layer.bias, top, product, fast))
    return len(linears)


@contextmanager
def memory(device: str) -> Iterator[Mapping[str, int]]:
    """Most bytes of GPU memory in use inside the ``with`` block, under ``peak`` afterwards."""
    sizes: dict[str, int] = {}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    yield sizes
    if device.startswith("cuda"):
        sizes["peak"] = torch.cuda.max_memory_allocated()


def release() -> None:
    """Free the last model's memory and compiled code."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cosine(got: Tensor, want: Tensor) -> float:
    """Mean cosine of the rows of two outputs, in float64."""
    a, b = (t.detach().double().reshape(-1, t.shape[-1]) for t in (got, want))
    return float(nn.functional.cosine_similarity(a, b.to(a.device), dim=-1).mean())
