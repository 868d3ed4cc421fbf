"""``POST /v1/embeddings``: texts and images to vectors, in the order of the input."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from ..arrays import Floats
from ..runtime.model import Mode
from ..runtime.zero_shot import l2
from .context import Context
from .errors import bad_request, http_error
from .items import Item, items_of, items_of_messages
from .models import Served
from .schemas import EmbeddingRequest
from .schemas import Mode as ModeWord


def mode_of(word: ModeWord) -> Mode:
    """The library's name of ``C`` or ``G``."""
    return "InternVL-G" if word.endswith("G") else "InternVL-C"


async def embeddings(context: Context, request: EmbeddingRequest) -> dict[str, Any]:
    """The answer; HttpError as :func:`.items.items_of` and :meth:`.admission.Admission.place`."""
    if (request.input is None) == (request.messages is None):
        raise bad_request("The request needs 'input' or 'messages'.", "input")
    if request.messages is not None:
        items = items_of_messages(request.messages)
    else:
        assert request.input is not None
        items = items_of(request.input, "input", request.modality == "image")
    served = context.models.get(request.model, "embed")
    if request.dimensions not in (None, served.width):
        message = f"The embeddings of {served.name} have {served.width} values, no other number."
        raise bad_request(message, "dimensions")
    with context.admitted(served, len(items), "input"):
        rows = await embedded(context, served, items, mode_of(request.mode), request.resize)
        tokens = sum(token_counts(served, items))
    if request.normalize:
        rows = l2(rows)
    data = [
        {"object": "embedding", "index": index, "embedding": encoded(row, request.encoding_format)}
        for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": served.name, "usage": usage}


async def embedded(
    context: Context,
    served: Served,
    items: list[Item],
    mode: Mode,
    resize: Any = None,
    labels: tuple[Any, Floats] | None = None,
) -> Floats:
    """The embeddings [N, E] of ``items``, not normalised.

    ``labels``: what they are compared with, and its embeddings, for a shadow bundle to compare with, too.
    """

    async def one(item: Item) -> Floats:
        try:
            if item.is_image:
                data: str | bytes = await context.read(item)
                answer = await served.service.encode_image(data, mode, resize)
            else:
                data = item.content
                answer = await served.service.encode_text(item.content)
        except Exception as error:
            raise http_error(error, item.param) from error
        served.done()
        vector: Floats = answer.value
        if context.shadow is not None and context.shadow.of == served.name:
            context.shadow.compare(data, mode, resize, vector, *(labels or ()))
        return vector

    return np.stack(await context.together([one(item) for item in items]))


def encoded(row: Floats, encoding: str) -> str | list[float]:
    """A vector as numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = row.tolist()
    return numbers


def token_counts(served: Served, items: list[Item]) -> list[int]:
    """Positions of each item that a model computes: a text's tokens, an image's patches."""
    texts = [item.content for item in items if not item.is_image]
    lengths = iter(served.model.tokenizer.encode_contrastive(texts)[1].tolist() if texts else ())
    return [served.image_tokens if item.is_image else next(lengths) for item in items]
