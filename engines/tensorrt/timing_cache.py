"""TensorRT's timing cache: kernel times that its builder measured, reused by later builds.

One file a release and GPU, for the times hold for these only. TensorRT-RTX measures nothing: there the calls
do nothing, and would ask for a GPU (its documentation, "Timing Cache Migration"), so they are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...files.cache_dir import cache_folder, touch
from ...files.locks import locked
from ...files.write import atomic
from ..gpu import Gpu
from .library import Library


def timing_file(lib: Library, gpu: Gpu) -> Path:
    """Where the times of ``lib`` on ``gpu`` are kept."""
    name = re.sub(r"[^a-z0-9.]+", "-", f"{lib.backend} {lib.release} {gpu.sm} {gpu.name}".lower()).strip("-")
    return cache_folder() / "timing" / f"{name}.timing"


@contextmanager
def timing_cache(lib: Library, config: Any, gpu: Gpu | None, *, enabled: bool = True) -> Iterator[None]:
    """Builds in the block use the kept times and add theirs; nothing happens with RTX, or if not ``enabled``.

    Times that other processes added meanwhile are kept: they are merged under a lock, and the file replaced
        whole.
    """
    if gpu is None or lib.cross_builds or not enabled:
        yield
        return
    path = timing_file(lib, gpu)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        yield  # a cache that cannot be written costs time, not correctness
        return
    _attach(config, _read(path))
    yield
    try:
        with locked(path.with_suffix(".lock")):
            cache = config.get_timing_cache()
            if stored := _read(path):
                cache.combine(config.create_timing_cache(stored), False)
            with atomic(path, durable=True) as partial:
                partial.write_bytes(bytes(cache.serialize()))
    except OSError:
        return  # as above


def _attach(config: Any, stored: bytes) -> None:
    """Give the configuration a timing cache of ``stored``; an empty one where the library refuses that."""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError:
        return b""
    touch(path)
    return data
