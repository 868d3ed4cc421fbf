"""Images of every kind to RGB pictures, and every kind of bad file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl_export.arrays import Array
from ivl_export.errors import InputError
from ivl_export.inputs.images import load_image


def photo(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)
    )


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A valid PNG up to its (missing) pixels: the outside of a decompression bomb."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


# --- accepted images ---


def test_path_bytes_image_and_array_give_the_same_picture(tmp_path: Path) -> None:
    image = photo()
    file = tmp_path / "photo.png"
    image.save(file)
    for given_as in (file, str(file), file.read_bytes(), image, np.asarray(image)):
        assert np.array_equal(np.asarray(load_image(given_as)), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = (255, 0, 0)
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(undo)), kind, exif=exif)
    shown = np.asarray(load_image(data)).astype(int)
    assert shown.shape == upright.shape
    assert np.abs(shown - upright).mean() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_put_on_white(mode: str) -> None:
    rgba = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (0, 0, 4, 8))
    shown = np.asarray(load_image(rgba.convert(mode)))
    assert (shown[:, :4] == 0).all()
    assert (shown[:, 4:] == 255).all()


def test_transparent_palette_and_transparent_color_are_put_on_white() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    shown = np.asarray(load_image(encoded(palette, "PNG", transparency=1)))
    assert shown[0, 0].tolist() == [255, 0, 0]
    assert (shown[1:] == 255).all()
    keyed = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (np.asarray(load_image(keyed)) == 255).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"MM\x00*\x00\x00\x00\x08\xff\xff\x01", b"no TIFF header", b""])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_cost_the_picture(block: bytes, kind: str) -> None:
    data = encoded(photo(), kind, exif=b"Exif\x00\x00" + block)
    assert load_image(data).size == (60, 40)


def test_exif_orientation_survives_alpha() -> None:
    image = Image.new("RGBA", (6, 4), (10, 20, 30, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(image, "PNG", exif=exif)).size == (4, 6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    shown = load_image(Image.new("RGB", (5, 5), (255, 255, 255)).convert(mode))
    assert shown.mode == "RGB"
    assert (np.asarray(shown) >= 250).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_brightness(kind: str) -> None:
    grey = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(load_image(encoded(grey, kind)))[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["I;16B", "I;16", "I"])
def test_sixteen_bit_tiffs_of_either_byte_order(mode: str) -> None:
    values = np.array([[0, 32768, 65535]], {"I;16B": ">u2", "I;16": "<u2", "I": "<i4"}[mode])
    grey = Image.frombytes(mode, (3, 1), values.tobytes())
    assert np.asarray(load_image(encoded(grey, "TIFF")))[0, :, 1].tolist() == [0, 128, 255]


def test_sixteen_bit_color_keeps_its_colors() -> None:
    pixels = struct.pack(">6H", 65535, 0, 32768, 0, 65535, 65535)
    size = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)  # two pixels, 16 bits, RGB
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" + pixels))
    shown = np.asarray(load_image(data + chunk(b"IEND", b""))).astype(int)
    assert np.abs(shown - [[[255, 0, 128], [0, 255, 255]]]).max() <= 1


def test_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(
            frames[0],
            kind,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if kind == "WEBP" else {}),
        )
        assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("array", "pixel"),
    [
        (np.full((3, 4), 200, np.uint8), [200] * 3),
        (np.full((3, 4, 1), 200, np.uint8), [200] * 3),
        (np.full((3, 4, 3), 65535, np.uint16), [255] * 3),
        (np.full((3, 4, 3), 0.5, np.float32), [128] * 3),
        (np.zeros((3, 4, 4), np.uint8), [255] * 3),
    ],
)
def test_arrays(array: Array, pixel: list[int]) -> None:
    image = load_image(array)
    assert image.size == (4, 3)
    assert np.asarray(image)[0, 0].tolist() == pixel


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tensors_are_read_with_channels_first_or_last(dtype: torch.dtype) -> None:
    pixels = torch.arange(5 * 7 * 3, dtype=torch.uint8).reshape(5, 7, 3)
    tensor = pixels if dtype == torch.uint8 else pixels / 255
    for given_as in (tensor, tensor.permute(2, 0, 1)):
        assert np.array_equal(np.asarray(load_image(given_as)), pixels.numpy())


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 4, 4, requires_grad=True), torch.zeros(3, 4, 4).bfloat16()]
)
def test_tensors_that_cannot_be_read_in_place_are_input_errors(tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match="The image frame 3 cannot be used"):
        load_image(tensor, "frame 3")
    with pytest.raises(InputError, match="A dict cannot be read"):
        load_image({}, "frame 3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "want"), [((1600, 1200), (400, 300)), ((1600, 500), (800, 250)), ((300, 200), (300, 200))]
)
def test_a_draft_is_a_smaller_jpeg_that_keeps_its_shorter_side(
    size: tuple[int, int], want: tuple[int, int]
) -> None:
    picture = photo(*size)
    data = encoded(picture, "JPEG", quality=95)
    draft = load_image(data, draft=200)
    assert draft.size == want
    assert load_image(data).size == load_image(encoded(picture, "PNG"), draft=200).size == size
    near = picture.resize(want, Image.Resampling.BOX)
    assert np.abs(np.asarray(draft).astype(int)[:, :, :2] - np.asarray(near).astype(int)[:, :, :2]).mean() < 3


def test_a_draft_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(photo(1600, 1200), "JPEG", exif=exif), draft=200).size == (300, 400)


def test_a_draft_does_not_hide_how_large_an_image_is() -> None:
    with pytest.raises(InputError, match="9000 x 9000"):
        load_image(encoded(Image.new("L", (9000, 9000)), "JPEG"), draft=200)


# --- refused images ---


def bad_files() -> dict[str, bytes]:
    jpeg, png = encoded(photo(200, 200), "JPEG"), encoded(photo(200, 200), "PNG")
    return {
        "empty": b"",
        "garbage": bytes(range(256)) * 8,
        "text": b"hello, this is no image at all",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "head.jpg": jpeg[:20],
        "crc.png": png[:60] + b"\x00\x01" + png[62:],
        "bomb.png": png_header(60000, 60000),
        "large.png": png_header(9000, 9000),
        "line.png": encoded(Image.new("L", (3000, 2)), "PNG"),
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        "float.tif": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
    }


@pytest.mark.parametrize("name", list(bad_files()))
def test_bad_files_give_an_input_error_that_names_them(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(bad_files()[name])
    for given_as in (file, file.read_bytes()):
        with pytest.raises(InputError) as caught:
            load_image(given_as, name)
        assert name in str(caught.value)
        assert caught.value.exit_code == 3
    with pytest.raises(InputError, match=name):
        load_image(file)


def test_missing_files_and_folders_are_input_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=path.name):
            load_image(path)


def test_bombs_are_refused_before_their_pixels_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png_header(9000, 9000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="9000 x 9000"):
        load_image(data)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 2), np.uint8),
        np.zeros((2, 3, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.full((4, 4, 3), 2.0),
        np.full((4, 4, 3), np.nan),
        np.zeros((1, 500, 3), np.uint8),
    ],
)
def test_bad_arrays_are_input_errors(array: Array) -> None:
    with pytest.raises(InputError):
        load_image(array, "frame 7")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_raise_anything_but_input_errors(data: Any) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    raw = bytearray(encoded(photo(24, 16), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(raw[: data.draw(st.integers(1, len(raw)))])
    try:
        image = load_image(damaged)
    except InputError:
        return
    assert image.mode == "RGB"
