"""The largest magnitudes of everything a model computes, and whether a 16-bit type holds them.

fp16 ends at 65504, and below 6.1e-5 it loses bits: a model that was trained in bf16, whose range is that of
fp32, may run over. Engines then give infinity or NaN, while the graphs that accuracy is measured on compute
in fp32 and show nothing. So the fp32 run that they are compared with is watched: every operation's result
(matrix products with their biases, residual sums, activations, norms), attention scores, and the sums of
squares in norms, which all engines add up in fp32. Magnitudes are kept by channel, a result's last axis: one
may be far below the others, and lose bits or become zero where they do not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BuildError, CapabilityError
from ..files.json import decode

if TYPE_CHECKING:
    import torch
    from torch import nn

RANGES = {"fp16": (2.0**-14, 65504.0), "bf16": (2.0**-126, 255 * 2.0**120), "fp32": (2.0**-126, 3.4028235e38)}
"""Smallest normal number and largest number of a type."""
ZERO = {"fp16": 2.0**-25, "bf16": 2.0**-134, "fp32": 2.0**-150}
"""Up to here a type rounds to zero: half of its smallest denormal number."""
RECEIPT = "magnitudes"
LISTED = 20
NAMED = 3
_BLOCK = re.compile(r"(?:.*\.)?layers\.(\d+)\.?(.*)")
_MOVES = ("copy_", "_to_copy", "clone", "contiguous", "cat", "stack", "index", "index_select", "gather")
_MASKS = ("full", "full_like", "new_full", "masked_fill", "where", "triu", "tril", "scalar_tensor")
_PASSED_OVER = frozenset((*_MOVES, *_MASKS, "embedding", "repeat_interleave", "arange", "fill"))
_MADE = re.compile(r"new_.*|empty.*|zeros.*|ones.*|.*_like")
"""Operations that compute nothing: they move values, or make memory and masks (with infinity on purpose)."""


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of one result over all samples.

    Args:
        component: where it is computed.
        place: the module and, unless it is a matrix product, the operation: ``block 1, mlp.fc1``.
        value: the magnitude.
        channel: its index on the last axis; of attention scores the head.
        channels: how many there are.
        beyond: how many of them reach over fp16's range.
        accumulated: whether it is a sum that engines keep in fp32 in every compute type.
    """

    component: str
    place: str
    value: float
    channel: int
    channels: int
    beyond: int
    accumulated: bool = False

    def __str__(self) -> str:
        more = f" and {self.beyond - 1} more channels" if self.beyond > 1 else ""
        return f"{self.component}, {self.place} reaches {self.value:.3g} in channel {self.channel}{more}"


@dataclass(frozen=True)
class Faint:
    """Channels of one result whose largest magnitude a type holds in denormal numbers at best.

    Args:
        component, place: as in :class:`Peak`.
        dtype: the type, ``fp16`` or ``bf16``.
        channel: the faintest of them, its largest magnitude ``value``.
        count: how many there are, of ``channels``; channels that are 0 throughout do not count.
        zeros: how many of them become zero.
    """

    component: str
    place: str
    dtype: str
    value: float
    channel: int
    count: int
    zeros: int
    channels: int

    def __str__(self) -> str:
        return (
            f"{self.component}, {self.place}: {self.count} of {self.channels} channels, {self.zeros} of them "
            f"zero; channel {self.channel} stays under {self.value:.2g}"
        )


@dataclass(frozen=True)
class Magnitudes:
    """Results of :class:`MagnitudeObserver`.

    Args:
        samples: how many samples.
        largest: the largest results of each component, and all that reach over fp16's range; the same of
            sums that engines keep in fp32.
        smallest: the results with channels that fp16 or bf16 hold in denormal numbers at best, those with
            most of them first.
    """

    samples: int
    largest: tuple[Peak, ...]
    smallest: tuple[Faint, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        return {**data, "largest": list(data["largest"]), "smallest": list(data["smallest"])}

    @classmethod
    def from_json(cls, data: Any) -> Magnitudes:
        """Inverse of :meth:`to_json`; IntegrityError."""
        return decode(cls, data, what="The receipt of magnitudes", fix="Build the bundle again.")

    def overflows(self, dtype: str, components: Sequence[str] | None = None) -> list[Peak]:
        """The results that ``dtype`` (``fp16``, ``bf16``, ``fp32``) does not hold, largest first."""
        return [
            peak
            for peak in sorted(self.largest, key=lambda peak: -peak.value)
            if peak.value > RANGES["fp32" if peak.accumulated else dtype][1]
            and (components is None or peak.component in components)
        ]

    def denormal(self, dtype: str) -> list[Faint]:
        """The results with channels that ``dtype`` holds in denormal numbers at best: few bits, or zero."""
        return [faint for faint in self.smallest if faint.dtype == dtype]

    def top(self) -> Peak | None:
        """The largest result of all that are computed in the type itself."""
        return max((p for p in self.largest if not p.accumulated), key=lambda p: p.value, default=None)

    def summary(self, dtype: str) -> dict[str, Any]:
        """The largest result against the range of ``dtype``, for reports."""
        peak = self.top()
        if peak is None:
            return {}
        end = RANGES[dtype][1]
        return {**asdict(peak), "type": dtype, "end": end, "share": peak.value / end}


NOT_MEASURED = Magnitudes(0, (), ())


def check_magnitudes(magnitudes: Magnitudes, dtype: str, ranges: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse ``dtype`` if it overflows on the model's values.

    Args:
        magnitudes: of the fp32 run on held-out samples.
        dtype: compute type of the engines, apart from quantised layers.
        ranges: component -> layer -> the largest input seen in calibration.

    Raises:
        BuildError: naming tensor and channel.
    """
    end = RANGES[dtype][1]
    listed = [str(peak) for peak in magnitudes.overflows(dtype)]
    listed += [
        f"{component}, {_named(layer)} reads {amax:.3g}"
        for component, layers in ranges.items()
        for layer, amax in layers.items()
        if amax > end
    ]
    if not listed:
        return
    more = f"; and {len(listed) - 5} more" if len(listed) > 5 else ""
    raise BuildError(
        f"This model overflows {dtype}: engines would give infinity or NaN.",
        f"{'; '.join(listed[:5])}{more}; {dtype} ends at {end:.6g}.",
        "Use --precision bf16, or fp8 / int8, which build on bf16."
        if dtype == "fp16"
        else "No 16-bit type holds it: look at the weights of these layers.",
    )


def refuse_type(magnitudes: Magnitudes, component: str, dtype: str) -> None:
    """CapabilityError where ``component`` overflows ``dtype``, which it is to be run in."""
    peaks = magnitudes.overflows(dtype, [component])
    if peaks:
        raise CapabilityError(
            f"{component} cannot be computed in {dtype}: it would give infinity or NaN.",
            f"{peaks[0]}; {dtype} ends at {RANGES[dtype][1]:.6g}.",
            'Give dtype="bf16".' if dtype == "fp16" else 'Give dtype="fp32".',
        )


def notes(magnitudes: Magnitudes, dtype: str) -> list[str]:
    """Notices on a type that holds the model's values only just, or loses bits of small ones."""
    said, end = [], RANGES[dtype][1]
    peak = magnitudes.top()
    if peak is not None and end / 4 < peak.value <= end:
        said.append(
            f"{peak}: {peak.value / end:.0%} of what {dtype} holds, on {magnitudes.samples} samples. "
            "Others may reach over: bf16 is safer."
        )
    if denormal := magnitudes.denormal(dtype):
        more = f"; and {len(denormal) - 1} more results" if len(denormal) > 1 else ""
        said.append(f"Denormal in {dtype}, so with fewer bits, or zero: {denormal[0]}{more}.")
    return said


def weight_notes(faint: Sequence[Mapping[str, Any]], dtype: str) -> list[str]:
    """Notices about weights with denormal channels, from the build's record of them."""
    if not faint:
        return []
    first = ", ".join(f"{w['name']} channel {w['channel']} ({w['value']:.2g})" for w in faint[:NAMED])
    count, zeros = (sum(int(w[key]) for w in faint) for key in ("count", "zeros"))
    return [
        f"{count} channels of {len(faint)} weights are denormal in {dtype}, so with fewer bits, {zeros} of "
        f"them become zero: {first}{' and more' if len(faint) > NAMED else ''}."
    ]


class MagnitudeObserver:
    """Watches modules while they compute in fp32; each component's calls go in a block of :meth:`watch`.

    Args:
        modules: component -> module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._stack: list[str] = []
        self._peaks: dict[tuple[str, str, bool], torch.Tensor] = {}
        self._component = ""
        self._handles = []
        for module in modules.values():
            for name, part in module.named_modules():
                self._handles += [
                    part.register_forward_pre_hook(self._entering(name)),
                    part.register_forward_hook(self._left, always_call=True),
                ]

    def close(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def watch(self, component: str) -> Iterator[None]:
        """Results computed inside the ``with`` block count as ``component``'s.

        BuildError where one is NaN or infinite.
        """
        self._component = component
        self._stack.clear()
        with _mode(self):
            yield

    def result(self, samples: int) -> Magnitudes:
        """The magnitudes recorded."""
        peaks = [
            Peak(
                component,
                place,
                float(channels.max()),
                int(channels.argmax()),
                len(channels),
                int((channels > RANGES["fp16"][1]).sum()),
                accumulated,
            )
            for (component, place, accumulated), channels in self._peaks.items()
        ]
        peaks.sort(key=lambda peak: -peak.value)
        largest: list[Peak] = []
        counts: Counter[tuple[str, bool]] = Counter()
        for peak in peaks:
            beyond = peak.value > RANGES["fp32" if peak.accumulated else "fp16"][1]
            if counts[peak.component, peak.accumulated] < LISTED or beyond:
                counts[peak.component, peak.accumulated] += 1
                largest.append(peak)
        faint = [
            faint
            for (component, place, accumulated), channels in self._peaks.items()
            if not accumulated
            for dtype in ("fp16", "bf16")
            if (faint := _faint(component, place, dtype, channels)) is not None
        ]
        faint.sort(key=lambda f: (-f.zeros, -f.count))
        return Magnitudes(samples, tuple(largest), tuple(faint))

    def see(self, operation: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> None:
        """Note the result of one operation."""
        place = self._stack[-1] if self._stack else ""
        label = "" if operation in ("linear", "conv2d") and place else f" ({operation})"
        if operation == "scaled_dot_product_attention":
            label = ""
            self._note(f"{_named(place)} attention scores", _scores(args[0], args[1], kwargs.get("scale")))
        if operation in ("rms_norm", "layer_norm", "native_layer_norm"):
            self._note(f"{_named(place)} sum of squares", args[0].square().sum(-1, keepdim=True), True)
        self._note(f"{_named(place)}{label}", out)

    def _note(self, place: str, values: torch.Tensor, accumulated: bool = False) -> None:
        import torch

        if not values.numel():
            return
        rows = values.reshape(-1, values.shape[-1]) if values.dim() else values.reshape(1, 1)
        channels = torch.maximum(rows.amax(0), -rows.amin(0))
        top = float(channels.max())  # NaN wins
        if not math.isfinite(top):
            channel = int((~torch.isfinite(channels)).nonzero()[0])
            raise BuildError(
                "The fp32 model gives NaN or infinity.",
                f"{self._component}, {place}, channel {channel}.",
                "Check the weights of this layer and those before it.",
            )
        key = (self._component, place, accumulated)
        known = self._peaks.get(key, channels)
        if len(known) != len(channels):  # a length, which varies, and no width
            known, channels = known.max()[None], channels.max()[None]
        self._peaks[key] = torch.maximum(known, channels)

    def _entering(self, name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...]) -> None:
            self._stack.append(name)

        return hook

    def _left(self, *_: Any) -> None:
        if self._stack:
            self._stack.pop()


def _faint(component: str, place: str, dtype: str, channels: torch.Tensor) -> Faint | None:
    """The channels that ``dtype`` holds in denormal numbers at best; None where there is none."""
    small = (channels > 0) & (channels < RANGES[dtype][0])
    if not small.any():
        return None
    channel = int(channels.masked_fill(~small, math.inf).argmin())
    zeros = int((small & (channels <= ZERO[dtype])).sum())
    value = float(channels[channel])
    return Faint(component, place, dtype, value, channel, int(small.sum()), zeros, len(channels))


def _mode(observer: MagnitudeObserver) -> Any:
    """A torch mode that shows every operation's result to ``observer``.

    In inference mode operations arrive whole: a linear layer with its bias, a norm, an attention.
    """
    from torch import Tensor
    from torch.utils import _python_dispatch

    base: Any = _python_dispatch.TorchDispatchMode

    def dispatch(
        _: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        floats = isinstance(out, Tensor) and out.is_floating_point()
        if floats and not getattr(func, "is_view", False) and _computes(operation):
            observer.see(operation, args, kwargs or {}, out)
        return out

    return type("Watching", (base,), {"__torch_dispatch__": dispatch})()


def _computes(operation: str) -> bool:
    return operation not in _PASSED_OVER and not _MADE.fullmatch(operation)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The largest magnitudes of q k^T, scaled: [B, heads] for q [B, heads, T, d], k [B, kv heads, S, d]."""
    import torch

    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if k.shape[1] != q.shape[1] else k
    rows = [(a @ b.transpose(-1, -2)).abs().amax((-1, -2)) for a, b in zip(q, k, strict=True)]
    return torch.stack(rows)


def _named(path: str) -> str:
    """``vision_model.encoder.layers.1.mlp.fc1`` -> ``block 1, mlp.fc1``."""
    if match := _BLOCK.fullmatch(path):
        return f"block {match[1]}, {match[2]}" if match[2] else f"block {match[1]}"
    return path or "the model"
