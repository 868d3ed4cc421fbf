"""The GPUs of this process, read from the driver itself: needs no package, and no library of TensorRT."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""NVIDIA's driver library."""
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR in cuda.h


@dataclass(frozen=True)
class Gpu:
    """A GPU: the driver's name of it, and its generation as in ``sm89``."""

    name: str
    sm: str

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


@cache
def gpus() -> tuple[Gpu, ...]:
    """GPUs this process may use (``CUDA_VISIBLE_DEVICES``), in the order of their numbers; empty if none."""
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_gpu(cuda, number) for number in range(count.value))


def _gpu(cuda: ctypes.CDLL, number: int) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), number)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    if failed:
        return Gpu(f"GPU {number}", "unknown generation")
    return Gpu(name.value.decode("utf-8", "replace"), f"sm{major.value}{minor.value}")
