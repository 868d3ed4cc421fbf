"""What the fp32 model gives on a sample set, streamed block by block and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import SentencePieceTokenizer
from ..models.config import ChatConfig
from .calibrate import spilled_bytes
from .chat import LONGEST, ChatBatch, chat_batches, empty_past, splice, visual_of
from .component_chain import Arrays, Step
from .dataset import MAX_STEP, Batch, CalibrationSet

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint
    from ..models.config import Whole
    from .forward_calls import Call


def recorded_bytes(config: Whole, components: Sequence[str], samples: int) -> int:
    """At most what a :class:`Recording` takes on disk: activations, and the large outputs."""
    from .segments import needed

    vision, llama, order = config.vision, config.llama, needed(components, config)
    cached = 2 * llama.num_hidden_layers * llama.hidden_size
    if isinstance(config, ChatConfig):
        values = config.num_features * llama.hidden_size * ("vision_chat" in order)
        if config.queries:
            values += config.num_tokens * vision.hidden_size + config.num_queries * llama.hidden_size
        text = config.num_visual + LONGEST + MAX_STEP
        values += (text * (cached + llama.hidden_size) + llama.vocab_size) * ("decoder" in order)
        return spilled_bytes(config, components, samples) + 4 * samples * values
    tokens = vision.num_tokens * vision.hidden_size * (1 + len(vision.feature_blocks))
    values = tokens * ("vision" in order)
    values += config.num_query_token * (cached + llama.hidden_size) * ("qllama_query" in order)
    values += (MAX_STEP * cached + llama.vocab_size) * ("qllama_step" in order)
    return spilled_bytes(config, components, samples) + 4 * samples * values


class Recording:
    """Outputs of the fp32 components on ``chosen``; memory holds one block and one batch.

    Args:
        checkpoint: the weights.
        components: those wanted; the ones they take inputs from are recorded too.
        chosen: the samples.
        settings, tokenizer: of the model.
        folder: where outputs and, meanwhile, activations lie; the caller removes it.
        batch_size: samples in memory at a time.
        progress: hears how much of :func:`.calibrate.calibration_units` is done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        components: Sequence[str],
        chosen: CalibrationSet,
        settings: ImageSettings,
        tokenizer: SentencePieceTokenizer,
        folder: Path,
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        from ..export.components import component_spec
        from .block_stream import Flow, visit
        from .forward_calls import samples_of
        from .segments import Modules, needed, parts

        order = needed(components, checkpoint.whole)
        self.folder = folder
        samples = samples_of(chosen, settings, tokenizer, checkpoint.whole, order, batch_size)
        self._calls = samples.calls
        self._batches: Callable[[], Iterator[Batch | ChatBatch]] = partial(
            chosen.batches, settings, tokenizer, batch_size
        )
        self._llama = checkpoint.whole.llama
        if isinstance(checkpoint.whole, ChatConfig):
            self._batches = partial(chat_batches, chosen, settings, tokenizer, self._llama, batch_size)
        self._names = {c: [t.name for t in component_spec(c, checkpoint.whole).outputs] for c in order}
        flow = Flow(Modules(checkpoint, order), samples, folder)
        try:
            for number, part in enumerate(parts(checkpoint.whole, order)):
                for call, [made] in visit(part, samples, [flow], progress, number * samples.count):
                    assert made is not None
                    for name, tensor in made[1].items():
                        np.save(self._path(call, name), tensor.cpu().numpy())
        finally:
            flow.close()

    def __iter__(self) -> Iterator[tuple[Batch | ChatBatch, list[Step]]]:
        """Every batch, and its steps as :func:`.component_chain.run_chain` gives them."""
        for number, batch in enumerate(self._batches()):
            made: Arrays = {"pixel_values": batch.pixel_values}
            steps = []
            for call in self._calls:
                if call.batch != number:
                    continue
                outputs = {n: np.load(self._path(call, n)) for n in self._names[call.component]}
                steps.append(Step(call.component, self._inputs(call, made), outputs))
                if call.component not in ("qllama_text", "qllama_step"):
                    made.update(outputs)
            yield batch, steps

    def _inputs(self, call: Call, made: Arrays) -> Arrays:
        """What ``call`` was given, also by other components."""
        if call.component != "decoder":
            return {**call.inputs, **_taken(call, made)}
        own = {name: array for name, array in call.inputs.items() if name != "input_ids"}
        past = empty_past(len(call.rows), self._llama) if call.cut is not None else _past(made)
        x = splice(made["input_embeds"], visual_of(made)[call.rows], call.cut)
        return {"input_embeds": x, **own, **past}

    def _path(self, call: Call, name: str) -> Path:
        return self.folder / f"{call.component}-{call.place}.{name}.npy"


def _taken(call: Call, made: Arrays) -> Arrays:
    """The inputs of ``call`` that are pixels, or other components' outputs."""
    from .segments import TOKENS_OF

    if call.component == "qllama_step":
        return {name: array[call.rows] for name, array in _past(made).items()}
    if call.component in TOKENS_OF:
        return {"tokens": made["tokens"][call.rows]}
    taken = {"vision": "pixel_values", "vision_chat": "pixel_values"}
    name = taken.get(call.component)
    return {name: made[name]} if name else {}


def _past(made: Arrays) -> Arrays:
    return {f"past_{n}": a for n, a in made.items() if n.startswith(("key.", "value."))}
