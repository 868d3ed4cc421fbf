"""Whether a service's memory stays flat: mixed requests by many clients, with the faults that real ones have.

    python -m ivl_export.benchmarks.runtime.soak --bundle BUNDLE --chat CHAT_BUNDLE

Clients request at the same time embeddings (InternVL-C and -G, of texts), classes, captions, and answers
about images; some send broken images, some cancel, some set too short a timeout. After every round all have
been answered, and the process's memory is read: RSS by Linux, at once and when the service is
idle, and the heap in use then, by glibc. Memory of the first rounds (kernels, caches that are
bounded, an arena for the largest batches that meet) is not a leak: growth is counted from then on, from the
median of the first quarter of rounds to that of the last.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import io
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ivl_export.benchmarks.runtime.measured import RECEIPTS, receipt, receipt_path
from ivl_export.cli.output import print_table
from ivl_export.errors import BusyError, InputError
from ivl_export.files.write import write_text
from ivl_export.runtime import InternVL, InternVLChat

GOAL = 0.02
KEPT_BYTES = 4 << 20
"""Of conversations, so that their store is full when warm-up ends."""
CLIENTS = 16
_SETTLE_SECONDS = 0.5
"""Time for cancelled requests to end: a started batch is finished."""
_SHARES = {
    "image, C": 22, "image, G": 14, "text": 22, "classes": 10, "caption": 10,
    "no image": 6, "cancelled": 8, "out of time": 6, "chat": 2,
}  # fmt: skip
_WORDS = ("red", "blue", "small", "large", "circle", "star", "ring", "left", "of", "a", "two")
Rng = np.random.Generator


@dataclass(frozen=True)
class Soaked:
    """Measurements of a soak test.

    Args:
        requests: answered so far, after each round.
        busy: bytes of RSS then.
        rss: bytes of RSS at rest.
        heap: bytes that were allocated then; 0 if the C library does not report it.
        asked: number of requests of each kind.
    """

    requests: tuple[int, ...]
    busy: tuple[int, ...]
    rss: tuple[int, ...]
    heap: tuple[int, ...]
    asked: dict[str, int]

    def ends(self, warm_up: int, of: Sequence[int]) -> tuple[float, float]:
        """Bytes ``of`` which the process had after ``warm_up``: medians of the first and the last quarter."""
        later = [size for done, size in zip(self.requests, of, strict=True) if done > warm_up]
        few = max(1, len(later) // 4)
        return statistics.median(later[:few]), statistics.median(later[-few:])

    def growth(self, warm_up: int, of: Sequence[int] | None = None) -> float:
        """Growth after ``warm_up`` requests, of ``rss`` unless said otherwise, as a share of the start."""
        first, last = self.ends(warm_up, self.rss if of is None else of)
        return last / first - 1 if first else 0.0


async def soak(
    model: InternVL,
    chat: InternVLChat | None,
    requests: int,
    every: int,
    clients: int = CLIENTS,
    seed: int = 0,
) -> Soaked:
    """Ask ``requests`` times, ``clients`` at once, and read the memory after ``every`` requests."""
    classes = model.class_embeddings(["circle", "star", "ring"])
    kinds = [kind for kind in _SHARES if chat is not None or kind != "chat"]
    shares = np.array([_SHARES[kind] for kind in kinds], float)
    rng = np.random.default_rng(seed)
    sent: Counter[str] = Counter()
    counts_done: list[int] = []
    busy: list[int] = []
    rss: list[int] = []
    heap: list[int] = []

    async def ask(kind: str, own: Rng) -> None:
        image = picture(own)
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "image, C": lambda: model.aencode_image(image),
            "image, G": lambda: model.aencode_image(image, "InternVL-G"),
            "text": lambda: model.aencode_text(sentence(own)),
            "classes": lambda: model.aclassify(image, classes),
            "caption": lambda: model.acaption(image),
            "no image": lambda: failing(model.aencode_image(own.bytes(2000)), InputError),
            "cancelled": lambda: cancelled(model.aencode_image(image), own.uniform(0, 0.02)),
            "out of time": lambda: failing(model.requests.caption(image, timeout=0.001), BusyError),
            "chat": lambda: asyncio.to_thread(talk, image, own),
        }
        await calls[kind]()
        sent[kind] += 1

    def talk(image: Any, own: Rng) -> None:
        assert chat is not None
        conversation = chat.chat([image])
        for _ in range(2):
            conversation.ask(sentence(own), max_new_tokens=8)

    while sum(sent.values()) < requests:
        queue = list(rng.choice(kinds, every, p=shares / shares.sum()))
        seeds = iter(rng.integers(0, 2**32, every).tolist())

        async def client(queue: list[str] = queue, seeds: Any = seeds) -> None:
            while queue:
                await ask(str(queue.pop()), np.random.default_rng(next(seeds)))

        await asyncio.gather(*(client() for _ in range(clients)))
        gc.collect()
        counts_done.append(sum(sent.values()))
        busy.append(resident())
        await asyncio.sleep(_SETTLE_SECONDS)
        model.components.release_memory()  # as the service does after a while
        rss.append(resident())
        heap.append(allocated())
    return Soaked(tuple(counts_done), tuple(busy), tuple(rss), tuple(heap), dict(sorted(sent.items())))


async def failing(call: Awaitable[Any], error: type[Exception]) -> None:
    """Await ``call``, which may fail with ``error``."""
    with suppress(error):
        await call


async def cancelled(call: Any, after: float) -> None:
    """Begin ``call`` and walk away ``after`` seconds."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(after)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def picture(rng: Rng) -> Any:
    """A picture of some size as a user may give it: a file's bytes, an array, or an image."""
    array = rng.integers(0, 256, (*rng.integers(20, 200, 2), 3), dtype=np.uint8)
    which = rng.integers(4)
    if which == 0:
        return array
    image = Image.fromarray(array)
    if which == 1:
        return image
    file = io.BytesIO()
    image.save(file, ("PNG", "JPEG")[which - 2])
    return file.getvalue()


def sentence(rng: Rng) -> str:
    """Some words."""
    return " ".join(rng.choice(_WORDS, rng.integers(1, 20)))


def resident() -> int:
    """Bytes of this process that are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not report the memory of a process")


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def allocated() -> int:
    """Bytes of the heap in use, of all threads; 0 without glibc."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether a service's memory stays flat over many requests.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--chat", type=Path, help="a chat bundle, for conversations")
    parser.add_argument("--requests", type=int, default=12_000)
    parser.add_argument("--warm-up", type=int, default=2_000, help="requests before growth is counted")
    parser.add_argument("--every", type=int, default=250, help="requests between two looks at the memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="soak", help="of the receipt")
    parser.add_argument("--out", type=Path, default=RECEIPTS, help="the folder of the receipt")
    args = parser.parse_args(argv)
    model = InternVL.load(args.bundle, threads=args.threads)
    chat = None
    if args.chat is not None:
        chat = InternVLChat.load(args.chat, threads=args.threads, kept_bytes=KEPT_BYTES)
    measured = asyncio.run(soak(model, chat, args.requests, args.every))
    sizes = {"RSS at rest": measured.rss, "RSS while busy": measured.busy, "allocated at rest": measured.heap}
    growth = {what: measured.growth(args.warm_up, of) for what, of in sizes.items()}
    rows = [
        (f"{done:,}", *(f"{size / 1e6:.1f}" for size in then))
        for done, *then in zip(measured.requests, measured.busy, measured.rss, measured.heap, strict=True)
    ]
    print_table(f"{args.bundle.name}: memory", ("requests", "RSS MB", "at rest MB", "in use MB"), rows)
    said = ", ".join(f"{what} {share:+.2%}" for what, share in growth.items())
    print(f"growth after {args.warm_up:,} requests: {said} (goal: within {GOAL:.0%} at rest)")
    bundles = [path.name for path in (args.bundle, args.chat) if path is not None]
    counts = asdict(model.requests.counts)
    result = receipt(args.name, args.threads, ()) | {
        "bundles": bundles, "clients": CLIENTS, "warm_up": args.warm_up,
        "growth": growth, "ends": {what: measured.ends(args.warm_up, of) for what, of in sizes.items()},
        "counts": counts,
        "malloc": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
        **asdict(measured),
    }  # fmt: skip
    write_text(json.dumps(result, indent=1) + "\n", receipt_path(args.name, args.out))
    model.close()
    return int(abs(growth["RSS at rest"]) > GOAL)


if __name__ == "__main__":
    sys.exit(main())
