"""The tensors of an InternVL 1.1 to 3.5 checkpoint under one set of keys, for every stored layout."""

from __future__ import annotations

import re
from pathlib import Path

from .storage import Rows, TensorRef, View, check_tensors
from .tiles_config import TilesConfig
from .tiles_layout import sources, stored_shapes
from .tiles_reading import refuse_flash
from .tiles_splits import Source

_SURPLUS = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.mask_token)")
_FLASH = re.compile(r"(model\.)?(pooling_before_gating|gating|mlp2)\..*")


def tiles_tensors(config: TilesConfig, stored: dict[str, TensorRef], source: Path) -> dict[str, TensorRef]:
    """Every tensor of a model of ``config`` by its key, as a view of the tensors of ``source``.

    Args:
        config: the model's sizes.
        stored: stored name to place.
        source: the checkpoint, in messages.

    Raises:
        CheckpointError: stored tensors are not those of the config.
        CapabilityError: the weights are an InternVL3.5-Flash's.
    """
    for name in stored:
        if _FLASH.fullmatch(name):
            refuse_flash(str(source), f"It holds {name}.")
    used = {name: ref for name, ref in stored.items() if not _SURPLUS.fullmatch(name)}
    sources_of = sources(config, used)
    check_tensors(source, used, stored_shapes(sources_of))
    return {key: _ref(part, used) for key, part in sources_of.items()}


def _ref(source: Source, stored: dict[str, TensorRef]) -> TensorRef:
    whole = source.parts[0]
    if len(source.parts) == 1 and whole.runs is None and source.columns == (0, 1) and not source.transposed:
        return stored[whole.name]
    rows = []
    for part in source.parts:
        ref = stored[part.name]
        height = 1
        for size in ref.shape[:-1] or ref.shape:
            height *= size
        rows.append(Rows(ref, part.runs or ((0, height),)))
    return View(tuple(rows), source.columns, source.transposed).ref(source.shape)
