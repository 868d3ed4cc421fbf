"""The shapes of requests. Fields that a route does not know are ignored: clients send them to every server.

Images are ``data:`` URLs, base64, or (where the server allows it) addresses; never paths.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from .errors import HttpError, bad_request

T = TypeVar("T")
_PLACE = re.compile(r" - at `\$\.?(?P<place>.*)`\Z", re.S)

Mode = Literal["C", "G", "InternVL-C", "InternVL-G"]
Method = Literal["cosine", "match"]
Resize = Literal["square", "center_crop", "pad"]
Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=100)]


class ImageUrl(Struct):
    """``image_url`` of a content part."""

    url: str
    detail: Literal["low", "high", "auto"] | None = None


class Part(Struct):
    """A text or an image: ``{"text"}``, ``{"image"}``, or a content part with ``type``."""

    type: Literal["text", "image", "image_url", "input_text", "input_image"] | None = None
    text: str | None = None
    image: str | ImageUrl | None = None
    image_url: str | ImageUrl | None = None


Items: TypeAlias = str | Part | list[str | Part]


class Message(Struct):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class EmbeddingRequest(Struct):
    """``POST /v1/embeddings``: ``input``, or ``messages`` for one vector of the last message's content."""

    input: Items | None = None
    messages: list[Message] | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    modality: Literal["text", "image"] | None = None
    mode: Mode = "C"
    normalize: bool = True
    resize: Resize | None = None
    user: str | None = None


class CaptionRequest(Struct):
    """``POST /v1/captions``: ``input`` is an image, or several."""

    input: Items
    model: str | None = None
    prompt: str | None = None
    max_tokens: Positive = 30
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None
    resize: Resize = "square"


class ClassifyRequest(Struct):
    """``POST /v1/classify``: ``templates`` are texts with ``{}`` for the label, or the name of a list."""

    input: Items
    labels: Annotated[list[str], Meta(min_length=1)]
    model: str | None = None
    templates: str | Annotated[list[str], Meta(min_length=1)] = "{}"
    mode: Mode = "C"
    top: Positive | None = None
    resize: Resize = "center_crop"


class RerankRequest(Struct):
    """``POST /v1/rerank``. Scores are cosines, or with ``method: match`` probabilities of image and text."""

    query: str | Part
    documents: list[str | Part]
    model: str | None = None
    top_n: Positive | None = None
    return_documents: bool = False
    method: Method = "cosine"
    mode: Mode = "C"


class ScoreRequest(Struct):
    """``POST /v1/score``: two items, one with many, or as many with as many. ``method`` as of ranking."""

    queries: Items | None = None
    documents: Items | None = None
    text_1: Items | None = None
    text_2: Items | None = None
    data_1: Items | None = None
    data_2: Items | None = None
    model: str | None = None
    method: Method = "cosine"
    mode: Mode = "C"


class SwapRequest(Struct):
    """``POST /admin/swap``: ``bundle`` is the name of a folder in that of ``--swap-from``."""

    model: str
    bundle: str


class StreamOptions(Struct):
    """``stream_options`` of a chat request."""

    include_usage: bool = False


class ChatRequest(Struct):
    """``POST /v1/chat/completions``. ``temperature`` is 0 where it is not given: the likeliest tokens."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    max_tiles: Positive | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None


def parsed(kind: type[T], body: bytes) -> T:
    """``body`` as a request of ``kind``; HttpError names the entry that does not fit."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        place = _PLACE.search(text)
        what = _PLACE.sub("", text)
        param = place["place"] if place else None
        raise bad_request(f"{what[0].upper()}{what[1:]}{f' in {param}' if param else ''}.", param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, "The body is not valid JSON.", code="invalid_json") from error


def schemas(kinds: list[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """JSON schemas of ``kinds`` for an OpenAPI document, and the components that they refer to."""
    roots, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    return list(roots), components
