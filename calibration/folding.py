"""Moving large input channels of linear layers into their weights, without adding an operation.

What a layer takes is divided channel by channel, and its weight's columns are multiplied. The division is
folded into what makes that input: the weight of a norm, or the rows of a linear layer whose outputs only pass
through operations that a factor passes through as well (attention's values, the ungated half of a gated MLP).
Not through a GELU, and not through self-attention's values of a decoder, which leave the component as its
cache. A norm before experts is left alone: what routes tokens to them would see the factors, too.
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

from ..errors import InputError, UsageError
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.checkpoint import Checkpoint
from ..quantization.schemes import folded_layers
from .block_stream import Flow, visit
from .dataset import CalibrationSet
from .forward_calls import samples_of
from .segments import Modules, needed, segments

if TYPE_CHECKING:
    from torch import Tensor

_CHAT = r"model\.vision_tower\.vision_tower"
_VISION = rf"((?:vision_model|{_CHAT}|{_CHAT}\.vision_model)\.encoder\.layers\.\d+\.)"
_LLAMA = rf"((?:(?:{_CHAT}\.)?qllama\.|language_model\.)?model\.layers\.\d+\.)"
_FED = (
    (_VISION, "norm1", ("attn.qkv",)),
    (_VISION, "attn.qkv", ("attn.proj",)),
    (_VISION, "norm2", ("mlp.fc1",)),
    (_LLAMA, "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    (_LLAMA, "cross_attn.norm1", ("cross_attn.q_proj",)),
    (_LLAMA, "cross_attn.norm2", ("cross_attn.k_proj", "cross_attn.v_proj")),
    (_LLAMA, "cross_attn.v_proj", ("cross_attn.o_proj",)),
    (_LLAMA, "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    (_LLAMA, "mlp.up_proj", ("mlp.down_proj",)),
)
"""Block, what stands in it before layers (a norm, or a linear layer), and all layers that it feeds."""


def groups(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Source -> the layers it feeds, for what stands before ``layers``; UsageError where nothing does."""
    return {source: fed_by(source) for source in map(_source_of, layers)}


def groups_apart(schemes: Mapping[str, str]) -> None:
    """UsageError if layers that share an input want it divided in two ways, or nothing can divide it."""
    smoothed, searched = (groups(folded_layers(schemes, fold)) for fold in ("smooth", "awq"))
    if both := sorted(set(smoothed) & set(searched)):
        members = ", ".join(smoothed[both[0]])
        raise UsageError(
            f"The recipe wants SmoothQuant and AWQ of what {both[0]} feeds.",
            f"{members} share one input.",
            "Give them schemes of one kind.",
        )


def _source_of(layer: str) -> str:
    for block, source, members in _FED:
        for member in members:
            if match := re.fullmatch(block + re.escape(member), layer):
                return match[1] + source
    raise UsageError(
        f"Layer {layer} cannot be smoothed.",
        "Nothing stands directly before it that the factors could be folded into.",
        "Give it a scheme without smoothing in the recipe, int8 or int4-weight.",
    )


def fed_by(source: str) -> tuple[str, ...]:
    """The layers that take what ``source`` makes; InputError where that is none to fold into."""
    for block, own, members in _FED:
        if match := re.fullmatch(block + re.escape(own), source):
            return tuple(match[1] + member for member in members)
    raise InputError(f"{source} feeds no layers that are smoothed.", fix="Calibrate again.")


@dataclass(frozen=True)
class Folded(Checkpoint):
    """A checkpoint whose tensors are multiplied as :func:`fold` says.

    Args:
        columns: key -> what the last axis of its tensor is multiplied by.
        rows: key -> what the first axis is multiplied by.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    original: Checkpoint | None = None

    def load(self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As :meth:`Checkpoint.load`, folded."""
        tensor = super().load(key)
        if key in self.columns or key in self.rows:
            found = tensor.float()
            if key in self.columns:
                found = found * self.columns[key]
            if key in self.rows:
                found = found * self.rows[key].reshape(-1, *[1] * (found.dim() - 1))
            tensor = found.to(tensor.dtype)
        return tensor.to(device=device, dtype=dtype)

    @cached_property
    def revision(self) -> str:
        """That of the checkpoint it was made from."""
        assert self.original is not None
        return self.original.revision


def fold(checkpoint: Checkpoint, divisors: Mapping[str, Tensor]) -> Checkpoint:
    """``checkpoint`` with ``divisors`` (source -> [channels]) folded in; it computes the same.

    Raises:
        InputError: a source that feeds nothing or is not in the checkpoint; divisors of another shape, or not
            finite and over 0.
    """
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    tensors = checkpoint.tensors
    for source, divisor in divisors.items():
        members = fed_by(source)
        shapes = {m: tensors[f"{m}.weight"].shape for m in members if f"{m}.weight" in tensors}
        if len(shapes) < len(members) or any(shape[1:] != tuple(divisor.shape) for shape in shapes.values()):
            raise InputError(
                f"The factors of {source} do not belong to this model.",
                f"They have the shape {list(divisor.shape)}.",
                "Calibrate again.",
            )
        if not (torch.isfinite(divisor).all() and (divisor > 0).all()):
            raise InputError(f"The factors of {source} are not finite and over 0.", fix="Calibrate again.")
        for member in members:
            columns[f"{member}.weight"] = divisor.float()
        weight = f"{source}.weight"
        if len(tensors[weight].shape) == 1:
            offset = f"{source}.bias"  # of a LayerNorm
            columns.update({key: 1 / divisor.float() for key in (weight, offset) if key in tensors})
            continue
        spared = torch.ones(tensors[weight].shape[0] - len(divisor))  # queries and keys before the values
        factors = torch.cat([spared, 1 / divisor.float()])
        rows.update({key: factors for key in (weight, f"{source}.bias") if key in tensors})
    changed = {*columns, *rows}
    # Without an offset nobody copies the bytes of the file.
    refs = {k: replace(r, offset=None) if k in changed else r for k, r in tensors.items()}
    kept = (checkpoint.path, checkpoint.model, refs, checkpoint._readers)
    return Folded(*kept, columns, rows, checkpoint)


def watch_inputs(
    see: Callable[[str, Tensor], None],
    layers: Iterable[str],
    checkpoint: Checkpoint,
    components: Sequence[str],
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
    passed: Callable[[], None] = lambda: None,
) -> None:
    """Run the fp32 model on a set block by block, and show the inputs of some layers.

    Args:
        see: takes a layer and one input of it, [..., in].
        layers: those of interest.
        checkpoint: its weights are read a block at a time.
        components: those that are quantised.
        chosen: the calibration set.
        settings, tokenizer: of the model.
        folder: where activations are spilled; the caller removes it.
        batch_size: samples in memory at a time.
        progress: hears how much of :func:`.calibrate.calibration_units` is done.
        passed: is called when all samples are through a block.
    """
    order, wanted = needed(components, checkpoint.model), set(layers)

    def hook(layer: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, args: see(layer, args[0].detach())

    samples = samples_of(chosen, settings, tokenizer, checkpoint.model, order, batch_size)
    flow = Flow(Modules(checkpoint, order), samples, folder)
    with ExitStack() as stack:
        stack.callback(flow.close)
        for module in flow.modules.by_name.values():
            for name, layer in module.named_modules():
                if name in wanted:
                    stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        for number, segment in enumerate(segments(checkpoint.model, order)):
            for _ in visit(segment, samples, [flow], progress, number * samples.count):
                pass
            passed()
