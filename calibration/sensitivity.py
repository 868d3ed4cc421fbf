"""Loss by quantising one layer: the model runs once in fp32, each of its blocks again for every variant.

A variant quantises one layer of a block, or one attention, and nothing else. It starts from the block's own
fp32 input, so that its loss is its own; outputs are compared as the block's update of the residual stream,
because a few massive channels of the stream itself would drown any loss. Memory holds one block, its weights
once for each scheme, and one batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UsageError
from ..files.json import decode
from ..files.write import atomic
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.calls import Call
from ..quantization.attention import FP8_ATTENTION, core_attentions, operand_names
from ..quantization.quantize import dequantise, quantise
from ..quantization.ranges import ActivationRanges
from ..quantization.schemes import SCHEMES, excluded
from .accuracy import Comparison
from .block_stream import Flow, visit
from .dataset import CalibrationSet
from .forward_calls import samples_of
from .outlier_channels import Channels, Finding
from .segments import Modules, Segment, needed, segments
from .simulate import attention_hook, rounding_hook

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint

DEFAULT = ("fp8", "int8", "int8-weight", "int4-weight", FP8_ATTENTION)


@dataclass(frozen=True)
class Loss:
    """Loss of a component's block when only ``layer`` is quantised, with ``scheme``.

    ``sqnr_db`` and ``cosine`` (mean over samples) compare the block's update of the residual stream;
    ``sqnr_db`` is None where the outputs are equal. ``tasks`` are percentage points lost on each task when
    the whole model runs so; empty without an evaluation set.
    """

    component: str
    layer: str
    scheme: str
    sqnr_db: float | None
    cosine: float
    samples: int
    tasks: dict[str, float] = field(default_factory=dict)

    @property
    def noise(self) -> float:
        """Noise over signal, as power: adds up over layers where they are independent."""
        return 0.0 if self.sqnr_db is None else 10 ** (-self.sqnr_db / 10)


@dataclass(frozen=True)
class Sensitivity:
    """Losses of every layer of the blocks, and unusual channels of their inputs."""

    losses: tuple[Loss, ...]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Inverse of :meth:`to_json`."""
        return decode(
            cls, data, what="The sensitivity receipt", fix="Measure it again: ivl-export sensitivity."
        )

    def worst(self) -> dict[tuple[str, str], Loss]:
        """(layer, scheme) -> the loss of the component that suffers most from it."""
        worst: dict[tuple[str, str], Loss] = {}
        for loss in self.losses:
            key = loss.layer, loss.scheme
            if key not in worst or loss.noise > worst[key].noise:
                worst[key] = loss
        return worst


def check_schemes(schemes: Sequence[str]) -> None:
    """UsageError for a scheme that cannot be tried on one layer alone."""
    unfit = [s for s in schemes if s != FP8_ATTENTION and (s not in SCHEMES or SCHEMES[s].fold)]
    if unfit:
        known = [name for name, scheme in SCHEMES.items() if not scheme.fold]
        raise UsageError(
            f"Scheme {unfit[0]!r} cannot be tried on one layer alone.",
            f"Known: {', '.join([*known, FP8_ATTENTION])}.",
            "Give --schemes one of these.",
        )


def measure(
    checkpoint: Checkpoint,
    components: Sequence[str],
    schemes: Sequence[str],
    ranges: ActivationRanges,
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    base: str = "bf16",
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> Sensitivity:
    """Losses on ``chosen``, block by block; a killed run resumes at its segment.

    Args:
        checkpoint: the fp32 weights.
        components: to measure; those they take inputs from are run too.
        schemes: of :data:`..quantization.schemes.SCHEMES` without a fold, and
        :data:`..quantization.attention.FP8_ATTENTION`. ranges: input ranges of the layers.
        chosen: samples, best ones that ``ranges`` were not measured on.
        settings, tokenizer: of the model.
        folder: for activations and the losses so far; the caller removes it.
        base: type that scales are rounded to.
        batch_size: samples in memory at a time.
        progress: callback with the number of :func:`.calibrate.calibration_units` done.

    Raises:
        UsageError: a scheme that cannot be tried on one layer alone.
        BuildError: NaN or infinity at a layer's input (layer and channel named); too little disk.
    """
    check_schemes(schemes)
    order = needed(components, checkpoint.model)
    samples = samples_of(chosen, settings, tokenizer, checkpoint.model, order, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    modules = Modules(checkpoint, order)
    flow = Flow(modules, samples, folder, "sensitivity")
    identity = [
        checkpoint.revision,
        chosen.hash,
        list(components),
        list(schemes),
        asdict(ranges),
        base,
        batch_size,
    ]
    state, plan = folder / "losses.json", segments(checkpoint.model, order)
    losses, findings, first = _resumed(state, identity)
    if first < len(plan) and not flow.whole(plan[first]):
        losses, findings, first = [], [], 0
    try:
        for number, segment in enumerate(plan[first:], first):
            channels = Channels(modules)
            variants = _Variants(modules, segment, schemes, ranges, base, components)
            with channels.hooks():
                for call, _ in visit(segment, samples, [flow], progress, number * samples.count):
                    with channels.paused():
                        variants.run(flow, segment, call)
            losses += variants.losses()
            findings += channels.findings(components)
            so_far = Sensitivity(tuple(losses), tuple(findings))
            with atomic(state) as partial:
                partial.write_text(json.dumps({"asked": identity, "done": number + 1, **so_far.to_json()}))
    finally:
        flow.close()
    return Sensitivity(tuple(losses), tuple(findings))


def _resumed(state: Path, identity: list[Any]) -> tuple[list[Loss], list[Finding], int]:
    try:
        data = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [], [], 0  # not begun, or cut off while it was written
    if data.get("asked") != json.loads(json.dumps(identity)):
        return [], [], 0
    segments_done = data.pop("done")
    saved = Sensitivity.from_json({key: data[key] for key in ("losses", "findings")})
    return list(saved.losses), list(saved.findings), segments_done


class _Variants:
    """All ways to quantise one layer of a block."""

    def __init__(
        self,
        modules: Modules,
        segment: Segment,
        schemes: Sequence[str],
        ranges: ActivationRanges,
        base: str,
        components: Sequence[str],
    ) -> None:
        self.modules, self.ranges, self.base = modules, ranges, base
        self.weights: dict[tuple[str, str], torch.Tensor] = {}
        self.tried: dict[str, list[tuple[str, str]]] = {}
        self.compared: dict[tuple[str, str, str], Comparison] = {}
        for component in () if segment.entry or segment.exit else components:
            module = modules.by_name[component]
            prefix = f"{modules.components[component].place(modules.config)}.{segment.block}."
            for name, layer in module.named_modules():
                if isinstance(layer, torch.nn.Linear) and name.startswith(prefix):
                    size = layer.out_features, layer.in_features
                    fit = [s for s in schemes if s in SCHEMES and not excluded(s, *size)]
                    self.tried.setdefault(component, []).extend((name, s) for s in fit)
            if FP8_ATTENTION in schemes:
                measured = set(ranges.amax[component])  # none by ranges that say nothing about attentions
                cores = (n for n in core_attentions(module) if n.startswith(prefix))
                own = [(n, FP8_ATTENTION) for n in cores if measured.issuperset(operand_names(n))]
                self.tried.setdefault(component, []).extend(own)

    def run(self, flow: Flow, segment: Segment, call: Call) -> None:
        """Run ``call`` through the block in every variant."""
        tried = self.tried.get(call.component, ())
        if not tried:
            return
        before, plain = flow.replay(segment, call)
        want = (plain - before).numpy()
        for layer, scheme in tried:
            with self._quantised(call.component, layer, scheme):
                got = flow.replay(segment, call)[1]
            comparison = self.compared.setdefault((call.component, layer, scheme), Comparison())
            comparison.add(want, (got - before).numpy())

    def losses(self) -> list[Loss]:
        """The loss of every variant."""
        losses = []
        for (component, layer, scheme), comparison in self.compared.items():
            m = comparison.metrics()
            sqnr = None if math.isinf(m.sqnr_db) else m.sqnr_db
            losses.append(Loss(component, layer, scheme, sqnr, m.cosine, m.samples))
        return losses

    @contextmanager
    def _quantised(self, component: str, layer: str, scheme: str) -> Iterator[None]:
        module, amax = self.modules.by_name[component], self.ranges.amax[component]
        with ExitStack() as stack:
            if scheme == FP8_ATTENTION:
                hook = attention_hook(layer, amax, self.base)
                stack.callback(core_attentions(module)[layer].register_forward_hook(hook).remove)
            else:
                linear = module.get_submodule(layer)
                stack.callback(setattr, linear, "weight", linear.weight)
                linear.weight = torch.nn.Parameter(self._weight(layer, scheme), requires_grad=False)
                if kind := SCHEMES[scheme].activation:
                    rounded = rounding_hook(amax[layer], kind, self.base)
                    stack.callback(linear.register_forward_pre_hook(rounded).remove)
            yield

    def _weight(self, layer: str, scheme: str) -> torch.Tensor:
        """Dequantised; schemes that store the same share it."""
        key = layer, SCHEMES[scheme].weight
        if key not in self.weights:
            weight = self.modules.load(f"{layer}.weight")
            self.weights[key] = dequantise(*quantise(weight, scheme, self.base))
        return self.weights[key]
