"""Bulk embedding against the plain loop: ``ivl-export embed`` and ``encode_image`` over the same files.

    python -m ivl_export.benchmarks.serve.bulk --work DIR

Photographs of 640 x 480, JPEG, are cut from those of scikit-image. Both ways have a loaded and warm model and
read the same files; the loop keeps its vectors in memory, the bulk run writes its shards to the disk, with
checksums and the hash of every input. The plan is made before. Each round does both, in turns: in five rounds
of 1,000 images each way does 5,000, after one round that does not count. CPU seconds: of the process.
"""

from __future__ import annotations

import argparse
import io
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ivl_export.benchmarks.runtime.images import PHOTOGRAPHS
from ivl_export.benchmarks.runtime.measured import (
    RECEIPTS,
    Candidate,
    Comparison,
    Goal,
    receipt,
    show,
    side_by_side,
)
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.bulk.config import EmbedConfig, open_run
from ivl_export.bulk.embed import Model, run
from ivl_export.bulk.plan import Plan
from ivl_export.files.write import write_text
from ivl_export.inputs.preprocess import read_images
from ivl_export.runtime import InternVL
from ivl_export.runtime.zero_shot import l2

PART = "serve-bulk"
SIZE = (640, 480)
IMAGES, ROUNDS, GOAL = 1000, 5, 0.95
PIECE = 64
"""Files of a call of the plain loop, which reads the next ones of them meanwhile."""
LOOP, BULK = "plain loop", "ivl-export embed"


def make_images(folder: Path, count: int) -> list[Path]:
    """``count`` JPEG files in ``folder``, all different; those that are there stay."""
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    whole = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    whole = [image.resize((1280, 960), Image.Resampling.BICUBIC) for image in whole]
    paths = [folder / f"{number:05}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if path.is_file():
            continue
        rng = np.random.default_rng(number)
        left, top = int(rng.integers(0, 1280 - SIZE[0])), int(rng.integers(0, 960 - SIZE[1]))
        buffer = io.BytesIO()
        part = whole[number % len(whole)].crop((left, top, left + SIZE[0], top + SIZE[1]))
        part.save(buffer, "JPEG", quality=90)
        path.write_bytes(buffer.getvalue())
    return paths


def measure(bundle: Path, work: Path, images: int, rounds: int, threads: int) -> Comparison:
    """Both ways over ``images`` files, ``rounds`` times.

    Args:
        bundle: of an InternVL.
        work: where the files and the shards are.
        images: files of a round.
        rounds: that count.
        threads: of the engines and of the readers.
    """
    folder = work / f"photos-{images}"
    paths = make_images(folder, images)
    config = EmbedConfig(bundle, (folder,), work / "vectors", threads=threads)
    model, plan = open_run(config, force=True)
    cpu: dict[str, list[float]] = {LOOP: [], BULK: []}
    with model, InternVL.load(bundle, threads=threads) as plain:
        calls: dict[str, Callable[[], object]] = {
            LOOP: partial(loop, plain, paths),
            BULK: partial(bulk, model, plan, config.out, threads),
        }
        candidates = [
            Candidate(name, partial(_counted, call, cpu[name]), items=images) for name, call in calls.items()
        ]
        timed = side_by_side(candidates, rounds)
        reading = _seconds_of(partial(read_images, paths[: min(images, 200)], model.image_settings)) / min(
            images, 200
        )
        plan_seconds = _seconds_of(partial(open_run, config, True))
    shutil.rmtree(config.out)
    each = {name: float(np.median(seconds[-rounds:])) / images for name, seconds in cpu.items()}
    facts = {
        "images": images * rounds,
        "size": list(SIZE),
        "bundle": bundle.name,
        "cpu_seconds_an_image": each,
        "reading_cpu_seconds_an_image": reading,
        "plan_cpu_seconds": plan_seconds,
    }
    note = (
        f"CPU an image: {1e3 * each[LOOP]:.2f} ms in the loop, {1e3 * each[BULK]:.2f} ms in bulk, "
        f"{1e3 * reading:.2f} ms of them reading. The plan took {plan_seconds:.2f} s of CPU."
    )
    goal = Goal(BULK, LOOP, "speed", GOAL)
    case = f"{bundle.name}, JPEG of {SIZE[0]} x {SIZE[1]}, {images} a round, {threads} threads"
    return Comparison(case, timed, (goal,), facts, (note,))


def loop(model: InternVL, paths: Sequence[Path]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """What a person writes: pieces of files, one after another."""
    parts = [model.encode_image(paths[start : start + PIECE]) for start in range(0, len(paths), PIECE)]
    return l2(np.concatenate(parts))


def bulk(model: Model, plan: Plan, out: Path, threads: int) -> None:
    """All shards made anew."""
    run(model, plan, out, force=True, readers=threads)


def _counted(call: Callable[[], object], seconds: list[float]) -> None:
    seconds.append(_seconds_of(call))


def _seconds_of(call: Callable[[], object]) -> float:
    """CPU seconds of this process that a call takes."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time bulk embedding against the plain loop.")
    parser.add_argument(
        "--work", type=Path, required=True, help="where photographs, bundle and shards are kept"
    )
    parser.add_argument("--bundle", type=Path, help="else nano in INT8 is built")
    parser.add_argument("--images", type=int, default=IMAGES, help="of a round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RECEIPTS, help="the folder of the receipt")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    bundle = args.bundle or Setting(args.work).bundle("nano", "int8")
    comparison = measure(bundle, args.work, args.images, args.rounds, args.threads)
    show([comparison])
    keep_receipt(PART, args.threads, [comparison], args.out)
    return 0


def keep_receipt(part: str, threads: int, comparisons: Sequence[Comparison], folder: Path) -> Path:
    """Write the receipt of a part, ``PART.json``."""
    import json

    path = folder / f"{part}.json"
    write_text(json.dumps(receipt(part, threads, comparisons), indent=1, allow_nan=False) + "\n", path)
    return path


if __name__ == "__main__":
    sys.exit(main())
