"""``scales.json``: the measured input range of every linear layer, for each component. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, IntegrityError
from ..strict_json import read_json

VERSION = 1


@dataclass(frozen=True)
class Scales:
    """Largest input magnitudes, and what they were measured on.

    Args:
        amax: component -> layer (published name without ``.weight``) -> amax of its input, over 0. The same
            LLaMA layer runs in three components, on different activations: each has its own.
        algorithm: ``max`` or ``percentile-99.99``.
        samples: how many images (and captions) were run.
        set_hash: :attr:`.dataset.CalibrationSet.hash`.
        synthetic: whether the images were drawn.
        without_caption: how many samples used a stand-in caption.
        model: revision of the checkpoint (:attr:`..models.checkpoint.Checkpoint.revision`).
    """

    amax: dict[str, dict[str, float]]
    algorithm: str
    samples: int
    set_hash: str
    synthetic: bool
    without_caption: int
    model: str

    def save(self, path: Path) -> None:
        """Write ``path`` (a ``scales.json``)."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Scales:
        """Read ``path``; InputError names what does not fit."""
        try:
            data = read_json(path)
        except OSError as error:
            raise InputError(f"Scales {path} cannot be read.", error.strerror or str(error)) from error
        except IntegrityError as error:
            raise InputError(error.what, error.why, "Calibrate again.") from error
        return cls.from_json(data, str(path))

    @classmethod
    def from_json(cls, data: Any, source: str = "scales.json") -> Scales:
        """Inverse of :meth:`save`, from parsed JSON."""
        kinds = {
            "amax": dict,
            "algorithm": str,
            "samples": int,
            "set_hash": str,
            "synthetic": bool,
            "without_caption": int,
            "model": str,
        }
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise InputError(f"{source} holds no scales of version {VERSION}.", fix="Calibrate again.")
        wrong = [k for k, kind in kinds.items() if type(data.get(k)) is not kind]
        wrong += sorted(set(data) - set(kinds) - {"version"})
        if wrong:
            raise InputError(f"{source} is no scales file.", f"Entries {wrong}.", "Calibrate again.")
        for component, layers in data["amax"].items():
            if not isinstance(layers, dict):
                raise InputError(f"{source}: {component} is no table of layers.", fix="Calibrate again.")
            for layer, value in layers.items():
                if type(value) not in (int, float) or not 0 < value < float("inf"):
                    raise InputError(
                        f"{source}: {component}, {layer} has no usable range.",
                        f"It is {value!r}, not a finite number over 0.",
                        "Calibrate again.",
                    )
        amax = {c: {n: float(v) for n, v in layers.items()} for c, layers in data["amax"].items()}
        return cls(**{**{k: data[k] for k in kinds}, "amax": amax})

    def check(self, linear_names: Iterable[str], components: Iterable[str], model: str) -> None:
        """Refuse scales that were measured on another model, or that lack a component.

        Args:
            linear_names: all linear layers of the model.
            components: what is built.
            model: the checkpoint's revision.

        Raises:
            InputError: naming the layer or component.
        """
        measured = {layer for layers in self.amax.values() for layer in layers}
        surplus = sorted(measured - set(linear_names))
        if surplus:
            raise InputError(
                "The scales do not belong to this model.",
                f"They name {len(surplus)} layers it does not have, for example {surplus[0]}.",
                "Calibrate this model, or give the scales that were measured on it.",
            )
        absent = sorted(set(components) - set(self.amax))
        if absent:
            raise InputError(
                f"The scales say nothing about {', '.join(absent)}.", fix="Calibrate with these components."
            )
        if self.model != model:
            raise InputError(
                "The scales were measured on other weights.",
                f"They name revision {self.model[:12]}, the checkpoint is {model[:12]}.",
                "Calibrate this checkpoint.",
            )
