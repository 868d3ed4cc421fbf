"""Running a sample set through a model block by block: one block's weights in memory, activations on disk.

All calls (:mod:`.forward_calls`) of a tower go through one segment, then through the next. Calls that
continue the keys and values of others run in the same visit, so that they find those of the same layer
and no cache is kept: captions after the queries, answers after their prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array
from ..models.calls import Call
from ..models.qllama import KeyValue
from ..models.registry import Context, Link, Ranges
from .activation_store import Spill
from .forward_calls import Samples
from .magnitudes import MagnitudeObserver
from .segments import Modules, Segment, depths

Made: TypeAlias = "tuple[Tensor, dict[str, Tensor]]"
"""Hidden states after a segment, and the component's outputs made there."""


class Flow:
    """The hidden states of all samples on their way through ``modules``.

    Args:
        modules: component modules to run.
        samples: the calls.
        folder: where hidden states are spilled.
        name: of the files there.
        source: another flow whose outputs, keys and values the components take; None: its own.
        components: those of ``modules`` that run; None: all.
        observer: watches the values computed.
    """

    def __init__(
        self,
        modules: Modules,
        samples: Samples,
        folder: Path,
        name: str = "states",
        source: Flow | None = None,
        components: Sequence[str] | None = None,
        observer: MagnitudeObserver | None = None,
    ) -> None:
        self.modules, self.source, self.observer = modules, source or self, observer
        self.components = tuple(modules.by_name if components is None else components)
        self.spills: dict[str, Spill] = {}
        self._outputs: dict[tuple[str, str], Spill] = {}
        self._written: set[str] = set()
        self._places = {(call.component, call.batch): call.place for call in samples.calls}
        self._past: KeyValue | None = None
        known, config = modules.components, modules.config
        for tower in dict.fromkeys(known[c].tower for c in self.components):
            shapes: list[tuple[int, ...]] = [call.shape for call in samples.tower(tower)]
            self.spills[tower] = Spill(folder, f"{name}-{tower}", shapes)
        for component in known.values():
            for link in component.links(config).values():
                if link.component in self.components and self._spilled(component.tower, link):
                    self._keep(link, samples, folder, name)

    def _spilled(self, tower: str, link: Link) -> bool:
        """Whether the tensor of ``link`` is stored apart from its tower's hidden states."""
        return not link.hidden and self.modules.components[link.component].tower != tower

    def _keep(self, link: Link, samples: Samples, folder: Path, name: str) -> None:
        maker, config = self.modules.components[link.component], self.modules.config
        tensor = next(t for t in maker.spec(config, Ranges()).outputs if t.name == link.output)
        sizes = tuple(size for size in tensor.shape if isinstance(size, int))
        shapes = [(call.shape[0], *sizes) for call in samples.calls if call.component == link.component]
        self._outputs[link.component, link.output] = Spill(folder, f"{name}-{link.output}", shapes)

    @torch.inference_mode()
    def run(self, segment: Segment, call: Call, pixels: Array | None) -> Made:
        """One call through one segment: hidden states [B, T, H], and the component's outputs made there."""
        with self.observer.watch(call.component) if self.observer else nullcontext():
            return self._run(segment, call, pixels)

    def _run(self, segment: Segment, call: Call, pixels: Array | None) -> Made:
        component, config = self.modules.components[call.component], self.modules.config
        module, context = self.modules.by_name[call.component], self._context(segment, call, pixels)
        spill = self.spills[segment.tower]
        if segment.entry:
            x = component.enter(config, module, context)
            if not component.depth(config):
                return x, self._kept(call, component.leave(config, module, x, context))
            spill.write(0, call.place, x)
            return x, {}
        x = spill.read(segment.block % 2, call.place).to(self.modules.device)
        if segment.exit:
            return x, self._kept(call, component.leave(config, module, x, context))
        x, keys_values = component.run_block(config, module, segment.block, x, context)
        spill.write((segment.block + 1) % 2, call.place, x)
        if call.keeps:
            self._past = keys_values
        outputs = component.after_block(config, module, segment.block + 1, x)
        if component.cached and keys_values is not None:
            outputs[f"key.{segment.block}"], outputs[f"value.{segment.block}"] = keys_values
        return x, self._kept(call, outputs)

    @torch.inference_mode()
    def replay(self, segment: Segment, call: Call) -> tuple[Tensor, Tensor]:
        """Input and output of a block, recomputed after :meth:`run` of that call; nothing is stored."""
        component = self.modules.components[call.component]
        x = self.spills[segment.tower].read(segment.block % 2, call.place).to(self.modules.device)
        module, context = self.modules.by_name[call.component], self._context(segment, call, None)
        return x, component.run_block(self.modules.config, module, segment.block, x, context)[0]

    def finished(self, segment: Segment) -> None:
        """``segment`` has run on every call: write its outputs to disk, free its inputs."""
        spill = self.spills[segment.tower]
        for (component, _), outputs in self._outputs.items():
            if component in self._written:
                outputs.sync(0)
        self._written.clear()
        if segment.exit:
            spill.remove(1 - segment.block % 2)
            return
        spill.sync((segment.block + 1) % 2)

    def whole(self, segment: Segment) -> bool:
        """Whether everything ``segment`` reads is there."""
        checks = [] if segment.entry else [self.spills[segment.tower].whole(segment.block % 2)]
        for name in self.components:
            component = self.modules.components[name]
            if component.tower == segment.tower:
                links = component.links(self.modules.config).values()
                checks += [
                    self._whole(link) for link in links if link.hidden or self._spilled(component.tower, link)
                ]
        return all(checks)

    def _whole(self, link: Link) -> bool:
        if link.hidden:
            return self.source.spills[self._tower(link)].whole(self._side(link))
        return self.source._outputs[link.component, link.output].whole(0)

    def close(self) -> None:
        """Close the files."""
        for spill in (*self.spills.values(), *self._outputs.values()):
            spill.close()

    def _context(self, segment: Segment, call: Call, pixels: Array | None) -> Context:
        arrays = call.inputs if pixels is None else {**call.inputs, "pixel_values": pixels}
        device, past = self.modules.device, None
        inputs = {n: torch.from_numpy(np.ascontiguousarray(a)).to(device) for n, a in arrays.items()}
        # Keys and values are those of the block that runs; the last batch's are left at the exit.
        if (
            call.continues is not None
            and self.source._past is not None
            and not (segment.entry or segment.exit)
        ):
            keys, values = (tensor[call.continues].contiguous() for tensor in self.source._past)
            past = keys, values
        modules = {**self.source.modules.by_name, **self.modules.by_name}
        return Context(inputs, len(call.rows), _Linked(self, call), past, modules, call.cut)

    def _kept(self, call: Call, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """``outputs``, of which those that other towers read are kept."""
        for name, tensor in outputs.items():
            spill = self._outputs.get((call.component, name))
            if spill is not None:
                spill.write(0, call.batch, tensor)
                self._written.add(call.component)
        return outputs

    def linked(self, link: Link, call: Call) -> Tensor:
        """Rows of ``call`` of the tensor of ``link``."""
        if link.hidden:
            place = self._places[link.component, call.batch]
            tensor = self.source.spills[self._tower(link)].read(self._side(link), place)
        else:
            tensor = self.source._outputs[link.component, link.output].read(0, call.batch)
        rows: Tensor = link.taken(tensor, call.rows)
        return rows.to(self.modules.device)

    def _tower(self, link: Link) -> str:
        return self.modules.components[link.component].tower

    def _side(self, link: Link) -> int:
        """The spill file with the last hidden states of the tower that ``link`` reads."""
        return depths(self.modules.config)[self._tower(link)] % 2


class _Linked(Mapping[str, Tensor]):
    """Outputs of other towers for one call, read when a component needs them."""

    def __init__(self, flow: Flow, call: Call) -> None:
        self._flow, self._call = flow, call
        component = flow.modules.components[call.component]
        self._links = component.links(flow.modules.config)

    def __getitem__(self, name: str) -> Tensor:
        return self._flow.linked(self._links[name], self._call)

    def __iter__(self) -> Iterator[str]:
        return iter(self._links)

    def __len__(self) -> int:
        return len(self._links)


def visit(
    segment: Segment,
    samples: Samples,
    flows: Sequence[Flow],
    progress: Callable[[int], None] = lambda count: None,
    before: int = 0,
) -> Iterator[tuple[Call, list[Made | None]]]:
    """Run every call of a tower through ``segment``; flows side by side, each weight loaded once.

    Args:
        segment: to run.
        samples: the calls.
        flows: all with calls of ``samples``.
        progress: callback with the number of samples done, ``before`` added.
        before: count at the start of this segment.

    Yields:
        A call, and the result of :meth:`Flow.run` for each flow (None where it lacks the component).
    """
    calls, images = samples.tower(segment.tower), _Images(samples)
    config, components = flows[0].modules.config, flows[0].modules.components
    with ExitStack() as stack:
        # cuDNN rounds fp32 convolutions to TF32 by default.
        stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
        for modules in {id(flow.modules): flow.modules for flow in flows}.values():
            stack.enter_context(modules.filled(segment))
        samples_done = 0
        for call in calls:
            if call.batch * samples.batch_size > samples_done:
                samples_done = call.batch * samples.batch_size
                progress(before + samples_done)
            component = components[call.component]
            if not component.depth(config) and not segment.entry:
                continue
            pixels = images.of(call) if segment.entry and component.sees(config) else None
            yield (
                call,
                [f.run(segment, call, pixels) if call.component in f.components else None for f in flows],
            )
    for flow in flows:
        if segment.tower in flow.spills:
            flow.finished(segment)
    progress(before + samples.count)


class _Images:
    """The images of one batch after another; each batch is read once, when a call needs it."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._batches: Iterator[Array] | None = None
        self._number, self._pixels = -1, np.zeros((0, 3, 0, 0), np.float32)

    def of(self, call: Call) -> Array:
        """The rows of ``call``, float32 [R, 3, S, S]."""
        if self._batches is None:
            self._batches = self._samples.pixels()
        while self._number < call.batch:
            self._pixels = next(self._batches)
            self._number += 1
        return self._pixels if len(call.rows) == len(self._pixels) else self._pixels[call.rows]
