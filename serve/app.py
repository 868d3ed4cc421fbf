"""The ASGI application: routes, keys, limits of bodies and time, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from .. import __version__
from .asgi import Message, Receive, Scope, Send
from .chat import chat, event
from .context import Context
from .embeddings import embeddings
from .errors import HttpError, http_error
from .page import page
from .schemas import (
    CaptionRequest,
    ChatRequest,
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    SwapRequest,
    parsed,
    schemas,
)
from .streams import ClientGone, EventStream, arrived, until_gone
from .swap import Swaps
from .tasks import captions, classify, rerank, score

Handler = Callable[[Context, Any], Coroutine[Any, Any, Any]]
POSTS: dict[str, tuple[type[Any], Handler, str]] = {
    "/v1/embeddings": (EmbeddingRequest, embeddings, "Embed texts and images."),
    "/v1/chat/completions": (ChatRequest, chat, "Answer a conversation with images; or stream the answer."),
    "/v1/captions": (CaptionRequest, captions, "Caption images."),
    "/v1/classify": (ClassifyRequest, classify, "Probabilities of labels for images."),
    "/v1/rerank": (RerankRequest, rerank, "Order texts and images by how they fit a query."),
    "/v1/score": (ScoreRequest, score, "Score pairs of texts and images."),
}
"""Route -> the shape of its requests, its handler, its description."""
ALIASES = {
    "/rerank": "/v1/rerank",
    "/v2/rerank": "/v1/rerank",
    "/score": "/v1/score",
    "/classify": "/v1/classify",
}
"""Other names, as clients of other servers have them."""
LIVE, READY = ("/health", "/livez", "/v1/health/live"), ("/ready", "/readyz", "/v1/health/ready")
OPEN = frozenset({*LIVE, *READY, "/", "/docs", "/openapi.json", "/metrics"})
"""Routes that need no key: they tell nothing of what clients send."""
_PARSED_AT_ONCE = 1 << 20
"""Bytes of JSON that are parsed on the event loop."""
_PROBE_SECONDS = 2.0
logger = logging.getLogger("ivl_export.serve")


def make_app(context: Context, swaps: Swaps) -> Any:
    """The application of ``context``, for any ASGI server."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warm = asyncio.create_task(_warm_up(context))
        yield
        warm.cancel()

    app = FastAPI(title="ivl-export", version=__version__, lifespan=lifespan, redoc_url=None)
    for path, (kind, handler, text) in POSTS.items():
        app.add_api_route(path, _post(context, path, kind, handler), methods=["POST"], summary=text)
    for alias, path in ALIASES.items():
        kind, handler, _ = POSTS[path]
        app.add_api_route(
            alias, _post(context, path, kind, handler), methods=["POST"], include_in_schema=False
        )
    for path in LIVE:
        app.add_api_route(
            path, _live(context), summary="The process answers.", include_in_schema=path == LIVE[0]
        )
    for path in READY:
        app.add_api_route(
            path, _ready(context), summary="All models answer.", include_in_schema=path == READY[0]
        )
    swap = _swap(context, swaps)
    app.add_api_route("/admin/swap", swap, methods=["POST"], summary="Another bundle under a model's name.")
    app.add_api_route("/", _page, include_in_schema=False)
    app.add_api_route("/metrics", _metrics(context), summary="Numbers for Prometheus.")
    app.add_api_route("/v1/models", _models(context), summary="The models and their receipts.")
    app.add_api_route("/v1/models/{name}", _model(context), summary="One model.")
    document = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            roots, components = schemas([kind for kind, _, _ in POSTS.values()])
            app.openapi_schema = document()
            app.openapi_schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
            for path, schema in zip(POSTS, roots, strict=True):
                body = {"required": True, "content": {"application/json": {"schema": schema}}}
                app.openapi_schema["paths"][path]["post"]["requestBody"] = body
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    app.add_exception_handler(404, _no_route)
    app.add_exception_handler(405, _no_route)
    return _guarded(app, context)


def _guarded(app: FastAPI, context: Context) -> Any:
    """``app`` behind the keys; while the server drains, every answer closes its connection."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if context.draining and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            try:
                await send(message)
            except RuntimeError as error:  # uvloop's, where the client has just left
                if "closed" not in str(error):
                    raise

        if scope["path"] not in OPEN and not has_key(scope, context.settings.keys):
            answer = _error(
                HttpError(401, "The request bears no valid API key.", code="invalid_api_key"), True
            )
            await answer(scope, receive, sending)
            return
        await app(scope, receive, sending)

    return guarded


def has_key(scope: Scope, keys: tuple[str, ...]) -> bool:
    """Whether the request bears one of ``keys``; all are compared, each in constant time."""
    if not keys:
        return True
    own = b""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            own = value[7:].strip()
        elif name == b"x-api-key":
            own = value.strip()
    matches = [hmac.compare_digest(own, key.encode()) for key in keys]
    return any(matches)


def _post(
    context: Context, path: str, kind: type[Any], handler: Handler
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        began = time.monotonic()
        held, model, whole = [0], "", False
        try:
            body = await arrived(_body(request, context, held), began + context.settings.timeout)
            whole = True
            data = await _parsed(context, kind, body)
            del body
            model = data.model if data.model in context.models.by_name else ""
            answer, model = await _answered(context, handler(context, data), request, model, began)
        except ClientGone:
            answer = Response(status_code=499)
        except Exception as error:
            answer = _error(_logged(error), close=not whole)
        finally:
            context.bodies.give_back(held[0])
        context.metrics.request(path, model, answer.status_code, time.monotonic() - began)
        return answer

    return endpoint


async def _answered(
    context: Context, work: Coroutine[Any, Any, Any], request: Request, model: str, began: float
) -> tuple[Response, str]:
    """The answer that ``work`` gives, whole or as a stream, and the name of the model that gave it."""
    ends = began + context.settings.timeout
    answer: Any = await until_gone(work, request.receive, ends)
    if not isinstance(answer, AsyncGenerator):
        context.metrics.tokens(answer["model"], answer["usage"])
        return Response(msgspec.json.encode(answer), media_type="application/json"), answer["model"]
    try:
        first = await until_gone(_first(answer), request.receive, ends)
    except BaseException:
        await answer.aclose()
        raise
    context.metrics.first(model, time.monotonic() - began)
    return EventStream(first, answer, ends, lambda error: event(_logged(error).to_json())), model


async def _parsed(context: Context, kind: type[Any], body: bytes) -> Any:
    if len(body) > _PARSED_AT_ONCE:
        return await context.run(parsed, kind, body)
    return parsed(kind, body)


async def _body(request: Request, context: Context, held: list[int]) -> bytes:
    """The body, counted in ``held`` while it comes.

    Raises:
        HttpError: 413: it is too long; 429: too much is held.
        ClientGone: the client left.
    """
    limit = context.settings.max_body
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_long(limit)
    parts = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        if held[0] + len(part) > limit:
            raise _too_long(limit)
        context.bodies.take(len(part))
        held[0] += len(part)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts) if len(parts) > 1 else part


def _too_long(limit: int) -> HttpError:
    return HttpError(413, f"The body is longer than {limit} bytes.", code="body_too_large")


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


def _logged(error: Exception) -> HttpError:
    """The answer for ``error``. Only its type is logged: a message could hold what a client sent."""
    answer = http_error(error)
    if answer.status == 500:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "?"
        logger.error("a request failed with %s at %s", type(error).__name__, where)
    return answer


def _error(error: HttpError, close: bool = False) -> Response:
    """The answer; ``close``: the rest of the request's body is not read."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if close:
        headers["Connection"] = "close"
    body = msgspec.json.encode(error.to_json())
    return Response(body, error.status, headers, "application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = "There is no such route." if status == 404 else "The route does not take this method."
    return _error(HttpError(status, message))


def _live(context: Context) -> Callable[[], Awaitable[Any]]:
    async def live() -> Response:
        return _health("live", True)

    return live


def _ready(context: Context) -> Callable[[], Awaitable[Any]]:
    async def ready() -> Response:
        models = [] if context.draining else context.models.by_name.values()
        alive = [await served.alive(_PROBE_SECONDS) for served in models]
        return _health("ready", bool(alive) and all(alive))

    return ready


def _health(word: str, good: bool) -> Response:
    body = {"object": "health.response", "message": word if good else f"not {word}", word: good}
    return Response(msgspec.json.encode(body), 200 if good else 503, media_type="application/json")


def _swap(context: Context, swaps: Swaps) -> Callable[[Request], Awaitable[Response]]:
    async def swap(request: Request) -> Response:
        held = [0]
        try:
            swaps.check(request.scope.get("client"), context.settings.keys)
            data = parsed(SwapRequest, await _body(request, context, held))
            answer = await swaps.swap(context, data)  # goes on if the client leaves
        except Exception as error:
            return _error(_logged(error))
        finally:
            context.bodies.give_back(held[0])
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return swap


async def _page() -> Response:
    html, policy = page()
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return Response(html, headers=headers, media_type="text/html; charset=utf-8")


def _metrics(context: Context) -> Callable[[], Awaitable[Any]]:
    async def metrics() -> Response:
        return Response(context.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return metrics


def _models(context: Context) -> Callable[[], Awaitable[Any]]:
    async def models() -> Response:
        entries = [served.described() for served in context.models.by_name.values()]
        return Response(
            msgspec.json.encode({"object": "list", "data": entries}), media_type="application/json"
        )

    return models


def _model(context: Context) -> Callable[[str], Awaitable[Any]]:
    async def model(name: str) -> Response:
        served = context.models.by_name.get(name)
        if served is None:
            return _error(HttpError(404, "There is no such model.", "model", "model_not_found"))
        return Response(msgspec.json.encode(served.described()), media_type="application/json")

    return model


async def _warm_up(context: Context) -> None:
    shadow = [context.shadow.served] if context.shadow is not None else []
    try:
        for served in [*context.models.by_name.values(), *shadow]:
            await context.run(served.warm_up)
    except Exception as error:
        context.failure = error
