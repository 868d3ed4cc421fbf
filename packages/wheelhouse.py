"""``--format wheelhouse``: wheels of this package and of all it needs, the bundle, and a script that installs
them without a network.

pip downloads the wheels, from the index that it is set up with. It evaluates the markers of requirements for
the Python that it runs in. What only another target needs (colorama on Windows) is then found in the metadata
of the wheels and downloaded as well, until nothing is missing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from platform import machine

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from .. import __version__
from ..errors import BuildError, UsageError
from ..progress import Progress, reported
from ..settings import Setting, names, text
from .contract import BUNDLE, File, Format, Job
from .distribution import (
    PROJECT,
    WHEEL,
    applies,
    constraint_lines,
    constraints,
    environment,
    installed,
    last_line,
    pip_available,
    requirement_lines,
    text_of,
    write_wheel,
)
from .project import DEVICE, EXTRAS, PYTHON

WHEELS = "wheels"
PLATFORM = Setting(
    "manylinux_2_28_x86_64, win_amd64 or another",
    "platform that it is for, as wheels name it; else this one",
    text,
)
ADDED = Setting("names: serve,video", "further extras; none: no further ones", names, default=("serve",))
_ROUNDS = 5
"""Of downloads: what a wheel of one round needs is in the next."""

_INSTALL = """#!/bin/sh
# Installs {project} {version} with {extras} from the wheels next to this file; no network is needed.
#   sh install.sh [FOLDER]    a new virtual environment there; else venv, next to this file
# PYTHON=python{python} names the Python to take.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${{PYTHON:-python{python}}}
venv=${{1:-"$here/venv"}}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != ({major}, {minor}))' || {{
    echo "error: these wheels are for Python {python}: PYTHON=/path/to/python{python} sh install.sh" >&2
    exit 1
}}
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index \\
    --find-links "$here/{wheels}" --constraint "$here/constraints.txt" '{project}[{extras}]=={version}'
"$venv/bin/{project}" verify "$here/{bundle}" --quick
echo "installed: $venv/bin/{project}"
"""
_README = """# {name}

{model} in {recipe}, and {project} {version} with all it needs, for Python {python} on {platform}.

```sh
sh install.sh            # into venv/, without a network
venv/bin/{project} run --help
venv/bin/{project} verify {bundle}
```

| file | |
|---|---|
| `install.sh` | makes a virtual environment and installs the wheels into it |
| `{wheels}/` | {project} and its dependencies |
| `constraints.txt` | the versions that {project} was tested with |
| `{bundle}/` | the model |

On Windows: `py -{python} -m venv venv`, then `venv\\Scripts\\pip install --no-index --find-links {wheels} -c
constraints.txt "{project}[{extras}]=={version}"`.
"""


@dataclass(frozen=True)
class Target:
    """Where the wheels are to be installed.

    Args:
        python: ``"3.11"``.
        platform: as wheels name it; None: this machine.
    """

    python: str
    platform: str | None

    @property
    def is_here(self) -> bool:
        """Whether it is this Python on this machine."""
        return self.platform is None and self.python == _python_here()

    @property
    def environment(self) -> dict[str, str]:
        """The values of markers there."""
        name = self.platform or sys.platform
        system = (
            "win32"
            if name.startswith("win")
            else "darwin"
            if name.startswith(("macosx", "darwin"))
            else "linux"
        )
        other = next((m for m in ("x86_64", "aarch64", "arm64") if name.endswith(m)), "AMD64")
        return environment(self.python, system, machine() if self.platform is None else other)

    def options(self) -> Iterator[str]:
        """Options of pip download."""
        yield from ("--only-binary", ":all:")
        if self.is_here:
            return
        yield from ("--python-version", self.python, "--implementation", "cp")
        for platform in platforms(self.platform) if self.platform else ():
            yield from ("--platform", platform)


def platforms(platform: str) -> list[str]:
    """``platform``, and older ones whose wheels run there: pip takes only those it is told.

    ``manylinux_2_28_x86_64`` -> itself, ``manylinux_2_27_x86_64`` ... ``manylinux_2_5_x86_64``, and the older
    names of three of these.
    """
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
    if match is None:
        return [platform]
    newest, machine = int(match[1]), match[2]
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 4, -1)]
    named = ((17, "manylinux2014"), (12, "manylinux2010"), (5, "manylinux1"))
    return [*tags, *(f"{name}_{machine}" for minor, name in named if minor <= newest)]


def files(job: Job) -> list[File]:
    """The wheelhouse without the downloaded wheels and the bundle.

    Raises:
        UsageError: an extra that there is not.
        CapabilityError: there is no pip.
    """
    pip_available()
    target, extras = _target(job), _extras(job)
    major, minor = target.python.split(".")
    words = {
        "project": PROJECT, "version": __version__, "extras": ",".join(extras), "python": target.python,
        "major": major, "minor": minor, "wheels": WHEELS, "bundle": BUNDLE, "name": job.name,
        "model": job.bundle.manifest.model.name, "recipe": job.bundle.manifest.recipe,
        "platform": target.platform or f"{sys.platform} {machine()}",
    }  # fmt: skip
    head = f"The versions that {PROJECT} {__version__} was tested with."
    return [
        File("README.md", _README.format(**words)),
        File("install.sh", _INSTALL.format(**words), executable=True),
        File("constraints.txt", text_of(constraint_lines(target.environment), head)),
        File(f"{WHEELS}/{WHEEL}", write_wheel),
    ]


def complete(job: Job, staging: Path, progress: Progress) -> None:
    """Download the wheels of all that is needed; BuildError says what could not be had."""
    target, wheels, extras = _target(job), staging / WHEELS, _extras(job)
    pins = constraints(target.environment)
    with reported(progress, "download wheels") as advanced:
        _download([f"{wheels / WHEEL}[{','.join(extras)}]"], target, wheels, staging / "constraints.txt")
        for _ in range(_ROUNDS):
            lacking = missing(wheels, extras, target.environment)
            advanced(len(list(wheels.glob("*.whl"))))
            if not lacking:
                return
            wanted = [
                f"{r.name}=={pins[n]}" if n in pins else f"{r.name}{r.specifier}" for n, r in lacking.items()
            ]
            _download(wanted, target, wheels, staging / "constraints.txt", "--no-deps")
    raise BuildError("The wheels are not complete.", f"{', '.join(lacking)} are missing.", "Report this.")


def pending(job: Job) -> tuple[str, ...]:
    """What :func:`complete` adds."""
    lines = requirement_lines(_extras(job), _target(job).environment)
    return (f"{WHEELS}/: {', '.join(lines)}, and what these need; pip downloads them",)


def missing(wheels: Path, extras: Iterable[str], target: Mapping[str, str]) -> dict[str, Requirement]:
    """Package -> a requirement on ``target`` that none of ``wheels`` meets, by their metadata."""
    have, needs = dict[str, Version](), dict[str, list[Requirement]]()
    for wheel in wheels.glob("*.whl"):
        own, version, _, _ = parse_wheel_filename(wheel.name)
        have[str(own)] = version
        needs[str(own)] = list(_requirements(wheel))
    lacking: dict[str, Requirement] = {}
    seen: set[tuple[str, str]] = set()
    todo: list[tuple[str, str]] = [(str(canonicalize_name(PROJECT)), extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in needs.get(name, ()):
            if not applies(requirement.marker, target, (extra,) if extra else ()):
                continue
            other = str(canonicalize_name(requirement.name))
            if other not in have or not requirement.specifier.contains(have[other], prereleases=True):
                lacking[other] = requirement
            todo += [(other, inner) for inner in ("", *requirement.extras)]
    return lacking


def _requirements(wheel: Path) -> Iterator[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        file = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(file).decode())
    for line in metadata.get_all("Requires-Dist") or ():
        with suppress(InvalidRequirement):  # of an extra, in an old spelling; pip reads over it as well
            yield Requirement(line)


def _download(wanted: Sequence[str], target: Target, wheels: Path, pins: Path, *more: str) -> None:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--dest", str(wheels), "--find-links", str(wheels), "--constraint", str(pins)),
        *target.options(), *more, *wanted,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(
            "The wheels could not be downloaded.",
            last_line(done.stderr or done.stdout),
            "Check the network, pip's index (pip config list), --platform and --python; nothing was kept.",
        )


def _target(job: Job) -> Target:
    return Target(job.settings.get("python") or _python_here(), job.settings.get("platform"))


def _python_here() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _extras(job: Job) -> tuple[str, ...]:
    own = EXTRAS[job.settings["device"]]
    added: tuple[str, ...] = job.settings["extras"]
    known = _known_extras()
    for name in added:
        if name not in known:
            raise UsageError(
                f"There is no extra {name!r}.", f"Known: {', '.join(known)}.", "Give -O extras=serve."
            )
    return tuple(dict.fromkeys((own, *added)))


def _known_extras() -> list[str]:
    return sorted({*(installed().metadata.get_all("Provides-Extra") or ())} - {"dev"})


FORMAT = Format(
    "wheelhouse",
    "an installation without a network",
    {"device": DEVICE, "python": PYTHON, "platform": PLATFORM, "extras": ADDED},
    files,
    complete,
    pending,
)
