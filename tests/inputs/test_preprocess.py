"""Images to arrays: numbers of the published recipe, and every kind of bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from ivl_export.errors import CheckpointError, InputError
from ivl_export.inputs import preprocess
from ivl_export.inputs.images import load_image
from ivl_export.inputs.preprocess import (
    MODES,
    PAD_COLOR,
    Array,
    ImageSettings,
    ResizeMode,
    preprocess_images,
    resize,
)

pytestmark = pytest.mark.numeric


def photo(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)
    )


# --- pixel values ---


def test_values_are_normalised_pixels() -> None:
    config = ImageSettings(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    values = preprocess_images([image, image[::-1].copy()], config)
    assert values.dtype == np.float32
    assert values.shape == (2, 3, 32, 32)
    want = (image / 255.0 - np.array(config.mean)) / np.array(config.std)
    np.testing.assert_allclose(values[0], want.transpose(2, 0, 1), atol=2e-6)
    np.testing.assert_allclose(values[1], want[::-1].transpose(2, 0, 1), atol=2e-6)


def test_square_is_a_bicubic_stretch() -> None:
    image = photo(90, 50)
    want = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(resize(image, ImageSettings(32))), want)


@pytest.mark.parametrize("turned", [False, True])
def test_center_crop_keeps_the_middle(turned: bool) -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
    shown = np.asarray(resize(image, ImageSettings(64, mode="center_crop")))
    assert shown.shape == (64, 64, 3)
    assert (shown[3:-3, 3:-3] == 255).all()


def test_pad_keeps_the_whole_picture_between_bars() -> None:
    shown = np.asarray(resize(Image.new("RGB", (120, 60), "white"), ImageSettings(60, mode="pad")))
    assert (shown[18:42] == 255).all()
    assert (shown[:12] == PAD_COLOR).all()
    assert (shown[-12:] == PAD_COLOR).all()


def test_pad_refuses_what_would_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="pad"):
        resize(Image.new("RGB", (100, 2)), ImageSettings(8, mode="pad"))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(MODES),
    st.integers(1, 40),
)
def test_any_size_becomes_the_square(width: int, height: int, mode: ResizeMode, side: int) -> None:
    values = preprocess_images([photo(width, height)] * 2, ImageSettings(side, mode=mode))
    assert values.shape == (2, 3, side, side)
    assert np.isfinite(values).all()
    assert np.array_equal(values[0], values[1])


@settings(max_examples=40, deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_any_grey_array_has_three_equal_channels(array: Array) -> None:
    shown = np.asarray(load_image(array))
    assert np.array_equal(shown, np.stack([array] * 3, -1))


def test_no_images_give_an_empty_batch() -> None:
    assert preprocess_images([], ImageSettings(8)).shape == (0, 3, 8, 8)


# --- settings ---


@pytest.mark.parametrize("mode", MODES)
def test_settings_round_trip(tmp_path: Path, mode: ResizeMode) -> None:
    config = ImageSettings(112, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), mode)
    config.save(tmp_path / "preprocessor_config.json")
    assert ImageSettings.load(tmp_path / "preprocessor_config.json") == config


@pytest.mark.parametrize(
    ("extra", "size", "mode"),
    [
        ({"crop_size": 224, "size": 224, "do_center_crop": True}, 224, "center_crop"),
        ({"size": {"height": 448, "width": 448}}, 448, "square"),
        ({"size": {"shortest_edge": 336}, "do_center_crop": True}, 336, "center_crop"),
        ({"size": {"shortest_edge": 336}, "do_center_crop": True, "resize_mode": "pad"}, 336, "pad"),
    ],
)
def test_published_settings_are_read(extra: dict[str, Any], size: int, mode: ResizeMode) -> None:
    published = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    assert ImageSettings.from_json({**published, **extra}) == ImageSettings(size, mode=mode)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"size": "big"},
        {"size": True},
        {"size": {}},
        {"size": 0},
        {"size": -5},
        {"size": 224, "resample": 2},
        {"size": 224, "rescale_factor": 1.0},
        {"size": 224, "rescale_factor": "x"},
        {"size": 224, "resize_mode": "fold"},
        {"size": 224, "resize_mode": ["square"]},
        {"size": 224, "image_mean": [0.5]},
        {"size": 224, "image_std": [0.5, 0.5, 0.0]},
        {"size": 224, "image_std": [0.5, 0.5, float("nan")]},
        {"size": 224, "image_mean": None},
    ],
)
def test_settings_that_cannot_be_followed_are_checkpoint_errors(tmp_path: Path, data: Any) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageSettings.load(file)


def test_unreadable_settings_are_checkpoint_errors(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    with pytest.raises(CheckpointError):
        ImageSettings.load(file)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError):
        ImageSettings.load(file)
