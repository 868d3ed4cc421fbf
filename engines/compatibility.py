"""Whether an engine file can be loaded on this machine, by its record in the manifest.

Engines are tied to the exact release that built them, and to the GPU generations they were built for. The
library would refuse another one late and in its own words, or take it and be wrong.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NoReturn

from ..bundle.manifest import SHIPPED, EngineFile, Manifest
from ..bundle.spec import FEATURES, terms
from ..errors import CapabilityError, UsageError
from .gpu import Gpu, gpus
from .targets import TARGETS
from .tensorrt import library as trt
from .tensorrt.options import BuildOptions
from .tensorrt.shapes import restrict_axes


def check_loadable(engine: EngineFile, rebuild: str, device: int = 0, any_gpu: bool = False) -> Gpu:
    """The GPU that ``engine`` will run on.

    Args:
        engine: the manifest's entry of the file.
        rebuild: the command that rebuilds it, for the errors.
        device: the GPU's number.
        any_gpu: let the library decide whether this GPU will do.

    Raises:
        CapabilityError: the library is missing or of another release, there is no GPU, or the engine was
            built for others; it names the engine's GPUs, and ``rebuild``.
    """
    what = f"The {engine.backend} engine of {engine.component} cannot be loaded here."
    release = trt.installed_release(engine.backend)
    if release is None:
        raise CapabilityError(
            what,
            f"It was built by {engine.backend} {engine.release}, which is not installed.",
            f"Install it: pip install {engine.backend}=={engine.release}",
        )
    options = BuildOptions.from_json(engine.built.options) if engine.built else BuildOptions()
    if release != engine.release and not (options.version_compatible and _newer(release, engine.release)):
        _refuse(what, f"It was built by {engine.backend} {engine.release}; {release} is installed.", rebuild)
    if device >= len(gpus()):
        raise CapabilityError(
            what,
            f"It was built for {_built_for(engine)}; there is no GPU {device}, or no driver for it.",
            "Run it on a machine with such a GPU, or give --backend onnxruntime.",
        )
    gpu = gpus()[device]
    if not any_gpu and not _runs_on(engine, options, gpu):
        _refuse(what, f"It was built for {_built_for(engine)}; this GPU is {gpu}.", rebuild)
    return gpu


def gpu_number(device: str) -> int:
    """The number in ``cuda:1``, 0 for ``cuda``; UsageError if it names no GPU."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise UsageError(f"TensorRT engines run on no device {device!r}.", "", "Give -O device=cuda:0.")
    return int(number or 0)


def fitting_target(manifest: Manifest, backend: str, device: int = 0) -> str | None:
    """The target of the engines of ``backend`` that were built for the GPU here; None if none were."""
    sm = gpus()[device].sm if device < len(gpus()) else ""
    targets = (engine.target for engine in manifest.engines if engine.backend == backend)
    return next((target for target in targets if sm in target.split("+")), None)


def rebuild_line(manifest: Manifest, engine: EngineFile, device: int = 0) -> str:
    """The command that builds ``engine`` of a bundle, and the bundle's others, again: for the GPU here, if
    any.

    TensorRT-RTX builds for some generations only; for a GPU of another it is ``tensorrt`` that does.
    """
    backend, target = engine.backend, engine.target
    if device < len(gpus()) and backend == trt.RTX:
        target = gpus()[device].sm
        backend = trt.RTX if target in TARGETS else trt.TENSORRT
    words = [*_build_words(manifest), "--backend", backend]
    if backend == trt.RTX:
        words += ["--targets", target]
    if engine.built is not None:
        words += BuildOptions.from_json(engine.built.options).flags()
    for other in manifest.engines:
        if (other.backend, other.target, other.part) == (engine.backend, engine.target, 0) and other.built:
            spec = manifest.components[other.component].spec
            for axis, before in zip(restrict_axes(spec, other.built.profiles).axes, spec.axes, strict=True):
                if axis != before and not terms(axis.name):
                    sizes = f"{axis.min}:{axis.opt}:{axis.max}"
                    words += ["--shapes", f"{other.component}.{axis.name}={sizes}"]
    return shlex.join(words)


def build_line(manifest: Manifest, features: Sequence[int]) -> str:
    """The command that builds a bundle again, with other feature blocks."""
    return shlex.join(_build_words(manifest, features))


def _build_words(manifest: Manifest, features: Sequence[int] | None = None) -> list[str]:
    """Options of ``ivl-export build`` for the model, the recipe and the outputs of a bundle."""
    source, words = manifest.model.source, ["ivl-export", "build"]
    if source != f"internvl-nano{SHIPPED}":
        words += ["--model", source.removesuffix(SHIPPED)]
    words += ["--precision", manifest.recipe]
    if features is None:
        names = [t.name for component in manifest.components.values() for t in component.spec.outputs]
        features = [int(name.removeprefix(FEATURES)) for name in names if name.startswith(FEATURES)]
    return [*words, *(["--features", ",".join(map(str, features))] if features else [])]


def _refuse(what: str, why: str, rebuild: str) -> NoReturn:
    raise CapabilityError(what, why, f"Build it again here: {rebuild}")


def _built_for(engine: EngineFile) -> str:
    limits = engine.built
    return f"{limits.gpu} ({limits.sm})" if limits is not None and limits.gpu else engine.target


def _runs_on(engine: EngineFile, options: BuildOptions, gpu: Gpu) -> bool:
    if engine.built is None or not engine.built.gpu:
        return gpu.sm in engine.target.split("+")
    if options.hardware == "ampere+":
        return _number(gpu.sm) >= 80
    same = gpu.sm == engine.built.sm
    # NVIDIA warns of other models of one generation unless the engine was built to be compatible.
    return same and (options.hardware == "same-cc" or gpu.name == engine.built.gpu)


def _newer(release: str, builder: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".") if part.isdecimal()]

    return numbers(release) >= numbers(builder)


def _number(sm: str) -> int:
    digits = sm.removeprefix("sm")
    return int(digits) if digits.isdecimal() else 0
