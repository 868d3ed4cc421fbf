"""``ranges.json``: measured input ranges of linear layers and attentions, for each component. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ..errors import InputError, IntegrityError
from ..files.json import Count, decode, read_json
from ..files.write import atomic
from .algorithms import depends_on_type
from .attention import operand_names

VERSION = 2
Positive = Annotated[float, Meta(gt=0, title="a finite number over 0")]
Shape = Annotated[list[Annotated[int, Meta(gt=0)]], Meta(min_length=2, max_length=2)]


@dataclass(frozen=True)
class ActivationRanges:
    """Ranges (amax) of layer inputs, which map to a type's largest value, and their calibration set.

    Args:
        amax: component -> layer (published name without ``.weight``) -> amax of its input, over 0. The same
            LLaMA layer runs in three components, on different activations: each has its own. The operands
            of attentions are listed with them (:func:`.attention.operand_names`).
        algorithm: as :func:`.algorithms.algorithm_name` writes it.
        samples: how many images (and captions) were run.
        set_hash: :attr:`..calibration.dataset.CalibrationSet.hash`.
        synthetic: whether the images were drawn.
        without_caption: number of samples with a generic caption.
        model: revision of the checkpoint (:attr:`..models.checkpoint.Checkpoint.revision`).
        skipped: files of the set that could not be used.
        kinds: layer -> the type its ranges were picked for, where the algorithm depends on that; ``int8`` for
            layers that are left out.
        shapes: layer -> shape of its weight, [out, in].
        folded: sha256 of the factors that were folded into the weights before (``smoothing.safetensors``,
            next to this file); empty if none were.
    """

    amax: dict[str, dict[str, Positive]]
    algorithm: str
    samples: Count
    set_hash: str
    synthetic: bool
    without_caption: Count
    model: str
    skipped: Count = 0
    kinds: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    folded: str = ""

    def save(self, path: Path) -> None:
        """Write ``path`` (a ``ranges.json``), whole or not at all."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1, sort_keys=True, ensure_ascii=False)
        with atomic(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ActivationRanges:
        """Read ``path``; InputError names the faulty entry."""
        try:
            data = read_json(path)
        except OSError as error:
            raise InputError(
                f"Activation ranges {path} cannot be read.",
                error.strerror or str(error),
                "Check the path, or measure them: ivl-export calibrate.",
            ) from error
        except IntegrityError as error:
            raise InputError(error.what, error.why, "Calibrate again.") from error
        return cls.from_json(data, str(path))

    @classmethod
    def from_json(cls, data: Any, source: str = "ranges.json") -> ActivationRanges:
        """Inverse of :meth:`save`, from parsed JSON."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise InputError(f"{source} holds no ranges of version {VERSION}.", fix="Calibrate again.")
        entries = {key: value for key, value in data.items() if key != "version"}
        return decode(cls, entries, what=source, fix="Calibrate again.", error=InputError)

    def check(
        self, shapes: Mapping[str, Iterable[int]], types: Mapping[str, Mapping[str, str]], model: str
    ) -> None:
        """Refuse ranges of another model, and ranges that lack a quantised layer.

        Args:
            shapes: every linear layer of the model -> [out, in].
            types: component -> layer -> type its input is rounded to, for all that is built.
            model: the checkpoint's revision.

        Raises:
            InputError: naming the layer or component.
        """
        measured = {layer for layers in self.amax.values() for layer in layers}
        owners = {layer.rpartition(".")[0] for layer in shapes}
        measured -= {name for owner in owners for name in operand_names(owner)} - set(shapes)
        surplus = sorted(measured - set(shapes))
        if surplus:
            raise InputError(
                "The ranges do not belong to this model.",
                f"They name {len(surplus)} layers it does not have, for example {surplus[0]}.",
                "Calibrate this model, or give the ranges that were measured on it.",
            )
        for layer in sorted(measured):
            if self.shapes.get(layer) != list(shapes[layer]):
                raise InputError(
                    "The ranges do not belong to this model.",
                    f"They give {layer} the shape {self.shapes.get(layer)}, it is {list(shapes[layer])}.",
                    "Calibrate this model, or give the ranges that were measured on it.",
                )
        if self.model != model:
            raise InputError(
                "The ranges were measured on other weights.",
                f"They name revision {self.model[:12]}, the checkpoint is {model[:12]}.",
                "Calibrate this checkpoint.",
            )
        absent = sorted(set(types) - set(self.amax))
        if absent:
            raise InputError(
                f"The ranges say nothing about {', '.join(absent)}.", fix="Calibrate with these components."
            )
        for component, layers in types.items():
            self._check_layers(component, layers)

    def _check_layers(self, component: str, layers: Mapping[str, str]) -> None:
        lacking = sorted(set(layers) - set(self.amax[component]))
        if lacking:
            raise InputError(
                f"{len(lacking)} layers of {component} that are quantised have no range.",
                f"For example {lacking[0]}.",
                "Calibrate again.",
            )
        if not depends_on_type(self.algorithm):
            return
        for layer, kind in layers.items():
            if (picked := self.kinds.get(layer, "int8")) != kind:
                raise InputError(
                    f"The ranges were picked for other types: {layer} for {picked}, not {kind}.",
                    f"The ranges of {self.algorithm} depend on the type.",
                    "Calibrate with the --precision you build with, or with --algorithm max.",
                )
