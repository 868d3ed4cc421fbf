"""Builder options: checked, kept as data, and what TensorRT-RTX makes of each without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.engines.gpu import gpus
from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.engines.tensorrt.options import HARDWARE, TACTICS, TILINGS, BuildOptions
from ivl_export.errors import CapabilityError, IntegrityError, UsageError

if TYPE_CHECKING:
    from ..conftest import Make

SIZES = st.none() | st.integers(1, 1 << 40)


@given(
    st.builds(
        BuildOptions,
        optimization_level=st.none() | st.integers(0, 5),
        workspace_bytes=SIZES,
        tactic_sources=st.none() | st.lists(st.sampled_from(TACTICS), unique=True).map(tuple),
        tiling=st.none() | st.sampled_from(TILINGS),
        l2_bytes=SIZES,
        hardware=st.none() | st.sampled_from(HARDWARE),
        weight_streaming=st.booleans(),
        refit=st.booleans(),
        strip_plan=st.booleans(),
        version_compatible=st.booleans(),
    )
)
def test_options_are_plain_data_and_back(options: BuildOptions) -> None:
    assert BuildOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_defaults_are_nothing() -> None:
    assert BuildOptions().to_json() == {}


@pytest.mark.parametrize(
    "data",
    [{"fast": True}, {"tiling": "hard"}, {"optimization_level": 7}, {"refit": False}, {"l2_bytes": "4"}],
)
def test_options_of_a_manifest_are_read_strictly(data: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        BuildOptions.from_json(data)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"optimization_level": 6}, "level 6"),
        ({"tiling": "hard"}, "--tiling"),
        ({"hardware": "hopper"}, "--hardware-compatible"),
        ({"tactic_sources": ("magic",)}, "--tactic-sources"),
        ({"workspace_bytes": 0}, "--workspace"),
        ({"l2_bytes": -1}, "--l2"),
    ],
)
def test_options_that_do_not_exist_are_named(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        BuildOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": 0},
        {"optimization_level": 5},
        {"workspace_bytes": 1 << 26},
        {"tactic_sources": ("jit-convolutions",)},
        {"tactic_sources": ()},
        {"tiling": "full", "l2_bytes": 1 << 20},
        {"weight_streaming": True},
    ],
)
def test_rtx_builds_with_it(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("tensorrt_rtx")
    sample = make("mlp", dtype="bf16", scheme="fp8")
    record = build_engine(sample.path, sample.spec, tmp_path / "x.engine", options=BuildOptions(**options))
    assert BuildOptions.from_json(
        json.loads(json.dumps(record.to_json()))["built"]["options"]
    ) == BuildOptions(**options)


@pytest.mark.parametrize(
    "options",
    [{"version_compatible": True}, {"hardware": "ampere+"}, {"refit": True}, {"strip_plan": True}],
)
def test_rtx_refuses_it_before_it_builds(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("tensorrt_rtx")
    if gpus() and not {"version_compatible", "hardware"} & set(options):
        pytest.skip("with a GPU it can be built")
    sample = make("mlp", dtype="bf16")
    with pytest.raises(CapabilityError, match="cannot do --"):
        build_engine(sample.path, sample.spec, tmp_path / "x.engine", options=BuildOptions(**options))
    assert not (tmp_path / "x.engine").exists()
