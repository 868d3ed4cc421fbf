"""Decoded images are kept by content and settings, within a size, and never half."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ivl_export.calibration.sources import open_calibration
from ivl_export.calibration.tensor_cache import TensorCache
from ivl_export.inputs.preprocess import ImageSettings


def test_images_are_decoded_once(photos: Path, tmp_path: Path, settings: ImageSettings) -> None:
    plain = open_calibration(photos)
    stored = replace(plain, cache=TensorCache(tmp_path / "cache"))
    want = np.concatenate(list(plain.pixels(settings, 5)))
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(stored.pixels(settings, 5))), want)
    assert len(list((tmp_path / "cache").iterdir())) == len(plain)
    for photo in photos.rglob("*.[jp][pn]g"):
        photo.unlink()  # only the cache can answer now
    np.testing.assert_array_equal(np.concatenate(list(stored.pixels(settings, 3))), want)


def test_other_settings_and_damaged_files_are_made_again(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    calls: list[int] = []

    def make(size: int) -> np.ndarray:
        calls.append(size)
        return np.full((1, 3, size, size), len(calls), np.float32)

    small, large = ImageSettings(size=28), ImageSettings(size=56)
    for settings in (small, large, replace(small, mean=(0.0, 0.0, 0.0)), small):
        cache.get("a", settings, lambda size=settings.size: make(size))  # type: ignore[misc]
    assert calls == [28, 56, 28]
    for content in (b"", b"\x93NUMPY half", b"0" * 5000):
        for file in tmp_path.glob("*.npy"):
            file.write_bytes(content)
        assert cache.get("a", small, lambda: make(28)).shape == (1, 3, 28, 28)
    assert calls == [28, 56, 28, 28, 28, 28]
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    assert not list(tmp_path.glob(".*"))


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    settings = ImageSettings(size=28)
    tensor = np.zeros((1, 3, 28, 28), np.float32)
    cache = TensorCache(tmp_path, limit=3 * (tensor.nbytes + 128))
    for i in range(5):
        cache.get(str(i), settings, lambda: tensor)
        for file in tmp_path.glob("*.npy"):
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
    cache.get("0", settings, lambda: tensor)  # used again
    cache.trim()
    assert len(list(tmp_path.iterdir())) == 3
    again: list[str] = []
    for name in ("0", "4", "3"):

        def made(name: str = name) -> np.ndarray:
            again.append(name)
            return tensor

        cache.get(name, settings, made)
    assert again == []


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tensor = np.ones((1, 3, 28, 28), np.float32)
    cache = TensorCache(tmp_path / "file" / "cache")
    assert cache.get("a", ImageSettings(size=28), lambda: tensor) is tensor
    cache.trim()
