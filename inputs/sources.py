"""Images and texts from callers: their types are told apart here, and named in errors. No torch.

a path       "cat.jpg", Path("cat.jpg")          read
bytes        of an image file                    decoded
a data URL   "data:image/png;base64,..."         decoded
an address   "https://..."                       fetched where a model was loaded with leave to
base64       "/9j/4AAQSkZJRg..."                 refused: it could also be a path
PIL, arrays, tensors                             used as they are
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from ..arrays import Array
from ..errors import InputError


class Pixels(Protocol):
    """A tensor that can be read in place, a torch tensor on the CPU for one (the array API's DLPack)."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self, *args: Any, **kwargs: Any) -> Any: ...


ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | Array | Pixels"
Kind = Literal["path", "bytes", "data", "url", "address", "base64", "PIL image", "array", "tensor"]

SHOWN = 80
"""Letters of a text that an error shows."""
MAX_DATA = 64 << 20
"""Letters of a data URL."""
_LONGEST_PATH = 255
_SCHEME = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+:)+//|(?:javascript|blob):")
_ADDRESS_PATH = re.compile(r"(https?|ftp|s3|gs|az|abfss?|hdfs|hf|file|blob|data):", re.IGNORECASE)
"""A path that was an address: ``Path`` makes one slash of two."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
_ENCODED = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
"""How JPEG, PNG, GIF, WebP and TIFF begin in base64."""


def kind_of(image: object) -> Kind:
    """Kind of ``image``; unknown objects count as tensors."""
    if isinstance(image, str):
        return _kind_of_text(image)
    if isinstance(image, os.PathLike):
        return "address" if _ADDRESS_PATH.match(os.fsdecode(image)) else "path"
    if isinstance(image, (bytes, bytearray, memoryview)):
        return "bytes"
    if isinstance(image, Image.Image):
        return "PIL image"
    return "array" if isinstance(image, np.ndarray) else "tensor"


def _kind_of_text(text: str) -> Kind:
    head = text[:32].lower()
    if head.startswith("data:"):
        return "data"
    if head.startswith(("http://", "https://")):
        return "url"
    if _SCHEME.match(head):
        return "address"
    encoded = len(text) > 64 and text.startswith(_ENCODED)
    if (encoded or len(text) > _LONGEST_PATH) and _BASE64.fullmatch(text) and not _short_parts(text):
        return "base64"
    return "path"


def _short_parts(text: str) -> bool:
    """Whether all names of a path are short enough to be real, and there are several."""
    parts = text.split("/")
    return len(parts) > 2 and max(map(len, parts)) < 64


def shown(text: str) -> str:
    """``text`` for an error: no query strings, passwords or contents; at most 80 letters, unless a path."""
    kind = _kind_of_text(text)
    if kind == "data":
        return _cut(f"{text[:SHOWN].partition(',')[0]},...")
    if kind == "base64":
        return f"{text[:16]}... ({len(text)} letters)"
    if kind in ("url", "address"):
        return _cut(_printable(without_secrets(text)))
    return _cut(_printable(text)) if len(text) > _LONGEST_PATH else _printable(text)


def without_secrets(url: str) -> str:
    """``url`` without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{place}{parts.path}"
    except ValueError:
        return re.split("[?#]", url, maxsplit=1)[0].rpartition("@")[2]


def _opened(text: str) -> str:
    """A path that was an address as it was: ``https:/x`` -> ``https://x``."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1://", text)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:38]}...{text[-39:]}"


def _printable(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def name_of(image: object, index: int = 0, total: int = 1) -> str:
    """Name of an image in errors: its path or address, else its number among ``total``."""
    kind = kind_of(image)
    if isinstance(image, Image.Image):
        file = getattr(image, "filename", "")
        text = os.fsdecode(file) if isinstance(file, (str, bytes)) else ""
    else:
        text = os.fsdecode(image) if isinstance(image, (str, os.PathLike)) else ""
        text = _opened(text) if kind == "address" else text
    if text and kind in ("path", "url", "address", "PIL image"):
        return shown(text)
    what = shown(text) if text else f"given as {kind if kind == 'bytes' else _article(kind)}"
    return what if total == 1 else f"number {index + 1} of {total} ({what})"


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def data_of(url: str, name: str | None = None, noun: str = "image") -> bytes:
    """The bytes in a ``data:`` URL, base64 or percent-encoded.

    Raises:
        InputError: damaged, too long, or of something else than an image (or a ``noun``).
    """
    label = name or shown(url)
    head, comma, body = url[len("data:") :].partition(",")
    kind, *options = head.lower().split(";")
    if not comma or len(url) > MAX_DATA:
        why = f"It has {len(url)} letters, the limit is {MAX_DATA}." if comma else "It has no comma."
        raise InputError(f"Cannot read the {noun} {label}.", why, "Give the bytes of the file.")
    if kind and not kind.startswith(("image/", f"{noun}/")) and kind != "application/octet-stream":
        raise InputError(
            f"Cannot read the {noun} {label}.", f"It holds {kind[:40]}.", f"Give {_article(noun)}."
        )
    if "base64" not in (option.strip() for option in options):
        return unquote_to_bytes(body)
    try:
        letters = "".join(unquote_to_bytes(body).decode("ascii").split())
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (UnicodeDecodeError, binascii.Error, ValueError) as error:
        raise InputError(
            f"The {noun} {label} is damaged.", f"Its base64 cannot be decoded: {error}.", "Encode it again."
        ) from error


def not_readable(image: object, name: str, noun: str = "image") -> InputError:
    """The error for text that is not a path: a URL, or base64."""
    kind = kind_of(image)
    if kind == "base64":
        return InputError(
            f"The {noun} {name} is not read.",
            "It is base64, where a path is expected.",
            "Give base64.b64decode(text), or 'data:image/png;base64,' + text.",
        )
    if kind == "url":
        return InputError(
            f"The {noun} {name} is not fetched.",
            "It is read without leave to fetch addresses.",
            "Fetch it and give its bytes, or load the model with reading=Reading(urls=UrlPolicy(...)).",
        )
    return InputError(
        f"The {noun} {name} is not read.",
        "It is an address, where a path is expected.",
        "Give the path of a file, or the bytes.",
    )


def image_sequence(images: Any) -> Sequence[ImageInput]:
    """``images`` as a sequence.

    Raises:
        InputError: one image, or nothing that holds images.
    """
    if getattr(images, "ndim", 4) < 4:
        raise _one("image")
    return sequence_of(images, "image")


def text_sequence(texts: Any, what: str = "text") -> list[str]:
    """``texts`` as a list.

    Args:
        texts: any number of texts.
        what: one of them in errors: ``label``, ``query``.

    Raises:
        InputError: one text, nothing that holds texts, or something else among them.
    """
    values = list(sequence_of(texts, what))
    for number, text in enumerate(values):
        if not isinstance(text, str):
            raise InputError(
                f"Number {number + 1} of {len(values)} {plural(what)} is not text.",
                f"It is of type {type(text).__name__}.",
                "Decode it: text.decode()." if isinstance(text, bytes) else "Give str.",
            )
    return values


def sequence_of(values: Any, what: str) -> Sequence[Any]:
    """``values`` as a sequence; ``what`` is one of them in errors.

    Raises:
        InputError: one value, or nothing that holds values in an order.
    """
    if isinstance(values, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)):
        raise _one(what)
    if isinstance(values, Sequence) or (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        if not isinstance(values, Mapping):
            return values  # type: ignore[no-any-return]
    elif isinstance(values, Iterable) and not isinstance(values, Set):
        return list(values)
    raise InputError(
        f"These are not {plural(what)}.",
        f"A {type(values).__name__} was passed; a sequence of {plural(what)} is needed.",
        "Give a list.",
    )


def _one(what: str) -> InputError:
    return InputError(f"One {what} was given.", f"A sequence of {plural(what)} is needed.", f"Use [{what}].")


def plural(what: str) -> str:
    """``query`` -> ``queries``."""
    return f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
