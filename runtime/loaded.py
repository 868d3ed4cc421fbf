"""The base class of models on a bundle: loading, engines, tokenizer, image settings, closing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..arrays import Floats
from ..bundle import Bundle, Verify
from ..bundle.manifest import MANIFEST
from ..engines.base import known_backend
from ..errors import InputError
from ..forks import cached_property
from ..inputs.preprocess import ImageSettings, PixelValues, ResizeMode
from ..inputs.sources import ImageInput, image_sequence
from ..inputs.tokenizer import NoTokenizer, Tokenizer, load_tokenizer, tokenizer_files
from ..models.registry import CHAT, Family, config_from_published, family_claiming
from .components import Components, fixed
from .image_batches import Images, Reading, pixel_batches, read_batch
from .timings import Timing

L = TypeVar("L", bound="Loaded")


def is_chat(bundle: Bundle) -> bool:
    """Whether ``bundle`` is of a chat model."""
    return family_of_bundle(bundle).form == CHAT


def family_of_bundle(bundle: Bundle) -> Family[Any]:
    """The model family of a bundle; CheckpointError for one that is not known here."""
    return family_claiming(bundle.manifest.model.config, f"{bundle.root / MANIFEST}")


class Loaded:
    """A bundle and its engines; see :class:`.model.InternVL` and :class:`.chat.InternVLChat`."""

    def __init__(self, bundle: Bundle, components: Components, reading: Reading | None = None) -> None:
        self.bundle, self.components, self.reading = bundle, components, reading

    @classmethod
    def load(
        cls: type[L],
        path: Path | str,
        backend: str = "onnxruntime",
        components: Iterable[str] | None = None,
        threads: int | None = None,
        target: str | None = None,
        batch: int | None = None,
        verify: Verify | None = "size",
        reading: Reading | None = None,
        share_weights: bool | None = None,
        device: str | None = None,
        provider: str | None = None,
        dtype: str | None = None,
        compile: bool | str | None = None,
        cuda_graphs: bool | None = None,
        backend_options: Mapping[str, Any] | None = None,
    ) -> L:
        """Open the bundle in ``path``; arguments and errors as of :func:`ivl_export.load`."""
        known_backend(backend)
        bundle = Bundle.open(path, verify)
        own = {
            "threads": threads,
            "device": device,
            "provider": provider,
            "dtype": dtype,
            "compile": compile,
            "cuda_graphs": cuda_graphs,
        }
        options = {name: value for name, value in own.items() if value is not None}
        options |= backend_options or {}
        model = cls(bundle, Components(bundle, backend, target, batch, share_weights, **options), reading)
        for name in components or ():
            model.components.open(name)
        return model

    def close(self) -> None:
        """Free the engines; the model cannot be used afterwards."""
        self.components.close()

    def __enter__(self: L) -> L:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def timings(self) -> dict[str, Timing]:
        """Wall time by stage since loading: components, ``open <name>``, ``preprocess``, ``tokenize``."""
        return self.components.timings.snapshot()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        folder = self.bundle.root / "preprocess"
        if tokenizer_files(folder):
            return load_tokenizer(folder)
        return NoTokenizer(family_of_bundle(self.bundle).vocabulary(self.config))

    @cached_property
    def config(self) -> Any:
        """The model's sizes, as its family has them."""
        return config_from_published(self.bundle.manifest.model.config, str(self.bundle.root / MANIFEST))

    @cached_property
    def image_settings(self) -> ImageSettings:
        """The checkpoint's image settings, with the size that the engines were built for."""
        settings = ImageSettings.load(self.bundle.path("preprocess/preprocessor_config.json"))
        return settings.at(fixed(self.components.spec(self.components.image_component).inputs[0].shape[2]))

    def pixel_values(self, images: Images, resize: ResizeMode | None = None) -> Floats:
        """``images`` as the vision engine takes them, float32 [B, 3, S, S]."""
        size = self.image_settings.size
        return np.concatenate([np.zeros((0, 3, size, size), np.float32), *self.pixel_batches(images, resize)])

    def pixel_batches(self, images: Images, resize: ResizeMode | None = None) -> Iterator[Floats]:
        """``pixel_values`` of ``images`` in batches of the vision engine."""
        settings = self.image_settings.resized(resize)
        return pixel_batches(images, settings, self.components.batch, self.components.timings, self.reading)

    def read_images(
        self,
        images: Sequence[ImageInput],
        resize: ResizeMode | None = None,
        on_error: Callable[[int, InputError], None] | None = None,
        max_tiles: int | Sequence[int] | None = None,
    ) -> PixelValues:
        """Images read once, as every method that takes images also takes them.

        Args:
            images: any number.
            resize: how an image is made square; None: as the checkpoint's preprocessor says.
            on_error: called with the number of an image that cannot be read, and why; None: raised.
            max_tiles: of models that cut images into tiles: the most tiles of every image, or of each, the
                thumbnail not counted; None: as the checkpoint says.
        """
        settings, timings = self.image_settings.resized(resize), self.components.timings
        chosen = image_sequence(images)
        return read_batch(chosen, settings, timings, self.reading, None, on_error, max_tiles)
