"""``--format python``: a small Python project that runs the bundle: app.py, pyproject.toml, README."""

from __future__ import annotations

from pathlib import Path

from .. import __version__
from ..settings import Setting, choice
from .contract import File, Format, Job
from .distribution import (
    PROJECT,
    PYTHONS,
    WHEEL,
    constraint_lines,
    environment,
    package_name,
    text_of,
    write_wheel,
)

EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
"""A device, and the extra that has ONNX Runtime for it."""
DEVICE = Setting("cpu or cuda", "where the bundle runs; else cpu", choice(tuple(EXTRAS)), default="cpu")
PYTHON = Setting("3.11, 3.12 or 3.13", "Python that it is for; else by format", choice(PYTHONS))
OLDEST = PYTHONS[0]
"""The Python that a project and an image are for if nothing is said."""

_PYPROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "{version}"
description = "{model} ({recipe}) as a Python program."
requires-python = ">={python}"
dependencies = ["{project}[{extra}]=={version}"]

[tool.setuptools]
py-modules = ["app"]
"""
_README = """# {name}

{model} in {recipe}, as a program: `app.py` loads the bundle next to it.

```sh
python{python} -m venv venv
venv/bin/pip install -c constraints.txt --find-links wheels '{project}[{extra}]=={version}'
{commands}
```

| file | |
|---|---|
| `app.py` | the program; change it as you like |
| `bundle/` | the model: graphs, weights, tokenizer, receipts, all hashed in `manifest.json` |
| `wheels/` | {project} {version}; its dependencies come from your package index |
| `constraints.txt` | the versions that {project} was tested with |

`venv/bin/{project} verify bundle` checks the files, `venv/bin/{project} run --help` has more to do with it.
"""
_COMMANDS = {
    "embed": 'venv/bin/python app.py embed photo.jpg --text "a red panda"',
    "classify": "venv/bin/python app.py classify photo.jpg --label cat --label dog",
    "caption": "venv/bin/python app.py caption photo.jpg",
    "chat": 'venv/bin/python app.py photo.jpg --ask "What is this?"',
}


def files(job: Job) -> list[File]:
    """The project, without the bundle."""
    manifest, chat = job.bundle.manifest, "chat" in job.abilities
    python: str = job.settings.get("python", OLDEST)
    words = {
        "name": package_name(job.name), "model": manifest.model.name, "recipe": manifest.recipe,
        "project": PROJECT, "version": __version__, "python": python,
        "extra": EXTRAS[job.settings["device"]],
    }  # fmt: skip
    shown = ["chat"] if chat else [c for c, a in _NEEDED.items() if a in job.abilities]
    program = Path(__file__).with_name("app_chat.py" if chat else "app_embeddings.py")
    pins = constraint_lines(environment(python))
    return [
        File("app.py", program),
        File("pyproject.toml", _PYPROJECT.format(**words)),
        File("README.md", _README.format(**words, commands="\n".join(_COMMANDS[c] for c in shown))),
        File("constraints.txt", text_of(pins, f"The versions that {PROJECT} {__version__} was tested with.")),
        File(f"wheels/{WHEEL}", write_wheel),
    ]


_NEEDED = {"embed": "embed", "classify": "embed", "caption": "caption"}
"""Commands of app.py, and the ability that each needs."""

FORMAT = Format(
    "python", "a Python project: app.py, pyproject.toml", {"device": DEVICE, "python": PYTHON}, files
)
