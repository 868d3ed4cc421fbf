"""What re-ranking by image-text matching gains: recall of nano's galleries of held-out scenes.

    python -m ivl_export.benchmarks.rerank BUNDLE    # of 'ivl-export build --itm'

The questions are those of the accuracy receipts: which of 200 scenes does this caption describe?
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ivl_export.cli.output import print_table
from ivl_export.runtime import InternVL, Ranking
from ivl_export.runtime.model import MODES
from ivl_export.runtime.zero_shot import rank
from ivl_export.synthetic.captions import caption
from ivl_export.synthetic.render import render
from ivl_export.synthetic.tasks import RETRIEVE, eval_scenes

TOP = 10


def measure(model: InternVL, galleries: int, scenes: int) -> dict[str, float]:
    """R@1 of each head alone, and re-ranked: {"InternVL-C": ..., "InternVL-C, re-ranked": ...}."""
    right: dict[str, list[Any]] = {}
    for part in range(galleries):
        shown = eval_scenes(RETRIEVE, scenes, 0, part=part, distinct=True)
        images: list[Any] = [render(scene, model.image_settings.size) for scene in shown]
        texts = [caption(scene) for scene in shown]
        words = model.encode_text(texts)
        for mode in MODES:
            by_search = Ranking(*rank(words, model.encode_image(images, mode, "square"), TOP))
            again = model.rerank(texts, images, by_search)
            for name, ranking in ((mode, by_search), (f"{mode}, re-ranked", again)):
                right.setdefault(name, []).append(ranking.indices[:, 0] == np.arange(scenes))
    return {name: float(np.mean(rows)) for name, rows in right.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--galleries", type=int, default=5)
    parser.add_argument("--scenes", type=int, default=200, help="in a gallery")
    chosen = parser.parse_args(arguments)
    with InternVL.load(chosen.bundle, threads=1) as model:
        result = measure(model, chosen.galleries, chosen.scenes)
    title = f"Text to image, {chosen.galleries} galleries of {chosen.scenes} scenes, best {TOP} matched"
    print_table(title, ("ranked by", "R@1"), [(name, f"{value:.1%}") for name, value in result.items()])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
