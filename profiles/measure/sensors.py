"""Clocks, temperature and memory while something is measured: the CPU's clock, and NVIDIA GPUs through NVML.

NVML comes with the driver; the package nvidia-ml-py (extra ``gpu``) reads it and is imported here only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

INTERVAL_S = 0.2


@dataclass(frozen=True)
class Range:
    """Smallest, middle and largest reading."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range | None:
        """The range of ``values``; None if there are none."""
        return cls(min(values), float(median(values)), max(values)) if values else None


@dataclass(frozen=True)
class GpuClocks:
    """One GPU while it was measured; None: its driver does not say.

    ``used_before_bytes`` and ``peak_used_bytes`` are the device's memory in use by all processes, before and
    at most; ``slowed_by`` the driver's reasons for holding clocks down.
    """

    name: str
    sm_mhz: Range | None
    memory_mhz: Range | None
    celsius: Range | None
    watts: Range | None
    used_before_bytes: int | None
    peak_used_bytes: int | None
    slowed_by: tuple[str, ...]

    @property
    def text(self) -> str:
        """In a line, with units."""
        ranges = (
            ("clock", "MHz", self.sm_mhz),
            ("memory clock", "MHz", self.memory_mhz),
            ("temperature", "C", self.celsius),
            ("power", "W", self.watts),
        )
        parts = [f"{what} {r.least:.0f} to {r.most:.0f} {unit}" for what, unit, r in ranges if r]
        parts += [f"slowed by {', '.join(self.slowed_by)}"] if self.slowed_by else []
        return f"{self.name}: {', '.join(parts)}"


@dataclass(frozen=True)
class Clocks:
    """Readings: the CPU's MHz (mean of the cores, before and after) and every GPU; None: unknown."""

    cpu_mhz_before: float | None
    cpu_mhz_after: float | None
    gpus: tuple[GpuClocks, ...]


@dataclass
class Watch:
    """Filled when the block of :func:`watch` ends."""

    clocks: Clocks | None = None


@contextmanager
def watch(interval: float = INTERVAL_S) -> Iterator[Watch]:
    """Read sensors every ``interval`` seconds while the ``with`` block runs."""
    result, before = Watch(), cpu_mhz()
    with _gpu_readers() as gpus:
        stop = threading.Event()

        def read_until_stopped() -> None:
            while True:
                for gpu in gpus:
                    gpu.read()
                if stop.wait(interval):
                    return

        thread = threading.Thread(target=read_until_stopped, name="sensors", daemon=True)
        if gpus:
            thread.start()
        try:
            yield result
        finally:
            stop.set()
            if gpus:
                thread.join()
            result.clocks = Clocks(before, cpu_mhz(), tuple(gpu.summary() for gpu in gpus))


def cpu_mhz(text: str | None = None) -> float | None:
    """Mean clock of the cores by Linux; ``text`` replaces ``/proc/cpuinfo``."""
    if text is None:
        text = ""
        with suppress(OSError):
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    fields = [line.partition(":")[2] for line in text.splitlines() if line.startswith("cpu MHz")]
    values = [float(value) for value in fields]
    return sum(values) / len(values) if values else None


@dataclass
class _GpuReader:
    """One GPU's readings. ``nvml`` is the pynvml module; unsupported readings are left out."""

    nvml: Any
    handle: Any
    name: str
    readings: dict[str, list[float]] = field(default_factory=dict)
    slowed: set[str] = field(default_factory=set)

    def read(self) -> None:
        """One reading of everything."""
        nvml, handle = self.nvml, self.handle
        asks: dict[str, Callable[[], float]] = {
            "sm": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "used": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        }
        for key, ask in asks.items():
            with suppress(nvml.NVMLError):
                self.readings.setdefault(key, []).append(float(ask()))
        with suppress(nvml.NVMLError):
            mask = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            self.slowed.update(name for name, bit in _slow_reasons(nvml).items() if mask & bit)

    def summary(self) -> GpuClocks:
        """Everything read so far."""

        def over(key: str) -> Range | None:
            return Range.of(self.readings.get(key, []))

        used = self.readings.get("used", [])
        return GpuClocks(
            self.name,
            over("sm"),
            over("memory"),
            over("celsius"),
            over("watts"),
            int(used[0]) if used else None,
            int(max(used)) if used else None,
            tuple(sorted(self.slowed)),
        )


def _slow_reasons(nvml: Any) -> dict[str, int]:
    """The driver's reasons that mean a slower GPU, by name (idle and set clocks are none of them)."""
    names = {
        "power limit": "nvmlClocksThrottleReasonSwPowerCap",
        "heat": "nvmlClocksThrottleReasonSwThermalSlowdown",
        "heat (hardware)": "nvmlClocksThrottleReasonHwThermalSlowdown",
        "power brake (hardware)": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    }
    return {said: getattr(nvml, name) for said, name in names.items() if hasattr(nvml, name)}


@contextmanager
def _gpu_readers() -> Iterator[list[_GpuReader]]:
    """A reader for every GPU; none without the package, the driver or a GPU."""
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError:
        yield []
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        yield [_GpuReader(pynvml, handle, _text(pynvml.nvmlDeviceGetName(handle))) for handle in handles]
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _text(name: str | bytes) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name  # bytes before release 12
