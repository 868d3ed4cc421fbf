"""The paper's cost tables, and this machine's measurements of the same things.

The paper's A100 and this machine are not compared: the only ratio is to the PyTorch bf16
baseline that ran on this machine in the same run. Cells that were not measured are empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...bundle.manifest import Model
from ...models.config import InternVLConfig, VisionConfig
from ...models.registry import expected_shapes
from ..measure.baseline import BACKEND, PRECISION
from ..measure.cases import Case

SOURCE = (
    "arXiv 2312.14238, Table 19: one A100, PyTorch, bf16, flash attention, batch 128; "
    "ms a pair, amortised over the batch"
)
SOURCE_11 = "arXiv 2312.14238, Table 11: InternViT-6B at 224 pixels, images per second"
TEXT_TOKENS = 80
"""Tokens of a text in the paper's table."""
BATCH = 128
"""Images and texts of a call in the paper's table."""
METHODS = ("InternVL-C", "InternVL-G")


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
PAPER_RATES = {1: 28.0, 128: 64.6}
"""Table 11: batch size to images per second of InternViT-6B at 224 pixels."""
PAPER_MODEL = "InternVL-14B"


@dataclass(frozen=True)
class Column:
    """A measured column: backend, precision, machine and batch size."""

    backend: str
    precision: str
    machine: str
    batch: int

    @property
    def title(self) -> str:
        """In a line."""
        return f"{self.backend} {self.precision}, {self.machine}, batch {self.batch}"


@dataclass(frozen=True)
class Line:
    """A line of Table 19: the paper's row if it has one, a measured row for every column, and the ratios.

    A ratio is the baseline's total divided by this column's: how many times as fast. It is given only with a
    baseline of the same machine and batch; None elsewhere.
    """

    model: str
    method: str
    image_size: int
    paper: Row | None
    measured: tuple[Row | None, ...]
    ratios: tuple[float | None, ...]


@dataclass(frozen=True)
class Rate:
    """A line of Table 11: images per second of the vision component; None: not measured."""

    model: str
    image_size: int
    batch: int
    paper: float | None
    measured: tuple[float | None, ...]


@dataclass(frozen=True)
class Table19:
    """Both tables: ``lines`` have a cell for each of ``columns``, ``rates`` for each of ``rate_columns``.

    The columns of the rates have the batch of their line, and 0 of their own. ``notes`` say what is empty
    and why.
    """

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    rate_columns: tuple[Column, ...]
    rates: tuple[Rate, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data with the paper's references."""
        data = {
            "columns": [vars(column) for column in self.columns],
            "lines": [
                {
                    **vars(line),
                    "paper": None if line.paper is None else vars(line.paper),
                    "measured": [None if row is None else vars(row) for row in line.measured],
                }
                for line in self.lines
            ],
            "rate_columns": [vars(column) for column in self.rate_columns],
            "rates": [vars(rate) for rate in self.rates],
        }
        return {"source": SOURCE, "source_11": SOURCE_11, **data, "notes": list(self.notes)}


Cells = dict[tuple[str, str, int], dict[Column, tuple[Row, float | None]]]
"""Line to column to its row, and the ratio to the baseline of its own run."""
Rates = dict[tuple[str, int, int], dict[Column, float]]


def table19(model: Model, config: InternVLConfig, cases: Iterable[Case], machine: str) -> Table19:
    """The tables for the bundle of ``model``.

    Cells come from components timed alone, texts at 80 tokens. A column has the largest batch (128 at most)
    that its parts were all measured at; a row's total is the sum of its parts. Other models than the paper's
    get separate lines, and the paper's stay empty.
    """
    size = config.vision.image_size
    why_not = different_model(model, config)
    name = model.name if why_not else PAPER_MODEL
    cells: Cells = {}
    rates: Rates = {}
    notes = [f"The paper's lines are empty: {why_not}"] if why_not else []
    for (backend, precision), times in _times(cases).items():
        for batch, ms in times.get("vision", {}).items():
            rates.setdefault((name, size, batch), {})[Column(backend, precision, machine, 0)] = 1e3 / ms
        shared = set(times.get("vision", {})) & set(times.get("qllama_text", {}))
        batch = max((b for b in shared if b <= BATCH), default=0)
        if not batch:
            notes.append(
                f"{backend} {precision} is empty: vision and qllama_text at {TEXT_TOKENS} tokens were not "
                "measured at one batch size."
            )
            continue
        column = Column(backend, precision, machine, batch)
        vision, text = times["vision"][batch], times["qllama_text"][batch]
        query = times.get("qllama_query", {}).get(batch)
        if query is None:
            notes.append(
                f"{backend} {precision}: qllama_query was not measured at batch {batch}: InternVL-G is empty."
            )
        for method, image in ((METHODS[0], None), (METHODS[1], query)):
            if method == METHODS[0] or image is not None:
                total = vision + (image or 0.0) + text
                row = Row(method, size, vision, image, text, total, 1e3 / total)
                row_cells = cells.setdefault((name, method, size), {})
                own = row_cells.get(Column(BACKEND, PRECISION, machine, batch), (None, None))[0]
                row_cells[column] = row, _ratio(own if column.backend != BACKEND else row, row)
    if cells:
        notes.append("The measured parts include the pooling heads and the text projection.")
    return _assembled(cells, rates, notes)


def merged(tables: Sequence[Table19]) -> Table19:
    """One table with the columns of all (the same column of several image sizes is one).

    Ratios stay those of their own runs; of a cell that several tables have the first is kept.
    """
    cells: Cells = {}
    rates: Rates = {}
    for table in tables:
        for line in table.lines:
            row_cells = cells.setdefault((line.model, line.method, line.image_size), {})
            for column, row, ratio in zip(table.columns, line.measured, line.ratios, strict=True):
                if row is not None:
                    row_cells.setdefault(column, (row, ratio))
        for rate in table.rates:
            for column, value in zip(table.rate_columns, rate.measured, strict=True):
                if value is not None:
                    rates.setdefault((rate.model, rate.image_size, rate.batch), {}).setdefault(column, value)
    return _assembled(cells, rates, dict.fromkeys(note for table in tables for note in table.notes))


def _assembled(cells: Cells, rates: Rates, notes: Iterable[str]) -> Table19:
    columns = tuple(dict.fromkeys(column for row_cells in cells.values() for column in row_cells))
    papers = {(PAPER_MODEL, row.method, row.image_size): row for row in PAPER}
    lines = []
    for key in dict.fromkeys((*papers, *cells)):
        row_cells = cells.get(key, {})
        rows = tuple(row_cells.get(column, (None, None))[0] for column in columns)
        ratios = tuple(row_cells.get(column, (None, None))[1] for column in columns)
        lines.append(Line(*key, papers.get(key), rows, ratios))
    rate_columns = tuple(dict.fromkeys(column for row_cells in rates.values() for column in row_cells))
    papers_11 = {(PAPER_MODEL, 224, batch): value for batch, value in PAPER_RATES.items()}
    rate_lines = [
        Rate(*key, papers_11.get(key), tuple(rates.get(key, {}).get(column) for column in rate_columns))
        for key in dict.fromkeys((*papers_11, *rates))
    ]
    said = [note for note in notes if not note.startswith(_BATCH_NOTE)]
    if other := sorted({c.batch for c in columns} - {BATCH}):
        said.append(
            f"{_BATCH_NOTE} {', '.join(map(str, other))} where the column says so; the paper's is {BATCH}."
        )
    return Table19(columns, tuple(lines), rate_columns, tuple(rate_lines), tuple(said))


_BATCH_NOTE = "Measured at batch"


def _ratio(baseline: Row | None, row: Row) -> float | None:
    if baseline is None or baseline.total_ms is None or row.total_ms is None:
        return None
    return baseline.total_ms / row.total_ms


def different_model(model: Model, config: InternVLConfig) -> str | None:
    """Why the paper's table is not about this model; None if it is (at any image size)."""
    full = InternVLConfig(vision=VisionConfig(image_size=config.vision.image_size))
    if _sizes(config) == _sizes(full) and model.parameters in (_count(full, False), _count(full, True)):
        return None
    return (
        f"they are about {PAPER_MODEL} ({_count(InternVLConfig(), False):,} parameters); "
        f"this bundle holds {model.name} ({model.parameters:,} parameters)."
    )


def _count(config: InternVLConfig, contrastive_only: bool) -> int:
    shapes = expected_shapes(replace(config, contrastive_only=contrastive_only))
    return sum(math.prod(shape) for shape in shapes.values())


def _sizes(config: InternVLConfig) -> tuple[object, ...]:
    """Sizes that decide the amount of work."""
    v, q = config.vision, config.qllama
    vision = (v.hidden_size, v.num_hidden_layers, v.num_attention_heads, v.intermediate_size, v.patch_size)
    text = (q.hidden_size, q.num_hidden_layers, q.num_attention_heads, q.intermediate_size, q.vocab_size)
    rest = (config.clip_embed_dim, config.num_query_token, config.cross_attention_frequency)
    return (*vision, *text, *rest)


def _times(cases: Iterable[Case]) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """(backend, precision) to component to batch to median ms for one row, of the tables' components.

    The baseline comes first; of one component the case that is planned first, on a GPU that without copies.
    """
    times_by: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for case in sorted(cases, key=lambda case: case.kind != "baseline"):
        if case.kind in ("component", "baseline") and case.sizes.get("text", TEXT_TOKENS) == TEXT_TOKENS:
            times = times_by.setdefault((case.backend, case.precision), {})
            each = times.setdefault(case.name, {})
            each.setdefault(case.batch, case.measurement.summary.p50_ms / case.batch)
    return times_by
