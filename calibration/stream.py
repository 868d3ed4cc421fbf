"""Running a sample set through a model block by block: one block's weights in memory, activations on disk.

A *call* is one run of one component on some rows of a batch. All calls of a tower go through one part, then
through the next. Query and step passes of a layer run in the same visit, so that the step finds the keys and
values of its layer at hand and no cache is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from ..errors import CapabilityError
from ..models.chat_config import ChatConfig
from ..models.qllama import KeyValue
from ..preprocess import Array, ImageSettings, Tokenizer
from .chain import Arrays, groups, step_inputs
from .chat import dialogues_of, runs
from .chat import step_inputs as chat_inputs
from .dataset import CalibrationSet, Texts
from .parts import ORDER, TOWERS, WITHOUT_BLOCKS, Context, Modules, Part, enter, leave, run_block
from .spill import Spill

if TYPE_CHECKING:
    from ..models.chat_config import Whole
    from ..models.config import InternVLConfig

Made: TypeAlias = "tuple[torch.Tensor, dict[str, torch.Tensor]]"
"""Hidden states behind a part, and the component's outputs made there."""

CACHED = ("qllama_query", "qllama_step", "decoder")
"""Components that give out their keys and values."""


@dataclass(frozen=True)
class Call:
    """One run of a component.

    Args:
        component: its name.
        batch: number of the batch.
        rows: which samples of the batch.
        inputs: ids, lengths, positions, mask; not what other components make, and no pixels.
        shape: of its hidden states, [B, T, H].
        place: where its hidden states lie in the tower's spill.
        cut: of a chat prompt, how many text tokens stand before the image.
    """

    component: str
    batch: int
    rows: list[int]
    inputs: Arrays
    shape: tuple[int, int, int]
    place: int
    cut: int | None = None


@dataclass(frozen=True)
class Samples:
    """A set as calls; images are read when they are asked for.

    Args:
        calls: in the order of :func:`.chain.run_chain`, batch after batch.
        pixels: images of each batch, float32 [B, 3, S, S].
        count: how many samples.
        batch_size: samples in a batch; the last may have fewer.
    """

    calls: Sequence[Call]
    pixels: Callable[[], Iterator[Array]]
    count: int
    batch_size: int

    def tower(self, name: str) -> list[Call]:
        """The calls that run through tower ``name``."""
        return [call for call in self.calls if call.component in TOWERS[name]]


def samples_of(
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    config: Whole,
    components: Sequence[str],
    batch_size: int,
) -> Samples:
    """``chosen`` as calls of ``components``.

    Raises:
        CapabilityError: a component that runs through neither tower.
    """
    unknown = [c for c in components if c not in ORDER]
    if unknown:
        raise CapabilityError(
            f"{', '.join(unknown)} cannot be calibrated.", f"Known components are {', '.join(ORDER)}."
        )
    if isinstance(config, ChatConfig):
        calls = _chat_calls(chosen, settings, tokenizer, config, components, batch_size)
    else:
        calls = _internvl_calls(chosen, settings, tokenizer, config, components, batch_size)
    return Samples(calls, lambda: chosen.pixels(settings, batch_size), len(chosen), batch_size)


def _chat_calls(
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    config: ChatConfig,
    components: Sequence[str],
    batch_size: int,
) -> list[Call]:
    calls: list[Call] = []
    place, width = 0, config.decoder.hidden_size
    patches = (settings.size // config.vision.patch_size) ** 2
    for batch, said in enumerate(dialogues_of(chosen, tokenizer, batch_size)):
        if "vision_chat" in components:
            shape = (len(said), 1 + patches, config.vision.hidden_size)
            calls.append(Call("vision_chat", batch, list(range(len(said))), {}, shape, batch))
        past = 0
        for run in runs(said) if set(components) & set(TOWERS["decoder"]) else ():
            rows, length = len(run.rows), run.length(config.num_visual)
            past = past if run.cut is None else 0
            if "decoder_embed" in components:
                ids = {"input_ids": run.ids}
                calls.append(Call("decoder_embed", batch, run.rows, ids, (rows, 0, width), place))
                place += 1
            if "decoder" in components:
                inputs = {"input_ids": run.ids, **chat_inputs(rows, length, past)}
                calls.append(Call("decoder", batch, run.rows, inputs, (rows, length, width), place, run.cut))
                place += 1
            past = length
    return calls


def _internvl_calls(
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    config: InternVLConfig,
    components: Sequence[str],
    batch_size: int,
) -> list[Call]:
    calls: list[Call] = []
    places = dict.fromkeys(TOWERS, 0)
    width = {"vision": config.vision.hidden_size, "qllama": config.qllama.hidden_size}
    for batch, texts in enumerate(chosen.texts(tokenizer, batch_size)):
        for component in components:
            tower = next(name for name, members in TOWERS.items() if component in members)
            for rows, inputs, length in _runs(component, texts, settings, config):
                shape = (len(rows), length, width[tower])
                calls.append(Call(component, batch, rows, inputs, shape, places[tower]))
                places[tower] += 1
    return calls


def _runs(
    component: str, texts: Texts, settings: ImageSettings, config: InternVLConfig
) -> Iterator[tuple[list[int], Arrays, int]]:
    """Rows, inputs and length of every call of ``component`` on a batch."""
    every, queries = list(range(len(texts.lengths))), config.num_query_token
    if component == "vision":
        yield every, {}, 1 + (settings.size // config.vision.patch_size) ** 2
    elif component == "qllama_query":
        yield every, {}, queries
    elif component == "qllama_text":
        for rows, length in groups(texts.lengths.tolist()):
            inputs = {"input_ids": texts.input_ids[rows, :length], "lengths": texts.lengths[rows]}
            yield rows, inputs, length
    else:
        for rows, length in groups([len(ids) for ids in texts.caption_ids]):
            ids = np.array([texts.caption_ids[row] for row in rows], np.int64)
            yield rows, step_inputs(ids, queries), length


class Flow:
    """The hidden states of all samples on their way through ``modules``.

    Args:
        modules: what they run through.
        samples: the calls.
        folder: where hidden states are spilled.
        name: of the files there.
        given: another flow whose tokens, keys and values the query and step passes take; None: its own.
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
        self._token_places = {c.batch: c.place for c in samples.tower("vision")}
        seen = [call.shape for call in samples.tower("vision_chat")]
        self._visual: Spill | None = None
        if "vision_chat" in self.components and isinstance(config := modules.config, ChatConfig):
            rows: list[tuple[int, ...]] = [
                (size[0], config.num_visual, config.decoder.hidden_size) for size in seen
            ]
            self._visual = Spill(folder, f"{name}-visual", rows)
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
            left = leave(component, module, x, Context(inputs, len(call.rows)))
            if self._visual is not None and component == "vision_chat":
                self._visual.write(0, call.place, left["visual_embeds"])
            return x, left
        x, made = run_block(component, module, part.block, x, self._context(call, inputs))
        spill.write((part.block + 1) % 2, call.place, x)
        if component == "qllama_query" or call.cut is not None:
            self._past = made
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
        if part.exit:
            spill.remove(1 - part.block % 2)
            if self._visual is not None and part.tower == "vision_chat":
                self._visual.sync(0)
            return
        spill.sync((part.block + 1) % 2)

    def whole(self, part: Part) -> bool:
        """Whether everything ``part`` reads is there."""
        wanted = [] if part.entry else [self.spills[part.tower].whole(part.block % 2)]
        if part.tower == "qllama" and "qllama_query" in self.components:
            tokens = self.given.spills["vision"]
            wanted.append(tokens.whole(self.given.modules.config.vision.num_hidden_layers % 2))
        if part.tower == "decoder" and part.entry and self.given._visual is not None:
            wanted.append(self.given._visual.whole(0))
        return all(wanted)

    def close(self) -> None:
        """Close the files."""
        for spill in (*self.spills.values(), *([self._visual] if self._visual else [])):
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
        assert self.given._visual is not None
        visual = self.given._visual.read(0, call.batch).to(self.modules.device)[call.rows]
        return torch.cat([x[:, : call.cut], visual, x[:, call.cut :]], 1)

    def _tokens(self, call: Call) -> torch.Tensor | None:
        if call.component != "qllama_query":
            return None
        side = self.modules.config.vision.num_hidden_layers % 2
        place = self._token_places[call.batch]
        return self.given.spills["vision"].read(side, place).to(self.modules.device)

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
