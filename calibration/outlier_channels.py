"""Channels of layers' inputs that are dead, or far larger than the rest; NaN is refused with its channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import BuildError
from .segments import Modules

HUGE = 20.0
"""A channel is huge where its largest magnitude is over so many times the median channel's."""
LISTED = 8


@dataclass(frozen=True)
class Finding:
    """Channels of a layer's input that calibration should know about.

    ``kind`` is ``dead`` (zero on every sample) or ``huge``; ``channels`` are the first of ``count``, the
    largest first; ``ratio`` is the largest one's over the median channel's.
    """

    component: str
    layer: str
    kind: str
    channels: tuple[int, ...]
    count: int
    ratio: float


class Channels:
    """Largest magnitude of every in feature of the layers that run."""

    def __init__(self, modules: Modules) -> None:
        self.modules, self.on = modules, True
        self.peaks: dict[tuple[str, str], torch.Tensor] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks are in place inside the ``with`` block."""
        with ExitStack() as stack:
            for component, module in self.modules.by_name.items():
                for name, layer in module.named_modules():
                    if isinstance(layer, torch.nn.Linear):
                        handle = layer.register_forward_pre_hook(self._hook(component, name))
                        stack.callback(handle.remove)
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded inside the ``with`` block."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def findings(self, components: Sequence[str]) -> list[Finding]:
        """Dead and huge channels of the layers of ``components``."""
        findings = []
        for (component, layer), peak in self.peaks.items():
            if component not in components:
                continue
            middle = float(peak.median())
            dead = (peak == 0).nonzero()[:, 0]
            ranked = peak.argsort(descending=True)
            huge = [int(c) for c in ranked[: int((peak > HUGE * middle).sum())]] if middle else []
            ratio = float(peak.max()) / middle if middle else 0.0
            for kind, channels in (("dead", dead.tolist()), ("huge", huge)):
                if channels:
                    first = tuple(channels[:LISTED])
                    findings.append(Finding(component, layer, kind, first, len(channels), ratio))
        return findings

    def _hook(self, component: str, layer: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            if not self.on:
                return
            peak = args[0].detach().abs().reshape(-1, args[0].shape[-1]).amax(0)
            if not torch.isfinite(peak).all():
                channel = int((~torch.isfinite(peak)).nonzero()[0, 0])
                raise BuildError(
                    f"The input of {layer} holds NaN or infinity.",
                    f"In channel {channel} of {len(peak)}, component {component}.",
                    "Check the weights before this layer; the model runs in fp32 here.",
                )
            key = component, layer
            self.peaks[key] = torch.maximum(self.peaks[key], peak) if key in self.peaks else peak

        return hook
