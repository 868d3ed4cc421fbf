"""Inputs of every kind, small, and the tiny model that embeds them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from ivl_export.bulk.config import EmbedConfig, open_run
from ivl_export.bulk.embed import Result, run
from ivl_export.runtime import InternVL


def picture(seed: int, kind: str = "PNG") -> bytes:
    """The file of a small picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def animation(seed: int, frames: int = 3) -> bytes:
    """The file of an animated picture, which is a video too."""
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)) for _ in range(frames)]
    file = io.BytesIO()
    images[0].save(file, "PNG", save_all=True, append_images=images[1:])
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_table(path: Path, columns: dict[str, list[Any]], rows: int = 100) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """21 pictures in two folders, one of which is broken, and a file of another kind."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(20):
        (folder / ("more" if i % 3 == 0 else ".") / f"{i:02}.png").write_bytes(picture(i))
    (folder / "more" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    (folder / "notes.md").write_text("no input")
    (folder / ".hidden.png").write_bytes(picture(99))
    return folder


Embed = Callable[..., Result]


@pytest.fixture
def config(tiny_bundle: Path, tmp_path: Path) -> EmbedConfig:
    """Shards of six inputs; sources are to be named."""
    return EmbedConfig(tiny_bundle, (), tmp_path / "out", shard_items=6, threads=1)


@pytest.fixture
def embed(config: EmbedConfig) -> Embed:
    """Embed sources with changes of ``config``."""

    def embedded(*sources: Path, force: bool = False, **changes: Any) -> Result:
        own = replace(config, sources=sources, **changes)
        model, plan = open_run(own, force)
        with model:
            return run(model, plan, own.out, force=force)

    return embedded


@pytest.fixture
def tiny(tiny_bundle: Path) -> Iterator[InternVL]:
    """The model, to compare with."""
    with InternVL.load(tiny_bundle, threads=1) as model:
        yield model
