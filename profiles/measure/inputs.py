"""Inputs to time components and calls with: drawn within the contract; times do not depend on the values."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array
from ...bundle.spec import ComponentSpec
from ...errors import UsageError

TEXT = "a red circle to the left of a small blue square"
JPEG_SIZE = (640, 480)


def random_inputs(
    spec: ComponentSpec, sizes: dict[str, int], vocabulary: int, seed: int = 0
) -> dict[str, Array]:
    """Valid inputs of a component: drawn floats and token ids, everything visible, nothing padded.

    Raises:
        UsageError: an integer input whose meaning is unknown.
    """
    generator = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tuple(d if isinstance(d, int) else sizes[d] for d in tensor.shape)
        if tensor.dtype == "float":
            inputs[tensor.name] = generator.standard_normal(shape, dtype=np.float32)
        elif tensor.name == "input_ids":
            first = min(3, vocabulary - 1)  # after unk, bos and eos
            inputs[tensor.name] = generator.integers(first, vocabulary, shape, dtype=np.int64)
        elif tensor.name == "lengths":
            inputs[tensor.name] = np.full(shape, sizes["text"], np.int64)
        elif tensor.name == "positions":
            positions = sizes["past"] + np.arange(sizes["text"], dtype=np.int64)
            inputs[tensor.name] = np.ascontiguousarray(np.broadcast_to(positions, shape))
        elif tensor.name == "attention_mask":
            inputs[tensor.name] = np.ones(shape, np.int64)
        else:
            raise UsageError(
                f"Component {spec.name} cannot be profiled.",
                f"The range of its input {tensor.name} ({tensor.dtype}) is unknown to this release.",
            )
    spec.check(inputs)
    return inputs


def random_pixels(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """``pixel_values`` of ``shape``."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def jpeg(size: tuple[int, int] = JPEG_SIZE) -> bytes:
    """A JPEG of ``size`` (width, height), between flat and noisy as photographs are."""
    from PIL import Image

    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3))
    waves = np.stack([np.sin(x / 37), np.cos(y / 53), np.sin((x + y) / 71)], -1)
    picture = np.clip(110 + 90 * waves + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return file.getvalue()
