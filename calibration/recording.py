"""What the fp32 model gives on a sample set, streamed block by block and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..preprocess import ImageSettings, Tokenizer
from .calibrate import spilled_bytes
from .chain import Arrays, Step
from .dataset import MAX_STEP, Batch, CalibrationSet

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint
    from ..models.config import InternVLConfig
    from .stream import Call


def recorded_bytes(config: InternVLConfig, components: Sequence[str], samples: int) -> int:
    """At most what a :class:`Recording` takes on disk: activations, and the large outputs."""
    from .parts import needed

    vision, qllama, order = config.vision, config.qllama, needed(components)
    cached = 2 * qllama.num_hidden_layers * qllama.hidden_size
    values = vision.num_tokens * vision.hidden_size * ("vision" in order)
    values += config.num_query_token * (cached + qllama.hidden_size) * ("qllama_query" in order)
    values += (MAX_STEP * cached + qllama.vocab_size) * ("qllama_step" in order)
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
        tokenizer: Tokenizer,
        folder: Path,
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        from ..export.components import component_spec
        from .parts import Modules, needed, parts
        from .stream import Flow, samples_of, visit

        order = needed(components)
        self.folder = folder
        samples = samples_of(chosen, settings, tokenizer, checkpoint.config, order, batch_size)
        self._calls = samples.calls
        self._batches = partial(chosen.batches, settings, tokenizer, batch_size)
        self._names = {c: [t.name for t in component_spec(c, checkpoint.config).outputs] for c in order}
        flow = Flow(Modules(checkpoint, order), samples, folder)
        try:
            for number, part in enumerate(parts(checkpoint.config, order)):
                for call, [made] in visit(part, samples, [flow], progress, number * samples.count):
                    assert made is not None
                    for name, tensor in made[1].items():
                        np.save(self._path(call, name), tensor.cpu().numpy())
        finally:
            flow.close()

    def __iter__(self) -> Iterator[tuple[Batch, list[Step]]]:
        """Every batch, and its steps as :func:`.chain.run_chain` gives them."""
        for number, batch in enumerate(self._batches()):
            made: Arrays = {"pixel_values": batch.pixel_values}
            steps = []
            for call in self._calls:
                if call.batch != number:
                    continue
                outputs = {n: np.load(self._path(call, n)) for n in self._names[call.component]}
                steps.append(Step(call.component, {**call.inputs, **_taken(call, made)}, outputs))
                if call.component in ("vision", "qllama_query"):
                    made.update(outputs)
            yield batch, steps

    def _path(self, call: Call, name: str) -> Path:
        return self.folder / f"{call.component}-{call.place}.{name}.npy"


def _taken(call: Call, made: Arrays) -> Arrays:
    """The inputs of ``call`` that are pixels, or other components' outputs."""
    if call.component == "qllama_step":
        kept = ((n, a) for n, a in made.items() if n.startswith(("key.", "value.")))
        return {f"past_{name}": array[call.rows] for name, array in kept}
    taken = {"vision": "pixel_values", "qllama_query": "tokens"}.get(call.component)
    return {taken: made[taken]} if taken else {}
