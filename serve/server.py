"""Runs the application on uvicorn until SIGTERM or Ctrl-C, and ends without losing a request.

On the first signal the server is no longer ready, and every answer closes its connection; requests are still
taken for ``drain_delay`` seconds. Then no new connection is accepted, running requests are finished, and the
process ends. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from ..errors import UsageError
from .app import make_app
from .context import Context
from .swap import Swaps

_LINGER = 0.3
"""Seconds between the last accepted connection and the end of idle ones."""


def run(context: Context, swaps: Swaps, started: Callable[[str], None] = lambda address: None) -> None:
    """Serve until a signal comes; ``started`` is called with the address once it is listened on.

    Raises:
        UsageError: the address cannot be listened on.
        IvlError: a model cannot be warmed up.
    """
    settings = context.settings
    listener = _listener(settings.host, settings.port, settings.timeout)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        make_app(context, swaps),
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=round(settings.timeout) + 1,
        lifespan="on",
    )
    started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        _Server(config, context, listener).run(sockets=[listener])
    finally:
        context.close()
    if context.failure is not None:
        raise context.failure


class _Server(uvicorn.Server):
    """uvicorn's server, which takes requests for a while after the first signal."""

    def __init__(self, config: uvicorn.Config, context: Context, listener: socket.socket) -> None:
        super().__init__(config)
        self._context, self._listener, self._deaf_at = context, listener, math.inf
        self._accepted: set[asyncio.Task[None]] = set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called with each signal. uvicorn would end at once, and raise the signal again afterwards."""
        if self._context.draining:
            self.should_exit = self.force_exit = True
            return
        self._context.draining = True
        self._deaf_at = time.monotonic() + self._context.settings.drain_delay

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        self.should_exit |= self._context.failure is not None
        late = time.monotonic() - self._deaf_at
        if late >= 0:
            self._stop_listening()
            # A connection that was accepted last may not have sent its request yet.
            self.should_exit |= late >= _LINGER
        return await super().on_tick(counter)

    def _stop_listening(self) -> None:
        """Accept the connections that the system has made already: it would reset them. Refuse others."""
        if self._listener.fileno() < 0:
            return
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        with suppress(OSError):  # there is none, or the socket was closed
            while True:
                connection, _ = self._listener.accept()
                task = loop.create_task(self._connected(connection))
                self._accepted.add(task)
                task.add_done_callback(self._accepted.discard)
        for server in self.servers:
            server.close()
        self._listener.close()  # a loop may have its own descriptor of it

    async def _connected(self, connection: socket.socket) -> None:
        kind: Any = self.config.http_protocol_class
        state = {"server_state": self.server_state, "app_state": self.lifespan.state}
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: kind(config=self.config, **state), connection)


def _listener(host: str, port: int, seconds: float) -> socket.socket:
    """Listen; a client that takes nothing of an answer for ``seconds`` is given up, where Linux does that."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))
        return listener
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {host}, port {port}.", f"{error.strerror or error}.", "Give another --port."
        ) from error
