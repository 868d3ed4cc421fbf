from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nano_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of nano in FP8: all four components."""
    return built("fp8", tmp_path_factory.mktemp("fp8") / "bundle", ())


@pytest.fixture(scope="session")
def nano_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of nano in INT8: the image tower alone, for time's sake."""
    return built("int8", tmp_path_factory.mktemp("int8") / "bundle", ("vision",))


@pytest.fixture(scope="session")
def nano_fp8_attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in FP8 with FP8 attention."""
    return built("fp8-attention", tmp_path_factory.mktemp("attention") / "bundle", ("vision",))


@pytest.fixture(scope="session")
def nano_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same in any precision."""

    @cache
    def made(precision: str) -> Path:
        return built(precision, tmp_path_factory.mktemp(precision) / "bundle", ("vision",))

    return made


def built(precision: str, out: Path, components: tuple[str, ...]) -> Path:
    """``ivl-export build`` without its scores on tasks, which take most of the time."""
    from ivl_export.cli import main
    from ivl_export.pipeline import run

    line = ["build", "--precision", precision, "--backend", "onnxruntime", "--calib-samples", "40"]
    line += ["--out", str(out), *(["--components", ",".join(components)] if components else [])]
    with pytest.MonkeyPatch.context() as patch:
        steps = run.build_steps
        patch.setattr(run, "build_steps", lambda plan: [s for s in steps(plan) if s.name != "tasks"])
        assert main(line) == 0
    return out
