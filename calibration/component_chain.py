"""The components chained on one batch: what calibration observes and accuracy compares.

A runner takes a component's inputs by name and returns its outputs by name, in numpy: a torch module, an ONNX
Runtime session and an engine all fit. Texts run in groups of equal length, without padding, because padded
rows never reach an embedding or a token and so must not widen a range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..inputs.preprocess import Array
from .chat import ChatBatch, empty_past, runs, splice, visual_of
from .chat import step_inputs as chat_inputs
from .dataset import Batch

Arrays: TypeAlias = "dict[str, Array]"
Runner = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Step:
    """One run of one component."""

    component: str
    inputs: Arrays
    outputs: Arrays


def run_chain(runners: Mapping[str, Runner], batch: Batch | ChatBatch) -> Iterator[Step]:
    """Run every component that has a runner, and whose inputs others made, on ``batch``.

    The caption decoder is fed prompt and caption at once behind the cache of the query pass (teacher
    forcing): the activations are those of the same tokens decoded one at a time, but ``lm_head``, which only
    the last position reaches, sees one row a sample.
    """
    if isinstance(batch, ChatBatch):
        yield from _run_chat(runners, batch)
        return
    made: Arrays = {}
    if "vision" in runners:
        step = _run(runners, "vision", {"pixel_values": batch.pixel_values})
        made = step.outputs
        yield step
    cache: Arrays = {}
    if "qllama_query" in runners and "tokens" in made:
        step = _run(runners, "qllama_query", {"tokens": made["tokens"]})
        cache = {name: array for name, array in step.outputs.items() if name.startswith(("key.", "value."))}
        yield step
    if "qllama_text" in runners:
        for rows, length in groups(batch.lengths.tolist()):
            inputs = {"input_ids": batch.input_ids[rows, :length], "lengths": batch.lengths[rows]}
            yield _run(runners, "qllama_text", inputs)
    if "qllama_step" in runners and cache:
        for rows, _ in groups([len(ids) for ids in batch.caption_ids]):
            ids = np.array([batch.caption_ids[row] for row in rows], np.int64)
            past = {f"past_{name}": array[rows] for name, array in cache.items()}
            inputs = {**step_inputs(ids, past["past_key.0"].shape[2]), **past}
            yield _run(runners, "qllama_step", inputs)
    if "qllama_itm" in runners and "tokens" in made:
        for rows, length in groups(batch.match_lengths.tolist()):
            texts = {"input_ids": batch.match_ids[rows, :length], "lengths": batch.match_lengths[rows]}
            yield _run(runners, "qllama_itm", {"tokens": made["tokens"][rows], **texts})


def _run_chat(runners: Mapping[str, Runner], batch: ChatBatch) -> Iterator[Step]:
    """Each group's prompts with an empty past, then its answers behind their cache."""
    visual: Array | None = None
    if "vision_chat" in runners:
        step = _run(runners, "vision_chat", {"pixel_values": batch.pixel_values})
        made = dict(step.outputs)
        yield step
        if "query_chat" in runners:
            step = _run(runners, "query_chat", {"tokens": made["tokens"]})
            made |= step.outputs
            yield step
        if "query_embeds" in made or "tokens" not in made:
            visual = visual_of(made)
    past: Arrays = {}
    for run in runs(batch.dialogues) if "decoder_embed" in runners else ():
        step = _run(runners, "decoder_embed", {"input_ids": run.ids})
        yield step
        if "decoder" not in runners or visual is None:
            continue
        x = splice(step.outputs["input_embeds"], visual[run.rows], run.cut)
        seen = 0 if run.cut is not None else past["past_key.0"].shape[2]
        if run.cut is not None:
            past = empty_past(len(run.rows), batch.decoder)
        inputs = {"input_embeds": x, **chat_inputs(len(x), x.shape[1], seen), **past}
        step = _run(runners, "decoder", inputs)
        past = {f"past_{n}": a for n, a in step.outputs.items() if n.startswith(("key.", "value."))}
        yield step


def step_inputs(ids: Array, past: int) -> Arrays:
    """Inputs of ``qllama_step`` for tokens [B, T] that follow ``past`` positions, without their cache."""
    batch, length = ids.shape
    return {
        "input_ids": ids,
        "positions": np.tile(np.arange(past, past + length, dtype=np.int64), (batch, 1)),
        "attention_mask": np.ones((batch, past + length), np.int64),
    }


def _run(runners: Mapping[str, Runner], component: str, inputs: Arrays) -> Step:
    return Step(component, inputs, runners[component](inputs))


def groups(lengths: list[int]) -> list[tuple[list[int], int]]:
    """Rows of equal length together: (rows, length), shortest first."""
    return [([i for i, n in enumerate(lengths) if n == length], length) for length in sorted(set(lengths))]
