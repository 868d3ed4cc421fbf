"""What the runtime adds to its engines: a chained call against the bare sum of ``session.run`` calls.

The bare calls get their arrays ready made (token ids, too) and keep what comes out; the runtime tokenizes,
checks, splits in batches, times each stage and joins the parts. Both use the same sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.profiles.inputs import TEXT, random_pixels
from ivl_export.runtime import InternVL
from ivl_export.runtime.zero_shot import l2

BATCHES = (1, 8)
MOST = 1.03
Array = np.ndarray[Any, Any]


def measure(setting: Setting) -> Iterator[Comparison]:
    """InternVL-C, InternVL-G and text, fp32 and INT8."""
    for name in setting.models:
        for precision in ("fp32", "int8"):
            with InternVL.load(setting.bundle(name, precision), threads=setting.threads) as model:
                for batch in BATCHES:
                    for case, chained, bare, embedding in calls(model, batch):
                        candidates = [
                            Candidate("runtime", chained, precision, batch),
                            Candidate("session.run", bare, precision, batch),
                        ]
                        timed = side_by_side(candidates, setting.rounds)
                        if not np.array_equal(chained(), embedding(*bare())):
                            raise AssertionError(f"{name}, {case}, batch {batch}: not the same embeddings")
                        goal = Goal("runtime", "session.run", "time", MOST)
                        yield Comparison(f"{name}, {case}, batch {batch}", timed, (goal,))


def calls(
    model: InternVL, batch: int
) -> Iterator[tuple[str, Callable[[], Array], Callable[[], list[Array]], Callable[..., Array]]]:
    """(what, the runtime's call, the bare calls, what makes embeddings of the bare calls' outputs)."""
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

    yield "InternVL-C", lambda: model.encode_image(pixels), internvl_c, lambda embed: embed
    yield (
        "InternVL-G",
        lambda: model.encode_image(pixels, "InternVL-G"),
        internvl_g,
        lambda embed, queries: l2(embed) + l2(queries),
    )
    yield "text", lambda: model.encode_text(texts), plain_text, lambda embed: embed


def session(model: InternVL, component: str) -> Any:
    """The ONNX Runtime session behind a component."""
    engine: Any = model.components.open(component)
    return engine._session
