"""The machine, the packages and the commit of a measurement. Nothing that identifies a person or host."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ... import __version__
from ...host import cores

PACKAGES = (
    "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "nvidia-modelopt",
)  # fmt: skip
PACKAGE = Path(__file__).parents[2]
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")


@dataclass(frozen=True)
class Gpu:
    """A GPU as the NVIDIA driver names it; ``sm`` as in ``sm89``, None where an old driver does not say."""

    name: str
    memory_mib: int
    driver: str
    sm: str | None = None


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement.

    ``cores`` are those this process may use. ``load_average`` is that of the minute before the measurement:
    far above zero, other work disturbed it. None: this system does not say.
    """

    cpu: str
    cpu_features: tuple[str, ...]
    architecture: str
    cores: int
    memory_bytes: int | None
    os: str
    gpus: tuple[Gpu, ...]
    load_average: float | None


def machine() -> Machine:
    """The machine this runs on."""
    text = _read("/proc/cpuinfo")
    fields = [line.partition(":") for line in text.splitlines()]
    names = [value.strip() for key, _, value in fields if key.strip() == "model name"]
    flags = {f for key, _, value in fields if key.strip() in ("flags", "Features") for f in value.split()}
    return Machine(
        cpu=names[0] if names else platform.processor() or "unknown",
        cpu_features=tuple(f for f in _CPU_FEATURES if f in flags),
        architecture=platform.machine(),
        cores=cores(),
        memory_bytes=_memory(),
        os=platform.platform(),
        gpus=installed_gpus(),
        load_average=_load(),
    )


def versions() -> dict[str, str]:
    """Releases of Python, this package and the libraries that decide speed; installed ones only."""
    releases = {"python": platform.python_version(), "ivl-export": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            releases[name] = version(name)
    return releases


def commit(folder: Path = PACKAGE) -> str | None:
    """The git commit of this package's source, followed by ``+`` if files differ; None outside a repository.

    A package installed inside some other repository is not part of that one.
    """
    git = ("git", "-C", str(folder))
    head = _output(*git, "rev-parse", "HEAD")
    if head is None or _output(*git, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return head + ("+" if _output(*git, "status", "--porcelain", "--untracked-files=no") else "")


def peak_memory() -> int | None:
    """Most bytes of memory this process has held so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory() -> int | None:
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _load() -> float | None:
    with suppress(AttributeError, OSError):
        return os.getloadavg()[0]
    return None


def installed_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi names; none without nvidia-smi."""
    fields = "--query-gpu=name,memory.total,driver_version"
    for query in (f"{fields},compute_cap", fields):  # older drivers refuse a field they do not know
        if text := _output("nvidia-smi", query, "--format=csv,noheader,nounits"):
            return parse_gpus(text)
    return ()


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs from nvidia-smi's output: name, MiB, driver and, where it says, compute capability."""
    gpus = []
    for line in text.splitlines():
        name, memory, driver, capability = ([part.strip() for part in line.split(",")] + [""] * 3)[:4]
        if memory.isdigit():
            major, _, minor = capability.partition(".")
            sm = f"sm{major}{minor}" if major.isdigit() and minor.isdigit() else None
            gpus.append(Gpu(name, int(memory), driver, sm))
    return tuple(gpus)


def _output(*command: str) -> str | None:
    """Output of a command; None if it is missing, fails or hangs."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return process.stdout.strip()


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""
