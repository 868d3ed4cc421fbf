"""Images and texts of callers: their types, names without secrets, single values; shared PIL images."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from ivl_export.errors import InputError
from ivl_export.inputs.images import load_image
from ivl_export.inputs.preprocess import ImageSettings, read_images
from ivl_export.inputs.sources import (
    SHOWN,
    data_of,
    image_sequence,
    kind_of,
    name_of,
    not_readable,
    shown,
    text_sequence,
)
from ivl_export.inputs.video import frames_of

COLORS = ("red", "lime", "blue", "white")


def noise(size: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def animation(tmp_path: Path) -> Path:
    first, *rest = [Image.new("RGB", (16, 16), color) for color in COLORS]
    first.save(tmp_path / "four.gif", save_all=True, append_images=rest)
    return tmp_path / "four.gif"


def color(image: Image.Image) -> tuple[int, ...]:
    pixel = image.convert("RGB").getpixel((3, 3))
    assert isinstance(pixel, tuple)
    return tuple(map(int, pixel))


# --- kinds and names ---

JPEG64 = base64.b64encode(encoded(noise(), "JPEG")).decode()


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        ("cat.jpg", "path"),
        ("/9j/cat.jpg", "path"),
        ("a" * 30 + "/" + "b" * 30 + "/c.png", "path"),
        (Path("cat.jpg"), "path"),
        ("DATA:image/png;base64,AAAA", "data"),
        ("HTTPS://example.org/cat.jpg", "url"),
        ("s3://bucket/cat.jpg", "address"),
        ("file:///tmp/cat.jpg", "address"),
        ("C:/cat.jpg", "path"),
        (JPEG64, "base64"),
        ("A" * 5000, "base64"),
        (b"x", "bytes"),
        (memoryview(b"x"), "bytes"),
        (noise(4), "PIL image"),
        (np.zeros((2, 2)), "array"),
        (torch.zeros(3, 2, 2), "tensor"),
    ],
)
def test_kinds(image: Any, kind: str) -> None:
    assert kind_of(image) == kind


SECRET = "0123abcdSECRET"


@pytest.mark.parametrize(
    "text",
    [
        f"https://bucket.invalid/cat.jpg?X-Amz-Signature={SECRET}",
        f"https://user:{SECRET}@bucket.invalid/cat.jpg#{SECRET}",
        f"s3://key:{SECRET}@bucket/{'x' * 300}/cat.jpg",
        f"data:image/png;base64,{SECRET}",
        f"file:///tmp/{'x' * 500}?token={SECRET}",
        "/9j/" + SECRET * 400,
    ],
)
def test_errors_show_no_secrets_and_few_letters(text: str) -> None:
    assert len(shown(text)) <= SHOWN
    assert SECRET not in shown(text)
    with pytest.raises(InputError) as caught:
        load_image(text)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.text(min_size=1, max_size=600))
def test_any_text_is_an_input_error_of_bounded_length(text: str) -> None:
    with pytest.raises(InputError) as caught:
        load_image(text + "\0none")
    assert len(str(caught.value)) < 2000


def test_paths_are_shown_whole() -> None:
    long = "/data/" + "/".join(["folder-of-pictures"] * 8) + "/cat.png"
    assert name_of(Path(long)) == long
    assert name_of(b"x") == "given as bytes"
    assert name_of(np.zeros(2)) == "given as an array"
    assert name_of(b"x", 4, 9) == "number 5 of 9 (given as bytes)"
    assert name_of("https://h/a.png?k=1", 4, 9) == "https://h/a.png"


# --- data URLs ---


@pytest.mark.parametrize("form", ["{}", "{}\n", "%2B".join(["{}"])])
def test_data_urls_are_decoded(form: str) -> None:
    image = noise()
    text = form.format(base64.b64encode(encoded(image)).decode())
    for head in ("data:image/png;base64,", "data:;base64,", "DATA:image/PNG;charset=x;BASE64,"):
        assert np.array_equal(np.asarray(load_image(head + text)), np.asarray(image))


def test_percent_encoded_data_and_missing_padding() -> None:
    assert data_of("data:image/x,a%20b") == b"a b"
    assert data_of("data:image/x;base64,YQ") == b"a"


@pytest.mark.parametrize("text", ["data:", "data:image/png;base64,%%%", "data:text/plain,hello", "data:,"])
def test_bad_data_urls_are_input_errors(text: str) -> None:
    with pytest.raises(InputError):
        load_image(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>403</html>", "page of HTML"),
        (b"  <html>403</html>", "page of HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x1f\x8b" + bytes(20), "gzip"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x1cftypheic", "HEIC"),
        (b"", "empty"),
    ],
)
def test_frequent_mistakes_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for image in (content, tmp_path / "x.png"):
        with pytest.raises(InputError, match=said):
            load_image(image)


# --- one value instead of many ---


@pytest.mark.parametrize(
    "texts", ["a cat", b"a cat", None, {"a": 1}, {"a"}, ["a", None], ["a", b"b"], [["a"]], 3]
)
def test_what_is_no_sequence_of_texts(texts: Any) -> None:
    with pytest.raises(InputError):
        text_sequence(texts, "label")


def test_sequences_of_texts() -> None:
    assert text_sequence(t for t in ("a", "b")) == text_sequence(("a", "b")) == ["a", "b"]
    assert text_sequence([]) == []
    with pytest.raises(
        InputError, match=r"One label was given. A sequence of labels is needed. Use \[label\]"
    ):
        text_sequence("cat", "label")
    with pytest.raises(InputError, match="Number 2 of 2 queries is not text"):
        text_sequence(["a", 7], "query")


@pytest.mark.parametrize(
    "images", ["cat.jpg", b"x", Path("cat.jpg"), noise(4), torch.zeros(3, 4, 4), None, {"a": 1}, 3]
)
def test_what_is_no_sequence_of_images(images: Any) -> None:
    with pytest.raises(InputError):
        image_sequence(images)


def test_sequences_of_images() -> None:
    images = [noise(4), noise(4, 1)]
    assert image_sequence(images) is images
    assert list(image_sequence(iter(images))) == images
    assert len(image_sequence(torch.zeros(2, 3, 4, 4))) == 2


def test_errors_name_the_image_of_a_batch(tmp_path: Path) -> None:
    good = encoded(noise())
    with pytest.raises(InputError, match="number 6 of 11"):
        read_images([good] * 5 + [b"<html>403</html>"] + [good] * 5, ImageSettings(8), threads=2)
    with pytest.raises(InputError, match=r"gone\.png"):
        read_images([good, tmp_path / "gone.png"], ImageSettings(8))


def test_pictures_of_no_pixels() -> None:
    for size in ((5, 0), (0, 5), (0, 0)):
        with pytest.raises(InputError, match="no pixels"):
            load_image(Image.new("RGB", size))


# --- PIL images that others use too ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_one_lazily_opened_image_in_many_threads(kind: str) -> None:
    data = encoded(noise(300), kind)
    want = read_images([data], ImageSettings(32)).values[0]
    for _ in range(8):
        image = Image.open(io.BytesIO(data))
        for row in read_images([image] * 8, ImageSettings(32), threads=8).values:
            assert np.array_equal(row, want)
    for _ in range(4):
        rows = in_threads(Image.open(io.BytesIO(data)))
        assert len(rows) == 6
        assert all(np.array_equal(row, want) for row in rows)


def in_threads(image: Image.Image) -> list[Any]:
    """``pixel_values`` of one image by six callers at once."""
    rows: list[Any] = []

    def call() -> None:
        rows.append(read_images([image], ImageSettings(32)).values[0])

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows


def test_the_frame_that_the_caller_sees_is_read_and_his_image_stays(animation: Path) -> None:
    with Image.open(animation) as image:
        for frame in (2, 0, 3):
            image.seek(frame)
            assert color(load_image(image)) == color(Image.new("RGB", (9, 9), COLORS[frame]))
            assert image.tell() == frame
    assert color(load_image(animation)) == (255, 0, 0)


def test_the_frames_of_an_iterator_are_all_read(animation: Path) -> None:
    with Image.open(animation) as image:
        frames = frames_of(list(ImageSequence.Iterator(image)), 2)
        assert image.tell() == 3
    want = frames_of(animation, 2)
    assert [color(load_image(frame)) for frame in frames] == [color(load_image(frame)) for frame in want]


def test_an_animated_image_as_some_frames_is_refused(animation: Path) -> None:
    with Image.open(animation) as image, pytest.raises(InputError, match=r"copies, \[frame\.copy"):
        frames_of([image, image])


def test_videos_of_other_kinds(animation: Path) -> None:
    url = "data:image/gif;base64," + base64.b64encode(animation.read_bytes()).decode()
    assert len(frames_of(url)) == 4
    for video in (
        "https://example.org/a.mp4?k=1",
        "s3://x/a.mp4",
        "A" * 4000,
        None,
        Image.new("RGB", (4, 4)),
    ):
        with pytest.raises(InputError):
            frames_of(video)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "path", ["https://h/x.png?sig=hidden", "s3://b/x.png?sig=hidden", "blob:https://h/x?sig=hidden"]
)
@pytest.mark.parametrize("kind", [str, Path])
def test_an_address_is_none_the_less_one_as_a_path(path: str, kind: Callable[[str], Any]) -> None:
    """``Path`` makes one slash of two, as a command line's arguments do."""
    inputs = kind(path)
    assert kind_of(inputs) in ("url", "address")
    assert "hidden" not in name_of(inputs)
    assert len(name_of(inputs)) <= SHOWN
    assert "where a path is expected" in str(not_readable(Path(path), name_of(inputs)))


def test_a_folder_of_a_strange_name_is_a_path() -> None:
    for text in ("a:b/c.png", "C:/x.png", "scenes/http/x.png", "datasets:/x.png"):
        assert kind_of(text) == kind_of(Path(text)) == "path"
