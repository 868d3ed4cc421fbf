"""Chat streams of many clients at once against one after another: tokens a second.

python -m ivl_export.benchmarks.serve.streams --bundle CHAT_BUNDLE --work FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivl_export.benchmarks.runtime.measured import RECEIPTS, receipt
from ivl_export.benchmarks.serve.load import Connection, post
from ivl_export.benchmarks.serve.servers import Server, ours
from ivl_export.cli.output import print_table
from ivl_export.files.write import write_text
from ivl_export.profiles.measure.inputs import jpeg

CLIENTS, TOKENS, GOAL = 16, 24, 2.5


def request(server: Server, seed: int) -> bytes:
    """A streamed answer of up to :data:`TOKENS` tokens; each ``seed`` has a picture of its own."""
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg((128 + seed, 128))).decode()
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return post(server.address, "/v1/chat/completions", body)


async def stream(server: Server, raw: bytes) -> int:
    """The tokens of one answer; RuntimeError if it ends with an error."""
    connection = Connection(server.address)
    status, body = await connection.ask(raw)
    connection.close()
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    if status != 200 or events[-1:] != ["[DONE]"]:
        raise RuntimeError(f"{status}: {body[-500:]!r}")
    usage = next(data["usage"] for event in events[:-1] if (data := json.loads(event)).get("usage"))
    return int(usage["completion_tokens"])


async def at_once(server: Server, requests: Sequence[bytes]) -> int:
    """Tokens of all, which come together."""
    return sum(await asyncio.gather(*(stream(server, raw) for raw in requests)))


async def in_turn(server: Server, requests: Sequence[bytes]) -> int:
    """Tokens of all, one after another."""
    return sum([await stream(server, raw) for raw in requests])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure chat streams of many clients.")
    parser.add_argument("--bundle", type=Path, required=True, help="a chat bundle")
    parser.add_argument("--work", type=Path, required=True, help="for the server's log")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RECEIPTS / "serve-streams.json", help="the receipt")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    rates: dict[str, list[float]] = {"at once": [], "one after another": []}
    with ours(options.work, [f"chat={options.bundle}"], options.threads) as server:
        requests = [request(server, seed) for seed in range(CLIENTS)]
        asyncio.run(at_once(server, requests))
        for turn in range(options.rounds):
            ways = [("at once", at_once), ("one after another", in_turn)]
            for name, way in ways if turn % 2 else ways[::-1]:
                began = time.perf_counter()
                tokens = asyncio.run(way(server, requests))
                rates[name].append(tokens / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["at once"] / medians["one after another"]
    data: dict[str, Any] = receipt("serve-streams", options.threads, ()) | {
        "bundle": options.bundle.name, "clients": CLIENTS, "tokens": TOKENS,
        "rates": rates, "medians": medians,
        "goal": {"least": GOAL, "ratio": ratio, "met": ratio >= GOAL},
    }  # fmt: skip
    write_text(json.dumps(data, indent=1) + "\n", options.out)
    print_table(
        f"{CLIENTS} streams of {TOKENS} tokens",
        ("way", "tokens a second"),
        [(name, f"{rate:.0f}") for name, rate in medians.items()],
    )
    print(f"at once over one after another: {ratio:.2f} (at least {GOAL})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
