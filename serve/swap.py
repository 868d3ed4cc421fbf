"""``POST /admin/swap``: another bundle under a model's name, while requests go on.

The new bundle is loaded and warmed up beside the old one (there is memory for both, or it fails and nothing
changes), takes its name, and the old one is closed when its last request is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ..errors import IvlError
from ..runtime import load
from .context import Context
from .errors import HttpError, bad_request, sentence
from .models import Served
from .schemas import SwapRequest

_LOOK_SECONDS = 0.05


class Swaps:
    """Swaps of one server, one at a time.

    Args:
        folder: a request names a bundle in it by the folder's name; None: nothing is swapped.
        backend, engine: how bundles are opened.
    """

    def __init__(self, folder: Path | None, backend: str, engine: Mapping[str, Any]) -> None:
        self._folder, self._backend, self._engine = folder, backend, engine
        self._busy = False
        self._drains: set[asyncio.Task[None]] = set()

    def check(self, client: tuple[str, int] | None, keys: tuple[str, ...]) -> None:
        """HttpError unless swapping is on, keys are asked for, and the request is from this machine."""
        if self._folder is None:
            raise HttpError(404, "There is no such route.")
        if not keys:
            raise HttpError(403, "A server without API keys swaps no bundles.")
        if client is None or not ip_address(client[0]).is_loopback:
            raise HttpError(403, "Bundles are swapped from the server's own machine.")

    async def swap(self, context: Context, request: SwapRequest) -> dict[str, Any]:
        """Swap; HttpError: no such model or bundle, a bundle that cannot take its place, or another swap."""
        old = context.models.by_name.get(request.model)
        if old is None:
            raise HttpError(404, "There is no such model.", "model", "model_not_found")
        assert self._folder is not None
        bundle = next((path for path in self._folder.iterdir() if path.name == request.bundle), None)
        if bundle is None:
            raise HttpError(404, "There is no such bundle in the folder of bundles.", "bundle")
        if self._busy:
            raise HttpError(409, "Another swap is under way.")
        self._busy = True
        try:
            new = await context.run(self._loaded, bundle, old)
        finally:
            self._busy = False
        context.models.by_name[old.name] = new
        context.metrics.follow(context.models)
        drain = asyncio.ensure_future(_close_when_idle(context, old))
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)
        return {"model": new.name, "bundle": f"sha256:{new.digest}", "previous": f"sha256:{old.digest}"}

    def _loaded(self, bundle: Path, old: Served) -> Served:
        try:
            new = Served(old.name, load(bundle, self._backend, **self._engine), old.limits)
        except IvlError as error:
            raise bad_request(sentence(error), "bundle") from error
        try:
            if not new.abilities >= old.abilities or ("embed" in old.abilities and new.width != old.width):
                raise bad_request("The bundle cannot do what the model can.", "bundle")
            new.warm_up()
        except BaseException:
            new.close()
            raise
        return new


async def _close_when_idle(context: Context, served: Served) -> None:
    while served.admission.held:
        await asyncio.sleep(_LOOK_SECONDS)
    await context.run(served.close)
