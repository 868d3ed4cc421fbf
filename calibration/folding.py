"""Moving large input channels of linear layers into their weights, without adding an operation.

With a factor ``s`` [in] for each input channel, a layer ``y = W x`` and its source become::

    W'    = W * diag(s)          columns of the weight
    norm' = norm / s             if the source is a norm: x' = x / s, so W' x' = W x
    V'    = diag(1 / s) * V      if the source is a linear layer: rows of its weight, and its bias

A source is the norm before the layer, or a linear layer whose outputs reach it only through operations that
commute with a factor (attention's values, the ungated half of a gated MLP). Not through a GELU, and not
through self-attention's values of a decoder, which leave the component as its cache. A norm before
experts is left alone: the router reads it, too.
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
"""Block, source in it (a norm, or a linear layer), and all layers that the source feeds."""


def groups(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Source -> the layers it feeds, for the sources of ``layers``; UsageError where there is none."""
    return {source: fed_by(source) for source in map(_source_of, layers)}


def groups_apart(schemes: Mapping[str, str]) -> None:
    """UsageError if layers that share an input have two schemes that divide it, or nothing can divide it."""
    smoothed, searched = (groups(folded_layers(schemes, fold)) for fold in ("smooth", "awq"))
    if both := sorted(set(smoothed) & set(searched)):
        members = ", ".join(smoothed[both[0]])
        raise UsageError(
            f"The recipe has both SmoothQuant and AWQ for layers fed by {both[0]}.",
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
        "No norm or linear layer directly before it can take the factors.",
        "Give it a scheme without smoothing in the recipe, int8 or int4-weight.",
    )


def fed_by(source: str) -> tuple[str, ...]:
    """The layers fed by ``source``; InputError if nothing can be folded into it."""
    for block, own, members in _FED:
        if match := re.fullmatch(block + re.escape(own), source):
            return tuple(match[1] + member for member in members)
    raise InputError(f"{source} feeds no layers that are smoothed.", fix="Calibrate again.")


@dataclass(frozen=True)
class Folded(Checkpoint):
    """A checkpoint whose tensors are multiplied as :func:`fold` says.

    Args:
        columns: key -> factors of the last axis of its tensor.
        rows: key -> factors of the first axis.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    original: Checkpoint | None = None

    def load(self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As :meth:`Checkpoint.load`, folded."""
        tensor = super().load(key)
        if key in self.columns or key in self.rows:
            folded = tensor.float()
            if key in self.columns:
                folded = folded * self.columns[key]
            if key in self.rows:
                folded = folded * self.rows[key].reshape(-1, *[1] * (folded.dim() - 1))
            tensor = folded.to(tensor.dtype)
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
    # Without an offset the bytes of the file are not copied.
    refs = {k: replace(r, offset=None) if k in changed else r for k, r in tensors.items()}
    common = (checkpoint.path, checkpoint.model, refs, checkpoint._readers)
    return Folded(*common, columns, rows, checkpoint)


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
    progress: Callable[[int], None] = lambda count: None,
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
        progress: callback with the number of :func:`.calibrate.calibration_units` done.
        passed: called when all samples have run through a block.
    """
    order, watched = needed(components, checkpoint.model), set(layers)

    def hook(layer: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, args: see(layer, args[0].detach())

    samples = samples_of(chosen, settings, tokenizer, checkpoint.model, order, batch_size)
    flow = Flow(Modules(checkpoint, order), samples, folder)
    with ExitStack() as stack:
        stack.callback(flow.close)
        for module in flow.modules.by_name.values():
            for name, layer in module.named_modules():
                if name in watched:
                    stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        for number, segment in enumerate(segments(checkpoint.model, order)):
            for _ in visit(segment, samples, [flow], progress, number * samples.count):
                pass
            passed()
