"""The Python project runs as it is shipped, and gives what the runtime gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ivl_export
from ivl_export.packages.distribution import WHEEL
from ivl_export.tests.packages.conftest import Pack


def run(package: Path, *arguments: str, text: str = "") -> str:
    command = [sys.executable, str(package / "app.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, input=text, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_embedding_project(pack: Pack, tiny_bundle: Path, photo: Path) -> None:
    root = pack(tiny_bundle, "python", name="tiny").root
    (root / "bundle").rename(root.parent / "elsewhere")  # it runs its own bundle, and where it lies
    root = root.rename(root.parent / "moved")
    (root.parent / "elsewhere").rename(root / "bundle")
    told = json.loads(run(root, "embed", str(photo), "--text", "a red ring", "--mode", "G"))
    probabilities = json.loads(run(root, "classify", str(photo), "--label", "ring", "--label", "cross"))
    captions = json.loads(run(root, "caption", str(photo)))
    with ivl_export.load(tiny_bundle) as model:
        for name, rows in (
            ("images", model.encode_image([photo], "InternVL-G")),
            ("texts", model.encode_text(["a red ring"])),
        ):
            np.testing.assert_allclose(
                told[name], rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-4
            )
        np.testing.assert_allclose(
            list(probabilities[0].values()), model.classify([photo], ["ring", "cross"])[0], rtol=1e-4
        )
        assert captions == model.caption([photo])
    readme = (root / "README.md").read_text()
    assert all(f"app.py {verb}" in readme for verb in ("embed", "classify", "caption"))


def test_the_chat_project(pack: Pack, chat_bundle: Path, photo: Path) -> None:
    root = pack(chat_bundle, "python").root
    told = run(root, str(photo), "--max-tokens", "8", text="What is it?\nAnd now?\n\n")
    with ivl_export.load(chat_bundle) as model:
        chat = model.chat([photo])
        answers = ["".join(chat.stream(q, 8)) for q in ("What is it?", "And now?")]
    assert told == "".join(f"{answer}\n" for answer in answers)
    assert "--ask" in (root / "README.md").read_text()


def test_errors_have_the_exit_code_of_the_package_and_no_traceback(
    pack: Pack, tiny_bundle: Path, tmp_path: Path
) -> None:
    root = pack(tiny_bundle, "python").root
    (tmp_path / "text.png").write_text("no picture")
    command = [sys.executable, str(root / "app.py"), "caption", str(tmp_path / "text.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ivl_export.InputError.exit_code
    assert done.stderr.startswith("error: Cannot read")


def test_pyproject_names_this_release_and_the_python(pack: Pack, tiny_bundle: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    package = pack(tiny_bundle, "python", name="My_Model.v2", settings={"python": "3.12"})
    project = tomllib.loads((package.root / "pyproject.toml").read_text())["project"]
    assert project["name"] == "my-model-v2"
    assert project["dependencies"] == [f"ivl-export[cpu]=={ivl_export.__version__}"]
    assert project["requires-python"] == ">=3.12"
    assert f"wheels/{WHEEL}" in package.files
    pins = (package.root / "constraints.txt").read_text().splitlines()
    assert any(line.startswith("numpy==") for line in pins)
    assert not [line for line in pins if ";" in line]
