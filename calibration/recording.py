"""Outputs of the fp32 model on a sample set, computed block by block and stored on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.calls import Arrays, Call
from ..models.registry import ModelConfig, component_of, component_spec
from .calibrate import spilled_bytes
from .component_chain import Step, chain_steps
from .dataset import Batch, CalibrationSet

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint
    from .magnitudes import Magnitudes


def recorded_bytes(config: ModelConfig, components: Sequence[str], samples: int) -> int:
    """Most bytes of disk that a :class:`Recording` takes: activations, and the outputs."""
    from .segments import needed

    values = sum(component_of(name, config).recorded(config) for name in needed(components, config))
    return spilled_bytes(config, components, samples) + 4 * samples * values


class Recording:
    """Outputs of the fp32 components on ``chosen``; memory holds one block and one batch.

    Args:
        checkpoint: the weights.
        components: to record; those they take inputs from are recorded too.
        chosen: the samples.
        settings, tokenizer: of the model.
        folder: for outputs and, meanwhile, activations; the caller removes it.
        batch_size: samples in memory at a time.
        progress: callback with the number of :func:`.calibrate.calibration_units` done.
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
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        from .block_stream import Flow, visit
        from .forward_calls import samples_of
        from .magnitudes import MagnitudeObserver
        from .segments import Modules, needed, segments

        self._config = checkpoint.model
        order = needed(components, self._config)
        self.folder = folder
        samples = samples_of(chosen, settings, tokenizer, self._config, order, batch_size)
        self._calls = samples.calls
        self._batches = partial(chosen.batches, settings, tokenizer, batch_size)
        self._names = {c: [t.name for t in component_spec(c, self._config).outputs] for c in order}
        modules = Modules(checkpoint, order)
        observer = MagnitudeObserver(modules.by_name)
        flow = Flow(modules, samples, folder, observer=observer)
        try:
            for number, segment in enumerate(segments(self._config, order)):
                for call, [result] in visit(segment, samples, [flow], progress, number * samples.count):
                    assert result is not None
                    for name, tensor in result[1].items():
                        np.save(self._path(call, name), tensor.cpu().numpy())
        finally:
            flow.close()
            observer.close()
        self.magnitudes: Magnitudes = observer.result(samples.count)
        """The largest magnitudes of all activations."""

    def __iter__(self) -> Iterator[tuple[Batch, list[Step]]]:
        """Every batch, and its steps as :func:`.component_chain.run_chain` gives them."""
        for number, batch in enumerate(self._batches()):
            calls = [call for call in self._calls if call.batch == number]
            yield batch, list(chain_steps(calls, batch.pixel_values, self._config, self._read))

    def _read(self, call: Call, _: Arrays) -> Arrays:
        return {name: np.load(self._path(call, name)) for name in self._names[call.component]}

    def _path(self, call: Call, name: str) -> Path:
        return self.folder / f"{call.component}-{call.place}.{name}.npy"
