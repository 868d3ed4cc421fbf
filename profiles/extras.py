"""The optional parts of this package, and which of their packages are installed."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from .backends import installed as installed_version

NEEDED = {
    "run on the CPU": "cpu",
    "run on a GPU": "gpu",
    "build": "quant",
    "GPU engines": "rtx",
    "train": "train",
    "calibrate on Hugging Face sets": "datasets",
    "draw PNG files": "plots",
    "score captions": "eval",
    "serve over HTTP, Prometheus metrics": "serve",
    "embed in bulk": "embed",
    "search with FAISS": "faiss",
    "read video files": "video",
}
"""A purpose, and the extra that installs its packages."""


@dataclass(frozen=True)
class Extra:
    """An optional part of this package: its packages and their versions (None: not installed).

    ``outside`` are packages whose version is outside the range that this package was made for, and the range.
    """

    name: str
    purpose: str
    packages: dict[str, str | None]
    outside: dict[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether every package is there, as far as this package's metadata says which they are."""
        return bool(self.packages) and None not in self.packages.values()

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f"pip install 'ivl-export[{self.name}]'"


def extra_here(name: str, purpose: str) -> Extra:
    """The extra ``name``, which serves ``purpose``, as it is installed here."""
    ranges = extra_packages(name)
    packages = {package: installed_version(package) for package in ranges}
    outside = {
        package: str(ranges[package])
        for package, installed in packages.items()
        if installed is not None and not ranges[package].contains(installed, prereleases=True)
    }
    return Extra(name, purpose, packages, outside)


def extra_packages(name: str) -> dict[str, SpecifierSet]:
    """Packages that ``pip install 'ivl-export[name]'`` adds, and their ranges, by this package's metadata."""
    try:
        requirements = map(Requirement, requires("ivl-export") or [])
    except PackageNotFoundError:  # run from a source tree that was never installed
        return {}
    mine = {"extra": name}
    return {
        r.name: r.specifier
        for r in requirements
        if r.marker and r.marker.evaluate(mine) and "extra" in str(r.marker)
    }


def extras_with(module: str) -> list[str]:
    """The extras that install the module ``module``: packages may be called ``<vendor>-<module>``."""
    name = module.replace("_", "-").lower()
    return [
        extra
        for extra in NEEDED.values()
        if any(p == name or p.endswith(f"-{name}") for p in map(canonicalize_name, extra_packages(extra)))
    ]
