"""Videos as a few of their frames, evenly spread: image sequences, animated images, video files. No torch.

InternVL reads a video as single frames and averages their embeddings. Animated GIF, WebP and APNG are read by
Pillow, video files by PyAV (extra ``video``), whose FFmpeg gets the bytes alone: a few container formats, no
network and no other files.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

from PIL import Image, ImageSequence, UnidentifiedImageError

from ..arrays import Array
from ..errors import CapabilityError, InputError, IvlError, UsageError
from ..files.lfs import refuse_lfs_pointer
from .images import MAX_PIXELS, frame_of, load_image
from .sources import ImageInput, data_of, image_sequence, kind_of, name_of, not_readable

Video: TypeAlias = "str | os.PathLike[str] | bytes | Array | Sequence[ImageInput]"
"""A file, its content, or frames in order: a sequence of images, or an array [frames, H, W, 3]."""

Chosen: TypeAlias = "Callable[[int], list[int]]"
"""The frames that are taken of so many."""

FRAMES = 8
MAX_BYTES = 1 << 32
MAX_ANIMATION_BYTES = 1 << 26
MAX_DECODED = 64 * MAX_PIXELS
"""Pixels of an animated image up to the last frame that is taken: each is drawn over those before."""
MAX_KEPT = 8 * MAX_PIXELS
"""Pixels of the frames that are taken."""
MAX_PACKETS = 1 << 20
MAX_GROUP = 1 << 12
"""Frames decoded to reach one: those since the last key frame."""
_ANIMATED = ("GIF", "PNG", "WEBP")
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv,asf"


def frames_of(
    video: Video, count: int = FRAMES, name: str | None = None, places: Places | None = None
) -> list[ImageInput]:
    """``count`` frames: those in the middle of so many equal parts; all of them where there are fewer.

    Args:
        video: a path, the bytes of a file, a ``data:`` URL, or frames in order, which come back as they are;
            ``list(ImageSequence.Iterator(image))`` has the frames of ``image``.
        count: 1 takes the one in the middle.
        name: of the video in errors.
        places: which of so many frames are taken; None: :func:`spread`.

    Raises:
        UsageError: ``count`` is under 1.
        InputError: no frames, a file that cannot be read, is too large or has no pictures.
        CapabilityError: a video file, and PyAV is not installed.
    """
    if count < 1:
        raise UsageError(f"{count} frames of a video cannot be read.", fix="Ask for 1 or more.")
    chosen = partial(places or spread, count=count)
    if isinstance(video, (str, os.PathLike)):
        label, kind = name or name_of(video), kind_of(video)
        if kind == "data":
            data = data_of(os.fsdecode(video), label, "video")
            return list(_decoded(io.BytesIO(data), len(data), chosen, label))
        if kind != "path":
            raise not_readable(video, label, "video")
        path = Path(video)
        if not _is_file(path):
            raise InputError(f"Cannot read the video {label}.", "There is no such file.", "Check the path.")
        refuse_lfs_pointer(path)
        with path.open("rb") as file:
            return list(_decoded(file, path.stat().st_size, chosen, label))
    if isinstance(video, (bytes, bytearray, memoryview)):
        return list(_decoded(io.BytesIO(video), len(video), chosen, name or "video bytes"))
    frames = image_sequence(video)
    if not len(frames):
        raise InputError(f"{name or 'The video'} has no frames.", "", "Give one at least.")
    numbers = chosen(len(frames))
    if animation := _repeated(frames):
        total = getattr(animation, "n_frames", 1)
        if len(frames) != total:
            raise InputError(
                f"One animated image occurs {len(frames)} times in {name or 'the video'}.",
                f"It has {total} frames and shows one at a time: all of them would be the same.",
                "Give copies, [frame.copy() for frame in ImageSequence.Iterator(image)], or the file.",
            )
        _check(animation.width * animation.height, numbers[-1] + 1, len(numbers), name or "of the list")
        return [frame_of(animation, f"{name or 'of the video'}, frame {i}", i) for i in numbers]
    return [frames[i] for i in numbers]


def _repeated(frames: Sequence[ImageInput]) -> Image.Image | None:
    """An animated image that is among ``frames`` more than once, as ``list(ImageSequence.Iterator(image))``.

    That list holds the image itself once for each of its frames.
    """
    seen: set[int] = set()
    for frame in frames:
        if isinstance(frame, Image.Image) and getattr(frame, "n_frames", 1) > 1:
            if id(frame) in seen:
                return frame
            seen.add(id(frame))
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


class Places(Protocol):
    """Which frames of a video are taken."""

    def __call__(self, total: int, count: int) -> list[int]:
        """At most ``count`` of ``total`` frames, rising."""
        ...


def chat_places(total: int, count: int) -> list[int]:
    """The frames that InternVL's published chat code takes of ``total``; all of them where there are fewer.

    With ``s = (total - 1) / count``: ``int(s / 2 + round(s * k))`` for k from 0 on. Half is rounded to even.
    """
    if total <= count:
        return list(range(total))
    segment = (total - 1) / count
    return [int(segment / 2 + round(segment * k)) for k in range(count)]


def spread(total: int, count: int) -> list[int]:
    """The frames of ``total`` in the middle of ``count`` equal parts, or all, rising."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _decoded(file: BinaryIO, size: int, chosen: Chosen, name: str) -> Iterator[Image.Image]:
    if size > MAX_BYTES:
        raise _too_large(name, f"It has {size / 1e9:.1f} GB, the limit is {MAX_BYTES / 1e9:.1f}.")
    with _named(name):
        try:
            with Image.open(file, formats=_ANIMATED) as image:
                if size > MAX_ANIMATION_BYTES:
                    limit = MAX_ANIMATION_BYTES / 1e6
                    raise _too_large(name, f"It has {size / 1e6:.0f} MB, the limit is {limit:.0f}.")
                yield from _animation(image, chosen, name)
                return
        except UnidentifiedImageError:
            file.seek(0)
        yield from _film(file, chosen, name)


def _animation(image: Image.Image, chosen: Chosen, name: str) -> Iterator[Image.Image]:
    numbers = chosen(getattr(image, "n_frames", 1))
    _check(image.width * image.height, numbers[-1] + 1, len(numbers), name)
    for number, frame in enumerate(ImageSequence.Iterator(image)):
        if number in numbers:
            yield load_image(frame.copy(), f"{name}, frame {number}")
        if number == numbers[-1]:
            return
    raise InputError(
        f"The video {name} is damaged.", f"It ends before frame {numbers[-1]}.", "Copy or download it again."
    )


def _film(file: BinaryIO, chosen: Chosen, name: str) -> Iterator[Image.Image]:
    """Frames of a video file, each decoded from the key frame before it."""
    try:
        import av
    except ImportError as error:
        raise CapabilityError(
            f"The video {name} cannot be read here.",
            "It is not an animated image, and PyAV, which reads video files, is not installed.",
            "pip install 'ivl-export[video]', or give its frames as images.",
        ) from error
    safe = {"format_whitelist": _CONTAINERS, "protocol_whitelist": ""}
    with av.open(file, "r", options=safe, metadata_errors="ignore") as container:
        if not container.streams.video:
            raise InputError(f"The video {name} has no pictures.", fix="Give a video that has pictures.")
        stream = container.streams.video[0]
        times, keys = _times(container, stream, name)
        moments = [times[i] for i in chosen(len(times))]
        width, height = stream.codec_context.width, stream.codec_context.height
        _check(width * height, 0, len(moments), name)
        for time in moments:
            frame = _at(container, stream, time, keys, name)
            _check(frame.width * frame.height, 0, len(moments), name)
            upright = frame.to_image().rotate(frame.rotation, expand=True)
            yield load_image(upright, f"{name}, {float(frame.time or 0):.2f} s")


def _times(container: Any, stream: Any, name: str) -> tuple[list[int], list[int]]:
    """When each frame is shown, and the key frames; rising. Nothing is decoded."""
    times, keys = [], []
    for packet in container.demux(stream):
        if packet.pts is not None:
            times.append(packet.pts)
            keys += [packet.pts] if packet.is_keyframe else []
        if len(times) > MAX_PACKETS:
            raise _too_large(name, f"It has over {MAX_PACKETS} frames.")
    if not times:
        raise InputError(f"The video {name} has no pictures.", fix="Give a video that has pictures.")
    return sorted(times), sorted(keys)


def _at(container: Any, stream: Any, time: int, keys: list[int], name: str) -> Any:
    """The frame shown at ``time``. Some containers seek too far: then again, from earlier."""
    last = bisect_right(keys, time) - 1
    for back in (0, 1, 2, 4, 8):
        earliest = last - back <= 0
        container.seek(keys[max(last - back, 0)] if keys else time, stream=stream)
        for decoded, frame in enumerate(container.decode(stream)):
            if decoded == 0 and frame.pts is not None and frame.pts > time and not earliest:
                break
            if frame.pts is None or frame.pts >= time:
                return frame
            if decoded > MAX_GROUP:
                raise _too_large(name, f"Over {MAX_GROUP} frames follow from one another.")
    raise InputError(
        f"The video {name} is damaged.", "It ends before its last frame.", "Copy or download it again."
    )


def _check(pixels: int, drawn: int, frames: int, name: str) -> None:
    if pixels > MAX_PIXELS or pixels * frames > MAX_KEPT or pixels * drawn > MAX_DECODED:
        raise _too_large(name, f"{pixels} pixels a frame, {max(drawn, frames)} frames to read.")


def _too_large(name: str, why: str) -> InputError:
    return InputError(f"The video {name} is too large.", why, "Cut it or make it smaller first.")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of a decoder on a damaged file become InputError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except (IvlError, GeneratorExit):
        raise
    except Exception as error:
        raise InputError(
            f"Cannot read the video {name}.",
            f"{type(error).__name__}: {error}.",
            "It is damaged, or of no known format. Use MP4, WebM, GIF, WebP or APNG.",
        ) from error
