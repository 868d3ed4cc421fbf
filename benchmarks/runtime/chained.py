"""Overhead of the runtime: a chained call against the bare sum of ``session.run`` calls.

Both get their arrays ready made, pixels and token ids, and use the same sessions; the runtime checks, splits
in batches, times each stage and joins the parts. The time of tokenization is given separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ivl_export.arrays import Array
from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.profiles.measure.inputs import TEXT, random_pixels
from ivl_export.runtime import InternVL
from ivl_export.runtime.zero_shot import l2

BATCHES = (1, 8)
MOST = 1.03


def measure(setting: Setting) -> Iterator[Comparison]:
    """InternVL-C, InternVL-G and text, fp32 and INT8."""
    for name in setting.models:
        for precision in ("fp32", "int8"):
            with InternVL.load(setting.bundle(name, precision), threads=setting.threads) as model:
                for batch in BATCHES:
                    for call in calls(model, batch):
                        yield _compared(
                            f"{name}, {call.case}, batch {batch}", call, precision, batch, setting
                        )


@dataclass(frozen=True)
class Call:
    """One thing done in several ways.

    Args:
        case: what.
        chained: the runtime's call.
        bare: the ``session.run`` calls it consists of.
        embedding: turns their outputs into those of ``chained``.
        more: further calls of the runtime with equal results, by name.
    """

    case: str
    chained: Callable[[], Array]
    bare: Callable[[], list[Array]]
    embedding: Callable[..., Array]
    more: Mapping[str, Callable[[], Array]] = field(default_factory=dict)


def _compared(case: str, call: Call, precision: str, batch: int, setting: Setting) -> Comparison:
    ways = {"runtime": call.chained, "session.run": call.bare, **call.more}
    candidates = [Candidate(name, way, precision, batch) for name, way in ways.items()]
    timed = side_by_side(candidates, setting.rounds)
    expected = call.embedding(*call.bare())
    if not all(np.array_equal(way(), expected) for way in (call.chained, *call.more.values())):
        raise AssertionError(f"{case}: not the same embeddings")
    return Comparison(case, timed, (Goal("runtime", "session.run", "time", MOST),))


def calls(model: InternVL, batch: int) -> Iterator[Call]:
    """InternVL-C, InternVL-G and text."""
    vision, query, text = (session(model, c) for c in ("vision", "qllama_query", "qllama_text"))
    size = model.image_settings.size
    pixels = random_pixels((batch, 3, size, size))
    texts = [TEXT] * batch
    ids, lengths = model.tokenizer.encode_contrastive(texts)

    def internvl_c() -> list[Array]:
        return list(vision.run(["image_embed"], {"pixel_values": pixels}))

    def internvl_g() -> list[Array]:
        embed, tokens = vision.run(["image_embed", "tokens"], {"pixel_values": pixels})
        return [embed, *query.run(["query_embed"], {"tokens": tokens})]

    def plain_text() -> list[Array]:
        return list(text.run(["text_embed"], {"input_ids": ids, "lengths": lengths}))

    def both(embed: Array, queries: Array) -> Array:
        return l2(embed) + l2(queries)

    yield Call("InternVL-C", lambda: model.encode_image(pixels), internvl_c, lambda embed: embed)
    yield Call("InternVL-G", lambda: model.encode_image(pixels, "InternVL-G"), internvl_g, both)
    yield Call(
        "text",
        lambda: model.encode_tokens(ids, lengths),
        plain_text,
        lambda embed: embed,
        {"runtime, with tokenization": lambda: model.encode_text(texts)},
    )


def session(model: InternVL, component: str) -> Any:
    """The ONNX Runtime session of a component."""
    engine: Any = model.components.open(component)
    return engine._session
