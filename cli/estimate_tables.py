"""What ``ivl-export estimate`` prints for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from .output import human_bytes, print_table

if TYPE_CHECKING:
    from ..profiles.cost.chat_estimate import ChatEstimate
    from ..profiles.cost.estimate import Estimate
    from ..profiles.cost.roofline import ComponentTime


def print_embeddings(result: Estimate, model: str, with_layers: bool) -> None:
    """Images and texts of an InternVL."""
    _head(result, model)
    _calls((point.batch, time) for point in result.points for time in point.components)
    priced = result.points[0].cost_c is not None
    print_table(
        f"Images (C: InternViT; G: and QLLaMA's queries) and texts of {result.text_tokens} tokens",
        (
            "batch", "C ms", "G ms", "text ms", "C images/s", "G images/s", "texts/s", "GPU memory", "fits",
            *(("cost of 1M, C", "cost of 1M, G") if priced else ()),
        ),
        [
            (
                p.batch, p.image_c_ms, p.image_g_ms, p.text_ms, p.images_c_per_s, p.images_g_per_s,
                p.texts_per_s, human_bytes(p.memory_bytes), p.fits,
                *((round(p.cost_c or 0, 2), round(p.cost_g or 0, 2)) if priced else ()),
            )
            for p in result.points
        ],
    )  # fmt: skip
    _tail(result, with_layers)


def print_chat(result: ChatEstimate, model: str, with_layers: bool) -> None:
    """Conversations with a chat model."""
    _head(result, model)
    _calls((point.batch, time) for point in result.points for time in point.components)
    priced = result.points[0].cost is not None
    print_table(
        f"Conversations: prompts of {result.prompt_tokens} positions, answers of {result.new_tokens} tokens",
        (
            "batch", "images ms", "prompt ms", "first token ms", "token ms", "tokens/s", "questions/s",
            "keys and values", "GPU memory", "fits", *(("cost of 1M questions",) if priced else ()),
        ),
        [
            (
                p.batch, p.image_ms, p.prompt_ms, p.first_token_ms, p.token_ms,
                p.tokens_per_s, p.questions_per_s,
                human_bytes(p.cache_bytes), human_bytes(p.memory_bytes), p.fits,
                *((round(p.cost or 0, 2),) if priced else ()),
            )
            for p in result.points
        ],
    )  # fmt: skip
    _tail(result, with_layers)


def _head(result: Estimate | ChatEstimate, model: str) -> None:
    gpu = result.gpu
    subject = f"{model} at {result.image_size} px, {result.precision}, on {gpu.title} ({gpu.sm})"
    typer.echo(f"{subject}: predicted, not measured")


def _calls(rows: Iterable[tuple[int, ComponentTime]]) -> None:
    print_table(
        "One call, ms: floor (published peaks) and what to expect",
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


def _tail(result: Estimate | ChatEstimate, with_layers: bool) -> None:
    gpu = result.gpu
    if with_layers:
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
    shares = (("16-bit", result.efficiencies.wide), ("8-bit", result.efficiencies.low))
    print_table(
        "Shares of the published peaks",
        ("", "share", "known from", "source"),
        [
            (name, f"{share.value:.0%}", share.known, share.source)
            for name, share in (*shares, ("memory", result.efficiencies.memory))
        ],
    )
    typer.echo("Assumptions:")
    for line in result.assumptions:
        typer.echo(f"- {line}")
    typer.echo(f"- Peaks of {gpu.title}: {gpu.source}")
    print_table(
        "Checked against measurements",
        ("measured", "GPU", "ms", "predicted", "error"),
        [(c.name, c.gpu, c.measured_ms, c.predicted_ms, f"{c.error:+.1%}") for c in result.checks],
    )
    if not all(c.published for c in result.checks):
        typer.echo("its ceilings: without a GPU of the table, a receipt is held to those measured with it.")
    if not any(c.receipt and c.published for c in result.checks):
        typer.echo(
            "No receipt of this repository has a latency on a GPU yet: Table 19's lines are the paper's, "
            "and the 16-bit share comes from these same lines."
        )
