"""``ivl-export run features``: hidden states of the vision tower's blocks, for dense tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..settings import read_settings
from .command import SettingsOpt
from .inputs import ImageFiles, numbers
from .options import ENGINE, BackendOpt, BundleArg, JsonOpt
from .output import check_writable
from .session import ImagesArg, save, session


def features(
    bundle: BundleArg,
    images: ImagesArg,
    out: Annotated[
        Path, typer.Option(help="A new .safetensors file, or .npy for a single block.", show_default=False)
    ],
    blocks: Annotated[
        str, typer.Option(help="Blocks, from 1, that the bundle was built to give; -1 is the last.")
    ] = "-1",
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Save dense features: one vector for the class token and for each patch of each image.

    The file holds features.BLOCK [images, tokens, width] float32; a .safetensors file names the images too.
    """
    numbers_of_blocks, files = numbers(blocks, "--blocks"), ImageFiles.find(images)
    engine = read_settings(ENGINE, settings or ())
    if (
        out.suffix not in (".safetensors", ".npy")
        or not numbers_of_blocks
        or (out.suffix == ".npy" and len(numbers_of_blocks) > 1)
    ):
        raise UsageError(
            f"Features of {len(numbers_of_blocks)} blocks cannot be saved as {out.name}.",
            "A .safetensors file holds any number of blocks, an .npy file one.",
            "Give --out features.safetensors.",
        )
    check_writable("--out", out)
    import json

    import numpy as np
    from safetensors.numpy import save as safetensors

    from ..bundle.spec import feature_name

    with session(bundle, backend, engine, as_json) as (model, report):
        parts, names = [], []
        for piece, pixels in files.read(model.read_images):
            parts.append(model.features(pixels, numbers_of_blocks))
            names += [str(file) for file in piece]
        arrays = {feature_name(k): np.concatenate([part[k] for part in parts]) for k in parts[0]}
        if out.suffix == ".npy":
            (array,) = arrays.values()
            save(out, lambda file: np.save(file, array))
        else:
            save(out, lambda file: file.write(safetensors(arrays, {"images": json.dumps(names)})))
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        report.update(out=str(out), images=names, shapes=shapes, skipped=files.skipped)
        report["table"] = (
            f"Features of {len(names)} images, saved as {out}",
            ("name", "shape"),
            list(shapes.items()),
        )
