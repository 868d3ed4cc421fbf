"""Encoding against PyTorch with the same weights in fp32: eager, and compiled by ``torch.compile``.

PyTorch gets tensors and runs in inference mode with attention by ``scaled_dot_product_attention``; the
compiler's default settings with fixed shapes. It compiles before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.models.load import load_model
from ivl_export.profiles.measure.baseline import torch_threads
from ivl_export.profiles.measure.inputs import TEXT, random_pixels
from ivl_export.runtime import InternVL

if TYPE_CHECKING:
    import torch

BATCHES = (1, 8)
TOLERANCE = 1e-4
"""Of the largest component of an embedding: fp32 sums in another order."""
Encode = Callable[[], np.ndarray[Any, Any]]


def measure(setting: Setting) -> Iterator[Comparison]:
    """InternVL-C, InternVL-G and text at batch 1 and 8."""
    import torch

    with torch_threads(setting.threads), torch.inference_mode():
        for name in setting.models:
            with InternVL.load(setting.bundle(name, "fp32"), threads=setting.threads) as ours:
                theirs = load_model(setting.checkpoint(name))
                for batch in BATCHES:
                    for case, our, eager, compiled in calls(ours, theirs, batch):
                        ways = {"runtime": our, "torch eager": eager, "torch.compile": compiled}
                        yield compared(f"{name}, {case}, batch {batch}", ways, setting, batch)


def compared(case: str, ways: Mapping[str, Encode], setting: Setting, batch: int) -> Comparison:
    """Time ``ways``, the runtime's first, after looking whether all compute the same.

    Raises:
        AssertionError: they do not.
    """
    (first, *others), (reference, *results) = ways, [call() for call in ways.values()]
    apart = {
        name: float(np.abs(out - reference).max() / np.abs(reference).max())
        for name, out in zip(others, results, strict=True)
    }
    if max(apart.values()) > TOLERANCE:
        raise AssertionError(f"{case}: not the same embeddings: {apart}")
    candidates = [Candidate(name, call, "fp32", batch) for name, call in ways.items()]
    goals = tuple(Goal(first, name, "speed", 1.0) for name in others)
    return Comparison(case, side_by_side(candidates, setting.rounds), goals, {"apart": apart})


def calls(ours: InternVL, theirs: Any, batch: int) -> Iterator[tuple[str, Encode, Encode, Encode]]:
    """(what, ours, eager, compiled), each giving embeddings [batch, E]."""
    import torch

    size = ours.image_settings.size
    pixels = random_pixels((batch, 3, size, size))
    texts = [TEXT] * batch
    ids, _ = ours.tokenizer.encode_contrastive(texts)
    images, tokens = torch.from_numpy(pixels), torch.from_numpy(ids)
    for case, our, call, inputs_given in (
        ("InternVL-C", lambda: ours.encode_image(pixels), lambda x: theirs.encode_image(x), images),
        (
            "InternVL-G",
            lambda: ours.encode_image(pixels, "InternVL-G"),
            lambda x: theirs.encode_image(x, "InternVL-G"),
            images,
        ),
        ("text", lambda: ours.encode_text(texts), lambda x: theirs.encode_text(x), tokens),
    ):
        yield case, our, _numpy(call, inputs_given), _numpy(torch.compile(call, dynamic=False), inputs_given)


def _numpy(call: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> Encode:
    return lambda: np.asarray(call(inputs).float().numpy())
