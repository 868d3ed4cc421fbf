"""The benchmark of reading images: its photographs, and the distance of both readings."""

from __future__ import annotations

import io

from PIL import Image

from ivl_export.benchmarks.runtime import images


def test_photographs_have_the_size_that_is_promised() -> None:
    files = images.photographs(200_000)
    assert len(files) == len(images.PHOTOGRAPHS)
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            assert image.format == "JPEG"
            assert 199_000 < image.width * image.height < 201_000


def test_both_readings_are_close_but_not_equal() -> None:
    result = images.cosines(images.photographs(1_000_000))
    assert list(result) == list(images.PHOTOGRAPHS)
    assert all(0.99 < cosine <= 1 for cosine in result.values())
    assert min(result.values()) < 1
