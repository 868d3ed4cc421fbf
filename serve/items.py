"""Items of a request: texts and images in every shape that clients send, counted before decoding.

``input`` may be a text, texts, or objects: ``{"text"}``, ``{"image"}``, ``{"type": "image_url", ...}``.
A text that begins with ``data:image/`` is an image, and with ``modality: image`` every text is one.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import InputError, TooLargeError
from ..inputs.images import FORMATS
from ..inputs.sources import data_of, kind_of
from ..runtime.urls import UrlPolicy, fetch
from .errors import bad_request, http_error
from .schemas import ImageUrl, Message, Part


@dataclass(frozen=True)
class Item:
    """A text or an image of a request.

    Args:
        param: its place in the request, for errors: ``input[2]``.
        content: the text; or the image as a ``data:`` URL, base64 or an address.
        is_image: which of the two.
        detail: of an image: ``low``, ``high`` or ``auto``.
    """

    param: str
    content: str
    is_image: bool = False
    detail: str = "auto"


def items_of(value: str | Part | Sequence[str | Part], param: str, images: bool = False) -> list[Item]:
    """The items of ``value``, which is the entry ``param``; ``images``: texts are images.

    Raises:
        HttpError: there are none, or one is neither a text nor an image.
    """
    if isinstance(value, str | Part):
        return [item_of(value, param, images)]
    if not value:
        raise bad_request(f"The list {param} is empty.", param)
    return [item_of(one, f"{param}[{number}]", images) for number, one in enumerate(value)]


def item_of(value: str | Part, param: str, images: bool = False) -> Item:
    """One item; errors as :func:`items_of`."""
    if isinstance(value, str):
        return Item(param, value, images or value[:11].lower() == "data:image/")
    shown = [("image", value.image), ("image_url", value.image_url)]
    contents = [(name, content) for name, content in shown if content is not None]
    if value.text is not None and contents:
        raise bad_request(
            "An item is a text or an image: these models have no embedding of both together.", param
        )
    if value.text is not None:
        return Item(f"{param}.text", value.text)
    if len(contents) != 1:
        raise bad_request("An item needs 'text', 'image' or 'image_url'.", param)
    name, content = contents[0]
    if isinstance(content, ImageUrl):
        return Item(f"{param}.{name}", content.url, True, content.detail or "auto")
    return Item(f"{param}.{name}", content, True)


def items_of_messages(messages: Sequence[Message]) -> list[Item]:
    """The one item that ``messages`` of an embedding hold."""
    items: list[Item] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}].content"
        if message.role == "user" and message.content is not None:
            items += items_of(message.content, place)
    if len(items) != 1:
        count = f"The messages hold {len(items)} texts and images; an embedding is of one."
        raise bad_request(count, "messages")
    return items


def image_bytes(item: Item, urls: UrlPolicy | None, max_pixels: int) -> bytes:
    """The image's file, its size read from its header.

    Raises:
        HttpError: it is not an image, is not allowed to be fetched, or is over ``max_pixels``.
    """
    try:
        data = _file(item.content, urls)
        _check_pixels(data, max_pixels)
    except InputError as error:
        raise http_error(error, item.param) from error
    return data


def is_address(item: Item) -> bool:
    """Whether the image has to be fetched."""
    return item.is_image and item.content[:8].lower().startswith(("http://", "https://"))


def _file(content: str, urls: UrlPolicy | None) -> bytes:
    kind = kind_of(content)
    if kind == "data":
        return data_of(content)
    if kind == "url":
        if urls is None:
            raise InputError("The image is not fetched", "this server fetches no addresses")
        return fetch(content, urls)
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("The image cannot be read", "it is neither a data URL nor base64") from error


def _check_pixels(data: bytes, limit: int) -> None:
    """TooLargeError from the header alone; what cannot be opened here is refused when it is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError("The image is too large", f"the limit is {limit} pixels") from error
    except Exception:  # a decoder may raise nearly anything on a damaged file
        return
    if width * height > limit:
        why = f"it is {width} x {height} pixels, the limit is {limit} in all"
        raise TooLargeError("The image is too large", why)
