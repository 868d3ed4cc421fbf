from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ivl_export.models.shipped import nano_folder
from ivl_export.tests.conftest import shared


@pytest.fixture(scope="session")
def nano_fp8(request: pytest.FixtureRequest) -> Path:
    """A bundle of nano in FP8: all four components."""
    return built(request, "fp8", ())


@pytest.fixture(scope="session")
def nano_int8(request: pytest.FixtureRequest) -> Path:
    """A bundle of nano in INT8: the image tower alone, for time's sake."""
    return built(request, "int8", ("vision",))


@pytest.fixture(scope="session")
def nano_fp8_attention(request: pytest.FixtureRequest) -> Path:
    """The same in FP8 with FP8 attention."""
    return built(request, "fp8-attention", ("vision",))


@pytest.fixture(scope="session")
def nano_weights(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The same in any precision."""
    return lambda precision: built(request, precision, ("vision",))


def built(request: pytest.FixtureRequest, precision: str, components: tuple[str, ...]) -> Path:
    """``ivl-export build`` without its scores on tasks, which take most of the time. Once for all runs."""

    def build(out: Path) -> None:
        from ivl_export.cli import main
        from ivl_export.pipeline import run

        line = ["build", "--precision", precision, "--backend", "onnxruntime", "--calib-samples", "40"]
        line += ["--out", str(out), *(["--components", ",".join(components)] if components else [])]
        with pytest.MonkeyPatch.context() as patch:
            steps = run.build_steps
            patch.setattr(run, "build_steps", lambda plan: [s for s in steps(plan) if s.name != "tasks"])
            assert main(line) == 0

    name = "-".join(["nano", precision, *components])
    return shared(request, name, build, nano_folder() / "model.safetensors", Path(__file__))
