"""SmoothQuant: large input channels of a linear layer are divided, its weight's columns multiplied.

The division is folded into the weight of the norm before it, so that no operation is added. Factors are
powers of two: the folded model computes the same values, and 16-bit stores hold it as exactly as before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UsageError
from ..models.checkpoint import Checkpoint
from ..preprocess import ImageSettings, Tokenizer
from .dataset import CalibrationSet
from .parts import Modules, needed, parts
from .stream import Flow, samples_of, visit

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = 0.5
"""How much of the difficulty moves from inputs (1: all) to weights (0: none)."""

_VISION, _QLLAMA = r"(vision_model\.encoder\.layers\.\d+\.)", r"(qllama\.model\.layers\.\d+\.)"
_FED = (
    (_VISION, "norm1", ("attn.qkv",)),
    (_VISION, "norm2", ("mlp.fc1",)),
    (_QLLAMA, "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    (_QLLAMA, "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
"""Block, a norm in it, and all layers that the norm feeds."""


def groups(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Norm -> the layers it feeds, for each norm before one of ``layers``; UsageError where there is none."""
    return {norm: _fed_by(norm) for norm in map(_norm_of, layers)}


def _norm_of(layer: str) -> str:
    for block, norm, members in _FED:
        for member in members:
            if match := re.fullmatch(block + re.escape(member), layer):
                return match[1] + norm
    raise UsageError(
        f"Layer {layer} cannot be smoothed.",
        "No norm stands directly before it that the factors could be folded into.",
        "Give it the scheme int8 in the recipe.",
    )


def _fed_by(norm: str) -> tuple[str, ...]:
    for block, own, members in _FED:
        if match := re.fullmatch(block + own, norm):
            return tuple(match[1] + member for member in members)
    raise ValueError(f"{norm} feeds no layers that are smoothed")


def channel_ranges(
    checkpoint: Checkpoint,
    components: Sequence[str],
    layers: Iterable[str],
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Largest input magnitude of every in feature of ``layers`` [in], over all components.

    Args:
        checkpoint: its weights are read a block at a time.
        components: those that are quantised.
        layers: those of interest.
        chosen: the calibration set.
        settings, tokenizer: of the model.
        folder: where activations are spilled; the caller removes it.
        batch_size: samples in memory at a time.
        progress: hears how much of :func:`.calibrate.calibration_units` is done.
    """
    order, wanted = needed(components), set(layers)
    found: dict[str, Tensor] = {}

    def see(layer: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            peak = args[0].detach().abs().reshape(-1, args[0].shape[-1]).amax(0)
            found[layer] = torch.maximum(found[layer], peak) if layer in found else peak

        return hook

    samples = samples_of(chosen, settings, tokenizer, checkpoint.config, order, batch_size)
    flow = Flow(Modules(checkpoint, order), samples, folder)
    with ExitStack() as stack:
        stack.callback(flow.close)
        for module in flow.modules.by_name.values():
            for name, layer in module.named_modules():
                if name in wanted:
                    stack.callback(layer.register_forward_pre_hook(see(name)).remove)
        for number, part in enumerate(parts(checkpoint.config, order)):
            for _ in visit(part, samples, [flow], progress, number * samples.count):
                pass
    return found


def factors(
    checkpoint: Checkpoint, ranges: Mapping[str, Tensor], layers: Iterable[str], alpha: float = ALPHA
) -> dict[str, Tensor]:
    """Norm -> what its channels are divided by [in], powers of two (fp32).

    ``input amax ** alpha / weight amax ** (1 - alpha)`` of each channel, over the layers that share the norm;
    1 where either is zero. Layers without ``ranges`` did not run and are left alone.
    """
    found = {}
    for norm, members in groups(layers).items():
        seen = [ranges[m] for m in members if m in ranges]
        if not seen:
            continue
        inputs = torch.stack(seen).amax(0)
        weights = torch.stack([checkpoint.load(f"{m}.weight").float().abs().amax(0) for m in members]).amax(0)
        alive = (inputs > 0) & (weights > 0)
        exact = torch.where(alive, inputs, 1.0) ** alpha / torch.where(alive, weights, 1.0) ** (1 - alpha)
        found[norm] = torch.where(alive, torch.exp2(exact.log2().round()), 1.0)
    return found


@dataclass(frozen=True)
class Folded(Checkpoint):
    """A checkpoint whose norms are divided and whose weights are multiplied as :func:`fold` says.

    Args:
        multipliers: key -> what the last axis of its tensor is multiplied by.
    """

    multipliers: dict[str, Tensor] = field(default_factory=dict)
    original: Checkpoint | None = None

    def load(self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As :meth:`Checkpoint.load`, folded."""
        tensor = super().load(key)
        if key in self.multipliers:
            tensor = (tensor.float() * self.multipliers[key]).to(tensor.dtype)
        return tensor.to(device=device, dtype=dtype)

    @cached_property
    def revision(self) -> str:
        """That of the checkpoint it was made from."""
        assert self.original is not None
        return self.original.revision


def fold(checkpoint: Checkpoint, divisors: Mapping[str, Tensor]) -> Checkpoint:
    """``checkpoint`` with ``divisors`` (norm -> [in], of :func:`factors`) folded in; it computes the same."""
    multipliers = {f"{norm}.weight": 1 / value for norm, value in divisors.items()}
    for norm, value in divisors.items():
        multipliers.update({f"{member}.weight": value for member in _fed_by(norm)})
    # Without an offset nobody copies the bytes of the file.
    tensors = {k: replace(r, offset=None) if k in multipliers else r for k, r in checkpoint.tensors.items()}
    readers = checkpoint._readers
    return Folded(
        checkpoint.path,
        checkpoint.model,
        tensors,
        checkpoint.contrastive_only,
        readers,
        multipliers,
        checkpoint,
    )
