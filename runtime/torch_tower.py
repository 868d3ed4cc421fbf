"""A bundle's vision tower as a torch module, for serving frameworks and trainers that expect one.

With every backend, outputs are on the device of the inputs; where the engine is on that
device too, nothing is copied. The only file of the runtime that imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle import Bundle, Verify
from ..engines.device import as_tensor
from ..errors import CapabilityError, InputError, UsageError
from .components import Components, visual_embeds, visual_shape
from .model import outputs_of

OUTPUTS = ("visual_embeds", "tokens")
"""A bundle's vision component, and its output with a row for each patch."""


class VisionTower(nn.Module):
    """InternViT from a bundle: ``tower(pixel_values)`` gives its last hidden state, or another block's.

    A chat model's gives the visual embeddings of the decoder, queries and projectors included.

    Args:
        components: the engines of an opened bundle; ``VisionTower.load`` opens one.
        select: ``all`` rows, or ``patches``: without the class token.
        block: whose hidden state, as :meth:`.InternVL.dense` takes it.

    It has no parameters: ``to``, ``half`` and optimizers leave it alone, and no gradient flows through it.
    """

    def __init__(self, components: Components, select: str = "all", block: int = -1) -> None:
        super().__init__()
        self.component = components.image_component
        if not self.component:
            raise CapabilityError(
                "This bundle has no vision tower.",
                f"It has {', '.join(components.bundle.manifest.components)}.",
                "Rebuild it with --components including vision.",
            )
        spec = components.spec(self.component)
        self.output = next(name for name in OUTPUTS if any(t.name == name for t in spec.outputs))
        self.projected = self.output == OUTPUTS[0]
        if select not in ("all", "patches") or (select == "patches" and self.projected):
            raise UsageError(
                f"The tower cannot select {select!r}.",
                f"The output of {self.component} is {self.output}.",
                "Use 'all'" + ("." if self.projected else " or 'patches'."),
            )
        self.components, self.first = components, int(select == "patches")
        self.image_size = int(spec.inputs[0].shape[2])
        if block != -1 and self.projected:
            raise CapabilityError(
                "The tower of a chat bundle gives no single block.",
                "It ends in the projector to the decoder.",
                "Take a bundle of the InternVL checkpoint.",
            )
        if block != -1:
            (self.output,) = outputs_of(components.bundle.manifest, spec, [block]).values()
        if self.projected:
            self.num_tokens, self.hidden_size = visual_shape(components)
            return
        shape = next(t.shape for t in spec.outputs if t.name == self.output)
        self.num_tokens, self.hidden_size = int(shape[1]) - self.first, int(shape[2])

    @classmethod
    def load(
        cls,
        path: Path | str,
        backend: str = "torch",
        *,
        select: str = "all",
        block: int = -1,
        target: str | None = None,
        verify: Verify | None = "size",
        **options: Any,
    ) -> VisionTower:
        """The tower of the bundle in ``path``, its engine opened.

        Args:
            path: the bundle's folder.
            backend, target, options: as of :func:`ivl_export.load` (``device``, ``dtype``, ``compile``, ...).
            select, block: see the class.
            verify: see :meth:`ivl_export.bundle.Bundle.open`.

        Raises:
            IntegrityError: the bundle is damaged.
            CapabilityError: it has no vision tower, gives no such block or has no such engine, or the backend
                is not installed.
        """
        tower = cls(Components(Bundle.open(path, verify), backend, target, **options), select, block)
        tower.components.open(tower.component)
        return tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] normalised pixels, any B, float type and device -> [B, N, D], of that type, there.

        Raises:
            InputError: images of another size, or no floats.
            CapabilityError: it computes in fp16, and runs over.
        """
        _check_floats(pixel_values)
        if self.projected:
            outputs = visual_embeds(self.components, pixel_values)
        else:
            feeds = {"pixel_values": pixel_values}
            outputs = self.components.run_device(self.component, feeds, [self.output])[self.output]
        rows = as_tensor(outputs)[:, self.first :]
        if self.components.options.get("dtype") == "fp16" and not bool(rows.isfinite().all()):
            raise CapabilityError(
                "The tower gave infinity or NaN.",
                "It computes in fp16, which ends at 65504, and these images make it reach further.",
                'Load it with dtype="bf16".',
            )
        return rows.to(pixel_values.device, pixel_values.dtype)

    def close(self) -> None:
        """Free the engine."""
        self.components.close()


def _check_floats(pixel_values: object) -> None:
    """InputError for anything but a float tensor: outputs have its type."""
    fix = "Give the output of InternVL.pixel_values or preprocess_images, as a tensor."
    if not isinstance(pixel_values, Tensor):
        raise InputError("The tower takes a torch tensor.", f"It got a {type(pixel_values).__name__}.", fix)
    if pixel_values.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        stored = f"These pixels are {pixel_values.dtype}, as images are stored."
        raise InputError("The tower takes normalised floats.", stored, fix)
