"""Images as users have them, to upright RGB pictures of 8 bits a channel. No torch."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

Array: TypeAlias = np.ndarray[Any, Any]
MAX_PIXELS = 64 * 1024 * 1024
MAX_ASPECT = 200
# Formats whose decoders are safe on files from strangers (EPS, for one, would start Ghostscript).
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class Pixels(Protocol):
    """A tensor that can be read in place, a torch tensor on the CPU for one (the array API's DLPack)."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self, *args: Any, **kwargs: Any) -> Any: ...


ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | Array | Pixels"


def load_image(image: ImageInput, name: str | None = None, draft: int | None = None) -> Image.Image:
    """An RGB image, upright (EXIF), without alpha (on white), first frame, 8 bits a channel.

    Takes a path, the bytes of a file, a PIL image, an array ([H, W], [H, W, 1|3|4]; uint8, uint16, or
    floats in 0..1), or a tensor with ``__dlpack__`` on the CPU, of such a shape or [1|3|4, H, W].
    ``name`` names the image in errors. With ``draft`` a JPEG may be decoded smaller, at an eighth, a quarter
    or half of its sides, as long as the shorter one keeps ``draft`` pixels: faster, and not quite the
    published pixels.

    Raises:
        InputError: what is missing, broken, of an unknown format, over :data:`MAX_PIXELS`, or more than
            :data:`MAX_ASPECT` times as long as wide.
    """
    if isinstance(image, np.ndarray):
        return _checked(_from_array(image, name or "array"), name or "array")
    if isinstance(image, Image.Image):
        label = name or getattr(image, "filename", "") or "image"
        return _decode(image, label)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(image), name or "image bytes", draft)
    if not isinstance(image, (str, os.PathLike)):
        return _checked(_from_array(_host_array(image, name or "tensor"), name or "tensor"), name or "tensor")
    path = Path(image)
    label = name or str(path)
    if not path.is_file():
        raise InputError(f"Cannot read the image {label}.", "There is no such file.", "Check the path.")
    return _open(path, label, draft)


def _open(file: Path | io.BytesIO, name: str, draft: int | None) -> Image.Image:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if draft is not None:
                _check_size(image, name)  # before drafting makes it look smaller
                image.draft(None, (draft, draft))
            return _decode(image, name)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"Cannot read the image {name}.",
            "It is no image of a known format, or its start is damaged.",
            "Use JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or JPEG 2000.",
        ) from error
    except Exception as error:  # a decoder may raise nearly anything on a damaged file
        raise _broken(name, error) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(0)
        image.load()
        return _to_rgb(_upright(image))
    except InputError:
        raise
    except Exception as error:  # as above
        raise _broken(name, error) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF is common in the wild, and no reason to refuse sound pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey; older Pillow versions open it as 32-bit integers.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it has floating-point pixels; save it with 8 bits a channel")
    if "A" in image.getbands() or image.mode in ("PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_array(array: Array, name: str) -> Image.Image:
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise InputError(f"Cannot use {name} as an image.", f"Its shape is {list(shape)}.", "Use [H, W, 3].")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and (array >= 0).all() and (array <= 1).all()):
            raise InputError(
                f"Cannot use {name} as an image.", "Its floats are not all in 0..1.", "Use uint8."
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"Cannot use {name} as an image.", f"Its dtype is {array.dtype}.", "Use uint8.")
    if not array.size:
        raise InputError(f"Cannot use {name} as an image.", f"Its shape is {list(shape)}.")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _host_array(tensor: Pixels, name: str) -> Array:
    """A tensor on the CPU as an array of its memory, channels last."""
    try:
        array: Array = np.from_dlpack(tensor)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"Cannot use {name} as an image.",
            f"A {type(tensor).__name__} cannot be read: {error}",
            "Give a path, bytes, a PIL image, an array [H, W, 3], or a tensor [3, H, W] on the CPU.",
        ) from error
    last = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and not last:
        array = array.transpose(1, 2, 0)
    return array


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"It is {width} x {height} pixels, the limit is {MAX_PIXELS} in all.")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"Cannot use the image {name}.",
            f"It is {width} x {height} pixels, over {MAX_ASPECT} times as long as wide.",
            "Crop it.",
        )


def _checked(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    return image


def _too_large(name: str, why: str) -> InputError:
    return InputError(f"The image {name} is too large.", why, "Make it smaller first.")


def _broken(name: str, error: Exception) -> InputError:
    why = f"{type(error).__name__}: {error}"
    return InputError(f"The image {name} is damaged.", why, "Copy or download it again.")
