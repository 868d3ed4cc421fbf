"""Optimization profiles: from the axes, presets and --shapes; and that prefill and decode share weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.bundle.spec import Axis, ComponentSpec
from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.engines.tensorrt.shapes import (
    PRESETS,
    check_shape_names,
    choose_profile,
    parse_shapes,
    profiles_of,
    ranges_of,
    restrict_axes,
)
from ivl_export.errors import UsageError
from ivl_export.verify.program import read_programs

if TYPE_CHECKING:
    from ..conftest import Make

VISION = ComponentSpec("vision", (), (), (Axis("batch", 1, 8, 128),))
STEP = ComponentSpec(
    "qllama_step", (), (),
    (Axis("batch", 1, 8, 128), Axis("text", 1, 1, 32), Axis("past", 96, 132, 224),
     Axis("total", 97, 133, 256)),
)  # fmt: skip


def test_a_component_without_a_cache_has_one_profile() -> None:
    assert profiles_of(VISION) == ({"batch": (1, 8, 128)},)


def test_decode_and_prefill_are_profiles_of_their_own() -> None:
    decode, prefill = profiles_of(STEP)
    assert decode["text"] == (1, 1, 4)
    assert decode["total"] == (97, 133, 228)
    assert prefill["text"] == (1, 16, 32)
    assert prefill["total"] == (97, 148, 256)
    assert decode["past"] == prefill["past"] == (96, 132, 224)


def test_presets_change_the_batch() -> None:
    batches = {name: profiles_of(VISION, name)[0]["batch"] for name in PRESETS}
    assert batches == {"latency": (1, 1, 8), "throughput": (1, 128, 128), "edge": (1, 1, 1)}
    with pytest.raises(UsageError, match=r"latency .*throughput .*edge"):
        profiles_of(VISION, "fast")


def test_shapes_win_over_presets_and_reach_the_components_they_name() -> None:
    shapes = parse_shapes(("batch=2:4:16", "qllama_step.past=100:100:100", "qllama_text.text=1:2:3"))
    assert profiles_of(VISION, "edge", shapes) == ({"batch": (2, 4, 16)},)
    decode, prefill = profiles_of(STEP, None, shapes)
    assert decode["past"] == (100, 100, 100)
    assert prefill["text"] == (1, 16, 32)
    assert prefill["total"] == (101, 116, 132)
    part = replace(STEP, name="qllama_step.1")
    assert profiles_of(part, None, shapes) == (decode, prefill)
    assert parse_shapes(("batch=8",)) == {"batch": (8, 8, 8)}


@pytest.mark.parametrize("text", ["batch", "batch=", "=1:2:3", "batch=1:2", "batch=a:b:c", "batch=3:2:1"])
def test_shapes_that_cannot_be_read_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="--shapes"):
        parse_shapes((text,))


def test_shapes_must_be_what_the_graph_takes() -> None:
    with pytest.raises(UsageError, match="out of range") as caught:
        profiles_of(VISION, None, {"batch": (1, 8, 256)})
    assert "1 to 128" in caught.value.why
    with pytest.raises(UsageError, match="past plus text"):
        parse_shapes(("total=1:2:3",))
    specs = {"vision": VISION, "qllama_step": STEP}
    check_shape_names({"batch": (1, 1, 1), "qllama_step.text": (1, 1, 1)}, specs)
    for key in ("bach", "vision.text", "total"):
        with pytest.raises(UsageError, match=r"Known: batch, past, qllama_step.batch"):
            check_shape_names({key: (1, 1, 1)}, specs)


@given(text=st.integers(1, 32), past=st.integers(96, 224), batch=st.integers(1, 128))
def test_every_size_of_the_spec_has_a_profile_and_decoding_has_its_own(
    text: int, past: int, batch: int
) -> None:
    sizes = {"text": text, "past": past, "batch": batch, "total": text + past}
    assert choose_profile(profiles_of(STEP), sizes) == (0 if text <= 4 else 1)


def test_sizes_outside_every_profile_have_none() -> None:
    profiles = profiles_of(STEP, "latency")
    assert choose_profile(profiles, {"batch": 9, "text": 1, "past": 96, "total": 97}) is None
    spec = restrict_axes(STEP, profiles)
    assert spec.axis("batch") == Axis("batch", 1, 1, 8)
    assert spec.axis("text") == Axis("text", 1, 1, 32)
    assert spec.axis("total") == Axis("total", 97, 133, 256)
    assert restrict_axes(STEP, ()) is STEP
    assert ranges_of(spec)["batch"] == (1, 1, 8)


@pytest.mark.slow
def test_prefill_and_decode_share_their_weights(make: Make, tmp_path: Path) -> None:
    """Within 1.1 of one profile's size: kernels of a second profile, 1.5 MB, and no second weights, 42 MB."""
    pytest.importorskip("tensorrt_rtx")
    sample = make("step", dtype="bf16", scheme="fp8", width=2048, heads=16)
    axes = (Axis("batch", 1, 2, 4), Axis("text", 1, 1, 32), Axis("past", 4, 8, 12), Axis("total", 5, 9, 44))
    spec = replace(sample.spec, axes=axes)
    one = build_engine(sample.path, spec, tmp_path / "one.engine", profiles=({},))
    two = build_engine(sample.path, spec, tmp_path / "two.engine")
    assert [p["text"] for p in two.built.profiles] == [(1, 1, 4), (1, 16, 32)]
    assert len(read_programs(tmp_path / "two.engine")) == 2
    assert one.size < two.size < 1.1 * one.size
