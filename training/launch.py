"""The processes of one run: started here, or joined where torchrun started them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import distributed

from ..errors import BuildError
from .distributed import device

T = TypeVar("T")


def together(processes: int, work: Callable[..., T], given: tuple[Any, ...], **own: Any) -> T | None:
    """``work(*given)`` in each of ``processes``: what the first one returned, None in the others.

    Where ``torchrun`` started the processes, each calls this and joins the others; ``processes`` is ignored.
    Otherwise this is the first, and the others are started here: ``work`` and ``given`` must be picklable.
    The first one gets ``own`` as well.

    Raises:
        BuildError: another process failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        first = os.environ["RANK"] == "0"
        result = _in_group(work, given, own if first else {})
        return result if first else None
    if processes == 1:
        return work(*given, **own)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)
    others = [
        context.Process(target=_other, args=(r, processes, port, threads, work, given))
        for r in range(1, processes)
    ]
    before = {name: os.environ.get(name) for name in _place(0, processes, port)}
    for process in others:
        process.start()
    os.environ.update(_place(0, processes, port))
    try:
        return _in_group(work, given, own)
    except RuntimeError as error:
        for process in others:
            process.join(timeout=5)
        broken = [r for r, process in enumerate(others, 1) if process.exitcode not in (None, 0)]
        if not broken:
            raise
        raise BuildError(f"Process {broken[0]} of {processes} failed.", str(error).splitlines()[0]) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for process in others:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def _in_group(work: Callable[..., T], given: tuple[Any, ...], own: Mapping[str, Any]) -> T:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(device())
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        return work(*given, **own)
    finally:
        distributed.destroy_process_group()


def _other(
    number: int, processes: int, port: int, threads: int, work: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    os.environ.update(_place(number, processes, port))
    torch.set_num_threads(threads)
    _in_group(work, given, {})


def _place(number: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun would tell a process."""
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
