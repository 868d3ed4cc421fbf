"""Work for one client: ended when it leaves, or is out of time; and answers that are streams of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Response

from .asgi import Receive, Scope, Send
from .errors import HttpError, out_of_time

T = TypeVar("T")
_LAST_WORD_SECONDS = 1.0


class ClientGone(Exception):
    """The client closed its connection: nobody waits for the answer."""


async def until_gone(work: Coroutine[Any, Any, T], receive: Receive, ends: float) -> T:
    """The result of ``work``, which is cancelled when the client leaves, or at ``ends``.

    Args:
        work: not begun.
        receive: of the request, whose body was read.
        ends: of the monotonic clock.

    Raises:
        ClientGone: the client left.
        HttpError: 504.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        left = ends - time.monotonic()
        await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if gone.done() else out_of_time()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events.

    Args:
        first: the first event.
        events: the others; closed at the end.
        ends: when the stream is out of time, by the monotonic clock.
        failed: the last event of a stream that fails.
    """

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        ends: float,
        failed: Callable[[Exception], bytes],
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self._first, self._events, self._ends, self._failed = first, events, ends, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events; a client that reads slowly is given up at the end of its time."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await until_gone(self._write(send), receive, self._ends)
        except ClientGone:
            pass
        except Exception as error:
            with suppress(asyncio.TimeoutError, TimeoutError):
                last = send({"type": "http.response.body", "body": self._failed(error)})
                await asyncio.wait_for(_awaited(last), _LAST_WORD_SECONDS)
        finally:
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _awaited(work: Any) -> None:
    await work


async def arrived(work: Coroutine[Any, Any, T], ends: float) -> T:
    """The result of ``work``; HttpError 408 if it is not there at ``ends``, of the monotonic clock."""
    try:
        return await asyncio.wait_for(work, ends - time.monotonic())
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise HttpError(408, "The request did not arrive in its time.", code="timeout") from error
