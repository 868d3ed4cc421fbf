"""This package as others install it: its wheel, and the exact versions of what it needs.

The wheel of a source tree is built by setuptools, its own backend, in a copy of the tree; that of an
installation is put together from the installed files.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .. import __version__
from ..errors import BuildError, CapabilityError

PROJECT = "ivl-export"
WHEEL = f"ivl_export-{__version__}-py3-none-any.whl"
SOURCE = Path(__file__).parent.parent
CONSTRAINTS = SOURCE / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
"""Releases of Python that bundles run on."""
_BACKEND = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
_OUTSIDE = ("tests", "benchmarks", "docs", "build", "bundles")
_NOT_OWN = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")
"""Files of an installation that are about it, not of the wheel."""


def write_wheel(out: Path) -> None:
    """Write this package's wheel to ``out``.

    Raises:
        BuildError: the source tree does not build.
        CapabilityError: there is neither a source tree nor an installation, or setuptools is too old.
    """
    if (SOURCE / "pyproject.toml").is_file():
        _build(out)
    else:
        _repack(installed(), out)


def installed() -> Distribution:
    """This package's installation; CapabilityError where it was never installed."""
    try:
        return distribution(PROJECT)
    except PackageNotFoundError as error:
        raise CapabilityError(
            f"{PROJECT} is not installed.",
            "It is run from a source tree: the requirements of a package are those of an installation.",
            "Install the tree: pip install -e .",
        ) from error


def _build(out: Path) -> None:
    """Build the source tree, in a copy: the backend leaves files in its folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree, dist = Path(folder, "tree"), Path(folder, "dist")
        dist.mkdir()
        tree.mkdir()
        for path in SOURCE.iterdir():
            if path.name.startswith(".") or path.name in _OUTSIDE or path.name.endswith(".egg-info"):
                continue
            if path.is_file():
                shutil.copyfile(path, tree / path.name)
            elif (path / "__init__.py").is_file():
                shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "-c", _BACKEND, str(dist)]
        if not _setuptools_builds():
            pip_available()
            command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(dist), str(tree)]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        wheels = list(dist.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise BuildError(
                f"The wheel of {PROJECT} does not build.",
                last_line(done.stderr or done.stdout),
                "pip install 'setuptools>=77' builds it without a network.",
            )
        shutil.copyfile(wheels[0], out)


def _setuptools_builds() -> bool:
    """Whether setuptools here is new enough for this project."""
    try:
        return int(distribution("setuptools").version.split(".")[0]) >= 77
    except (PackageNotFoundError, ValueError):
        return False


def pip_available() -> None:
    """CapabilityError where this Python has no pip."""
    try:
        distribution("pip")
    except PackageNotFoundError as error:
        raise CapabilityError(
            "This Python has no pip.", f"It is {sys.executable}.", "Install it: python -m ensurepip"
        ) from error


def last_line(text: str) -> str:
    """The last line of a tool's output that says an error, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["It said nothing."])[-1]


def _repack(dist: Distribution, out: Path) -> None:
    """The wheel that an installation came from: its files, and a new record of them."""
    members: dict[str, bytes] = {}
    for file in dist.files or ():
        place, path = file.as_posix(), Path(str(dist.locate_file(file)))
        if place.startswith("..") or path.suffix == ".pyc" or path.name in _NOT_OWN:
            continue
        members[place] = path.read_bytes()
    info = {place.split("/")[0] for place in members if place.split("/")[0].endswith(".dist-info")}
    if len(info) != 1:
        raise CapabilityError(
            f"The files of {PROJECT}'s installation are not known.",
            "Its record is missing.",
            "Install it with pip, from a wheel or a source tree.",
        )
    record = f"{info.pop()}/RECORD"
    rows = [f"{place},sha256={_hash(data)},{len(data)}" for place, data in members.items()]
    members[record] = "\n".join([*rows, f"{record},,", ""]).encode()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for place, data in members.items():
            archive.writestr(zipfile.ZipInfo(place), data, zipfile.ZIP_DEFLATED)


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def environment(python: str, system: str = "linux", machine: str = "x86_64") -> dict[str, str]:
    """The values of requirement markers on CPython ``python`` (``"3.11"``)."""
    windows, mac = system == "win32", system == "darwin"
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "nt" if windows else "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Windows" if windows else "Darwin" if mac else "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": system,
    }


def applies(marker: Marker | None, target: Mapping[str, str], extras: Iterable[str] = ()) -> bool:
    """Whether a requirement with ``marker`` is one on ``target``, with ``extras`` of the package."""
    return marker is None or any(marker.evaluate({**target, "extra": extra}) for extra in ("", *extras))


def constraints(target: Mapping[str, str]) -> dict[str, str]:
    """Package -> the exact version that the tests ran with, of those that ``target`` has."""
    pins = {}
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if applies(pin.marker, target):
                pins[str(canonicalize_name(pin.name))] = next(iter(pin.specifier)).version
    return pins


def requirements(extras: Iterable[str], target: Mapping[str, str]) -> Iterator[Requirement]:
    """What this package needs on ``target`` with ``extras``; CapabilityError as :func:`installed`."""
    for text in installed().requires or ():
        requirement = Requirement(text)
        if applies(requirement.marker, target, extras):
            yield requirement


def requirement_lines(extras: Iterable[str], target: Mapping[str, str]) -> list[str]:
    """Lines of a requirements.txt: every direct requirement, in its exact version if that is known."""
    pins, lines = constraints(target), set()
    for requirement in requirements(tuple(extras), target):
        name = str(canonicalize_name(requirement.name))
        wanted = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        version = f"=={pins[name]}" if name in pins else str(requirement.specifier)
        lines.add(f"{name}{wanted}{version}")
    return sorted(lines)


def constraint_lines(target: Mapping[str, str]) -> list[str]:
    """Lines of a constraints.txt for ``target``, without markers: pip would ask them of itself."""
    return [f"{name}=={version}" for name, version in sorted(constraints(target).items())]


def text_of(lines: Iterable[str], head: str) -> str:
    """``lines`` as a file, below a comment."""
    return "".join(f"{line}\n" for line in (f"# {head}", *lines))


def package_name(name: str) -> str:
    """``name`` as one of a Python project."""
    return re.sub(r"[-_.]+", "-", name).strip("-").lower()
