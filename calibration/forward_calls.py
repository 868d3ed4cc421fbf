"""A sample set as the calls (:class:`..models.calls.Call`) of a model's components."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..arrays import Array
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.calls import Call
from ..models.registry import ModelConfig, component_of, family_of
from .dataset import CalibrationSet


@dataclass(frozen=True)
class Samples:
    """A set as calls; images are read when they are used.

    Args:
        calls: in the order of :func:`.component_chain.run_chain`, batch after batch.
        pixels: images of each batch, float32 [B, 3, S, S].
        towers: component -> its tower.
        count: how many samples.
        batch_size: samples in a batch; the last may have fewer.
    """

    calls: Sequence[Call]
    pixels: Callable[[], Iterator[Array]]
    towers: dict[str, str]
    count: int
    batch_size: int

    def tower(self, name: str) -> list[Call]:
        """The calls that run through tower ``name``."""
        return [call for call in self.calls if self.towers[call.component] == name]


def samples_of(
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    config: ModelConfig,
    components: Sequence[str],
    batch_size: int,
) -> Samples:
    """``chosen`` as calls of ``components``.

    Raises:
        UsageError, CapabilityError: a model of ``config`` has no such component.
    """
    towers = {name: component_of(name, config).tower for name in components}
    places = dict.fromkeys(towers.values(), 0)
    calls: list[Call] = []
    for batch in chosen.sample_batches(tokenizer, batch_size):
        for call in family_of(config).calls(config, components, batch):
            tower = towers[call.component]
            calls.append(replace(call, place=places[tower]))
            places[tower] += 1
    return Samples(calls, lambda: chosen.pixels(settings, batch_size), towers, len(chosen), batch_size)
