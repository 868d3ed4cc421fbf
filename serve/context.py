"""What the routes of a server share: its models and settings, and the threads that decode images."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from ..host import cores
from .admission import HeldBytes
from .items import Item, image_bytes, is_address
from .metrics import Metrics
from .models import Models, Served
from .settings import ServerSettings
from .shadow import Shadow

T = TypeVar("T")
_SMALL = 256 << 10
"""Letters of an image that are decoded at once: a thread would take longer to be woken."""
_FETCHES = 16


class Context:
    """The state of one server. Close it when done."""

    def __init__(self, models: Models, settings: ServerSettings) -> None:
        self.models, self.settings = models, settings
        self.draining = False
        self.failure: Exception | None = None
        """Why a model cannot be warmed up; the server then ends with it."""
        self.bodies, self.metrics = HeldBytes(settings.max_held), Metrics(models)
        self.shadow: Shadow | None = None
        self._decoders = ThreadPoolExecutor(cores(), "ivl-decoder")
        self._fetchers = ThreadPoolExecutor(_FETCHES, "ivl-fetcher")

    @contextmanager
    def admitted(self, served: Served, items: int, param: str) -> Iterator[None]:
        """Room for the items of a request; errors as :meth:`.admission.Admission.place`."""
        with served.admission.place(items, param):
            yield

    async def read(self, item: Item) -> bytes:
        """The file of an image; errors as :func:`.items.image_bytes`."""
        settings = self.settings
        if len(item.content) <= _SMALL and not is_address(item):
            return image_bytes(item, settings.urls, settings.max_pixels)
        threads = self._fetchers if is_address(item) else self._decoders
        data: bytes = await self.run(image_bytes, item, settings.urls, settings.max_pixels, threads=threads)
        return data

    async def run(self, work: Any, *arguments: Any, threads: ThreadPoolExecutor | None = None) -> Any:
        """``work(*arguments)`` on a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads or self._decoders, work, *arguments)

    async def together(self, work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """The results of all; where one fails, the others are cancelled."""
        if len(work) == 1:
            return [await work[0]]
        tasks = [asyncio.ensure_future(one) for one in work]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """End the threads and close the models."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        if self.shadow is not None:
            self.shadow.close()
        self.models.close()
