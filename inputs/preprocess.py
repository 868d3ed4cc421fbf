"""Images to ``pixel_values``, as the published model reads them; they are made nowhere else. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ..arrays import Array
from ..errors import CheckpointError, InputError, UsageError
from ..files.text import read_text
from .images import MAX_PIXELS, load_image
from .sources import ImageInput, name_of
from .tiles import MAX_TILES, Tiling, tiles_of

ResizeMode = Literal["square", "center_crop", "pad"]

MODES: tuple[ResizeMode, ...] = ("square", "center_crop", "pad")
PAD_COLOR = (123, 116, 103)
_BICUBIC = 3
_TILED = "InternVLProcessor"
"""The processor that makes tiles with every value of ``crop_to_patches``."""

_FIXED: dict[str, tuple[object, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_convert_rgb": (True,),
    "do_pad": (False,),
    "pad_size": (),
    "do_flip_channel_order": (False,),
    "do_grayscale": (False,),
    "do_reduce_labels": (False,),
    "do_image_splitting": (False,),
    "do_align_long_axis": (False,),
    "do_thumbnail": (False,),
    "image_grid_pinpoints": (),
    "resample": (_BICUBIC, "bicubic", "BICUBIC"),
    "interpolation": (_BICUBIC, "bicubic", "BICUBIC"),
    "antialias": (True,),
    "offset": (False,),
    "rescale_offset": (False,),
    "image_format": ("RGB", "rgb"),
    "channel_order": ("RGB", "rgb"),
    "size_divisor": (1,),
    "crop_pct": (1,),
    "keep_aspect_ratio": (False,),
    "use_square_size": (True,),
}
"""Keys that change pixels, with the values that are done here; null is done always."""
_READ = frozenset(
    {"size", "crop_size", "do_center_crop", "resize_mode", "do_normalize", "image_mean", "image_std"}
    | {"rescale_factor", "crop_to_patches", "min_patches", "max_patches", "use_thumbnail", "processor_class"}
)
_HARMLESS = frozenset(
    {
        "image_processor_type",
        "feature_extractor_type",
        "auto_map",
        "_processor_class",
        "_valid_processor_keys",
    }
    | {
        "data_format",
        "input_data_format",
        "return_tensors",
        "device",
        "disable_grouping",
        "default_to_square",
    }
    | {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "image_seq_length"}
    | {"patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "video_processor_type"}
)
"""Keys that transformers 4 and 5, LLaVA and OpenGVLab write, and that change no pixels of an image."""


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes ``pixel_values``. Always bicubic, always RGB in 0..1 before ``mean`` and ``std``.

    Args:
        size: side in pixels.
        mean, std: of each channel.
        mode: ``square`` stretches to the square (retrieval, captions), ``center_crop`` resizes the shortest
            side and crops (classification), ``pad`` pads to a square with :data:`PAD_COLOR` first (chat).
        tiling: the image becomes several squares of ``size`` (:mod:`.tiles`); None: one.
        shortest_edge: ``center_crop``'s length of the shortest side; None: ``size``.
        unknown: keys of the file that nothing here knows.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    mode: ResizeMode = "square"
    tiling: Tiling | None = None
    shortest_edge: int | None = None
    unknown: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.size < 1 or self.mode not in MODES or len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"not image settings: {self}")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise ValueError(f"mean and std must be finite: {self.mean}, {self.std}")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std must be positive: {self.std}")
        if self.tiling is not None and self.mode != "square":
            raise ValueError(f"tiles are stretched, the mode is {self.mode}")
        if self.shortest_edge is not None and self.shortest_edge < self.size:
            raise ValueError(f"the shortest edge, {self.shortest_edge}, is under the size, {self.size}")

    def at(self, size: int) -> ImageSettings:
        """The same for another side; ``shortest_edge`` grows with it."""
        edge = self.shortest_edge
        scaled = None if edge is None else max(size, round(edge * size / self.size))
        return replace(self, size=size, shortest_edge=scaled)

    def resized(self, mode: ResizeMode | None) -> ImageSettings:
        """The same with another mode; None: its own."""
        return self if mode is None else replace(self, mode=mode)

    def to_json(self) -> dict[str, Any]:
        """The ``preprocessor_config.json`` of the published layout, plus ``resize_mode``."""
        crop = self.mode == "center_crop"
        square = {"height": self.size, "width": self.size}
        tiling = self.tiling and {
            "crop_to_patches": True,
            "min_patches": self.tiling.min_tiles,
            "max_patches": self.tiling.max_tiles,
            "use_thumbnail": self.tiling.thumbnail,
        }
        return {
            "image_processor_type": "GotOcr2ImageProcessor" if tiling else "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.shortest_edge or self.size} if crop else square,
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
            **(tiling or {}),
        }

    def save(self, path: Path) -> None:
        """Write ``path`` (a ``preprocessor_config.json``)."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, data: object, source: str = "preprocessor_config.json") -> ImageSettings:
        """Read published or own settings.

        Every key is obeyed, known to change no pixels, or named in ``unknown``.

        Raises:
            CheckpointError: a key with an unsupported value; it is named.
        """
        try:
            if not isinstance(data, dict):
                raise TypeError("it holds no JSON object")
            return _settings(data)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{source} cannot be followed.",
                f"{type(error).__name__}: {error}.",
                "Take the file that was published with the checkpoint.",
            ) from error

    @classmethod
    def load(cls, path: Path) -> ImageSettings:
        """Read ``path`` (a ``preprocessor_config.json``)."""
        try:
            data = json.loads(read_text(path, CheckpointError))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read.", str(error), "Download it again.") from error
        return cls.from_json(data, str(path))


def _settings(data: dict[str, Any]) -> ImageSettings:
    for key, values in _FIXED.items():
        if data.get(key) is not None and not any(data[key] is v or data[key] == v for v in values):
            supported = f"; only {' or '.join(map(repr, values))} is done here" if values else ""
            raise ValueError(f"{key} is {data[key]!r}{supported}")
    if abs(_or(data, "rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise ValueError(f"rescale_factor is {data['rescale_factor']!r}; only 1/255 is done here")
    tiled = data.get("processor_class") == _TILED or _flag(data, "crop_to_patches", False)
    tiling = None
    if tiled:
        most, least = (_whole(_or(data, key, n), key) for key, n in (("max_patches", 12), ("min_patches", 1)))
        tiling = Tiling(most, least, _flag(data, "use_thumbnail", True))
    size, mode, edge = _geometry(data)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if _flag(data, "do_normalize", True):
        mean = _three(data.get("image_mean", ImageSettings.mean), "image_mean")
        std = _three(data.get("image_std", ImageSettings.std), "image_std")
    unknown = sorted(map(str, data.keys() - _FIXED.keys() - _READ - _HARMLESS))
    return ImageSettings(size, mean, std, mode, tiling, edge, tuple(unknown))


def _geometry(data: dict[str, Any]) -> tuple[int, ResizeMode, int | None]:
    """Side, mode, and the shortest edge where it is another."""
    value, crop, own = data["size"], _flag(data, "do_center_crop", False), data.get("resize_mode")
    shortest = isinstance(value, dict) and value.keys() == {"shortest_edge"}
    side = _side(value, "size")
    if crop and data.get("crop_size") is not None:
        resized, side = side, _side(data["crop_size"], "crop_size")
        stretched = isinstance(value, dict) and not shortest
        if resized < side or (resized != side and (stretched or own in ("square", "pad"))):
            raise ValueError(f"size is {value!r} and crop_size {data['crop_size']!r}")
    else:
        resized, stretched = side, isinstance(value, dict) and not shortest
    if own is not None:
        mode: Any = own
    elif crop:
        mode = "square" if stretched else "center_crop"
    elif shortest:
        raise ValueError(f"size is {value!r} without do_center_crop: images would not be square")
    else:
        mode = "square"
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"resize_mode is {mode!r}, known are {', '.join(MODES)}")
    return side, mode, resized if mode == "center_crop" and resized != side else None


def _side(value: object, key: str) -> int:
    """A square's side, or a shortest edge, of a published size."""
    if isinstance(value, dict):
        sides = [value[name] for name in sorted(value) if value[name] is not None]
        if value.keys() not in ({"height", "width"}, {"shortest_edge"}) or len({*map(repr, sides)}) != 1:
            raise ValueError(f"{key} is {value!r}; a square is needed")
        value = sides[0]
    return _whole(value, key)


def _or(data: dict[str, Any], key: str, default: Any) -> Any:
    return default if data.get(key) is None else data[key]


def _flag(data: dict[str, Any], key: str, default: bool) -> bool:
    value = _or(data, key, default)
    if type(value) is not bool:
        raise ValueError(f"{key} is {value!r}, no bool")
    return value


def _whole(value: object, key: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {value!r}, no whole number over 0")
    return value


def _three(values: Any, key: str) -> tuple[float, float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ValueError(f"{key} is {values!r}, not three numbers")
    red, green, blue = map(float, values)
    return red, green, blue


@dataclass(frozen=True)
class PixelValues:
    """Images as a vision tower takes them.

    Args:
        values: float32 [tiles of all images, 3, S, S], normalised.
        tiles: of each image, in order; 0: it could not be read, and was to be left out.
    """

    values: Array
    tiles: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, images: slice | Sequence[int]) -> PixelValues:
        """Some of the images."""
        ends = np.cumsum([0, *self.tiles])
        places = range(len(self.tiles))[images] if isinstance(images, slice) else images
        rows = [row for i in places for row in range(ends[i], ends[i + 1])]
        contiguous = rows and rows == list(range(rows[0], rows[-1] + 1))
        values = self.values[rows[0] : rows[-1] + 1] if contiguous else self.values[rows]
        return PixelValues(values, tuple(self.tiles[i] for i in places))


class ReadImages(Protocol):
    """Reads images for one model: :func:`read_images` with all but its first and last argument."""

    def __call__(
        self, images: Sequence[ImageInput], *, on_error: Callable[[int, InputError], None]
    ) -> PixelValues:
        """``pixel_values``; ``on_error`` gets the index of an unreadable image, and the reason."""
        ...


def preprocess_images(
    images: Sequence[ImageInput], settings: ImageSettings, threads: int = 1, approximate_jpeg: bool = False
) -> Array:
    """``pixel_values`` float32 [len(images), 3, S, S] (tiles: more), normalised; see :func:`read_images`."""
    return read_images(images, settings, threads, approximate_jpeg).values


def read_images(
    images: Sequence[ImageInput],
    settings: ImageSettings,
    threads: int = 1,
    approximate_jpeg: bool = False,
    names: Sequence[str] | None = None,
    max_tiles: int | Sequence[int] | None = None,
    on_error: Callable[[int, InputError], None] | None = None,
) -> PixelValues:
    """Read, resize and normalise images, each once.

    Args:
        images: any number.
        settings: size, mean, std, mode, tiling.
        threads: images decoded and resized at a time (Pillow lets others run meanwhile).
        approximate_jpeg: decode large JPEGs smaller, to no less than twice the side; not quite the published
            pixels. Of no use to tiles, whose grid follows from the size of the image.
        names: of the images in errors; None: their paths, or numbers.
        max_tiles: the most tiles of each image, or of every image; None: as ``settings`` say.
        on_error: called with the number of an image that cannot be read, which is left out; None: raised.

    Raises:
        InputError: as :func:`~.images.load_image`, of the first image that cannot be read.
    """
    limits = [max_tiles] * len(images) if max_tiles is None or isinstance(max_tiles, int) else max_tiles
    if len(limits) != len(images) or any(n is not None and not 1 <= n <= MAX_TILES for n in limits):
        raise UsageError(f"max_tiles is {max_tiles!r}.", "", f"Give 1 to {MAX_TILES}, one or one an image.")
    tiling, one = settings.tiling, settings.tiling is None
    draft = 2 * settings.size if approximate_jpeg and one else None
    whole = np.empty((len(images) if one else 0, 3, settings.size, settings.size), np.float32)

    def read(index: int) -> Array | InputError:
        name = names[index] if names else name_of(images[index], index, len(images))
        try:
            picture = load_image(images[index], name, draft)
            if tiling is None:
                return normalised(np.asarray(resize(picture, settings)), settings, whole[index])[None]
            limit = limits[index]
            tiles = tiles_of(picture, settings.size, tiling if limit is None else tiling.limited(limit))
            return normalised(np.stack([np.asarray(tile) for tile in tiles]), settings)
        except InputError as error:
            if on_error is None:
                raise
            return error

    if min(threads, len(images)) <= 1:
        parts = [read(index) for index in range(len(images))]
    else:
        with ThreadPoolExecutor(min(threads, len(images))) as pool:
            try:
                parts = list(pool.map(read, range(len(images))))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    rows = [part for part in parts if not isinstance(part, InputError)]
    for index, part in enumerate(parts):
        if on_error is not None and isinstance(part, InputError):
            on_error(index, part)
    tiles = tuple(0 if isinstance(part, InputError) else len(part) for part in parts)
    return PixelValues(
        whole if one and len(rows) == len(parts) else np.concatenate([whole[:0], *rows]), tiles
    )


SAMPLE_TILES = 2
"""Tiles that a calibration sample gives of a model that takes tiles."""


def sample_tiles(image: ImageInput, settings: ImageSettings, number: int) -> Array:
    """Two tiles of an image, float32 [2, 3, S, S], where ``settings`` have a tiling.

    The ``number``-th part (modulo how many there are; of a small image, too), and the whole image, or the
    part after it where there is no thumbnail.
    """
    if settings.tiling is None:
        raise ValueError("no tiling")
    most = max(2, settings.tiling.max_tiles)
    cut = replace(settings.tiling, max_tiles=most, min_tiles=max(2, settings.tiling.min_tiles))
    tiles = tiles_of(load_image(image, name_of(image)), settings.size, cut)
    parts = len(tiles) - cut.thumbnail
    second = -1 if cut.thumbnail else (number + 1) % parts
    return normalised(np.stack([np.asarray(tiles[i]) for i in (number % parts, second)]), settings)


def normalised(images: Array, settings: ImageSettings, out: Array | None = None) -> Array:
    """uint8 [..., S, S, 3] -> float32 [..., 3, S, S]: ``(value / 255 - mean) / std``, rounded as published.

    ``out``: where to write; None: a new array.
    """
    shape = (*images.shape[:-3], 3, *images.shape[-3:-1])
    values: Array = np.empty(shape, np.float32) if out is None else out
    for channel in range(3):
        plane = values[..., channel, :, :]
        np.divide(images[..., channel], np.float32(255.0), out=plane, dtype=np.float32)
        plane -= np.float32(settings.mean[channel])
        plane /= np.float32(settings.std[channel])
    return values


def resize(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """``image`` (RGB) as one square of ``settings.size`` pixels, by ``settings.mode``."""
    side, (width, height) = settings.size, image.size
    if settings.mode == "center_crop":
        short, edge = min(width, height), settings.shortest_edge or side
        wide, high = max(edge, edge * width // short), max(edge, edge * height // short)
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
