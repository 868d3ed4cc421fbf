"""Images in engine batches: while one batch is used, the next is read in other threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..host import cores
from ..inputs.images import ImageInput
from ..inputs.preprocess import ImageSettings, preprocess_images
from .timings import Timings
from .urls import UrlPolicy, fetch, is_url

Floats: TypeAlias = NDArray[np.float32]
Images: TypeAlias = "Sequence[ImageInput] | Floats"
_FETCHES = 8
"""Images fetched at a time."""


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Args:
        threads: images decoded and resized at a time; None: as many as there are cores.
        fast: decode large JPEGs smaller; see :func:`~ivl_export.inputs.preprocess.preprocess_images`.
        urls: what may be fetched; None: nothing, text is a path.
    """

    threads: int | None = None
    fast: bool = False
    urls: UrlPolicy | None = None


def pixel_batches(
    images: Images, settings: ImageSettings, size: int, timings: Timings, reading: Reading | None = None
) -> Iterator[Floats]:
    """``pixel_values`` float32 [<= size, 3, S, S] of ``images``, in order.

    An array is taken as ready ``pixel_values``. Reading is timed as ``preprocess``. Raises InputError for
    what is no sequence of images, and as :func:`~ivl_export.inputs.preprocess.load_image`.
    """
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.float32:
            raise InputError(
                "This array is not pixel_values.",
                f"It is {images.dtype} {list(images.shape)}; float32 [B, 3, S, S] is needed.",
                "Give pictures as a list of [H, W, 3] arrays.",
            )
        for start in range(0, len(images), size):
            yield images[start : start + size]
        return
    if isinstance(images, str | bytes | PathLike):
        raise InputError("One image was given.", "A sequence of images is needed.", "Use [image].")

    how = reading or Reading()
    threads = how.threads or cores()

    def opened(image: ImageInput) -> ImageInput:
        return fetch(str(image), how.urls) if is_url(image) else image

    def read(start: int) -> Floats:
        batch = images[start : start + size]
        if any(map(is_url, batch)):
            with timings.measure("fetch"), ThreadPoolExecutor(min(len(batch), _FETCHES)) as pool:
                batch = list(pool.map(opened, batch))
        with timings.measure("preprocess"):
            return cast(Floats, preprocess_images(batch, settings, threads, how.fast))

    if len(images) <= size:
        yield from [read(0)] if len(images) else []
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for start in range(size, len(images), size):
            pixels, ahead = ahead.result(), reader.submit(read, start)
            yield pixels
        yield ahead.result()
