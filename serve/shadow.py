"""A share of the requests of one model, repeated on another bundle after they were answered, and compared.

Clients never see the second bundle, nor wait for it. What is compared is exported as metrics: cosines of
embeddings, and whether the likeliest label is the same.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..arrays import Floats
from ..errors import UsageError
from ..runtime import ServiceLimits, load
from ..runtime.model import Mode
from ..runtime.zero_shot import l2
from .metrics import Metrics
from .models import Models, Served

if TYPE_CHECKING:
    from ..runtime import InternVL

_MOST = 16
"""Comparisons that run at a time; others are left out."""


class Shadow:
    """The second bundle.

    Args:
        of: name of the model whose requests are repeated.
        served: the second bundle.
        share: of these requests, 0 to 1.
        metrics: of the server.
    """

    def __init__(self, of: str, served: Served, share: float, metrics: Metrics) -> None:
        self.of, self.served, self._share, self._metrics = of, served, share, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def compare(
        self,
        content: str | bytes,
        mode: Mode,
        resize: str | None,
        row: Floats,
        labels: tuple[Any, ...] = (),
        classes: Floats | None = None,
    ) -> None:
        """Perhaps repeat the embedding ``row`` of a text or a file.

        ``labels`` (labels, templates) with their embeddings ``classes``: compare the likeliest one, too.
        """
        if random.random() >= self._share or len(self._tasks) >= _MOST:
            return
        task = asyncio.ensure_future(self._compared(content, mode, resize, row, labels, classes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compared(
        self,
        content: str | bytes,
        mode: Mode,
        resize: str | None,
        row: Floats,
        labels: tuple[Any, ...],
        classes: Floats | None,
    ) -> None:
        service = self.served.service
        try:
            if isinstance(content, str):
                other = (await service.encode_text(content)).value
            else:
                other = (await service.encode_image(content, mode, resize)).value
            self._metrics.cosine("text" if isinstance(content, str) else mode, float(l2(row) @ l2(other)))
            if classes is not None:
                own = await self._classes(labels)
                same = np.argmax(l2(row) @ classes.T) == np.argmax(l2(other) @ own.T)
                self._metrics.top_1(bool(same))
        except Exception as error:  # the answer was right; only its repetition failed
            self._metrics.shadow_failed(type(error).__name__)

    async def _classes(self, labels: tuple[Any, ...]) -> Floats:
        if labels not in self.served.classes:
            model = cast("InternVL", self.served.model)
            embed = asyncio.get_running_loop().run_in_executor(None, model.class_embeddings, *labels)
            self.served.classes[labels] = await embed
        return self.served.classes[labels]

    def close(self) -> None:
        """Give up what runs, and close the bundle."""
        for task in self._tasks:
            task.get_loop().call_soon_threadsafe(task.cancel) if task.get_loop().is_running() else None
        self.served.close()


def load_shadow(
    models: Models,
    metrics: Metrics,
    bundle: str,
    share: float,
    limits: ServiceLimits,
    engine: Mapping[str, Any],
) -> Shadow:
    """Load ``bundle`` as the shadow of the first model; ``engine`` as of :func:`ivl_export.load`.

    Raises:
        UsageError: it has other embeddings than that model.
    """
    first = next(iter(models.by_name.values()))
    served = Served("shadow", load(bundle, **engine), limits)
    if "embed" not in first.abilities & served.abilities or first.width != served.width:
        served.close()
        raise UsageError(
            f"{bundle} cannot be the shadow of {first.name}.", "Both give embeddings, of the same length.",
            "Name another bundle of the same model.",
        )  # fmt: skip
    return Shadow(first.name, served, share, metrics)
