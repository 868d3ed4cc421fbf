"""A sample set as calls: which component runs on which rows, and on what.

A *call* is one run of one component on some rows of a batch, which have the same lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CapabilityError
from ..inputs.preprocess import Array, ImageSettings
from ..inputs.tokenizer import SentencePieceTokenizer
from ..models.config import ChatConfig
from .chat import dialogues_of, runs
from .chat import step_inputs as chat_inputs
from .component_chain import Arrays, groups, step_inputs
from .dataset import CalibrationSet, Texts
from .segments import ORDER, TOWERS

if TYPE_CHECKING:
    from ..models.config import InternVLConfig, Whole


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
        calls: in the order of :func:`.component_chain.run_chain`, batch after batch.
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
    tokenizer: SentencePieceTokenizer,
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
    tokenizer: SentencePieceTokenizer,
    config: ChatConfig,
    components: Sequence[str],
    batch_size: int,
) -> list[Call]:
    calls: list[Call] = []
    place, width = 0, config.decoder.hidden_size
    tokens = 1 + (settings.size // config.vision.patch_size) ** 2
    for batch, said in enumerate(dialogues_of(chosen, tokenizer, batch_size)):
        every = list(range(len(said)))
        if "vision_chat" in components:
            shape = (len(said), tokens, config.vision.hidden_size)
            calls.append(Call("vision_chat", batch, every, {}, shape, batch))
        if "query_chat" in components and config.queries:
            shape = (len(said), config.num_queries, config.queries.qllama.hidden_size)
            calls.append(Call("query_chat", batch, every, {}, shape, batch))
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
    tokenizer: SentencePieceTokenizer,
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
    elif component == "qllama_itm":
        for rows, length in groups(texts.match_lengths.tolist()):
            inputs = {"input_ids": texts.match_ids[rows, :length], "lengths": texts.match_lengths[rows]}
            yield rows, inputs, queries + length
    else:
        for rows, length in groups([len(ids) for ids in texts.caption_ids]):
            ids = np.array([texts.caption_ids[row] for row in rows], np.int64)
            yield rows, step_inputs(ids, queries), length
