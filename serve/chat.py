"""``POST /v1/chat/completions``: conversations with images, whole or streamed (server-sent events)."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec

from ..errors import InputError, TooLongError, UsageError
from ..inputs.chat_template import IMAGE, Slot, Turn
from ..inputs.images import load_image
from ..runtime.serving.chat_service import Completion
from ..sampling import Sampling
from .context import Context
from .errors import HttpError, bad_request, http_error, sentence
from .items import Item, item_of
from .models import Served
from .schemas import ChatRequest, Message

_SEEDS = 1 << 32


async def chat(context: Context, request: ChatRequest) -> Any:
    """The completion, or a generator of the events of a stream.

    Raises:
        HttpError: as :func:`turns_of` and :func:`.items.image_bytes`; the prompt is too long.
    """
    check_unsupported(request)
    system, turns, images = turns_of(request.messages)
    served = context.models.get(request.model, "chat")
    if request.stream:
        return _events(context, served, request, system, turns, images)
    text = ""
    async for piece in _answer(context, served, request, system, turns, images):
        if isinstance(piece, str):
            text += piece
            continue
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": piece.finish, "logprobs": None}
        head = _head(served, "chat.completion")
        return {**head, "choices": [choice], "usage": usage_of(piece)}
    raise AssertionError("an answer ends with a completion")


async def _events(
    context: Context,
    served: Served,
    request: ChatRequest,
    system: str | None,
    turns: Sequence[Turn],
    images: Sequence[Item],
) -> AsyncGenerator[bytes, None]:
    head = _head(served, "chat.completion.chunk")
    answer = _answer(context, served, request, system, turns, images)

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return event({**head, "choices": [choice]})

    begun = False
    try:
        async for piece in answer:
            if not begun:  # not before the prompt was read: until then an error has a status of its own
                begun = True
                yield chunk({"role": "assistant", "content": ""})
            if isinstance(piece, str):
                yield chunk({"content": piece})
                continue
            yield chunk({}, piece.finish)
            context.metrics.tokens(served.name, usage_of(piece))
            if request.stream_options is not None and request.stream_options.include_usage:
                yield event({**head, "choices": [], "usage": usage_of(piece)})
        yield b"data: [DONE]\n\n"
    finally:
        await answer.aclose()


async def _answer(
    context: Context,
    served: Served,
    request: ChatRequest,
    system: str | None,
    turns: Sequence[Turn],
    images: Sequence[Item],
) -> AsyncGenerator[str | Completion, None]:
    """The pieces of the answer, and its end; the request has its place until then."""
    served = context.models.get(served.name, "chat")  # it may have been swapped since
    with context.admitted(served, 1 + len(images), "messages"):
        files = await context.together([context.read(image) for image in images]) if images else []
        tokens = request.max_completion_tokens or request.max_tokens
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        answer = served.service.complete(
            turns, files, system, _tiles(served, request, images), tokens, sampling_of(request), stop
        )
        try:
            async for piece in answer:
                yield piece
            served.done()
        except TooLongError as error:
            raise bad_request(sentence(error), "messages", "context_length_exceeded") from error
        except UsageError as error:
            raise http_error(error) from error
        except InputError as error:
            damaged = await context.run(_unreadable, images, files)
            raise damaged or http_error(error, "messages") from error
        except Exception as error:
            raise http_error(error, "messages") from error
        finally:
            await answer.aclose()


def _unreadable(images: Sequence[Item], files: Sequence[bytes]) -> HttpError | None:
    """The answer for the first image that cannot be read: they were read together, without their places."""
    place = ""
    try:
        for image, file in zip(images, files, strict=True):
            place = image.param
            load_image(file)
    except InputError as error:
        return http_error(error, place)
    return None


def turns_of(messages: Sequence[Message]) -> tuple[str | None, list[Turn], list[Item]]:
    """The system message, the turns (the last is open) and the images of a conversation, in their order.

    Raises:
        HttpError: the roles do not alternate, or a message holds what its role cannot say.
    """
    system: list[str] = []
    turns: list[Turn] = []
    images: list[Item] = []
    asked: list[str | Slot] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        parts = _parts(message, place, images)
        if message.role == "user":
            asked += ["\n"] * bool(asked) + parts
            continue
        if any(isinstance(part, Slot) for part in parts):
            raise bad_request("Only the user's messages show images.", f"{place}.content")
        text = "".join(str(part) for part in parts)
        if message.role == "assistant":
            if not asked:
                raise bad_request("An assistant's message follows a user's.", place)
            turns.append(_turn(asked, text))
            asked = []
        elif turns or asked:
            raise bad_request("System messages come first.", place)
        else:
            system.append(text)
    if not asked:
        raise bad_request("The last message is the user's.", "messages")
    turns.append(_turn(asked, None))
    return "\n".join(system) if system else None, turns, images


def _parts(message: Message, place: str, images: list[Item]) -> list[str | Slot]:
    """The texts of a message, joined where they meet, and places of its images, which go to ``images``."""
    if message.content is None or isinstance(message.content, str):
        return [message.content or ""]
    parts: list[str | Slot] = []
    for number, part in enumerate(message.content):
        item = item_of(part, f"{place}.content[{number}]")
        if item.is_image:
            images.append(item)
            parts.append(IMAGE)
        elif parts and isinstance(parts[-1], str):
            parts[-1] = f"{parts[-1]}\n{item.content}"
        else:
            parts.append(item.content)
    return parts or [""]


def _turn(parts: Sequence[str | Slot], answer: str | None) -> Turn:
    """Images before the text are placed as the checkpoint's template says, others where they are."""
    count = sum(isinstance(part, Slot) for part in parts)
    texts = [str(part) for part in parts[count:]]
    if all(isinstance(part, Slot) for part in parts[:count]):
        return Turn("".join(texts), answer, count)
    return Turn(tuple(parts), answer, count)


def _tiles(served: Served, request: ChatRequest, images: Sequence[Item]) -> list[int] | None:
    """The most tiles of each image: one where ``detail`` is low; None: as the checkpoint says."""
    tiling = served.model.image_settings.tiling
    if tiling is None:
        return None
    most = request.max_tiles or tiling.max_tiles
    return [1 if image.detail == "low" else most for image in images]


def sampling_of(request: Any) -> Sampling:
    """How tokens are drawn; without a seed each request has its own."""
    seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
    return Sampling(request.temperature or 0.0, request.top_k or 0, request.top_p or 1.0, seed)


def check_unsupported(request: ChatRequest) -> None:
    """HttpError for fields that would change the answer, and are not known here."""
    usual: dict[str, tuple[Any, ...]] = {
        "n": (None, 1), "logprobs": (None, False), "tools": (None, []), "functions": (None, []),
        "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}),
        "response_format": (None, {"type": "text"}),
    }  # fmt: skip
    for name, values in usual.items():
        if getattr(request, name) not in values:
            raise bad_request(f"This server does not support {name}.", name, "unsupported_parameter")


def usage_of(end: Completion) -> dict[str, Any]:
    """Counts of positions: of prompt (images among them) and answer, and how many were computed before."""
    return {
        "prompt_tokens": end.prompt,
        "completion_tokens": end.new,
        "total_tokens": end.prompt + end.new,
        "prompt_tokens_details": {"cached_tokens": end.cached},
    }


def event(body: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _head(served: Served, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
    }
