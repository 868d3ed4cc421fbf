"""The models of a server: a loaded bundle under a name, with its service, its admission and its receipts."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..arrays import Floats
from ..errors import IvlError, UsageError
from ..files.hashing import sha256_file
from ..forks import cached_property
from ..runtime import ChatService, InternVL, InternVLChat, Service, ServiceLimits, load
from ..runtime.components import fixed
from .admission import Admission
from .errors import HttpError, bad_request

Ability = Literal["embed", "caption", "chat", "match"]
_CLASSES = 16
_ALIVE_SECONDS = 5.0
"""An answer that is younger shows that a model's workers live."""


class Recent(OrderedDict[Hashable, Floats]):
    """The last ``most`` embeddings of labels."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: Hashable, value: Floats) -> None:
        super().__setitem__(key, value)
        while len(self) > self._most:
            self.popitem(last=False)


@dataclass(eq=False)
class Served:
    """One loaded bundle.

    Args:
        name: by which requests ask for it.
        model: the loaded bundle.
        limits: see :class:`.settings.ServerSettings`.
    """

    name: str
    model: InternVL | InternVLChat
    limits: ServiceLimits
    created: int = field(default_factory=lambda: int(time.time()))
    warm: bool = False
    answered: float = -math.inf
    classes: Recent = field(default_factory=lambda: Recent(_CLASSES))

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits.max_running + self.limits.max_queued)
        # What waits is bounded by the admission: a request is admitted once, with all its items.
        inner = replace(self.limits, max_queued=self.admission.capacity, timeout=math.inf)
        self.service: Any
        if isinstance(self.model, InternVLChat):
            self.service = ChatService(self.model, inner)
        else:
            self.service = Service(self.model, inner)

    @cached_property
    def abilities(self) -> frozenset[Ability]:
        """What the bundle's components can do."""
        if isinstance(self.model, InternVLChat):
            return frozenset({"chat"})
        outputs: dict[str, Ability] = {"image_embed": "embed", "logits": "caption", "itm_logits": "match"}
        gives = self.model.components.gives
        return frozenset(ability for output, ability in outputs.items() if gives(output))

    @cached_property
    def digest(self) -> str:
        """The sha256 of the manifest, which has those of all files."""
        return sha256_file(self.model.bundle.root / "manifest.json")

    @cached_property
    def width(self) -> int:
        """Values of an embedding."""
        component = self.model.components.gives("image_embed")
        shapes = {t.name: t.shape for t in self.model.components.spec(component).outputs}
        return fixed(shapes["image_embed"][1])

    @cached_property
    def image_tokens(self) -> int:
        """Positions that the vision model computes for one image."""
        component = self.model.components.image_component
        shapes = {t.name: t.shape for t in self.model.components.spec(component).outputs}
        return fixed(shapes["tokens"][1]) if "tokens" in shapes else 0

    def described(self) -> dict[str, Any]:
        """The entry of ``/v1/models``, with the receipts of accuracy and latency that the bundle holds."""
        manifest = self.model.bundle.manifest
        receipts = {name: self._receipt(name) for name in manifest.receipts if name != "verification"}
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ivl-export",
            "abilities": sorted(self.abilities),
            "recipe": manifest.recipe,
            "backend": self.model.components.backend,
            "bundle": f"sha256:{self.digest}",
            "receipts": receipts,
        }

    def _receipt(self, name: str) -> Any:
        if name not in self._receipts:
            self._receipts[name] = self.model.bundle.receipt(name)
        return self._receipts[name]

    @cached_property
    def _receipts(self) -> dict[str, Any]:
        return {}

    def warm_up(self) -> None:
        """Open the engines and run each once; errors as those of the calls."""
        size = self.model.image_settings.size
        picture = np.zeros((size, size, 3), np.uint8)
        if isinstance(self.model, InternVLChat):
            self.model.chat([picture]).ask(".", max_new_tokens=2)
            self.warm = True
            return
        if "embed" in self.abilities:
            self.model.encode_image([picture])
            self.model.encode_text(["."])
        if "caption" in self.abilities:
            self.model.caption([picture], max_new_tokens=2)
        if "match" in self.abilities:
            self.model.match([picture], ["."])
        self.warm = True

    def done(self) -> None:
        """An item was answered just now."""
        self.answered = time.monotonic()

    async def alive(self, seconds: float) -> bool:
        """Whether the workers answer: lately, or a small question within ``seconds``."""
        if not self.warm:
            return False
        if time.monotonic() - self.answered < _ALIVE_SECONDS:
            return True
        try:
            await asyncio.wait_for(self._probe(), seconds)
        except (IvlError, asyncio.TimeoutError, TimeoutError):
            return False
        self.done()
        return True

    async def _probe(self) -> None:
        if isinstance(self.service, ChatService):
            chat = await self.service.chat()
            await self.service.ask(chat, ".", 1)
        else:
            await self.service.encode_text(".")

    def close(self) -> None:
        """End the service and free the engines."""
        self.service.close()
        self.model.close()


class Models:
    """The models of a server by name, in the order in which they were named."""

    def __init__(self, served: Iterable[Served]) -> None:
        self.by_name: dict[str, Served] = {}
        for one in served:
            if one.name in self.by_name:
                raise UsageError(
                    f"Two models are called {one.name}.", "Requests ask for a model by name.",
                    "Give one another name: NAME=BUNDLE.",
                )  # fmt: skip
            self.by_name[one.name] = one

    def get(self, name: str | None, ability: Ability) -> Served:
        """The model ``name``; None: the first with ``ability``.

        Raises:
            HttpError: there is none of the name, or it lacks ``ability``.
        """
        if name is None:
            able = [one for one in self.by_name.values() if ability in one.abilities]
            if able:
                return able[0]
            raise bad_request(f"No model here can {ability}.", "model")
        served = self.by_name.get(name)
        if served is None:
            known = ", ".join(self.by_name)
            raise HttpError(
                404, f"There is no such model; this server has {known}.", "model", "model_not_found"
            )
        if ability not in served.abilities:
            raise bad_request(f"The model {served.name} cannot {ability}.", "model")
        return served

    def close(self) -> None:
        """Close all models."""
        for served in self.by_name.values():
            served.close()


def load_models(
    bundles: Sequence[str], limits: ServiceLimits, backend: str, engine: Mapping[str, Any]
) -> Models:
    """Load ``bundles``, folders or ``NAME=FOLDER``; errors as :func:`ivl_export.load`."""
    served: list[Served] = []
    for text in bundles:
        name, folder = named(text)
        served.append(Served(name, load(folder, backend, **engine), limits))
    return Models(served)


def named(text: str) -> tuple[str, Path]:
    """``NAME=FOLDER``, or a folder, whose name is the model's."""
    name, equals, folder = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        return name, Path(folder)
    return Path(text).resolve().name, Path(text)
