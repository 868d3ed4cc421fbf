"""The tables of ``ivl-export estimate``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from .output import human_bytes, print_table

if TYPE_CHECKING:
    from ..profiles.cost.chat_estimate import ChatEstimate
    from ..profiles.cost.estimate import ComponentEstimate, Estimate, Share
    from ..profiles.cost.roofline import ComponentTime

    AnyEstimate = Estimate | ChatEstimate | ComponentEstimate


def print_embeddings(result: Estimate, model: str, with_layers: bool, evidence: bool) -> None:
    """Latency, throughput, memory and cost of an InternVL's images and texts, a column a batch size."""
    _head(result, model)
    points = result.points
    rows: list[tuple[str, list[object]]] = [
        ("ms, images of InternVL-C", [p.image_c_ms for p in points]),
        ("ms, images of InternVL-G", [p.image_g_ms for p in points]),
        (f"ms, texts of {result.text_tokens} tokens", [p.text_ms for p in points]),
        ("images/s, InternVL-C", [p.images_c_per_s for p in points]),
        ("images/s, InternVL-G", [p.images_g_per_s for p in points]),
        ("texts/s", [p.texts_per_s for p in points]),
        *_memory([(p.memory_bytes, p.fits) for p in points]),
    ]
    if points[0].cost_c is not None:
        rows.append(("cost of 1M images, InternVL-C", [round(p.cost_c or 0, 2) for p in points]))
        rows.append(("cost of 1M images, InternVL-G", [round(p.cost_g or 0, 2) for p in points]))
    _by_batch(rows, [p.batch for p in points])
    _tail(result, with_layers, evidence)


def print_chat(result: ChatEstimate, model: str, with_layers: bool, evidence: bool) -> None:
    """Latency, throughput, memory and cost of conversations, a column a batch size."""
    _head(result, model)
    points = result.points
    rows: list[tuple[str, list[object]]] = [
        ("ms, image", [p.image_ms for p in points]),
        (f"ms, prompt of {result.prompt_tokens} positions", [p.prompt_ms for p in points]),
        ("ms to the first token", [p.first_token_ms for p in points]),
        ("ms, each further token", [p.token_ms for p in points]),
        ("tokens/s", [p.tokens_per_s for p in points]),
        (f"questions/s, answers of {result.new_tokens} tokens", [p.questions_per_s for p in points]),
        ("memory, keys and values", [human_bytes(p.cache_bytes) for p in points]),
        *_memory([(p.memory_bytes, p.fits) for p in points]),
    ]
    if points[0].cost is not None:
        rows.append(("cost of 1M questions", [round(p.cost or 0, 2) for p in points]))
    _by_batch(rows, [p.batch for p in points])
    _tail(result, with_layers, evidence)


def print_components(result: ComponentEstimate, model: str, with_layers: bool, evidence: bool) -> None:
    """Latency, throughput, memory and cost of another family's components, a column a batch size."""
    _head(result, model)
    points = result.points
    rows: list[tuple[str, list[object]]] = [
        (f"ms, {times[0].component}", [t.expected_ms for t in times])
        for times in zip(*(p.components for p in points), strict=True)
    ]
    rows += [("rows/s", [p.per_s for p in points]), *_memory([(p.memory_bytes, p.fits) for p in points])]
    if points[0].cost is not None:
        rows.append(("cost of 1M rows", [round(p.cost or 0, 2) for p in points]))
    _by_batch(rows, [p.batch for p in points])
    _tail(result, with_layers, evidence)


def _memory(points: list[tuple[int, bool]]) -> list[tuple[str, list[object]]]:
    sizes: list[object] = [human_bytes(size) for size, _ in points]
    return [("GPU memory", sizes), ("fits", [fits for _, fits in points])]


def _by_batch(rows: list[tuple[str, list[object]]], batches: list[int]) -> None:
    print_table("", ("", *(f"batch {n}" for n in batches)), [(name, *values) for name, values in rows])


def _head(result: AnyEstimate, model: str) -> None:
    gpu = result.gpu
    subject = f"{model} at {result.image_size} px, {result.precision}, on {gpu.title} ({gpu.sm})"
    typer.echo(f"{subject}: predicted, not measured")


def _calls(rows: Iterable[tuple[int, ComponentTime]]) -> None:
    print_table(
        "One call, ms: floor (published peaks) and expected",
        ("batch", "component", "at", "GMAC", "floor", "expected", "of the floor", "bound by"),
        [
            (
                batch,
                t.component,
                ", ".join(f"{axis} {size}" for axis, size in t.sizes.items()),
                round(t.gmacs),
                t.floor_ms,
                t.expected_ms,
                f"{t.floor_ms / t.expected_ms:.0%}",
                t.bound,
            )
            for batch, t in rows
        ],
    )


def _tail(result: AnyEstimate, with_layers: bool, evidence: bool) -> None:
    shares = [("16-bit", result.efficiencies.wide), ("8-bit", result.efficiencies.low)]
    shares.append(("memory", result.efficiencies.memory))
    if with_layers:
        _layers(result)
    if evidence:
        _evidence(result, shares)
        return
    values = ", ".join(f"{name} {share.value:.0%} ({share.known})" for name, share in shares)
    typer.echo(f"Shares of the GPU's published peaks: {values}.")
    typer.echo("Their sources, the assumptions and the errors of past predictions: --evidence.")


def _layers(result: AnyEstimate) -> None:
    _calls((point.batch, time) for point in result.points for time in point.components)
    last = result.points[-1]
    print_table(
        f"Layers at batch {last.batch}, ms of all layers of a type",
        ("layer", "multiplies", "GMAC", "floor", "expected", "bound by"),
        [
            (x.layer, x.kind, x.gmacs, x.floor_ms, x.expected_ms, x.bound)
            for t in last.components
            for x in t.layers
        ],
    )


def _evidence(result: AnyEstimate, shares: Sequence[tuple[str, Share]]) -> None:
    print_table(
        "Shares of the published peaks",
        ("", "share", "basis", "source"),
        [(name, f"{share.value:.0%}", share.known, share.source) for name, share in shares],
    )
    typer.echo("Assumptions:")
    for line in result.assumptions:
        typer.echo(f"- {line}")
    typer.echo(f"- Peaks of {result.gpu.title}: {result.gpu.source}")
    print_table(
        "Checked against measurements",
        ("measured", "GPU", "ms", "predicted", "error"),
        [(c.name, c.gpu, c.measured_ms, c.predicted_ms, f"{c.error:+.1%}") for c in result.checks],
    )
    if not all(c.published for c in result.checks):
        typer.echo(
            "its ceilings: without a GPU of the table, a receipt is compared at those measured with it."
        )
    if not any(c.receipt and c.published for c in result.checks):
        typer.echo(
            "No receipt of this repository has a latency on a GPU yet: Table 19's lines are the paper's, "
            "and the 16-bit share comes from these same lines."
        )
