"""Images in engine batches: while one batch is used, the next is read in other threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..arrays import Floats
from ..errors import InputError
from ..host import cores
from ..inputs.preprocess import ImageSettings, PixelValues, read_images
from ..inputs.sources import ImageInput, image_sequence, name_of
from .timings import Timings
from .urls import UrlPolicy, fetch, is_url

Images: TypeAlias = "Sequence[ImageInput] | Floats | PixelValues"
_FETCHES = 8
"""Images fetched at a time."""


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Args:
        threads: images decoded and resized at a time; None: as many as there are cores.
        approximate_jpeg: decode large JPEGs smaller; see :func:`~ivl_export.inputs.preprocess.read_images`.
        urls: which URLs may be fetched; None: none, text is a path.
    """

    threads: int | None = None
    approximate_jpeg: bool = False
    urls: UrlPolicy | None = None


def pixel_batches(
    images: Images, settings: ImageSettings, size: int, timings: Timings, reading: Reading | None = None
) -> Iterator[Floats]:
    """``pixel_values`` float32 [<= size, 3, S, S] of ``images``, in order.

    Arrays and :class:`~ivl_export.inputs.preprocess.PixelValues` are taken as ready. Reading is timed as
    ``preprocess``. Raises InputError for anything but a sequence of images, and as
    :func:`~ivl_export.inputs.images.load_image`.
    """
    source = as_images(images)
    ready = source.values if isinstance(source, PixelValues) else source
    if isinstance(ready, np.ndarray):
        check_pixel_values(ready)
        for start in range(0, len(ready), size):
            yield ready[start : start + size]
        return
    total = len(ready)
    names = [name_of(image, index, total) for index, image in enumerate(ready)]

    def read(start: int) -> Floats:
        part = slice(start, start + size)
        return read_batch(ready[part], settings, timings, reading, names[part]).values

    if total <= size:
        yield from [read(0)] if total else []
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for start in range(size, total, size):
            pixels, ahead = ahead.result(), reader.submit(read, start)
            yield pixels
        yield ahead.result()


def check_pixel_values(array: Floats) -> None:
    """InputError for an array that is not ``pixel_values``."""
    if array.ndim != 4 or array.shape[1] != 3 or array.dtype != np.float32:
        raise InputError(
            "This array is not pixel_values.",
            f"It is {array.dtype} {list(array.shape)}; float32 [B, 3, S, S] is needed.",
            "Give pictures as a list of [H, W, 3] arrays.",
        )


def as_images(images: Images) -> Images:
    """``images`` with a length and an order: a sequence, or ready ``pixel_values``; else InputError."""
    return images if isinstance(images, (PixelValues, np.ndarray)) else image_sequence(images)


def read_batch(
    images: Sequence[ImageInput],
    settings: ImageSettings,
    timings: Timings,
    reading: Reading | None = None,
    names: Sequence[str] | None = None,
    on_error: Callable[[int, InputError], None] | None = None,
    max_tiles: int | Sequence[int] | None = None,
) -> PixelValues:
    """Images fetched, where ``reading`` allows it, decoded and preprocessed together.

    ``names``, ``on_error`` and ``max_tiles`` as of :func:`~ivl_export.inputs.preprocess.read_images`; images
    that cannot be fetched are always an error.
    """
    how = reading or Reading()
    names = names or [name_of(image, index, len(images)) for index, image in enumerate(images)]
    if any(map(is_url, images)):
        with timings.measure("fetch"), ThreadPoolExecutor(min(len(images), _FETCHES)) as pool:
            images = list(pool.map(lambda i: fetch(i, how.urls) if is_url(i) else i, images))
    threads = how.threads or cores()
    with timings.measure("preprocess"):
        return read_images(images, settings, threads, how.approximate_jpeg, names, max_tiles, on_error)
