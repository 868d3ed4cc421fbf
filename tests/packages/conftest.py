"""This package's wheel, built once; packages that the tests of this folder make have that one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ivl_export
from ivl_export.files.locks import locked
from ivl_export.packages import distribution
from ivl_export.packages.write import Package
from ivl_export.tests.conftest import package_digest

Pack = Callable[..., Package]


@pytest.fixture(scope="session")
def wheel(request: pytest.FixtureRequest) -> Path:
    """The wheel of the source tree; kept in pytest's cache under the hash of the package."""
    pytest.importorskip("setuptools", "77")
    folder = request.config.cache.mkdir("wheel")
    file = folder / package_digest()[:16] / distribution.WHEEL
    with locked(folder):
        if not file.exists():
            for old in folder.iterdir():
                shutil.rmtree(old, ignore_errors=True)
            file.parent.mkdir()
            distribution.write_wheel(file)
    return file


@pytest.fixture
def pack(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pack:
    """Makes a package of a bundle in ``tmp_path / "package"``."""
    monkeypatch.setattr(distribution, "_build", lambda out: shutil.copyfile(wheel, out))

    def make(bundle: Path, format: str, **keywords: Any) -> Package:
        out = keywords.pop("out", tmp_path / "package")
        return ivl_export.package(bundle, out, format=format, **keywords)

    return make


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small picture."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"
