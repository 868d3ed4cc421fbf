"""Builder options: checked, kept as data, and accepted or refused by TensorRT-RTX without a GPU."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.engines.gpu import gpus
from ivl_export.engines.tensorrt.build import build_engine
from ivl_export.engines.tensorrt.options import HARDWARE, OPTIONS, TACTICS, TILINGS, BuildOptions
from ivl_export.errors import CapabilityError, IntegrityError, UsageError
from ivl_export.settings import keyword

if TYPE_CHECKING:
    from ..conftest import Make

SIZES = st.none() | st.integers(1, 1 << 40)


ANY = st.builds(
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


@given(ANY)
def test_options_are_plain_data_and_back(options: BuildOptions) -> None:
    assert BuildOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_defaults_are_nothing() -> None:
    assert BuildOptions().to_json() == {}
    assert BuildOptions.of(()) == BuildOptions.of({}) == BuildOptions()


@given(ANY)
def test_the_words_that_give_options_are_read_as_them(options: BuildOptions) -> None:
    words = options.flags()
    assert words[::2] == ["-O"] * (len(words) // 2)
    assert BuildOptions.of(words[1::2]) == options


def test_every_field_has_a_key() -> None:
    assert sorted(keyword(OPTIONS, key) for key in OPTIONS) == sorted(f.name for f in fields(BuildOptions))


def test_options_from_python() -> None:
    """Keys with dashes or underscores; values as their types, or as they are typed."""
    typed = {"optimization_level": "4", "workspace": "2G", "tactic-sources": "cublas, cudnn", "refit": "true"}
    plain = {
        "optimization-level": 4,
        "workspace": 2 << 30,
        "tactic_sources": ["cublas", "cudnn"],
        "refit": True,
    }
    want = BuildOptions(4, 2 << 30, ("cublas", "cudnn"), refit=True)
    assert BuildOptions.of(typed) == BuildOptions.of({**plain, "refit": True}) == want
    assert BuildOptions.of({"refit": False, "strip_plan": "false"}) == BuildOptions()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tilling": "fast"}, r"no engine option 'tilling'.*Did you mean -O tiling\?"),
        ({"magic": 1}, r"optimization-level \(0 to 5\): 0 builds fastest.*version-compatible.*-O KEY=VALUE"),
        ({"optimization-level": "fast"}, r"does not take 'fast'.*0 to 5.*Give -O optimization-level=0"),
        ({"optimization-level": True}, r"does not take True"),
        ({"workspace": "lots"}, r"does not take 'lots'.*a size: 512M, 2G.*Give -O workspace=512M"),
        ({"refit": "maybe"}, r"does not take 'maybe'.*nothing, true or false.*Give -O refit,"),
        ({"tiling": True}, r"does not take True.*none, fast, moderate, full"),
        ({"tactic-sources": 3}, r"does not take 3.*edge-mask-convolutions"),
        (["l2=1M", "l2=2M"], r"-O l2 is given twice"),
        ({"strip-plan": True, "strip_plan": False}, r"given twice"),
    ],
)
def test_options_that_cannot_be_read_are_explained(options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){says}"):
        BuildOptions.of(options)


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
        ({"optimization_level": 6}, "-O optimization-level does not take 6"),
        ({"tiling": "hard"}, "-O tiling"),
        ({"hardware": "hopper"}, "-O hardware-compatible"),
        ({"tactic_sources": ("magic",)}, "-O tactic-sources"),
        ({"workspace_bytes": 0}, "-O workspace"),
        ({"l2_bytes": -1}, "-O l2"),
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
    with pytest.raises(CapabilityError, match="cannot do -O "):
        build_engine(sample.path, sample.spec, tmp_path / "x.engine", options=BuildOptions(**options))
    assert not (tmp_path / "x.engine").exists()
