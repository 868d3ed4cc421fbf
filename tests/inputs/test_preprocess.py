"""Images to arrays: numbers of the published recipe, and every kind of bad file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from ivl_export.arrays import Array
from ivl_export.errors import CheckpointError, InputError, UsageError
from ivl_export.inputs import preprocess
from ivl_export.inputs.images import load_image
from ivl_export.inputs.preprocess import (
    MODES,
    PAD_COLOR,
    ImageSettings,
    ResizeMode,
    preprocess_images,
    read_images,
    resize,
)
from ivl_export.inputs.sources import ImageInput
from ivl_export.inputs.tiles import Tiling

GOLDENS = Path(__file__).parents[1] / "goldens" / "family"

pytestmark = pytest.mark.numeric


def photo(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)
    )


def formula(name: str) -> Image.Image:
    """The pictures of the goldens."""
    width, height = {"A": (100, 60), "B": (45, 150)}[name]
    y, x = np.mgrid[:height, :width]
    channels = {
        "A": (7 * x + 13 * y, x * x + 3 * y, x * y + 17),
        "B": (x * x * y + 5, 11 * x + y * y, 255 - ((3 * x + 2 * y) % 256)),
    }[name]
    return Image.fromarray(np.stack([c % 256 for c in channels], -1).astype(np.uint8))


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
        {"size": 224, "do_resize": False},
        {"size": 224, "do_rescale": False},
        {"size": 224, "do_convert_rgb": False},
        {"size": 224, "do_normalize": "yes"},
        {"size": 224, "do_pad": True},
        {"size": 224, "offset": True},
        {"size": 224, "image_format": "BGR"},
        {"size": 224, "antialias": False},
        {"size": 224, "interpolation": "bilinear"},
        {"size": 224, "crop_pct": 0.875},
        {"size": 224, "image_mean": [math.nan, 0.5, 0.5]},
        {"size": 224, "image_std": [math.inf, 0.5, 0.5]},
        {"size": 224, "pad_size": {"height": 9, "width": 9}},
        {"size": 224, "image_grid_pinpoints": [[336, 672]]},
        {"size": {"shortest_edge": 224}},
        {"size": {"shortest_edge": 224, "longest_edge": 300}, "do_center_crop": True},
        {"size": {"height": 224, "width": 448}},
        {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True},
        {"size": {"shortest_edge": 112}, "crop_size": 224, "do_center_crop": True},
        {"size": 224, "crop_size": {"height": 224, "width": 112}, "do_center_crop": True},
        {"size": 448, "crop_to_patches": True, "max_patches": 0},
        {"size": 448, "crop_to_patches": True, "max_patches": 41},
        {"size": 448, "crop_to_patches": True, "min_patches": 20},
        {"size": 448, "crop_to_patches": 1},
    ],
)
def test_settings_that_cannot_be_followed_are_checkpoint_errors(tmp_path: Path, data: Any) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageSettings.load(file)


def test_the_key_that_cannot_be_followed_is_named() -> None:
    for key, value in (("do_rescale", False), ("resample", 0), ("do_pad", True), ("crop_to_patches", "x")):
        with pytest.raises(CheckpointError, match=f"{key} is {value!r}"):
            ImageSettings.from_json({"size": 224, key: value})


def test_without_normalisation_values_are_0_to_1() -> None:
    config = ImageSettings.from_json({"size": 16, "do_normalize": False, "image_mean": [0.5] * 3})
    white = np.full((16, 16, 3), 255, np.uint8)
    assert np.array_equal(preprocess_images([white], config), np.ones((1, 3, 16, 16), np.float32))


def test_resizing_to_more_than_is_cropped() -> None:
    config = ImageSettings.from_json(
        {"size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}, "do_center_crop": True}
    )
    assert config == ImageSettings(112, mode="center_crop", shortest_edge=128)
    image = photo(400, 300)
    small = image.resize((170, 128), Image.Resampling.BICUBIC).crop((29, 8, 141, 120))
    assert np.array_equal(np.asarray(resize(image, config)), np.asarray(small))
    assert ImageSettings.from_json(config.to_json()) == config
    assert config.at(224).shortest_edge == 256


NATIVE = {
    "crop_size": None,
    "crop_to_patches": False,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "disable_grouping": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"height": 448, "width": 448},
}


def test_the_processor_of_native_checkpoints_tiles_whatever_its_file_says() -> None:
    assert ImageSettings.from_json(NATIVE) == ImageSettings(448, tiling=Tiling(12))
    assert ImageSettings.from_json({**NATIVE, "processor_class": "LlavaProcessor"}) == ImageSettings(448)
    cropped = {**NATIVE, "processor_class": None, "crop_to_patches": True, "max_patches": 6}
    assert ImageSettings.from_json(cropped) == ImageSettings(448, tiling=Tiling(6))
    assert ImageSettings.from_json(NATIVE).unknown == ()


def test_unknown_keys_are_collected() -> None:
    config = ImageSettings.from_json({**NATIVE, "do_sharpen": True, "b": 1})
    assert config.unknown == ("b", "do_sharpen")
    assert config == ImageSettings.from_json(NATIVE)


# --- tiles ---


@pytest.mark.parametrize("number", [0, 1])
def test_pixel_values_of_tiles_equal_the_published_ones(number: int) -> None:
    published = json.loads((GOLDENS / "preprocess.json").read_text())
    image, picture = published["images"][number], formula(published["images"][number]["name"])
    for case in image["cases"]:
        config = ImageSettings(case["tile_size"], tiling=Tiling(case["max_tiles"]))
        pixels = read_images([picture], config)
        assert pixels.tiles == (case["tiles_with_thumbnail"],)
        for v in case["values"]:
            got = pixels.values[v["tile"], v["channel"], v["row"], v["col"]]
            assert got == np.float32(v["value"])
        assert pixels.values.sum(dtype=np.float64) == pytest.approx(case["pixel_sum"], rel=1e-12)


def test_each_image_has_its_own_limit_of_tiles() -> None:
    config = ImageSettings(16, tiling=Tiling(12))
    pictures = [photo(90, 30), photo(30, 90), photo(40, 40)]
    free = read_images(pictures, config, threads=3)
    assert free.tiles == (13, 13, 10)
    assert read_images(pictures, config, max_tiles=1).tiles == (1, 1, 1)
    some = read_images(pictures, config, max_tiles=[12, 1, 4])
    assert some.tiles == (13, 1, 5)
    assert np.array_equal(some[[0]].values, free.values[:13])
    assert np.array_equal(free[[2, 0]].values, np.concatenate([free.values[26:], free.values[:13]]))
    for limit in (0, 41, [1, 2]):
        with pytest.raises(UsageError, match="max_tiles"):
            read_images(pictures, config, max_tiles=limit)


@pytest.mark.parametrize("tiling", [None, Tiling(4)])
def test_images_that_cannot_be_read_are_left_out_where_that_is_wanted(tiling: Tiling | None) -> None:
    config, errors = ImageSettings(16, tiling=tiling), dict[int, InputError]()
    images: list[ImageInput] = [photo(), b"nothing", photo(20, 60), b""]
    pixels = read_images(images, config, threads=2, on_error=errors.__setitem__)
    assert [*errors] == [1, 3]
    assert [bool(tiles) for tiles in pixels.tiles] == [True, False, True, False]
    assert np.array_equal(pixels.values, preprocess_images([images[0], images[2]], config))


def test_tiles_are_stretched_only() -> None:
    with pytest.raises(ValueError, match="pad"):
        ImageSettings(16, mode="pad", tiling=Tiling())


def test_settings_with_tiles_round_trip() -> None:
    config = ImageSettings(448, tiling=Tiling(6, 2, False))
    assert ImageSettings.from_json(config.to_json()) == config


def test_unreadable_settings_are_checkpoint_errors(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    with pytest.raises(CheckpointError):
        ImageSettings.load(file)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError):
        ImageSettings.load(file)
