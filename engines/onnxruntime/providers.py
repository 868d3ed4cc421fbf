"""ONNX Runtime's execution providers: which one an engine runs on, and its options.

Option names and values are those of ONNX Runtime's documentation of the CUDA and the TensorRT execution
provider; all values go over as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...bundle.spec import ComponentSpec
from ...errors import CapabilityError, UsageError
from ..device import HOST

Provider = Literal["cpu", "cuda", "tensorrt"]
NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
INSTALL: dict[Provider, str] = {
    "cpu": "pip install 'ivl-export[cpu]'",
    "cuda": "pip install 'ivl-export[gpu]'",
    "tensorrt": "pip install 'ivl-export[gpu]'",
}
"""The line that installs a provider. ``onnxruntime`` and ``onnxruntime-gpu`` are two builds of one package:
only one of them can be there."""


@dataclass(frozen=True)
class Placement:
    """Where an ONNX Runtime engine runs.

    Args:
        provider: its provider; operators that it lacks go to the ones after it.
        index: number of the GPU.
        stream: a ``cudaStream_t`` as an integer that all work is put on, in order and without waiting; None:
            ONNX Runtime's own, and every run is finished before it returns.
        tf32: let the CUDA provider round fp32 products' inputs to 10 bits of mantissa (its own default, and
            not ours: the fp32 graph is there to be exact).
        cache: folder where the TensorRT provider keeps its engines and timings; None: every load builds.
        options: further options of the provider, which win over the ones chosen here.
        profile: the optimization profile of the TensorRT provider.
    """

    provider: Provider = "cpu"
    index: int = 0
    stream: int | None = None
    tf32: bool = False
    cache: Path | None = None
    options: Mapping[str, str] | None = None
    profile: Mapping[str, str] | None = None

    @property
    def device(self) -> str:
        """In torch's words."""
        return HOST if self.provider == "cpu" else f"cuda:{self.index}"

    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """The ``providers`` of ``InferenceSession``: this one with its options, then those after it."""
        if self.provider == "cpu":
            return [(NAMES["cpu"], {})]
        common = {"device_id": str(self.index)}
        if self.stream is not None:
            common |= {"has_user_compute_stream": "1", "user_compute_stream": str(self.stream)}
        cuda = {**common, "use_tf32": str(int(self.tf32))}
        if self.provider == "cuda":
            chosen = [(NAMES["cuda"], {**cuda, **(self.options or {})})]
        else:
            tensorrt = {**common, **(self.profile or {}), **self._caches()}
            chosen = [(NAMES["tensorrt"], {**tensorrt, **(self.options or {})}), (NAMES["cuda"], cuda)]
        return [*chosen, (NAMES["cpu"], {})]

    def check(self, ort: Any) -> None:
        """CapabilityError, with the line that installs it, if this onnxruntime has no such provider."""
        have = list(ort.get_available_providers())
        if NAMES[self.provider] not in have:
            raise self._absent(f"It was built with {', '.join(have)}.")

    def check_used(self, session: Any) -> None:
        """CapabilityError if ``session`` fell back: ONNX Runtime does so where libraries do not load."""
        if NAMES[self.provider] not in session.get_providers():
            raise self._absent(
                "Its libraries could not be loaded (another CUDA, cuDNN or TensorRT, or no driver)."
            )

    def _absent(self, why: str) -> CapabilityError:
        return CapabilityError(
            f"This onnxruntime has no {self.provider.upper()} provider.",
            why,
            f"Install it: pip uninstall onnxruntime && {INSTALL[self.provider]}",
        )

    def _caches(self) -> dict[str, str]:
        if self.cache is None:
            return {}
        return {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(self.cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(self.cache),
        }


def placement(
    spec: ComponentSpec,
    device: str | None = None,
    provider: str | None = None,
    *,
    stream: int | None = None,
    tf32: bool = False,
    cache: Path | None = None,
    options: Mapping[str, str] | None = None,
) -> Placement:
    """Where the engine of ``spec`` runs; ``device`` is ``cpu``, ``cuda`` or ``cuda:N``.

    ``provider`` says who runs it there: ``cuda`` (the default on a GPU) or ``tensorrt``. For the others see
    :class:`Placement`.

    Raises:
        UsageError: no such device or provider, or the two do not belong together.
    """
    kind, _, number = (device or ("cpu" if provider in (None, "cpu") else "cuda")).partition(":")
    chosen = provider or kind
    fits = chosen == "cpu" if kind == "cpu" else chosen in ("cuda", "tensorrt")
    if kind not in ("cpu", "cuda") or not fits or (number and not number.isdecimal()):
        raise UsageError(
            f"ONNX Runtime cannot run with device {device!r} and provider {provider!r}.",
            "Devices are cpu, cuda and cuda:N; a GPU's providers are cuda and tensorrt.",
            "Give -O device=cuda, for example.",
        )
    profile = _profile(spec) if chosen == "tensorrt" else None
    return Placement(chosen, int(number or 0), stream, tf32, cache, options, profile)  # type: ignore[arg-type]


def _profile(spec: ComponentSpec) -> dict[str, str]:
    """The contract's ranges as TensorRT's optimization profile: ``pixel_values:1x3x224x224,...``."""

    def shapes(which: str) -> str:
        return ",".join(f"{t.name}:{'x'.join(map(str, spec.shape(t, which)))}" for t in spec.inputs)

    return {f"trt_profile_{which}_shapes": shapes(which) for which in ("min", "opt", "max")}
