"""Images and texts to arrays, as the published model reads them. No torch: the runtime uses this too."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import CheckpointError, InputError

ResizeMode = Literal["square", "center_crop", "pad"]
Array: TypeAlias = np.ndarray[Any, Any]
ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | Array"

MODES: tuple[ResizeMode, ...] = ("square", "center_crop", "pad")
MAX_PIXELS = 64 * 1024 * 1024
MAX_ASPECT = 200
PAD_COLOR = (123, 116, 103)
# Formats whose decoders are safe on files from strangers (EPS, for one, would start Ghostscript).
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_BICUBIC = 3

BUCKETS = (16, 32, 48, 80)
MAX_LENGTH = 80
#: Contrastive texts are this plus the caption, without a space between (as published).
CONTRASTIVE_PREFIX = "summarize:"
#: What the caption decoder is started with, by language. The English one is the published one.
CAPTION_PROMPT: dict[str, str] = {"en": "English caption:", "zh": "中文描述:"}


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


def load_image(image: ImageInput, name: str | None = None) -> Image.Image:
    """An RGB image, upright (EXIF), without alpha (on white), first frame, 8 bits a channel.

    Takes a path, the bytes of a file, a PIL image or an array ([H, W], [H, W, 1|3|4]; uint8, uint16, or
    floats in 0..1). ``name`` names the image in errors. Raises InputError for what is missing, broken,
    of an unknown format, over :data:`MAX_PIXELS`, or more than :data:`MAX_ASPECT` times as long as wide.
    """
    if isinstance(image, np.ndarray):
        return _checked(_from_array(image, name or "array"), name or "array")
    if isinstance(image, Image.Image):
        label = name or getattr(image, "filename", "") or "image"
        return _decode(image, label)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(image), name or "image bytes")
    path = Path(image)
    label = name or str(path)
    if not path.is_file():
        raise InputError(f"Cannot read the image {label}.", "There is no such file.", "Check the path.")
    return _open(path, label)


def preprocess_images(images: Sequence[ImageInput], settings: ImageSettings) -> Array:
    """``pixel_values`` float32 [len(images), 3, S, S], normalised; errors as :func:`load_image`."""
    out = np.empty((len(images), 3, settings.size, settings.size), np.float32)
    scale = np.float32(1.0) / (np.float32(255.0) * np.asarray(settings.std, np.float32))
    shift = np.asarray(settings.mean, np.float32) / np.asarray(settings.std, np.float32)
    for row, image in zip(out, images, strict=True):
        pixels = np.asarray(resize(load_image(image), settings), np.float32)
        row[:] = (pixels * scale - shift).transpose(2, 0, 1)
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


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file, formats=_FORMATS) as image:
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


class Tokenizer:
    """The LLaMA sentencepiece tokenizer of a checkpoint: bos 1, eos 2, id 0 pads.

    Texts are encoded as given: no normalisation, and no special tokens are recognised inside them.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes) -> None:
        """Read a ``tokenizer.model`` file, or its bytes; CheckpointError if it is none."""
        import sentencepiece

        name = "the tokenizer" if isinstance(model, bytes) else str(model)
        try:
            self.model = model if isinstance(model, bytes) else Path(model).read_bytes()
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"Cannot read {name}.", str(error), "Take the tokenizer.model of the checkpoint."
            ) from error
        self.bos, self.eos = int(self._sp.bos_id()), int(self._sp.eos_id())
        if self.bos < 0 or self.eos < 0:
            raise CheckpointError(f"Cannot use {name}.", "It has no bos or no eos piece.")

    def __len__(self) -> int:
        return int(self._sp.vocab_size())

    def encode_contrastive(
        self,
        texts: Sequence[str],
        max_length: int = MAX_LENGTH,
        buckets: Sequence[int] = BUCKETS,
        prefix: str = CONTRASTIVE_PREFIX,
    ) -> tuple[Array, Array]:
        """Ids of ``prefix + text`` with bos and eos: (input_ids int64 [B, T], lengths int64 [B]).

        Padded on the right with 0 to the smallest bucket that holds the longest text. Text pieces are cut
        to ``max_length - 2`` before bos and eos are put around them, as transformers' LlamaTokenizer does:
        eos, where the embedding is read, is always there.
        """
        rows = [[self.bos, *self._ids(prefix + text)[: max_length - 2], self.eos] for text in texts]
        return pad_ids(rows, [b for b in buckets if b < max_length] + [max_length])

    def encode_captions(
        self, prompts: Sequence[str], texts: Sequence[str], buckets: Sequence[int] = BUCKETS
    ) -> tuple[Array, Array, Array]:
        """Prompt, caption and eos, for training: (input_ids int64 [B, T], lengths, prompt lengths int64 [B]).

        The first ``prompt length`` ids of a row are :meth:`encode_prompt` of its prompt; ids from there to
        ``length`` (eos is the last) are what the decoder learns to say.
        """
        heads = [self.encode_prompt(prompt) for prompt in prompts]
        rows = [
            [*self.encode_prompt(prompt + text), self.eos]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        for head, row, text in zip(heads, rows, texts, strict=True):
            if row[: len(head)] != head:
                raise InputError(
                    f"The caption {text!r} cannot be trained on.",
                    "Its first letters merge with the prompt's last ones into one token.",
                )
        ids, lengths = pad_ids(rows, buckets)
        return ids, lengths, np.array([len(head) for head in heads], np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a caption prompt, ``English caption:``: bos, no eos."""
        return [self.bos, *self._ids(text)]

    def decode(self, ids: Sequence[int] | Array) -> str:
        """Text of ``ids`` up to the first eos, without bos, padding and ids that the model does not know."""
        kept: list[int] = []
        for i in map(int, ids):
            if i == self.eos:
                break
            if i not in (0, self.bos) and 0 < i < len(self):
                kept.append(i)
        return str(self._sp.decode(kept))

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"Cannot encode the text {text!r}.", str(error), "Use valid Unicode.") from error
        return list(self._sp.encode(text))


def pad_ids(rows: Sequence[Sequence[int]], buckets: Sequence[int]) -> tuple[Array, Array]:
    """Pad on the right with 0 to the smallest bucket: (ids int64 [B, T], lengths int64 [B])."""
    lengths = np.array([len(row) for row in rows], np.int64)
    longest = int(lengths.max(initial=0))
    fits = [b for b in sorted(buckets) if b >= longest]
    if not fits:
        raise InputError(
            f"A text has {longest} tokens.", f"The longest bucket is {max(buckets)}.", "Shorten it."
        )
    ids = np.zeros((len(rows), fits[0]), np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids, lengths
