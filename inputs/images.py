"""Images as users have them, to upright RGB pictures of 8 bits a channel. No torch."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..arrays import Array
from ..errors import InputError, TooLargeError
from ..files.lfs import refuse_lfs_pointer
from ..forks import fork_safe_lock
from .sources import ImageInput, Pixels, data_of, kind_of, name_of, not_readable

MAX_PIXELS = 64 * 1024 * 1024
MAX_ASPECT = 200
# Formats whose decoders are safe on files from strangers (EPS, for one, would start Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
"""Names of image files end so, in small letters."""


def load_image(image: ImageInput, name: str | None = None, draft: int | None = None) -> Image.Image:
    """An RGB image, upright (EXIF), without alpha (on white), 8 bits a channel.

    Takes a path, the bytes of a file, a ``data:`` URL, a PIL image, an array ([H, W], [H, W, 1|3|4]; uint8,
    uint16, or floats in 0..1), or a tensor with ``__dlpack__`` on the CPU, of such a shape or [1|3|4, H, W].
    Of an animated file it is the first frame, of a PIL image the frame that it is at; that image may be used
    by other threads meanwhile, and stays as it is. ``name`` names the image in errors. With ``draft`` a JPEG
    may be decoded smaller, at an eighth, a quarter or half of its sides, as long as the shorter one keeps
    ``draft`` pixels: faster, and not quite the published pixels.

    Raises:
        InputError: it is missing, broken, of an unknown format, over :data:`MAX_PIXELS`, or more than
            :data:`MAX_ASPECT` times as long as wide; text that is neither a path nor a ``data:`` URL.
    """
    label, kind = name or name_of(image), kind_of(image)
    if isinstance(image, np.ndarray):
        return _checked(_from_array(image, label), label)
    if isinstance(image, Image.Image):
        return _decode(frame_of(image, label), label)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(image), label, draft)
    if not isinstance(image, (str, os.PathLike)):
        return _checked(_from_array(_host_array(image, label), label), label)
    if kind == "data":
        return _open(io.BytesIO(data_of(os.fsdecode(image), label)), label, draft)
    if kind != "path":
        raise not_readable(image, label)
    try:
        path = Path(image)
        there = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(f"Cannot read the image {label}.", f"{error}."[:200], "Check the path.") from error
    if not there:
        raise InputError(f"Cannot read the image {label}.", "There is no such file.", "Check the path.")
    refuse_lfs_pointer(path)
    return _open(path, label, draft)


def frame_of(image: Image.Image, name: str, frame: int | None = None) -> Image.Image:
    """A copy of a PIL image's current frame, or of another; the image stays at its frame.

    Images that are opened and not yet loaded are decoded by their first use, in place: one thread at a time.
    """
    with _exclusively(image):
        try:
            _check_size(image, name)
            if frame is None:
                return image.copy()
            own = image.tell()
            try:
                image.seek(frame)
                return image.copy()
            finally:
                image.seek(own)
        except InputError:
            raise
        except Exception as error:  # a decoder may raise nearly anything on a damaged file
            raise _broken(name, error) from error


_users: dict[int, tuple[threading.RLock, int]] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_users.clear)  # the parent's threads are not there
_guard = fork_safe_lock()


@contextmanager
def _exclusively(image: Image.Image) -> Iterator[None]:
    """One thread at a time for each PIL image; they cannot be weakly referenced by value."""
    key = id(image)
    with _guard:
        lock, users = _users.get(key, (threading.RLock(), 0))
        _users[key] = lock, users + 1
    try:
        with lock:
            yield
    finally:
        with _guard:
            lock, users = _users.pop(key)
            if users > 1:
                _users[key] = lock, users - 1


def _open(file: Path | io.BytesIO, name: str, draft: int | None) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image, name)  # before drafting makes it look smaller
            if draft is not None:
                image.draft(None, (draft, draft))
            image.load()
            return _decode(image, name)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except UnidentifiedImageError as error:
        raise _unknown(name, file) from error
    except Exception as error:  # as above
        raise _broken(name, error) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
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
        raise InputError(
            f"The image {name} cannot be used.", f"Its shape is {list(shape)}.", "Use [H, W, 3]."
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and (array >= 0).all() and (array <= 1).all()):
            raise InputError(
                f"The image {name} cannot be used.", "Its floats are not all in 0..1.", "Use uint8."
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"The image {name} cannot be used.", f"Its dtype is {array.dtype}.", "Use uint8.")
    if not array.size:
        raise InputError(f"The image {name} cannot be used.", f"Its shape is {list(shape)}.")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _host_array(tensor: Pixels, name: str) -> Array:
    """A tensor on the CPU as an array of its memory, channels last."""
    try:
        array: Array = np.from_dlpack(tensor)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"The image {name} cannot be used.",
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
    if min(width, height) < 1:
        raise InputError(f"Cannot use the image {name}.", f"It is {width} x {height}: it has no pixels.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"Cannot use the image {name}.",
            f"It is {width} x {height} pixels, over {MAX_ASPECT} times as long as wide.",
            "Crop it.",
        )


def _checked(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    return image


_CONTENTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "It is a Git LFS pointer, not the file.",
        "git lfs pull, or download it again.",
    ),
    (b"<!doctype html", "It is a page of HTML, such as a server's error.", "Check where it comes from."),
    (b"<html", "It is a page of HTML, such as a server's error.", "Check where it comes from."),
    (b"<svg", "It is SVG.", "Draw it as PNG."),
    (b"<?xml", "It is XML.", "Check where it comes from."),
    (b"%pdf", "It is PDF.", "Draw its pages as PNG."),
    (b"\x1f\x8b", "It is packed with gzip.", "Unpack it."),
    (b"pk\x03\x04", "It is a ZIP archive.", "Unpack it."),
)
"""How files begin (in small letters) that are often given as images."""


def _unknown(name: str, file: Path | io.BytesIO) -> InputError:
    why = "It is not an image of a known format, or its start is damaged."
    fix = "Use JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or JPEG 2000."
    try:
        head = file.getvalue()[:64] if isinstance(file, io.BytesIO) else _head(file)
    except OSError:
        head = b"?"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for begin, said, advice in _CONTENTS:
        if start.startswith(begin):
            why, fix = said, advice
    if not head:
        why, fix = "It is empty.", "Copy or download it again."
    if head[4:8] == b"ftyp":
        why, fix = "It is HEIC, AVIF or a video.", "Save it as JPEG or PNG."
    return InputError(f"Cannot read the image {name}.", why, fix)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _too_large(name: str, why: str) -> TooLargeError:
    return TooLargeError(f"The image {name} is too large.", why, "Make it smaller first.")


def _broken(name: str, error: Exception) -> InputError:
    why = f"{type(error).__name__}: {error}"
    return InputError(f"The image {name} is damaged.", why, "Copy or download it again.")
