"""What people write first: FastAPI, Pillow and the PyTorch model in fp32, an image at a time.

python -m ivl_export.benchmarks.serve.naive BUNDLE PORT THREADS

It takes what ``ivl-export serve`` takes at ``/v1/embeddings``: one data URL, answered in base64.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from ivl_export.bundle import Bundle
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.models import load_model
from ivl_export.models.shipped import checkpoint_path


def app(bundle: Path) -> FastAPI:
    """The service of the checkpoint that ``bundle`` was built from."""
    manifest = Bundle.open(bundle).manifest
    folder = checkpoint_path(manifest.model.source.removesuffix(" (shipped)"))
    model = load_model(folder)
    settings = ImageSettings.load(folder / "preprocessor_config.json")
    mean, std = (np.asarray(values, np.float32) for values in (settings.mean, settings.std))
    api = FastAPI()

    @api.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.post("/v1/embeddings")
    def embeddings(body: dict[str, Any]) -> dict[str, Any]:
        data = base64.b64decode(body["input"].partition(",")[2])
        image = (
            Image.open(io.BytesIO(data)).convert("RGB").resize((settings.size,) * 2, Image.Resampling.BICUBIC)
        )
        pixels = (np.asarray(image, np.float32) / 255 - mean) / std
        with torch.inference_mode():
            row = model.encode_image(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])[0]
        row = row / row.norm()
        text = base64.b64encode(row.numpy().tobytes()).decode()
        return {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": text}]}

    return api


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(app(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="warning")
