"""Hidden states of the vision model for dense tasks, segmentation heads for one: the last, or any block's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..bundle.manifest import Manifest
from ..bundle.spec import FEATURES, ComponentSpec, block_number, feature_name
from ..engines.compatibility import build_line
from ..errors import CapabilityError
from ..inputs.preprocess import ResizeMode
from .image_batches import Floats, Images
from .loaded import fixed

if TYPE_CHECKING:
    from .model import InternVL


def dense(
    model: InternVL, images: Images, blocks: Sequence[int], resize: ResizeMode | None = None
) -> dict[int, Floats]:
    """Hidden states behind each of ``blocks``: number of the block -> [B, N, D] float32.

    The class token stands first, then the patches by row. ``blocks`` are numbers from 1, or from the end
    backwards: -1 is the last.

    Raises:
        UsageError: the vision tower has no such block.
        CapabilityError: the bundle was built without its output.
    """
    spec = model.components.spec("vision")
    names = outputs_of(model.bundle.manifest, spec, blocks)
    shape = [fixed(d) for d in next(t.shape for t in spec.outputs if t.name == "tokens")[1:]]
    parts: dict[int, list[Floats]] = {k: [np.zeros((0, *shape), np.float32)] for k in names}
    for pixels in model.pixel_batches(images, resize):
        made = model.components.run("vision", {"pixel_values": pixels}, list(names.values()))
        for block, name in names.items():
            parts[block].append(made[name].astype(np.float32, copy=False))
    return {block: np.concatenate(found) for block, found in parts.items()}


def outputs_of(manifest: Manifest, spec: ComponentSpec, blocks: Sequence[int]) -> dict[int, str]:
    """Number of each of ``blocks`` -> the output of ``vision`` (contract ``spec``) that is its hidden state.

    Errors as :func:`dense`.
    """
    depth = int(manifest.model.config["vision_config"]["num_hidden_layers"])
    kept = [int(t.name.removeprefix(FEATURES)) for t in spec.outputs if t.name.startswith(FEATURES)]
    known = {**{k: feature_name(k) for k in kept}, depth: "tokens"}
    wanted = [block_number(block, depth) for block in blocks]
    missing = [k for k in wanted if k not in known]
    if missing:
        again = build_line(manifest, features=sorted({*kept, *missing}))
        raise CapabilityError(
            f"This bundle does not give the output of block {missing[0]}.",
            f"It was built to give {', '.join(map(str, known))}.",
            f"Build it again: {again}",
        )
    return {k: known[k] for k in wanted}
