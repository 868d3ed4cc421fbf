"""Eight clients at once against the same requests one after another, through ``await model.aencode_image``.

A request is a JPEG file's content: it is decoded, resized and encoded. Requests that come together share a
batch, and are read while another batch runs. The batch row is one call with all images: what joining can give
at most where reading takes no time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import numpy as np

from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.profiles.measure.inputs import jpeg
from ivl_export.runtime import InternVL

CLIENTS = 8
REQUESTS = 2
"""Of each client."""
LEAST = 1.6


def measure(setting: Setting) -> Iterator[Comparison]:
    """InternVL-C in fp32 and INT8."""
    for name in setting.models:
        for precision in ("int8", "fp32"):
            with InternVL.load(setting.bundle(name, precision), threads=setting.threads) as model:
                yield _compared(f"{name}, {CLIENTS} clients", model, precision, setting)


def _compared(case: str, model: InternVL, precision: str, setting: Setting) -> Comparison:
    picture = jpeg()
    many = CLIENTS * REQUESTS

    async def client(requests: int) -> list[np.ndarray]:
        return [await model.aencode_image(picture) for _ in range(requests)]

    async def at_once() -> list[list[np.ndarray]]:
        return await asyncio.gather(*(client(REQUESTS) for _ in range(CLIENTS)))

    pixels = model.pixel_values([picture] * CLIENTS)
    candidates = [
        Candidate("at once", lambda: asyncio.run(at_once()), precision, many),
        Candidate("one after another", lambda: asyncio.run(client(many)), precision, many),
        Candidate("batches, no reading", lambda: model.encode_image(pixels), precision, CLIENTS),
        Candidate("alone, no reading", lambda: model.encode_image(pixels[:1]), precision, 1),
    ]
    timed = side_by_side(candidates, setting.rounds)
    reference = model.encode_image([picture])[0]
    answers = [row for rows in asyncio.run(at_once()) for row in rows]
    apart = max(float(np.abs(row - reference).max() / np.abs(reference).max()) for row in answers)
    busy = _cores(lambda: asyncio.run(client(many)))
    goal = Goal("at once", "one after another", "speed", LEAST)
    note = (
        f"{case}, {precision}: one after another keeps {busy:.2f} of {setting.threads} cores busy; "
        f"filling them can give {setting.threads / busy:.2f}x."
    )
    return Comparison(case, timed, (goal,), {"apart": apart, "answers": len(answers), "cores": busy}, (note,))


def _cores(call: Callable[[], object]) -> float:
    """How many cores ``call`` keeps busy."""
    wall, used = time.perf_counter(), time.process_time()
    call()
    return (time.process_time() - used) / (time.perf_counter() - wall)
