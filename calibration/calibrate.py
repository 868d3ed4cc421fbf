"""Measuring activation ranges: the fp32 model runs on a calibration set, block by block.

Memory holds one block and one batch, for models of every size; hidden states between two blocks are on disk.
The ranges are saved after every segment, so a killed run resumes there.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BuildError
from ..files.hashing import sha256_json
from ..files.write import atomic
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.registry import Ranges, component_of
from ..quantization.algorithms import algorithm_name, depends_on_type
from ..quantization.attention import core_attentions, operand_names
from ..quantization.ranges import ActivationRanges
from .dataset import CalibrationSet
from .observers import observers

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint
    from ..models.registry import ModelConfig
    from .segments import Segment

STATE = "state.json"
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")

Amax = dict[str, dict[str, float]]


@dataclass(frozen=True)
class SegmentTime:
    """Time of one segment of a tower.

    Args:
        tower: ``vision`` or ``qllama`` (query, text, step and matching pass together).
        block: its number; None for the entry and the exit.
        seconds: wall clock, with reading the weights.
        samples: how many went through.
    """

    tower: str
    block: int | None
    seconds: float
    samples: int


def calibration_units(config: ModelConfig, components: Sequence[str], samples: int) -> int:
    """Total of the progress of :func:`calibrate`: samples times segments."""
    from .segments import needed, segments

    return samples * len(segments(config, needed(components, config)))


def spilled_bytes(config: ModelConfig, components: Sequence[str], samples: int) -> int:
    """Most bytes on disk during :func:`calibrate`: two copies of each tower's hidden states.

    Outputs of one tower for another are stored once.
    """
    from .segments import needed

    values = 0
    for component in (component_of(name, config) for name in needed(components, config)):
        positions, width = component.hidden(config)
        values += 2 * positions * width * (component.depth(config) > 0)
        for name, link in component.links(config).items():
            maker = component_of(link.component, config)
            if not link.hidden and maker.tower != component.tower:
                tensors = {tensor.name: tensor for tensor in maker.spec(config, Ranges()).outputs}
                fixed = [size for size in tensors[name].shape if isinstance(size, int)]
                values += link.rows * math.prod(fixed)
    return 4 * samples * values


def seconds_per_block(times: Sequence[SegmentTime]) -> dict[str, float]:
    """Tower -> mean seconds of one sample in one block, with reading the block's weights."""
    seconds = {}
    for tower in dict.fromkeys(part.tower for part in times):
        blocks = [part for part in times if part.tower == tower and part.block is not None]
        if blocks:
            seconds[tower] = sum(b.seconds for b in blocks) / sum(b.samples for b in blocks)
    return seconds


def calibration_seconds(
    config: ModelConfig, per_block: Mapping[str, float], samples: int, devices: int = 1, speedup: float = 1
) -> float:
    """Seconds to calibrate all blocks of ``config`` on ``samples``, spread over ``devices``.

    Assumes: data parallel over samples, so that every device streams all blocks over its own share and the
    largest magnitudes are merged at the end, which is exact for ``max``; no device waits for another; weights
    are read as fast by all of them as by the one that was measured; entry and exit are left out (under one
    block's time).

    Args:
        config: the model, at full depth.
        per_block: tower -> seconds of one sample in one block, as measured (:func:`seconds_per_block`).
        samples: of the whole set.
        devices: how many share it.
        speedup: how many times faster each is than the measured one.
    """
    from .segments import depths

    blocks = depths(config)
    share = math.ceil(samples / devices)
    return share * sum(blocks[tower] * seconds for tower, seconds in per_block.items()) / speedup


def calibrate(
    checkpoint: Checkpoint,
    components: Sequence[str],
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    algorithm: str = "max",
    kinds: Mapping[str, str] | None = None,
    device: str = "cpu",
    folder: Path | None = None,
    key: str = "",
    progress: Callable[[int], None] = lambda count: None,
    timed: Callable[[SegmentTime], None] = lambda part: None,
) -> ActivationRanges:
    """Activation amax of every linear, for each component it runs in.

    Components that ``components`` need inputs from are run too, and measured.

    Args:
        checkpoint: its weights are read a block at a time.
        components: those to quantise.
        chosen: the calibration set.
        settings, tokenizer: of the model.
        batch_size: samples in memory at a time.
        algorithm: one of :data:`.observers.ALGORITHMS`, or ``percentile-99.9``.
        kinds: layer -> the type its input will be rounded to, for ``entropy`` and ``mse``; ``int8`` for those
            it leaves out.
        device: where blocks run: one block's weights and one batch are there at a time.
        folder: where activations are spilled and where a killed run resumes; removed at the end. None: a
            temporary folder.
        key: other content that must be equal for a killed run to resume.
        progress: callback with the number of :func:`calibration_units` done.
        timed: callback with the time of each segment.

    Raises:
        BuildError: NaN, infinity, or nothing but zeros at a layer's input (named); too little disk.
        UsageError: an unknown algorithm, percentile or component.
        CapabilityError: a component without weights.
    """
    from torch import nn

    from .block_stream import Flow, visit
    from .forward_calls import samples_of
    from .observers import Watch
    from .segments import Modules, needed, segments

    recorded = algorithm_name(algorithm)
    order = needed(components, checkpoint.model)
    modules = Modules(checkpoint, order, device=device)
    chosen_for: dict[str, str] = {}
    if depends_on_type(recorded):
        operands = (o for m in modules.by_name.values() for a in core_attentions(m) for o in operand_names(a))
        chosen_for = {**dict.fromkeys(operands, "fp8"), **(kinds or {})}
    samples = samples_of(chosen, settings, tokenizer, checkpoint.model, order, batch_size)
    plan = segments(checkpoint.model, order)
    watch = Watch(modules.by_name, observers(recorded, chosen_for))
    identity = _identity(
        [checkpoint.revision, chosen.hash, recorded, chosen_for, order, batch_size, device, key],
        [settings.to_json(), tokenizer.digest],
    )
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="ivl-calibrate-") as name:
        state = _State(Path(name), identity, order)
        flow = Flow(modules, samples, state.folder)
        try:
            first = state.resumable(flow.whole, plan)
            for number, segment in enumerate(plan[first:], first):
                started = time.perf_counter()
                with watch.hooks():
                    for _ in visit(segment, samples, [flow], progress, number * samples.count):
                        pass
                state.finished(number + 1, watch.take())
                block = None if segment.entry or segment.exit else segment.block
                timed(SegmentTime(segment.tower, block, time.perf_counter() - started, samples.count))
        finally:
            flow.close()
        amax = state.amax
        shutil.rmtree(state.folder, ignore_errors=True)
    for component, layers in amax.items():
        parts = modules.by_name[component].named_modules()
        _fill_unrouted(layers, (name for name, part in parts if isinstance(part, nn.Linear)))
    measured = sorted({layer for layers in amax.values() for layer in layers})
    weights = {layer: checkpoint.tensors.get(f"{layer}.weight") for layer in measured}  # attentions have none
    return ActivationRanges(
        amax=amax,
        algorithm=recorded,
        samples=len(chosen),
        set_hash=chosen.hash,
        synthetic=chosen.synthetic,
        without_caption=chosen.without_caption,
        model=checkpoint.revision,
        skipped=len(chosen.skipped),
        kinds={layer: chosen_for[layer] for layer in measured if layer in chosen_for},
        shapes={layer: list(ref.shape) for layer, ref in weights.items() if ref is not None},
    )


def _fill_unrouted(layers: dict[str, float], names: Iterable[str]) -> None:
    """Give an expert that no token was routed to the largest range of the other experts of its block."""
    largest: dict[str, float] = {}
    for name, value in layers.items():
        kind = _EXPERT.sub("*", name)
        largest[kind] = max(value, largest.get(kind, 0.0))
    for name in names:
        kind = _EXPERT.sub("*", name)
        if name not in layers and kind != name and kind in largest:
            layers[name] = largest[kind]


class _State:
    """Progress of a run, in a small file that is replaced after every segment."""

    def __init__(self, folder: Path, identity: str, order: Sequence[str]) -> None:
        self.folder, self.identity = folder, identity
        self.order, self.segments_done = list(order), 0
        self.amax: Amax = {component: {} for component in order}
        saved = self._read()
        if saved is None:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BuildError(
                    f"Cannot write to {folder}.",
                    error.strerror or str(error),
                    "Free disk space, or choose another place for --out.",
                ) from error
        else:
            self.segments_done, self.amax = saved["done"], {c: saved["amax"][c] for c in order}

    def resumable(self, whole: Callable[[Segment], bool], plan: Sequence[Segment]) -> int:
        """Number of segments of ``plan`` to skip; 0 if their activations are gone."""
        if self.segments_done < len(plan) and not whole(plan[self.segments_done]):
            self.segments_done, self.amax = 0, {component: {} for component in self.order}
        return self.segments_done

    def finished(self, count: int, amax: Amax) -> None:
        """Save that ``count`` segments have run; ``amax`` is from the last one."""
        for component, layers in amax.items():
            self.amax[component].update(layers)
        self.segments_done = count
        state = {"identity": self.identity, "done": count, "amax": self.amax}
        with atomic(self.folder / STATE, durable=True) as partial:
            partial.write_text(json.dumps(state), encoding="utf-8")

    def _read(self) -> Any:
        """The state of an earlier run with the same identity, or None."""
        try:
            saved = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return saved if saved.get("identity") == self.identity else None


def _identity(*content: Any) -> str:
    import torch

    return sha256_json([torch.__version__, *content])
