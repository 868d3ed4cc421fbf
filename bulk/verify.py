"""Verifies finished embeddings: all checksums, and a sample of the inputs computed again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import Array
from ..errors import IntegrityError, UsageError
from ..progress import SILENT, Progress
from ..runtime.shards import Shard, check_shard, open_shard
from .embed import Content, Model, costs_of, cut, embed_groups
from .plan import QUARANTINE, Plan, check_same, load_plan, path_of, printable
from .sources import Item

TOLERANCE = {"float32": 1e-3, "float16": 2e-3}
"""Length of the difference of two vectors, as a share of their length: other machines round differently."""


@dataclass(frozen=True)
class Verified:
    """What was found equal.

    Args:
        items: inputs that were computed again.
        equal: vectors of them that have the same bits, of ``vectors``.
        furthest: the greatest length of a difference, as a share of the vector's length.
        rows, shards: whose checksums were compared.
    """

    items: int
    vectors: int
    equal: int
    furthest: float
    rows: int
    shards: int


def verify(
    model: Model,
    plan: Plan,
    out: Path,
    sample: int,
    *,
    readers: int | None = None,
    tolerance: float | None = None,
    progress: Progress = SILENT,
) -> Verified:
    """Compare ``out`` with its plan: every checksum, and ``sample`` inputs computed again.

    Args:
        model: the plan's bundle, loaded.
        plan: as it is made of the sources now.
        out: a finished folder.
        sample: number of inputs; which ones follows from the plan.
        readers: threads that read.
        tolerance: greatest difference, see :data:`TOLERANCE`.
        progress: receives the shards.

    Raises:
        UsageError: there is no plan in ``out``, or another one.
        IntegrityError: a shard is missing or damaged, an input changed, or a vector is another.
    """
    earlier = load_plan(out)
    if earlier is None:
        raise UsageError(f"{out} has no embeddings.", "There is no plan in it.", "Run it without --verify.")
    check_same(plan, earlier, out)
    if not (out / QUARANTINE).is_file():
        raise IntegrityError(f"{out} is not finished.", "", "Run the same command without --verify.")
    limit = TOLERANCE[plan.embedding.dtype] if tolerance is None else tolerance
    chosen = _chosen(plan, sample)
    items = vectors = equal = rows = 0
    furthest = 0.0
    progress.started("verify", plan.shards, "shards")
    for number in range(plan.shards):
        shard = open_shard(path_of(out, number))
        if (shard.receipt.plan, shard.receipt.shard) != (plan.digest, number):
            raise IntegrityError(
                f"{shard.path} is of another plan.", "", "Delete it and run the command again."
            )
        check_shard(shard.path)
        rows += shard.receipt.rows
        if number in chosen:
            compared = _compared(model, plan, shard, chosen[number], limit, readers)
            items, vectors, equal = items + len(chosen[number]), vectors + compared[0], equal + compared[1]
            furthest = max(furthest, compared[2])
        progress.advanced(number + 1)
    return Verified(items, vectors, equal, furthest, rows, plan.shards)


def _chosen(plan: Plan, sample: int) -> dict[int, list[int]]:
    """Shard -> places in it of the sampled items."""
    rng = np.random.default_rng(int(plan.digest[:16], 16))
    numbers = rng.choice(plan.items, min(sample, plan.items), replace=False, shuffle=False)
    chosen: dict[int, list[int]] = defaultdict(list)
    for number in sorted(numbers.tolist()):
        chosen[number // plan.work.shard_items].append(number % plan.work.shard_items)
    return chosen


def _compared(
    model: Model, plan: Plan, shard: Shard, places: Sequence[int], limit: float, readers: int | None
) -> tuple[int, int, float]:
    """Vectors of the sampled items, those with equal bits, and the furthest difference."""
    wanted = set(places)
    numbers = plan.numbers(shard.receipt.shard)
    items: list[Item] = [item for i, item in enumerate(plan.items_of(numbers)) if i in wanted]
    parts = cut(shard.receipt.shard, items, costs_of(plan), plan.work.batch)
    with closing(embed_groups(model, plan, parts, readers)) as contents:
        content: Content = next(contents)[1]
    stored = _rows_of(shard)
    bad = {(q.key, q.kind) for q in shard.receipt.quarantine}
    vectors = equal = 0
    furthest = 0.0
    for i, (key, kind) in enumerate(content.items):
        where = f"{kind} {printable(key)} of {shard.path.name}"
        own = stored.get((key, kind), [])
        if ((printable(key), kind) in bad) != (i in content.bad) or (not own and i not in content.bad):
            raise IntegrityError(
                f"The {where} is not as it was made.",
                content.bad.get(i, "It is in quarantine, or missing, and can be embedded now."),
                "Restore the input, or embed again with --force.",
            )
        if i in content.bad:
            continue
        if any(digest != content.digests[i] for digest, _ in own):
            raise IntegrityError(
                f"The {where} is of another input.",
                "Its content has another hash now.",
                "Restore the input, or embed again with --force.",
            )
        again = content.rows[i].astype(np.float32)
        before = np.stack([vector for _, vector in own]).astype(np.float32)
        distance = np.inf if before.shape != again.shape else _distance(before, again)
        vectors += len(own)
        equal += len(own) if before.shape == again.shape and np.array_equal(before, again) else 0
        furthest = max(furthest, distance)
        if not distance <= limit:
            raise IntegrityError(
                f"The {where} has another vector than it should have.",
                f"The difference is {distance:.3g} of its length; at most {limit:g} is allowed.",
                "Delete the shard and run the command again: it is made anew.",
            )
    return vectors, equal, furthest


def _distance(
    before: Array,
    again: Array,
) -> float:
    length = np.maximum(np.linalg.norm(again, axis=1), 1e-12)
    return float(np.max(np.linalg.norm(before - again, axis=1) / length))


def _rows_of(
    shard: Shard,
) -> dict[tuple[str, str], list[tuple[bytes, Array]]]:
    """(key, kind) -> hash of the input and vector, of each row."""
    rows = defaultdict(list)
    vectors = (vector for block in shard.blocks for vector in block)
    columns = (shard.column(name) for name in ("key", "kind", "sha256"))
    for vector, key, kind, digest in zip(vectors, *columns, strict=True):
        rows[key, kind].append((digest, vector))
    return rows
