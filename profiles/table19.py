"""The paper's cost table, and this machine's measurements beside it where they measure the same thing.

The paper's A100 and this machine are not set against each other: no ratio is formed between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..manifest import Model
from ..models.config import InternVLConfig, VisionConfig
from ..models.layout import expected_shapes
from .latency import Case

SOURCE = (
    "arXiv 2312.14238, Table 19: one A100, PyTorch, bf16, flash attention, batch 128; "
    "ms a pair, amortised over the batch"
)
TEXT_TOKENS = 80
"""Tokens of a text in the paper's table."""


@dataclass(frozen=True)
class Row:
    """Milliseconds for one image-text pair by part, and pairs per second; None where it does not apply."""

    method: str
    image_size: int
    vit_ms: float | None
    qllama_image_ms: float | None
    qllama_text_ms: float | None
    total_ms: float | None
    pairs_per_s: float | None


PAPER = (
    Row("InternVL-C", 224, 15.5, None, 4.9, 20.4, 48.9),
    Row("InternVL-C", 336, 35.2, None, 4.9, 40.1, 24.9),
    Row("InternVL-C", 448, 66.9, None, 4.9, 71.8, 13.9),
    Row("InternVL-G", 224, 15.5, 8.2, 4.9, 28.6, 35.0),
    Row("InternVL-G", 336, 35.2, 10.3, 4.9, 50.4, 19.8),
    Row("InternVL-G", 448, 66.9, 12.8, 4.9, 84.6, 11.8),
)


@dataclass(frozen=True)
class Table19:
    """The paper's rows and, line by line, what was measured here (None: it was not).

    ``batch`` is the batch size of the measured column, ``notes`` say what is empty and why.
    """

    paper: tuple[Row, ...]
    measured: tuple[Row | None, ...]
    batch: int | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        lines = [
            {"paper": vars(row), "measured": None if mine is None else vars(mine)}
            for row, mine in zip(self.paper, self.measured, strict=True)
        ]
        return {"source": SOURCE, "batch": self.batch, "lines": lines, "notes": list(self.notes)}


def table19(model: Model, config: InternVLConfig, cases: Iterable[Case]) -> Table19:
    """The table for the bundle of ``model``.

    Measured cells are filled for the full model alone, at the image size it was built for, from components
    timed alone at the largest batch that all of them have. A row's total is the sum of its parts.
    """
    empty: tuple[Row | None, ...] = (None,) * len(PAPER)
    why_not = different_model(model, config)
    if why_not:
        return Table19(PAPER, empty, None, (f"Measured cells are empty: {why_not}",))
    times = _times(cases)
    batches = set.intersection(*(set(times.get(part, {})) for part in ("vision", "qllama_text")))
    if not batches:
        why = f"vision and qllama_text at {TEXT_TOKENS} tokens were not measured at one batch size."
        return Table19(PAPER, empty, None, (f"Measured cells are empty: {why}",))
    batch, size = max(batches), config.vision.image_size
    notes = [f"Measured at {size} pixels, the size this bundle was built for; other sizes are empty."]
    if batch != 128:
        notes.append(f"Measured at batch {batch}; the paper's is 128.")
    notes.append("The measured parts include the pooling heads and the text projection (0.3% of the MACs).")
    query = times.get("qllama_query", {}).get(batch)
    if query is None:
        notes.append(f"qllama_query was not measured at batch {batch}: InternVL-G is empty.")
    vision, text = times["vision"][batch], times["qllama_text"][batch]
    measured: list[Row | None] = []
    for row in PAPER:
        image = query if row.method == "InternVL-G" else None
        if row.image_size != size or (row.method == "InternVL-G" and image is None):
            measured.append(None)
            continue
        total = vision + (image or 0.0) + text
        measured.append(Row(row.method, size, vision, image, text, total, 1e3 / total))
    return Table19(PAPER, tuple(measured), batch, tuple(notes))


def different_model(model: Model, config: InternVLConfig) -> str | None:
    """Why the paper's table is not about this model; None if it is (whatever its image size)."""
    full = InternVLConfig(vision=VisionConfig(image_size=config.vision.image_size))
    if _sizes(config) == _sizes(full) and model.parameters in (_count(full, False), _count(full, True)):
        return None
    return (
        f"the table is about InternVL-14B ({_count(InternVLConfig(), False):,} parameters); "
        f"this bundle holds {model.name} ({model.parameters:,} parameters)."
    )


def _count(config: InternVLConfig, contrastive_only: bool) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config, contrastive_only).values())


def _sizes(config: InternVLConfig) -> tuple[object, ...]:
    """What decides the amount of work."""
    v, q = config.vision, config.qllama
    vision = (v.hidden_size, v.num_hidden_layers, v.num_attention_heads, v.intermediate_size, v.patch_size)
    text = (q.hidden_size, q.num_hidden_layers, q.num_attention_heads, q.intermediate_size, q.vocab_size)
    rest = (config.clip_embed_dim, config.num_query_token, config.cross_attention_frequency)
    return (*vision, *text, *rest)


def _times(cases: Iterable[Case]) -> dict[str, dict[int, float]]:
    """Component to batch to median ms for one row, of the cases that the table is about."""
    times: dict[str, dict[int, float]] = {}
    for case in cases:
        if case.kind == "component" and case.sizes.get("text", TEXT_TOKENS) == TEXT_TOKENS:
            p50 = case.measurement.summary.p50_ms
            times.setdefault(case.name, {})[case.batch] = p50 / case.batch
    return times
