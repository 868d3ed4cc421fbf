"""Videos: the mean of their frames' embeddings (InternVL paper, zero-shot video classification)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..inputs.preprocess import ResizeMode
from ..inputs.video import Video, frames_of
from .image_batches import Floats
from .zero_shot import l2

if TYPE_CHECKING:
    from .model import InternVL, Mode


def encode_videos(
    model: InternVL, videos: Sequence[Video], frames: int, mode: Mode, resize: ResizeMode | None
) -> Floats:
    """Embeddings [V, E] float32: of each video the mean over its frames, each scaled to length 1 before.

    One video is in memory at a time. Errors as :func:`~ivl_export.inputs.video.frames_of`.
    """
    rows = [model.encode_image([], mode)]
    for video in videos:
        shown = frames_of(video, frames)
        rows.append(l2(model.encode_image(shown, mode, resize)).mean(0, keepdims=True))
    return np.concatenate(rows).astype(np.float32, copy=False)
