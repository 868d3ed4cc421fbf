"""What ``Reading(approximate_jpeg=True)`` saves and costs: photographs of 12 megapixels, read exactly and as
JPEG drafts.

The photographs are those that come with scikit-image, enlarged. Reading is decoding, resizing to the side of
InternVL-14B-224px and normalising; the loss is measured on embeddings of the shipped nano.
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.inputs.preprocess import ImageSettings, preprocess_images
from ivl_export.runtime.zero_shot import l2

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
PIXELS = 12_000_000
QUALITY = 90
THREADS = (1, 2)
FASTER = 1.0


def photographs(pixels: int = PIXELS) -> list[bytes]:
    """JPEG files of about ``pixels`` each."""
    from skimage import data

    pictures = []
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(data, name)()).convert("RGB")
        scale = (pixels / (image.width * image.height)) ** 0.5
        size = round(image.width * scale), round(image.height * scale)
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
        pictures.append(buffer.getvalue())
    return pictures


def measure(setting: Setting) -> list[Comparison]:
    """A comparison for each number of threads; the first has the distance of the embeddings."""
    files, settings = photographs(), ImageSettings()
    facts = {"cosines": cosines(files)}
    name, worst = min(facts["cosines"].items(), key=lambda item: item[1])
    note = f"Embeddings of both: cosine {worst:.5f} at worst ({name})."
    comparisons = []
    for threads in THREADS:
        candidates = [
            Candidate(
                name, partial(preprocess_images, files, settings, threads, approximate), items=len(files)
            )
            for name, approximate in (("exact", False), ("fast", True))
        ]
        case = f"{PIXELS / 1e6:.0f} megapixels, JPEG to pixel_values of {settings.size}, {threads} threads"
        goal = Goal("fast", "exact", "speed", FASTER)
        comparisons.append(
            Comparison(case, side_by_side(candidates, setting.rounds), (goal,), facts, (note,))
        )
    return comparisons


def cosines(files: list[bytes]) -> dict[str, float]:
    """Photograph -> cosine of nano's InternVL-C embeddings of both readings."""
    import torch

    from ivl_export.models import load_model
    from ivl_export.models.shipped import nano_folder

    model = load_model(nano_folder(), dtype=torch.float32, device="cpu")
    settings = ImageSettings.load(nano_folder() / "preprocessor_config.json")

    def embedded(approximate: bool) -> Any:
        pixels = torch.from_numpy(preprocess_images(files, settings, approximate_jpeg=approximate))
        with torch.inference_mode():
            return l2(model.encode_image(pixels).numpy())

    both = (embedded(False) * embedded(True)).sum(1)
    return dict(zip(PHOTOGRAPHS, np.round(both.astype(float), 6).tolist(), strict=True))
