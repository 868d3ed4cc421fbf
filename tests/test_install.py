"""Installed and imported packages agree: pyproject's extras against the library's own imports."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ivl_export.tests.sources import ROOT, sources, tree

README = (ROOT / "README.md").read_text(encoding="utf-8")
OUTSIDE = ("tests", "benchmarks", "examples")
OPTIONAL = {"jinja2", "opentelemetry-sdk", "torch-tensorrt"}
"""Used if installed, named with their install line when needed: no extra has them."""
BY_OTHERS = {"httptools", "uvloop"}
"""Taken by uvicorn where they are installed: a request then costs a third of the CPU."""
BY_TRITON = {"triton_python_backend_utils"}
"""Part of Triton's Python backend, which runs packages/triton_model.py; nothing here imports that."""
IMPORTS = {
    "onnxruntime-gpu": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx",
    "torch-tensorrt": "torch_tensorrt", "nvidia-ml-py": "pynvml", "opentelemetry-sdk": "opentelemetry",
    "faiss-cpu": "faiss", "pyyaml": "yaml", "pillow": "PIL", "jinja2": "jinja2",
}  # fmt: skip
"""Package -> module, where a package may be missing or several have one module."""


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    data: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return data


def packages(requirements: list[str]) -> set[str]:
    return {str(canonicalize_name(Requirement(text).name)) for text in requirements}


@cache
def installed() -> Mapping[str, list[str]]:
    """Modules and the packages that they come from: every installed package is read."""
    return packages_distributions()


def modules_of(package: str) -> set[str]:
    if package in IMPORTS:
        return {IMPORTS[package]}
    return {
        m for m, names in installed().items() if package in {str(canonicalize_name(name)) for name in names}
    }


def imports(file: Path) -> Iterator[str]:
    """Modules from elsewhere: of import statements, ``import_module("x")``, and tables of such names."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Constant) and node.value in ("pynvml", "tensorrt", "tensorrt_rtx"):
            yield node.value  # loaded by name


def imported(*folders: str) -> set[str]:
    """Modules that the library imports, in ``folders`` only if any are named."""
    every = sources(*OUTSIDE)
    files = [f for f in every if not folders or f.relative_to(ROOT).parts[0] in folders]
    return {name for file in files for name in imports(file)} - sys.stdlib_module_names - {"ivl_export"}


def test_every_package_of_an_extra_is_imported_by_the_library() -> None:
    data, modules = project(), imported()
    extras = data["optional-dependencies"]
    for extra, requirements in {"": data["dependencies"], **extras}.items():
        if extra != "dev":
            own = packages(requirements) - BY_OTHERS
            unused = {package for package in own if not modules_of(package) & modules}
            assert not unused, f"extra {extra!r}: only tests need {unused}"


def test_every_import_of_the_library_is_installed_by_an_extra() -> None:
    data = project()
    extras = {k: v for k, v in data["optional-dependencies"].items() if k != "dev"}
    declared = packages([*data["dependencies"], *(text for extra in extras.values() for text in extra)])
    known = {module for package in declared | OPTIONAL for module in modules_of(package)}
    assert imported() - known - BY_TRITON == set()


def test_quant_is_what_building_imports() -> None:
    building = imported("models", "export", "quantization", "calibration", "pipeline")
    quant = {m for p in packages(project()["optional-dependencies"]["quant"]) for m in modules_of(p)}
    assert {"torch", "onnx", "onnx_ir", "onnxscript"} <= quant & building
    assert not {"modelopt", "huggingface_hub", "requests"} & imported()


def test_the_readme_names_every_extra() -> None:
    named = {
        extra for by_name in re.findall(r"ivl-export\[([\w,]+)\]", README) for extra in by_name.split(",")
    }
    extras = set(project()["optional-dependencies"]) - {"dev"}
    assert extras == named | {"rtx"}


def test_every_package_has_its_exact_version() -> None:
    pinned = packages([
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    ])  # fmt: skip
    data = project()
    extras = data["optional-dependencies"]
    installed = [*data["dependencies"], *(t for name, e in extras.items() if name != "gpu" for t in e)]
    assert packages(installed) - pinned == set()


BLOCKED = """
import json, os, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from ivl_export.cli import main
for folder, line in json.loads(sys.argv[1]).items():
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder + "." + name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    try:
        code = main(line.split())
    except SystemExit as left:
        code = left.code
    sys.stdout.flush(), sys.stderr.flush()
    with open(folder + ".code", "w") as file:
        file.write(str(code or 0))
"""
REFUSED = {"build": "quant", "build --dry-run": "quant", "calibrate": "quant", "export": "quant",
           "sensitivity": "quant", "train": "train", "train qat": "train"}  # fmt: skip
"""Commands, and the extra that each names."""
ANSWERED = (
    "--help", "doctor", "estimate --gpu l40s", "build --list-recipes", "verify BUNDLE",
    "compare BUNDLE BUNDLE",
    "profile BUNDLE --seconds 0.01 --layers --no-latency --calls 1 --component vision",
    "train scenes scenes --count 1",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A command's exit code, its stderr, and the folder that it ran in."""

    code: int
    stderr: str
    folder: Path


@pytest.fixture(scope="module")
def without_quant(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Every command where no module of extra ``quant`` can be imported: one process, a folder for each."""
    root, folders = tmp_path_factory.mktemp("without"), dict[str, Path]()
    for number, line in enumerate((*REFUSED, *ANSWERED)):
        folders[line] = root / str(number)
        folders[line].mkdir()
        if "BUNDLE" in line:
            (folders[line] / "BUNDLE").symlink_to(tiny_bundle)
    lines = json.dumps({str(folder): line for line, folder in folders.items()})
    process = subprocess.run([sys.executable, "-c", BLOCKED, lines], check=False)
    assert process.returncode == 0
    return {
        line: Answer(
            int(folder.with_suffix(".code").read_text()),
            folder.with_suffix(".err").read_text(encoding="utf-8"),
            folder,
        )
        for line, folder in folders.items()
    }


@pytest.mark.parametrize("line", REFUSED)
def test_commands_that_need_an_extra_say_which_and_why(line: str, without_quant: dict[str, Answer]) -> None:
    answer = without_quant[line]
    assert answer.code == 5, answer.stderr
    what, why, fix = answer.stderr.strip().splitlines()[-3:]
    assert what == f"error: 'ivl-export {line.split()[0]}' needs torch, which is not installed."
    assert re.search(r"torch.*; running a bundle", why)
    assert fix == f"  fix: pip install 'ivl-export[{REFUSED[line]}]'"
    assert "Traceback" not in answer.stderr
    assert list(answer.folder.iterdir()) == []


@pytest.mark.parametrize("line", ANSWERED)
def test_the_others_work_without_quant(line: str, without_quant: dict[str, Answer]) -> None:
    assert without_quant[line].code == 0, without_quant[line].stderr


def test_a_wheel_has_every_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    inside = [f.parent.relative_to(ROOT).parts for f in sources(*OUTSIDE) if f.name == "__init__.py"]
    assert set(data["tool"]["setuptools"]["packages"]) == {".".join(("ivl_export", *p)) for p in inside}
