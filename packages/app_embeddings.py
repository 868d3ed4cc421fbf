"""Embeds, classifies and captions images with the bundle next to this file.

python app.py embed photo.jpg --text "a red panda"
python app.py classify photo.jpg --label cat --label dog
python app.py caption photo.jpg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ivl_export

BUNDLE = Path(__file__).resolve().parent / "bundle"


def embed(model: ivl_export.InternVL, images: list[str], texts: list[str], mode: str) -> dict[str, Any]:
    """Unit vectors of images and texts; their products are cosines."""
    head: Any = f"InternVL-{mode}"
    vectors = {"images": model.encode_image(images, head), "texts": model.encode_text(texts)}
    return {name: _unit(rows).tolist() for name, rows in vectors.items()}


def classify(model: ivl_export.InternVL, images: list[str], labels: list[str]) -> list[dict[str, float]]:
    """The probability of each label, for each image."""
    rows = model.classify(images, labels)
    return [dict(zip(labels, map(float, row), strict=True)) for row in rows]


def caption(model: ivl_export.InternVL, images: list[str]) -> list[str]:
    """A caption of each image."""
    return model.caption(images)


def _unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and print its result as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (("embed", "vectors"), ("classify", "probabilities of labels"), ("caption", "text")):
        one = commands.add_parser(name, help=help)
        one.add_argument("images", nargs="*" if name == "embed" else "+", help="image files")
        if name == "embed":
            one.add_argument("--text", action="append", default=[], help="a text (repeat)")
            one.add_argument("--mode", choices=("C", "G"), default="C", help="which image embedding")
        if name == "classify":
            one.add_argument("--label", action="append", required=True, help="a label (repeat)")
    chosen = parser.parse_args(arguments)
    try:
        with ivl_export.load(BUNDLE) as model:
            if chosen.command == "embed":
                result: Any = embed(model, chosen.images, chosen.text, chosen.mode)
            elif chosen.command == "classify":
                result = classify(model, chosen.images, chosen.label)
            else:
                result = caption(model, chosen.images)
    except ivl_export.IvlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
