"""Captions, zero-shot classes, and the ranking and scoring of images and texts against each other."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..arrays import Floats
from ..inputs.tokenizer import CAPTION_PROMPT
from ..runtime.captions import stop_criteria
from ..runtime.components import fixed
from ..runtime.templates import templates
from ..runtime.zero_shot import l2, probabilities
from ..sampling import check_search
from .chat import sampling_of
from .context import Context
from .embeddings import embedded, mode_of, token_counts
from .errors import bad_request, http_error
from .items import Item, item_of, items_of
from .models import Served
from .schemas import CaptionRequest, ClassifyRequest, RerankRequest, ScoreRequest

if TYPE_CHECKING:
    from ..runtime import InternVL

_TEXTS_PER_ITEM = 16
"""Texts of labels that count as one item: an image takes longer than so many."""


async def captions(context: Context, request: CaptionRequest) -> dict[str, Any]:
    """``POST /v1/captions``: a caption of each image."""
    items = _images(request.input, "input")
    served = context.models.get(request.model, "caption")
    prompt = CAPTION_PROMPT["en"] if request.prompt is None else request.prompt
    try:
        stop = stop_criteria(served.model, request.max_tokens, request.min_tokens)
        sampling = sampling_of(request)
        check_search(stop, 1, sampling)
        prompt_tokens = len(served.model.tokenizer.encode_prompt(prompt)) + _queries(served)
    except Exception as error:
        raise http_error(error, "prompt") from error

    async def one(item: Item) -> tuple[str, str, int]:
        data = await context.read(item)
        try:
            answer = await served.service.caption_tokens(data, prompt, stop, request.resize, None, sampling)
        except Exception as error:
            raise http_error(error, item.param) from error
        served.done()
        finish = "stop" if stop.ends(answer.value[-1]) else "length"
        return served.model.tokenizer.decode(answer.value).strip(), finish, len(answer.value)

    with context.admitted(served, len(items), "input"):
        rows = await context.together([one(item) for item in items])
    data = [
        {"object": "caption", "index": index, "caption": text, "finish_reason": finish}
        for index, (text, finish, _) in enumerate(rows)
    ]
    new = sum(count for _, _, count in rows)
    return {**_list(served, data), "usage": _usage(prompt_tokens * len(items), new)}


async def classify(context: Context, request: ClassifyRequest) -> dict[str, Any]:
    """``POST /v1/classify``: the probabilities of labels for each image."""
    items = _images(request.input, "input")
    served = context.models.get(request.model, "embed")
    words = (request.templates,) if isinstance(request.templates, str) else tuple(request.templates)
    try:
        if len(words) == 1 and "{}" not in words[0]:  # the name of a published list
            words = templates(words[0])
    except Exception as error:
        raise http_error(error, "templates") from error
    key = (tuple(request.labels), words)
    texts = 0 if key in served.classes else len(request.labels) * len(words)
    with context.admitted(served, len(items) + -(-texts // _TEXTS_PER_ITEM), "input"):
        if key not in served.classes:
            embed = cast("InternVL", served.model).class_embeddings
            try:
                served.classes[key] = await context.run(embed, *key)
            except Exception as error:
                raise http_error(error, "labels") from error
        classes = served.classes[key]
        mode = mode_of(request.mode)
        rows = await embedded(context, served, items, mode, request.resize, (key, classes))
    shares = probabilities(rows, classes, served.model.bundle.manifest.model.logit_scale)
    data = [_classified(index, row, request) for index, row in enumerate(shares)]
    return {**_list(served, data), "usage": _usage(sum(token_counts(served, items)))}


def _classified(index: int, shares: Floats, request: ClassifyRequest) -> dict[str, Any]:
    order = np.argsort(-shares, kind="stable")[: request.top]
    scores = [{"label": request.labels[place], "score": float(shares[place])} for place in order]
    return {
        "object": "classification", "index": index, "label": scores[0]["label"], "scores": scores,
        "probs": shares.tolist(), "num_classes": len(shares),
    }  # fmt: skip


async def rerank(context: Context, request: RerankRequest) -> dict[str, Any]:
    """``POST /v1/rerank``: documents, texts or images, in the order in which they fit the query."""
    query = item_of(request.query, "query")
    documents = items_of(request.documents, "documents")
    served, scores, tokens = await _scores(context, request, [query] * len(documents), documents)
    order = np.argsort(-scores, kind="stable")[: request.top_n]
    results: list[dict[str, Any]] = [
        {"index": int(place), "relevance_score": float(scores[place])} for place in order
    ]
    if request.return_documents:
        for result in results:
            document = documents[result["index"]]
            result["document"] = {"text": None if document.is_image else document.content}
    name = f"rerank-{secrets.token_hex(12)}"
    return {"id": name, "model": served.name, "results": results, "usage": _usage(tokens)}


async def score(context: Context, request: ScoreRequest) -> dict[str, Any]:
    """``POST /v1/score``: one score for each pair; one item on the left is paired with all on the right."""
    pairs = [("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2")]
    shown = [pair for pair in pairs if all(getattr(request, name) is not None for name in pair)]
    if len(shown) != 1:
        raise bad_request("The request needs 'queries' and 'documents', or 'text_1' and 'text_2'.", "queries")
    left, right = (items_of(getattr(request, name), name) for name in shown[0])
    if len(left) not in (1, len(right)):
        message = f"{len(left)} items on the left are one, or as many as the {len(right)} on the right."
        raise bad_request(message, shown[0][0])
    left = left * len(right) if len(left) == 1 else left
    served, scores, tokens = await _scores(context, request, left, right)
    data = [
        {"object": "score", "index": index, "score": value} for index, value in enumerate(scores.tolist())
    ]
    head = {"id": f"score-{secrets.token_hex(12)}", "created": int(time.time())}
    return {**head, **_list(served, data), "usage": _usage(tokens)}


async def _scores(
    context: Context, request: RerankRequest | ScoreRequest, left: Sequence[Item], right: Sequence[Item]
) -> tuple[Served, Floats, int]:
    """The model, the score of each pair, and the tokens of all items."""
    unique = list(dict.fromkeys([*left, *right]))
    if request.method == "match":
        served = context.models.get(request.model, "match")
        with context.admitted(served, len(unique), right[0].param):
            pairs = zip(left, right, strict=True)
            scores = await context.together([_matched(context, served, *pair) for pair in pairs])
        return served, np.array(scores, np.float32), sum(token_counts(served, unique))
    served = context.models.get(request.model, "embed")
    with context.admitted(served, len(unique), right[0].param):
        rows = l2(await embedded(context, served, unique, mode_of(request.mode)))
    places = {item: place for place, item in enumerate(unique)}
    a, b = (rows[[places[item] for item in side]] for side in (left, right))
    return served, np.asarray((a * b).sum(1), np.float32), sum(token_counts(served, unique))


async def _matched(context: Context, served: Served, left: Item, right: Item) -> float:
    """The probability that the text of a pair describes its image."""
    if left.is_image == right.is_image:
        raise bad_request("A match is between an image and a text.", right.param)
    image, text = (left, right) if left.is_image else (right, left)
    data = await context.read(image)
    try:
        answer = await served.service.match(data, text.content)
    except Exception as error:
        raise http_error(error, image.param) from error
    served.done()
    return float(answer.value)


def _images(value: Any, param: str) -> list[Item]:
    return items_of(value, param, images=True)


def _queries(served: Served) -> int:
    """Positions of an image in the decoder."""
    components = served.model.components
    outputs = components.spec(components.gives("query_hidden")).outputs
    return fixed({tensor.name: tensor.shape for tensor in outputs}["query_hidden"][1])


def _list(served: Served, data: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "model": served.name, "data": data}


def _usage(prompt: int, new: int = 0) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
