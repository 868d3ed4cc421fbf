"""Models of true size from checkpoint to proven engines: seconds, peak anonymous memory, products in 8 bits.

For every layout a seeded checkpoint is made, and one ``ivl-export build`` runs in a separate process, as a
user would start it. A layout may be cut: ``internvl3-38b:45+4`` has 45 blocks of the tower and 4 of the
decoder.

The receipt is rewritten after every layout, so a run that is killed keeps its rows; rows of other layouts
stay.

    python -m ivl_export.benchmarks.fullsize.build --work FOLDER --layouts internvl3-1b,internvl3-38b:45+4
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ivl_export.benchmarks.fullsize.make_checkpoint import LAYOUTS
from ivl_export.benchmarks.fullsize.measured import Run, StepFailed, run
from ivl_export.files.write import write_text
from ivl_export.models.registry import family_of
from ivl_export.profiles.measure.machine import commit, machine, versions

RECEIPT = Path(__file__).resolve().parents[2] / "profiles" / "receipts" / "fullbuild.json"
HERE = "ivl_export.benchmarks.fullsize"
SAMPLES = 2
"""One to calibrate on and one that is held out: time grows with samples, memory does not."""


@dataclass(frozen=True)
class Layout:
    """A published layout, and the blocks of tower and decoder that it has here."""

    name: str
    vision: int
    text: int
    whole: bool

    @classmethod
    def of(cls, text: str) -> Layout:
        """From ``NAME`` or ``NAME:VISION+DECODER``; ValueError if it is neither."""
        name, cut, blocks = text.partition(":")
        if name not in LAYOUTS:
            raise ValueError(f"{name!r} is no layout; known: {', '.join(LAYOUTS)}")
        full = family_of(LAYOUTS[name]).depths(LAYOUTS[name])
        if not cut:
            return cls(name, *full, True)
        try:
            vision, decoder = map(int, blocks.split("+"))
        except ValueError:
            raise ValueError(f"{text!r}: blocks are VISION+DECODER, 45+4") from None
        if not (1 <= vision <= full[0] and 1 <= decoder <= full[1]):
            raise ValueError(f"{text!r}: {name} has {full[0]}+{full[1]} blocks")
        return cls(name, vision, decoder, (vision, decoder) == full)

    def __str__(self) -> str:
        return self.name if self.whole else f"{self.name}:{self.vision}+{self.text}"


def measure(layout: Layout, precision: str, options: Sequence[str], work: Path) -> dict[str, Any]:
    """The row of one layout; its checkpoint and bundle are removed again.

    Raises:
        StepFailed: making the checkpoint or building failed.
    """
    model, bundle = work / "model", work / "bundle"
    sizes = ["--vision-blocks", str(layout.vision), "--qllama-blocks", str(layout.text)]
    try:
        run([sys.executable, "-m", f"{HERE}.make_checkpoint", str(model), "--layout", layout.name, *sizes])
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        command = ["build", "--model", str(model), "--precision", precision, "--out", str(bundle), "--json"]
        command += ["--calib-samples", str(SAMPLES), "--allow-accuracy-loss", *options]
        built = run([sys.executable, "-m", f"{HERE}.tool", "cli", *command])
        return {
            "layout": str(layout),
            "blocks": [layout.vision, layout.text],
            "precision": precision,
            "options": list(options),
            "checkpoint_bytes": weights,
            **_figures(built),
            "machine": asdict(machine()),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    finally:
        for folder in (model, bundle):
            shutil.rmtree(folder, ignore_errors=True)


def _figures(built: Run) -> dict[str, Any]:
    report = json.loads(built.stdout)
    cosines = {
        name: min(output["worst_cosine"] for output in outputs.values())
        for name, outputs in report["components"].items()
        if outputs
    }
    return {
        "seconds": built.seconds,
        "cpu_seconds": built.cpu_seconds,
        "peak_anonymous": built.peak_anonymous,
        "bundle_bytes": report["bytes"],
        "steps_seconds": {step["step"]: step["seconds"] for step in report["steps"]},
        "worst_cosine": cosines,
        "verification": report["verification"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build models of true size and write what it took.")
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints and bundles")
    parser.add_argument("--layouts", required=True, help="NAME or NAME:VISION+DECODER, joined by commas")
    parser.add_argument("--precision", default="fp8")
    parser.add_argument("--out", type=Path, default=RECEIPT, help="the receipt, a JSON file")
    parser.add_argument("options", nargs="*", help="further options of 'ivl-export build', after --")
    args = parser.parse_args(argv)
    try:
        layouts = [Layout.of(text) for text in args.layouts.split(",")]
    except ValueError as error:
        parser.error(str(error))
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    failed = False
    for layout in layouts:
        print(f"{layout} ...", file=sys.stderr, flush=True)
        try:
            row = measure(layout, args.precision, args.options, args.work)
        except StepFailed as error:
            print(f"{layout}: {error}", file=sys.stderr)
            failed = True
            continue
        rows = [r for r in rows if (r["layout"], r["precision"]) != (str(layout), args.precision)] + [row]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps({"rows": rows}, indent=1) + "\n", args.out)
        print(f"{layout}: {row['seconds']:.0f} s, {row['peak_anonymous'] / 2**30:.1f} GiB")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
