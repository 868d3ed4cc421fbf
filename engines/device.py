"""Tensors passed in place between engines, and between engines and their callers.

A buffer is anything that speaks DLPack: a torch tensor, a numpy array, a CuPy array. Engines take buffers
through it without a copy if they are on the engine's device, and return torch tensors (which speak it
too). Order on a GPU is the caller's stream's: an engine's work is on that stream, or is finished before
the call returns. Torch is imported when the first buffer is, so that runs on host arrays need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ..arrays import Array
from ..errors import CapabilityError, InputError

if TYPE_CHECKING:
    import torch

HOST = "cpu"


class Buffer(Protocol):
    """An array that others can read in place; see the Python array API's ``from_dlpack``."""

    @property
    def shape(self) -> Any:
        """Its sizes."""
        ...

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self, *args: Any, **kwargs: Any) -> Any: ...


B = TypeVar("B", bound=Buffer)


def as_tensor(buffer: Buffer, device: str | None = None) -> torch.Tensor:
    """``buffer`` as a torch tensor on ``device`` (None: where it is): its own memory, or copied there.

    Raises:
        CapabilityError: torch is not installed, or has no such device.
        InputError: it cannot be read through DLPack.
    """
    require_torch()
    import torch
    from torch.utils.dlpack import from_dlpack

    if isinstance(buffer, np.ndarray):
        if buffer.dtype.hasobject or not buffer.dtype.isnative:
            raise InputError("An array cannot be read in place.", f"It holds {buffer.dtype}.")
        # torch cannot see read-only memory without a warning, nor negative strides.
        tensor = torch.from_numpy(np.require(buffer, requirements=["C", "W"]))
    elif isinstance(buffer, torch.Tensor):
        tensor = buffer.detach()
    else:
        try:
            tensor = from_dlpack(buffer)
        except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"A {type(buffer).__name__} cannot be read in place.",
                str(error).split("\n", 1)[0],
                "Give a torch tensor, a numpy array, or anything with __dlpack__.",
            ) from error
    try:
        return tensor if device is None else tensor.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise CapabilityError(
            f"torch cannot use {device}.", str(error).split("\n", 1)[0], "Give -O device=cpu."
        ) from error


def to_host(buffer: Buffer) -> Array:
    """``buffer`` as a numpy array; floats become float32. Its own memory where it can be."""
    if isinstance(buffer, np.ndarray):
        return buffer if buffer.dtype.char not in "ed" else buffer.astype(np.float32)
    tensor = as_tensor(buffer, HOST)
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def deliver(outputs: Mapping[str, torch.Tensor], out: Mapping[str, Buffer] | None) -> dict[str, torch.Tensor]:
    """``made``, written into the buffers of ``out`` where there is one of that name; those are handed back.

    An engine that wrote there itself has handed in that very tensor: nothing is copied then.

    Raises:
        InputError: a buffer of another shape, or one that nothing was made for.
    """
    buffers = {} if out is None else {name: in_place(buffer) for name, buffer in out.items()}
    strange = sorted(set(buffers) - set(outputs))
    if strange:
        raise InputError(f"There is no output for the buffer {strange[0]!r}.", f"Outputs: {sorted(outputs)}.")
    for name, target in buffers.items():
        source = outputs[name]
        if target.shape != source.shape:
            raise InputError(
                f"The buffer of output {name} has the wrong shape.",
                f"It is {list(target.shape)}, the output is {list(source.shape)}.",
            )
        if target.data_ptr() != source.data_ptr() or target.dtype != source.dtype:
            target.copy_(source)
    return {name: buffers.get(name, tensor) for name, tensor in outputs.items()}


def in_place(buffer: Buffer) -> torch.Tensor:
    """``buffer`` as a tensor of the same memory, to be written to; InputError where that cannot be."""
    require_torch()
    import torch
    from torch.utils.dlpack import from_dlpack

    if isinstance(buffer, np.ndarray) and not (buffer.flags.writeable and buffer.flags.c_contiguous):
        raise InputError("An output buffer cannot be written.", "It is read-only, or not contiguous.")
    if isinstance(buffer, torch.Tensor):
        return buffer.detach()
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else from_dlpack(buffer)


@contextmanager
def on_stream(device: str, stream: int | None) -> Iterator[int]:
    """Torch's work inside the ``with`` block goes on ``stream``; yields its handle.

    Args:
        device: the engine's device; nothing happens unless it is a CUDA device.
        stream: a ``cudaStream_t`` as an integer; None: torch's current stream.

    Raises:
        InputError: the handle of CUDA's per-thread stream.
    """
    if not device.startswith("cuda"):
        yield 0
        return
    require_torch()
    import torch

    with torch.cuda.device(device):
        if stream is None:
            yield int(torch.cuda.current_stream().cuda_stream)
            return
        with torch.cuda.stream(_stream(device, stream)):
            yield stream


LEGACY = (0, 1)
"""Handles of CUDA's default stream: none, and ``cudaStreamLegacy``."""
PER_THREAD = 2
"""``cudaStreamPerThread``."""


def _stream(device: str, handle: int) -> Any:
    """The torch stream of a ``cudaStream_t``.

    ``ExternalStream(0)`` is a fresh stream of torch's pool, not the default one: its work would run beside
    what the caller enqueued (torch/csrc/cuda/Stream.cpp).
    """
    import torch

    if handle in LEGACY:
        return torch.cuda.default_stream(device)
    if handle == PER_THREAD:
        raise InputError(
            "An engine cannot run on CUDA's per-thread stream.",
            "Torch has no stream of that kind, and the buffers are torch's.",
            "Make a stream (torch.cuda.Stream, cudaStreamCreate) and give its handle.",
        )
    return torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]


@contextmanager
def off_default_stream(device: str, own: Callable[[], Any]) -> Iterator[int]:
    """The current stream's handle; in the place of the default stream, that of ``own()``, in its order.

    TensorRT synchronises the device in every run on the default stream, and CUDA captures no graph there.

    Args:
        device: the engine's device; nothing happens unless it is a CUDA device.
        own: the engine's own torch stream.
    """
    if not device.startswith("cuda"):
        yield 0
        return
    import torch

    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        if int(current.cuda_stream) not in LEGACY:
            yield int(current.cuda_stream)
            return
        side = own()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                yield int(side.cuda_stream)
        finally:
            # The caller's work goes on after the engine's, which also covers memory that either lets go of.
            current.wait_stream(side)


def concatenate(parts: Sequence[Buffer], axis: int = 0) -> Any:
    """Buffers of one kind, arrays or tensors, joined along ``axis``."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate([np.asarray(part) for part in parts], axis)
    require_torch()
    import torch

    return torch.cat([as_tensor(part) for part in parts], axis)


def zeros(shape: Sequence[int], like: Buffer) -> Any:
    """Zeros of the kind, type and place of ``like``."""
    if isinstance(like, np.ndarray):
        return np.zeros(shape, like.dtype)
    return as_tensor(like).new_zeros(tuple(shape))


def copied(buffer: Any) -> Any:
    """A copy of an array or tensor, of its kind, on its device."""
    return buffer.copy() if isinstance(buffer, np.ndarray) else as_tensor(buffer).clone()


def require_torch() -> None:
    """CapabilityError if torch is not installed."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise CapabilityError(
            "torch is not installed.",
            f"Buffers on a device are torch tensors. {error}",
            "Install it: pip install torch",
        ) from error
