"""Running a sample set through a model block by block: one block's weights in memory, activations on disk.

All calls (:mod:`.forward_calls`) of a tower go through one part, then through the next. Query and step
passes of a
layer run in the same visit, so that the step finds the keys and values of its layer at hand and no cache is
kept; so do the prompts and answers of a chat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ..bundle.spec import feature_name
from ..inputs.preprocess import Array
from ..models.config import ChatConfig
from ..models.qllama import KeyValue
from .activation_store import Spill
from .forward_calls import Call, Samples
from .segments import (
    TOKENS_OF,
    TOWERS,
    WITHOUT_BLOCKS,
    Context,
    Modules,
    Part,
    depths,
    enter,
    leave,
    project_features,
    run_block,
)

Made: TypeAlias = "tuple[torch.Tensor, dict[str, torch.Tensor]]"
"""Hidden states behind a part, and the component's outputs made there."""

CACHED = ("qllama_query", "qllama_step", "decoder")
"""Components that give out their keys and values."""


class Flow:
    """The hidden states of all samples on their way through ``modules``.

    Args:
        modules: what they run through.
        samples: the calls.
        folder: where hidden states are spilled.
        name: of the files there.
        given: another flow whose tokens, keys and values the other passes take; None: its own.
        components: those of ``modules`` that run; None: all.
    """

    def __init__(
        self,
        modules: Modules,
        samples: Samples,
        folder: Path,
        name: str = "states",
        given: Flow | None = None,
        components: Sequence[str] | None = None,
    ) -> None:
        self.modules, self.given = modules, given or self
        self.components = tuple(modules.by_name if components is None else components)
        self.spills = {}
        for tower, members in TOWERS.items():
            if set(members) & set(self.components):
                shapes: list[tuple[int, ...]] = [call.shape for call in samples.tower(tower)]
                self.spills[tower] = Spill(folder, f"{name}-{tower}", shapes)
        self._token_places = {
            (c.component, c.batch): c.place for tower in TOKENS_OF.values() for c in samples.tower(tower)
        }
        self._visual: dict[str, Spill] = {}
        if isinstance(config := modules.config, ChatConfig):
            counts = {"query_chat": config.num_queries, "vision_chat": config.num_features}
            for component in (c for c in counts if c in self.components):
                width, calls = config.decoder.hidden_size, samples.tower(component)
                rows: list[tuple[int, ...]] = [(call.shape[0], counts[component], width) for call in calls]
                self._visual[component] = Spill(folder, f"{name}-{component}-out", rows)
        self._past: KeyValue | None = None

    @torch.inference_mode()
    def run(self, part: Part, call: Call, pixels: Array | None) -> Made:
        """One call through one part: its hidden states [B, T, H], and the component's outputs made there."""
        component, device = call.component, self.modules.device
        module = self.modules.by_name[component]
        arrays = call.inputs if pixels is None else {"pixel_values": pixels}
        inputs = {n: torch.from_numpy(np.ascontiguousarray(a)).to(device) for n, a in arrays.items()}
        spill = self.spills[part.tower]
        if part.entry:
            x = self._entered(call, module, Context(inputs, len(call.rows)))
            if component in WITHOUT_BLOCKS:
                return x, {"input_embeds": x}
            spill.write(0, call.place, x)
            return x, {}
        x = spill.read(part.block % 2, call.place).to(device)
        if part.exit:
            return x, self._kept(call, leave(component, module, x, Context(inputs, len(call.rows))))
        x, made = run_block(component, module, part.block, x, self._context(call, inputs))
        spill.write((part.block + 1) % 2, call.place, x)
        if part.features:
            return x, self._kept(call, project_features(module, x))
        if component == "qllama_query" or call.cut is not None:
            self._past = made
        number = part.block + 1
        if component == "vision" and number in self.modules.config.vision.feature_blocks:
            return x, {feature_name(number): x}
        if component not in CACHED:
            return x, {}
        return x, {
            f"{kind}.{part.block}": tensor for kind, tensor in zip(("key", "value"), made, strict=True)
        }

    @torch.inference_mode()
    def again(self, part: Part, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """What a block read, and what it makes of it now; nothing is kept. After :meth:`run` of that call."""
        device = self.modules.device
        inputs = {n: torch.from_numpy(np.ascontiguousarray(a)).to(device) for n, a in call.inputs.items()}
        x = self.spills[part.tower].read(part.block % 2, call.place).to(device)
        module = self.modules.by_name[call.component]
        return x, run_block(call.component, module, part.block, x, self._context(call, inputs))[0]

    def finished(self, part: Part) -> None:
        """``part`` has run on every call: what it made is safe, what it read is not needed any more."""
        spill = self.spills[part.tower]
        if part.tower in self._visual and (part.features or part.exit):
            self._visual[part.tower].sync(0)
        if part.exit:
            spill.remove(1 - part.block % 2)
            return
        spill.sync((part.block + 1) % 2)

    def whole(self, part: Part) -> bool:
        """Whether everything ``part`` reads is there."""
        wanted = [] if part.entry else [self.spills[part.tower].whole(part.block % 2)]
        here = set(TOWERS[part.tower]) & set(self.components) & set(TOKENS_OF)
        wanted += [self._spilled_tokens(component).whole(self._side(component)) for component in here]
        if part.tower == "decoder" and part.entry:
            wanted += [visual.whole(0) for visual in self.given._visual.values()]
        return all(wanted)

    def close(self) -> None:
        """Close the files."""
        for spill in (*self.spills.values(), *self._visual.values()):
            spill.close()

    def _context(self, call: Call, inputs: dict[str, torch.Tensor]) -> Context:
        return Context(inputs, len(call.rows), self._tokens(call), self._past_of(call))

    def _entered(self, call: Call, module: Any, given: Context) -> torch.Tensor:
        """Hidden states before the first block; a chat prompt's have their images in them."""
        if call.component != "decoder":
            return enter(call.component, module, given)
        holder = self.modules if "decoder_embed" in self.modules.by_name else self.given.modules
        x = enter("decoder_embed", holder.by_name["decoder_embed"], given)
        if call.cut is None:
            return x
        seen = [spill.read(0, call.batch)[call.rows] for spill in self.given._visual.values()]
        visual = [rows.to(self.modules.device) for rows in seen]
        return torch.cat([x[:, : call.cut], *visual, x[:, call.cut :]], 1)

    def _kept(self, call: Call, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``outputs``, of which those that the decoder reads are kept."""
        for name in ("visual_embeds", "query_embeds"):
            if name in outputs:
                self._visual[call.component].write(0, call.place, outputs[name])
        return outputs

    def _tokens(self, call: Call) -> torch.Tensor | None:
        if call.component not in TOKENS_OF:
            return None
        place = self._token_places[TOKENS_OF[call.component], call.batch]
        found = self._spilled_tokens(call.component).read(self._side(call.component), place)
        return found[call.rows].to(self.modules.device)

    def _spilled_tokens(self, component: str) -> Spill:
        return self.given.spills[TOKENS_OF[component]]

    def _side(self, component: str) -> int:
        """Where the last hidden states of the tower lie that ``component`` takes its tokens from."""
        return depths(self.given.modules.config)[TOKENS_OF[component]] % 2

    def _past_of(self, call: Call) -> KeyValue | None:
        past = self.given._past
        if call.component == "decoder":
            return past if call.cut is None else None
        if call.component != "qllama_step" or past is None:
            return None
        keys, values = (tensor[call.rows].contiguous() for tensor in past)
        return keys, values


def visit(
    part: Part,
    samples: Samples,
    flows: Sequence[Flow],
    progress: Callable[[int], None] = lambda done: None,
    before: int = 0,
) -> Iterator[tuple[Call, list[Made | None]]]:
    """Run every call of a tower through ``part``; flows side by side, each weight loaded once.

    Args:
        part: what runs.
        samples: the calls.
        flows: all with calls of ``samples``.
        progress: hears the samples that are through, ``before`` added.
        before: what was done before this part.

    Yields:
        A call, and what :meth:`Flow.run` gave for each flow (None where it lacks the component).
    """
    calls = samples.tower(part.tower)
    images = samples.pixels() if part.tower in ("vision", "vision_chat") and part.entry else None
    with ExitStack() as stack:
        # cuDNN rounds fp32 convolutions to TF32 unless told otherwise.
        stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
        for modules in {id(flow.modules): flow.modules for flow in flows}.values():
            stack.enter_context(modules.filled(part))
        done = 0
        for call in calls:
            if call.batch * samples.batch_size > done:
                done = call.batch * samples.batch_size
                progress(before + done)
            if call.component in WITHOUT_BLOCKS and not part.entry:
                continue
            pixels = next(images) if images is not None else None
            yield (
                call,
                [f.run(part, call, pixels) if call.component in f.components else None for f in flows],
            )
    for flow in flows:
        if part.tower in flow.spills:
            flow.finished(part)
    progress(before + samples.count)
