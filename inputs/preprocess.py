"""Images and texts to arrays, as the published model reads them. No torch: the runtime uses this too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from ..errors import CheckpointError, InputError
from .images import MAX_PIXELS, ImageInput, load_image

ResizeMode = Literal["square", "center_crop", "pad"]
Array: TypeAlias = np.ndarray[Any, Any]

MODES: tuple[ResizeMode, ...] = ("square", "center_crop", "pad")
PAD_COLOR = (123, 116, 103)
_BICUBIC = 3


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes ``pixel_values``: side in pixels, per-channel mean and std (of 0..1 values), mode.

    ``square`` stretches to the square (retrieval, captions), ``center_crop`` resizes the shortest side and
    crops (classification), ``pad`` pads to a square with :data:`PAD_COLOR` first (chat). Always bicubic.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    mode: ResizeMode = "square"

    def __post_init__(self) -> None:
        if self.size < 1 or self.mode not in MODES or len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"not image settings: {self}")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std must be positive: {self.std}")

    def to_json(self) -> dict[str, Any]:
        """The ``preprocessor_config.json`` of the published layout, plus ``resize_mode``."""
        crop = self.mode == "center_crop"
        square = {"height": self.size, "width": self.size}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.size} if crop else square,
            "resample": _BICUBIC,
            "do_center_crop": crop,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
            "resize_mode": self.mode,
        }

    def save(self, path: Path) -> None:
        """Write ``path`` (a ``preprocessor_config.json``)."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, data: object, source: str = "preprocessor_config.json") -> ImageSettings:
        """Read published or own settings; CheckpointError where they ask for what is not done here.

        Without ``resize_mode`` the mode follows ``do_center_crop``.
        """
        try:
            if not isinstance(data, dict):
                raise TypeError("it holds no JSON object")
            crop = data.get("crop_size", data["size"])
            size = crop.get("height", crop.get("shortest_edge")) if isinstance(crop, dict) else crop
            if data.get("resample", _BICUBIC) != _BICUBIC:
                raise ValueError(f"resample is {data['resample']}, only bicubic (3) is known")
            if abs(data.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
                raise ValueError(f"rescale_factor is {data['rescale_factor']}, only 1/255 is known")
            mode: Any = data.get("resize_mode") or ("center_crop" if data.get("do_center_crop") else "square")
            mean = tuple(float(v) for v in data.get("image_mean", cls.mean))
            std = tuple(float(v) for v in data.get("image_std", cls.std))
            if type(size) is not int or len(mean) != 3 or len(std) != 3:
                raise ValueError(f"size {size!r}, mean {mean} or std {std} is not what an RGB square needs")
            return cls(size, mean, std, mode)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{source} cannot be read.",
                f"{type(error).__name__}: {error}.",
                "Take the file that was published with the checkpoint.",
            ) from error

    @classmethod
    def load(cls, path: Path) -> ImageSettings:
        """Read ``path`` (a ``preprocessor_config.json``)."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read.", str(error), "Download it again.") from error
        return cls.from_json(data, str(path))


def preprocess_images(
    images: Sequence[ImageInput], settings: ImageSettings, threads: int = 1, fast: bool = False
) -> Array:
    """``pixel_values`` float32 [len(images), 3, S, S], normalised; errors as :func:`load_image`.

    Args:
        images: any number.
        settings: side, mean, std and mode.
        threads: images decoded and resized at a time (Pillow lets others run meanwhile).
        fast: decode large JPEGs smaller, to no less than twice the side; not quite the published pixels.
    """
    out = np.empty((len(images), 3, settings.size, settings.size), np.float32)
    scale = np.float32(1.0) / (np.float32(255.0) * np.asarray(settings.std, np.float32))
    shift = np.asarray(settings.mean, np.float32) / np.asarray(settings.std, np.float32)
    draft = 2 * settings.size if fast else None

    def fill(row: Array, image: ImageInput) -> None:
        pixels = np.asarray(resize(load_image(image, draft=draft), settings), np.float32)
        row[:] = (pixels * scale - shift).transpose(2, 0, 1)

    if min(threads, len(images)) <= 1:
        for row, image in zip(out, images, strict=True):
            fill(row, image)
        return out
    with ThreadPoolExecutor(min(threads, len(images))) as pool:
        try:
            for _ in pool.map(fill, out, images):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out


def resize(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """``image`` (RGB) as a square of ``settings.size`` pixels, by ``settings.mode``."""
    side, (width, height) = settings.size, image.size
    if settings.mode == "center_crop":
        short = min(width, height)
        wide, high = max(side, side * width // short), max(side, side * height // short)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - side) // 2, (high - side) // 2
        return image.crop((left, top, left + side, top + side))
    if settings.mode == "pad" and width != height:
        long = max(width, height)
        if long * long > 4 * MAX_PIXELS:
            raise InputError(
                "An image is too large to pad to a square.",
                f"It is {width} x {height} pixels.",
                "Make it smaller first.",
            )
        canvas = Image.new("RGB", (long, long), PAD_COLOR)
        canvas.paste(image, ((long - width) // 2, (long - height) // 2))
        image = canvas
    return image.resize((side, side), Image.Resampling.BICUBIC)
