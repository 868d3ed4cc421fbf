"""Abilities of this machine to build and run bundles, and missing packages.

Nothing heavy is imported; packages are looked up by their metadata.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..engines.memory import Load, available_memory, check_memory
from ..engines.products import FACTORS, factors
from ..engines.targets import ON_THE_GPU, TARGETS, TENSORRT_ONLY
from ..engines.tensorrt.library import release_problem
from ..errors import BuildError
from ..models.registry import ModelConfig, component_names
from ..quantization.recipe import LayerPlan, Recipe, load_recipe, shipped_recipes
from ..quantization.schemes import SCHEMES, promise
from ..verify.expectations import CPU_KERNELS
from .backends import Here, backends_here
from .cost.gpus import of_driver
from .cost.sizes import weights
from .extras import NEEDED, Extra, extra_here
from .measure.machine import Gpu, Machine, machine

SCHEMA = "ivl-export.doctor/1"
_PYTHON = ((3, 10), (3, 14))
_OVERHEAD = 256 << 20
"""Disk for small files: graphs, receipts, ranges."""


@dataclass(frozen=True)
class Problem:
    """An obstacle to the request; ``fix`` is a command to run or a thing to change."""

    what: str
    why: str
    fix: str


@dataclass(frozen=True)
class Ability:
    """A backend's abilities with the shipped recipes.

    Args:
        backend: its name in :data:`~ivl_export.engines.base.BACKENDS`.
        build: why bundles for it cannot be built here; empty if they can.
        products: recipe -> types of both factors of products that it runs in 8 bits or less; a recipe that is
            missing runs wholly in ``rest``.
        rest: type of all other products.
        targets: recipe -> GPU generations that engines can be built for; empty where none is named.
    """

    backend: str
    build: str
    products: dict[str, tuple[str, ...]]
    rest: str
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """Bytes that building a model takes, and bytes free (None: unknown).

    ``bundle`` is weights and engines of one target; ``memory`` the largest single engine build.
    """

    weights: int
    bundle: int
    memory: int
    largest: str
    free_disk: int
    free_memory: int | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything found."""

    python: str
    machine: Machine
    extras: tuple[Extra, ...]
    backends: tuple[Here, ...]
    abilities: tuple[Ability, ...]
    needs: Needs | None
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data with the schema's name."""
        data = asdict(self)
        data["extras"] = [{**asdict(e), "installed": e.installed, "install": e.install} for e in self.extras]
        return {"schema": SCHEMA, "ok": not self.problems, **data}


@dataclass(frozen=True)
class Request:
    """The build to check: a precision, of a model or (config None) of any."""

    recipe: Recipe
    layers: LayerPlan
    config: ModelConfig | None = None


def diagnose(request: Request | None = None, where: Path = Path()) -> Diagnosis:
    """Look at this machine, and check the ``request``; ``where`` is the folder of the bundle."""
    here = machine()
    extras = tuple(extra_here(name, purpose) for purpose, name in NEEDED.items())
    installed = {e.name: e.installed for e in extras}
    backends = backends_here()
    abilities = tuple(_ability(backend, installed) for backend in backends)
    needs, load = None, None
    if request is not None and request.config is not None:
        needs, load = needs_of(request.config, request.recipe, request.layers, where, installed["rtx"])
    problems = [
        *_python_problems(),
        *_version_problems(extras),
        *(request_problems(request, extras, here.gpus) if request else ()),
    ]
    if needs is not None:
        problems += _room(needs, load)
    return Diagnosis(platform.python_version(), here, extras, backends, abilities, needs, tuple(problems))


def needs_of(
    config: ModelConfig, recipe: Recipe, layers: LayerPlan, where: Path, gpu_engines: bool = True
) -> tuple[Needs, Load | None]:
    """Memory and disk to build a model, and those free in ``where``; the largest engine build, if any."""
    parts = {name: weights(config, recipe, layers, [name]) for name in component_names(config)}
    stored = weights(config, recipe, layers).nbytes
    engines = sum(part.nbytes for part in parts.values()) if gpu_engines else 0
    loads: dict[str, Load] = {name: part.build_load for name, part in parts.items()} if gpu_engines else {}
    largest = max(loads, key=lambda name: loads[name].build_bytes, default="")
    folder = next(p for p in (where.absolute(), *where.absolute().parents) if p.is_dir())
    load = loads.get(largest)
    needs = Needs(
        weights=stored,
        bundle=stored + engines + _OVERHEAD,
        memory=load.build_bytes if load else 0,
        largest=largest,
        free_disk=shutil.disk_usage(folder).free,
        free_memory=available_memory(),
    )
    return needs, load


def _version_problems(extras: Iterable[Extra]) -> list[Problem]:
    outside = {
        package: (extra.packages[package], supported)
        for extra in extras
        for package, supported in extra.outside.items()
    }
    return [
        Problem(
            f"{package} {version_here} is outside the supported range.",
            f"The range is {supported}.",
            f"pip install '{package}{supported}'",
        )
        for package, (version_here, supported) in outside.items()
    ]


def _ability(here: Here, installed: Mapping[str, bool]) -> Ability:
    recipes = [load_recipe(name) for name in shipped_recipes()]
    products = {recipe.name: low_products(here.backend, recipe) for recipe in recipes}
    products = {name: kinds for name, kinds in products.items() if kinds}
    missing = "" if installed["quant"] else "the packages of the extra 'quant' are not all installed"
    if here.backend in CPU_KERNELS:
        return Ability(here.backend, missing, products, "fp32")
    if here.backend == "tensorrt-rtx":
        targets = {
            recipe.name: tuple(t.name for t in TARGETS.values() if not recipe.element_types & t.missing)
            for recipe in recipes
        }
        return Ability(here.backend, missing or _uninstalled(here), products, "16 bits", targets)
    return Ability(here.backend, missing or here.blocked, products, "16 bits")


def _uninstalled(here: Here) -> str:
    return here.blocked if here.release is None else ""


def low_products(backend: str, recipe: Recipe) -> tuple[str, ...]:
    """Types of both factors of the products of ``recipe`` that ``backend`` runs in 8 bits or less.

    Of ONNX Runtime and torch on a CPU, as in the receipts; engines of TensorRT run the promised types, or the
    build fails.
    """
    promised = {promise(rule.scheme) for rule in recipe.rules if rule.scheme in SCHEMES} & set(FACTORS)
    if backend == "torch-tensorrt":  # no engine of it was read yet
        return ()
    kernels = CPU_KERNELS.get(backend, {scheme: scheme for scheme in FACTORS})
    return tuple(sorted({factors(kernels[scheme]) for scheme in promised if scheme in kernels}))


def _python_problems() -> list[Problem]:
    low, high = _PYTHON
    if low <= sys.version_info[:2] < high:
        return []
    return [
        Problem(
            f"Python {platform.python_version()} is not supported.",
            f"The package needs {low[0]}.{low[1]} or newer, below {high[0]}.{high[1]}.",
            "Make an environment with Python 3.11.",
        )
    ]


def request_problems(request: Request, extras: tuple[Extra, ...], gpus: tuple[Gpu, ...]) -> list[Problem]:
    """Obstacles to the request: of this installation to build it, of these GPUs to run it."""
    problems = []
    has_gpu_runtime = any(extra.installed for extra in extras if extra.name == "gpu")
    for extra in extras:
        needed = extra.name == "quant" or (extra.name == "cpu" and not has_gpu_runtime)
        if needed and not extra.installed:
            missing = ", ".join(p for p, v in extra.packages.items() if v is None) or "ivl-export itself"
            problems.append(Problem("Bundles cannot be built.", f"Not installed: {missing}.", extra.install))
    for gpu in gpus:
        sm = gpu.sm or (peaks.sm if (peaks := of_driver(gpu.name)) else None)
        target = TARGETS.get(sm or "")
        if sm in TENSORRT_ONLY:
            if (lacking_release := release_problem("tensorrt")) is not None:
                problems.append(
                    Problem(
                        f"TensorRT-RTX does not build for {gpu.name} ({sm}).",
                        f"TensorRT does, on this GPU, but {lacking_release.what}",
                        ON_THE_GPU,
                    )
                )
        elif target is None:
            known = ", ".join(TARGETS)
            problems.append(
                Problem(
                    f"No engines can be built for {gpu.name} ({sm or 'unknown generation'}).",
                    f"TensorRT-RTX 1.7 builds for {known}; TensorRT for {', '.join(TENSORRT_ONLY)} too.",
                    "Run bundles with --backend onnxruntime.",
                )
            )
        elif lacking := sorted(request.recipe.element_types & target.missing):
            able = [n for n in shipped_recipes() if not load_recipe(n).element_types & target.missing]
            problems.append(
                Problem(
                    f"{gpu.name} ({target.name}) cannot run {request.recipe.name}.",
                    f"It lacks {', '.join(lacking)}.",
                    f"Give a --precision that it has: {', '.join(able)}.",
                )
            )
    return problems


def _room(needs: Needs, load: Load | None) -> list[Problem]:
    problems = []
    if needs.free_disk < needs.bundle:
        problems.append(
            Problem(
                "There is not enough disk for the bundle.",
                f"It takes {needs.bundle / 1e9:.1f} GB, {needs.free_disk / 1e9:.1f} GB are free.",
                "Free some, or choose another --out.",
            )
        )
    if load is not None:
        try:
            check_memory(needs.largest, load)
        except BuildError as error:
            problems.append(Problem(error.what, error.why, error.fix))
    return problems
