"""Frames of image sequences, animated images and video files; files that would do harm are refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl_export import cli
from ivl_export.errors import CapabilityError, InputError, UsageError
from ivl_export.inputs import video
from ivl_export.inputs.video import chat_places, spread
from ivl_export.runtime import InternVL, InternVLChat, frames_of
from ivl_export.runtime.zero_shot import l2

pytestmark = pytest.mark.numeric

KINDS = ("GIF", "PNG", "WEBP")


def colors(count: int) -> list[Image.Image]:
    """Frames whose red value is their number."""
    return [Image.new("RGB", (32, 16), (10 * i, 255 - 10 * i, 90)) for i in range(count)]


def animated(kind: str, count: int = 20) -> bytes:
    buffer = io.BytesIO()
    first, *rest = colors(count)
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    first.save(buffer, kind, save_all=True, append_images=rest, **options)
    return buffer.getvalue()


pytest.importorskip("av")


def film(container: str, codec: str, count: int = 20, size: tuple[int, int] = (32, 16)) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 6  # several key frames, and some that follow
        for image in colors(count):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image.resize(size)), "rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def numbers(frames: list[Any]) -> list[int]:
    return [round(np.asarray(frame)[:, :, 0].mean() / 10) for frame in frames]


@given(total=st.integers(1, 500), count=st.integers(1, 40))
def test_frames_are_spread_evenly(total: int, count: int) -> None:
    result = spread(total, count)
    assert len(result) == min(total, count) == len(set(result))
    assert result == sorted(result)
    assert all(0 <= i < total for i in result)
    gaps = np.diff([-result[0] - 1, *result, 2 * total - result[-1]])  # the ends count as half a part
    assert gaps.max() - gaps.min() <= 2
    assert spread(total, 1) == [total // 2]
    assert spread(total, total) == list(range(total))


def test_a_sequence_gives_its_own_frames() -> None:
    frames = colors(10)
    assert frames_of(frames, 2) == [frames[2], frames[7]]
    assert frames_of([Path("a.png"), Path("b.png")], 8) == [Path("a.png"), Path("b.png")]
    stacked = np.stack([np.asarray(frame) for frame in frames])
    assert numbers(frames_of(stacked, 2)) == [2, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_animations_are_read_frame_by_frame(kind: str, tmp_path: Path) -> None:
    data = animated(kind)
    path = tmp_path / f"clip.{kind.lower()}"
    path.write_bytes(data)
    for given_as in (data, path, str(path)):
        frames = frames_of(given_as, 4)
        assert numbers(frames) == [2, 7, 12, 17]
        assert all(isinstance(f, Image.Image) and f.mode == "RGB" and f.size == (32, 16) for f in frames)
    assert numbers(frames_of(data, 30)) == list(range(20))


def test_a_still_image_is_a_video_of_one_frame() -> None:
    buffer = io.BytesIO()
    colors(1)[0].save(buffer, "PNG")
    assert numbers(frames_of(buffer.getvalue(), 8)) == [0]


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mjpeg"), ("mpegts", "mpeg2video")],
)
def test_video_files_are_read_at_the_same_frames(container: str, codec: str, tmp_path: Path) -> None:
    data = film(container, codec)
    path = tmp_path / "clip.bin"  # the content decides
    path.write_bytes(data)
    for given_as in (data, path):
        assert numbers(frames_of(given_as, 4)) == [2, 7, 12, 17]
    assert numbers(frames_of(data, 1)) == [10]


def test_video_files_need_pyav_and_animations_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film("mp4", "mpeg4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert numbers(frames_of(animated("GIF"), 2)) == [5, 15]
    with pytest.raises(CapabilityError, match=r"ivl-export\[video\]"):
        frames_of(data)


def bad() -> dict[str, bytes]:
    mp4 = film("mp4", "mpeg4")
    return {
        "empty": b"",
        "garbage": bytes(range(256)) * 40,
        "cut.gif": animated("GIF")[:900],
        "cut.mp4": mp4[: len(mp4) // 2],
        "list.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "concat.txt": b"ffconcat version 1.0\nfile /etc/hostname\n",
        "sheet.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    }


@pytest.mark.parametrize("name", list(bad()))
def test_bad_files_give_an_input_error_that_names_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(bad()[name])
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
        frames_of(path)
    assert "hostname" not in caught.value.why


def test_what_is_not_there_or_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file"):
        frames_of(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="no frames"):
        frames_of([])
    with pytest.raises(UsageError, match="0 frames"):
        frames_of(animated("GIF"), 0)
    for limit, value in (
        ("MAX_DECODED", 32 * 16 * 10),
        ("MAX_KEPT", 32 * 16 * 7),
        ("MAX_ANIMATION_BYTES", 100),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(video, limit, value)
            with pytest.raises(InputError, match="too large"):
                frames_of(animated("GIF"))
    for limit, value in (
        ("MAX_PACKETS", 10),
        ("MAX_KEPT", 32 * 16 * 7),
        ("MAX_BYTES", 100),
        ("MAX_GROUP", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(video, limit, value)
            with pytest.raises(InputError, match="too large"):
                frames_of(film("mp4", "mpeg4"))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_files_never_raise_anything_but_input_errors(data: Any) -> None:
    raw = bytearray(data.draw(st.sampled_from(FILES)))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(raw[: data.draw(st.integers(1, len(raw)))])
    try:
        frames = frames_of(damaged, 3)
    except InputError:
        return
    assert 1 <= len(frames) <= 3


FILES = [*(animated(kind, 5) for kind in KINDS), film("mp4", "mpeg4", 8), film("matroska", "mpeg4", 8)]


def test_a_video_is_the_mean_of_its_frames(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.gif"
    path.write_bytes(animated("GIF"))
    with InternVL.load(tiny_bundle, threads=1) as model:
        for mode in ("InternVL-C", "InternVL-G"):
            got = model.encode_video(path, 3, mode)
            want = l2(model.encode_image(frames_of(path, 3), mode)).mean(0)
            np.testing.assert_allclose(got, want, atol=1e-6)
        both = model.encode_videos([path, colors(3)], 3)
        assert both.shape == (2, 48)
        np.testing.assert_allclose(both[1], model.encode_video(colors(3)), atol=1e-6)
        assert model.encode_videos([]).shape == (0, 48)
        want = model.encode_video(path, 4)
    line = ["run", "embed", str(tiny_bundle), "--video", str(path), "--frames", "4", "--json"]
    out = tmp_path / "out.npy"
    assert cli.main([*line, "--out", str(out)]) == 0
    np.testing.assert_allclose(np.load(out), want[None], atol=1e-6)
    assert f'"video": "{path}"' in capsys.readouterr().out


@pytest.mark.slow
def test_a_chat_sees_a_video_frame_by_frame(
    chat_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.webp"
    path.write_bytes(animated("WEBP"))
    with InternVLChat.load(chat_bundle, threads=1) as model:
        talk = model.chat(frames_of(path, 3))
        want = talk.ask("what is this?", 4)
        assert talk.history[0].images == 3
        same = [colors(20)[i] for i in spread(20, 3)]
        assert want == model.chat(same).ask("what is this?", 4)
    line = ["run", "chat", str(chat_bundle), "--video", str(path), "--frames", "3", "--json"]
    assert cli.main([*line, "--question", "what is this?", "--max-new-tokens", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["turns"][0]["answer"], said["videos"]) == (want, [str(path)])


@given(st.integers(1, 3000), st.integers(1, 64))
def test_the_frames_of_the_published_chat_code(total: int, count: int) -> None:
    places = chat_places(total, count)
    assert places == sorted(set(places))
    assert len(places) == min(total, count)
    assert 0 <= places[0] <= places[-1] < total
    if total > count:  # as its get_index computes them, with numpy
        start, segment = 0, float(total - 1) / count
        assert places == [int(start + (segment / 2) + np.round(segment * k)) for k in range(count)]


def test_frames_are_the_requested_ones() -> None:
    frames = [np.full((4, 4, 3), n, np.uint8) for n in range(30)]
    selected = frames_of(frames, 8, places=chat_places)
    assert [int(np.asarray(frame)[0, 0, 0]) for frame in selected] == chat_places(30, 8)
