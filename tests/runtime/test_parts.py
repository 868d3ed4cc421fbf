"""The runtime's parts that need no engine: zero-shot arithmetic, image batches, timings, imports."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from ivl_export.errors import InputError, UsageError
from ivl_export.inputs.preprocess import ImageSettings, preprocess_images
from ivl_export.runtime import zero_shot
from ivl_export.runtime.image_batches import Reading, pixel_batches
from ivl_export.runtime.timings import Timings

pytestmark = pytest.mark.numeric

SETTINGS = ImageSettings(size=14)


def test_the_runtime_imports_no_large_package() -> None:
    code = """
import sys
before = set(sys.modules)
from ivl_export.runtime import InternVL
imported = set(sys.modules) - before
large = {"torch", "transformers", "modelopt", "onnx", "onnxscript", "onnxruntime", "matplotlib", "rich"}
large |= {"email", "http", "numpy.random", "importlib.metadata"}  # a sixth of the time that the import takes
assert not large & imported, large & imported
builds = ("ivl_export.export", "ivl_export.calibration", "ivl_export.training")
assert not [m for m in sys.modules if m.startswith(builds)]
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_l2_keeps_zero_rows() -> None:
    out = zero_shot.l2(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    assert np.allclose(out, np.array([[0.6, 0.8], [0.0, 0.0]]))
    assert out.dtype == np.float32


def test_ensemble_is_the_mean_of_unit_vectors() -> None:
    # label 0: two templates of different length, 90 degrees apart; label 1: one direction
    texts = np.array([[10, 0], [0, 0.1], [2, 2], [5, 5]], np.float32)
    assert np.allclose(zero_shot.ensemble(texts, 2), np.full((2, 2), 0.5**0.5), atol=1e-6)


def test_probabilities_are_the_softmax_of_scaled_cosines() -> None:
    images = np.array([[2.0, 0.0]], np.float32)
    classes = np.array([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], np.float32)
    scale = np.log(5.0)
    want = np.exp([5.0, 0.0, -5.0])
    assert np.allclose(zero_shot.probabilities(images, classes, scale), want / want.sum(), rtol=1e-5)
    assert np.isfinite(zero_shot.probabilities(images, classes, np.log(1e4))).all()


def test_rank_orders_by_cosine_not_by_length() -> None:
    queries = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    items = np.array([[100.0, 100.0], [0.1, 0.0], [0.0, -1.0]], np.float32)
    order, scores = zero_shot.rank(queries, items, 2)
    assert order.tolist() == [[1, 0], [0, 1]]
    assert np.allclose(scores, [[1, 0.5**0.5], [0.5**0.5, 0]], atol=1e-6)
    assert zero_shot.rank(queries, items, 9)[0].shape == (2, 3)


def test_templates() -> None:
    assert zero_shot.fill("a photo of a {}.", "c{at}") == "a photo of a c{at}."
    with pytest.raises(UsageError, match="no label"):
        zero_shot.fill("no label", "cat")


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_pixel_batches_are_the_preprocessed_images_in_order(count: int) -> None:
    rng = np.random.default_rng(count)
    images = [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(count)]
    timings = Timings()
    parts = list(pixel_batches(images, SETTINGS, 4, timings))
    assert [len(p) for p in parts] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    if count:
        assert np.array_equal(np.concatenate(parts), preprocess_images(images, SETTINGS))
        assert timings.snapshot()["preprocess"].calls == len(parts)


def test_ready_pixels_pass_through_and_other_arrays_are_refused() -> None:
    pixels = np.zeros((5, 3, 14, 14), np.float32)
    assert [len(p) for p in pixel_batches(pixels, SETTINGS, 2, Timings())] == [2, 2, 1]
    for wrong in (pixels[0], pixels.astype(np.float64), np.zeros((5, 14, 14, 3), np.uint8), "a.png", b"GIF"):
        with pytest.raises(InputError):
            list(pixel_batches(wrong, SETTINGS, 2, Timings()))  # type: ignore[arg-type]


def test_a_broken_image_surfaces_from_the_reading_thread() -> None:
    images = [Image.new("RGB", (9, 9))] * 5 + [b"broken"]
    stream = pixel_batches(images, SETTINGS, 2, Timings())
    assert len(next(stream)) == 2
    with pytest.raises(InputError):
        list(stream)


def test_timings_are_read_while_new_stages_come(request: pytest.FixtureRequest) -> None:
    timings, before = Timings(), sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(before))
    sys.setswitchinterval(1e-6)

    def work() -> None:
        for i in range(3_000):
            with timings.measure(str(i)):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        timings.snapshot()
    assert len(timings.snapshot()) == 3_000


def test_timings_add_up_over_threads() -> None:
    timings = Timings()

    def work() -> None:
        for _ in range(50):
            with timings.measure("stage"):
                time.sleep(0.0001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stage = timings.snapshot()["stage"]
    assert stage.calls == 200
    assert stage.seconds >= 200 * 0.0001
    timings.reset()
    assert timings.snapshot() == {}


def test_threads_read_the_same_pixels_in_the_same_order() -> None:
    images = [Image.new("RGB", (20 + i, 30), (i, 2 * i, 3 * i)) for i in range(9)]
    plain = preprocess_images(images, SETTINGS)
    assert np.array_equal(preprocess_images(images, SETTINGS, threads=4), plain)
    batches = list(pixel_batches(images, SETTINGS, 4, Timings(), Reading(threads=3)))
    assert np.array_equal(np.concatenate(batches), plain)


def test_the_first_bad_image_is_reported_from_any_thread() -> None:
    images: list[Image.Image | bytes] = [Image.new("RGB", (20, 30)), b"no image", Image.new("RGB", (20, 30))]
    with pytest.raises(InputError, match="not an image of a known format"):
        preprocess_images(images, SETTINGS, threads=3)


def test_urls_are_only_fetched_with_leave() -> None:
    with pytest.raises(InputError, match="without leave"):
        list(pixel_batches(["https://example.org/a.jpg"], SETTINGS, 4, Timings()))
