"""What is asked of a build."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..engines.tensorrt import library as trt
from ..engines.tensorrt.options import BuildOptions

ORT = "onnxruntime"
RTX = trt.RTX
TENSORRT = trt.TENSORRT
BACKENDS = (ORT, RTX, TENSORRT)
MIXED = "mixed"
"""The precision whose recipe is searched (:mod:`.mixed`)."""


@dataclass(frozen=True)
class Request:
    """The arguments of ``ivl-export build``.

    Args:
        out: the bundle's folder.
        model: a checkpoint, or what stands for a shipped one (:func:`..models.shipped.checkpoint_path`).
        precision: a shipped recipe or a recipe file.
        calib: images and captions, of :data:`..calibration.sources.KINDS`; None:
            :data:`.calibration.OWN_CALIBRATION` beside the weights, or drawn scenes for a model trained on
            them.
        calib_samples: how many of them.
        calib_seed: chooses which.
        calib_columns: of image and caption, where they cannot be found
            (:func:`..calibration.sources.open_calibration`).
        scales: a ``scales.json`` that was measured before; None: measure.
        algorithm: how ranges are picked (:mod:`..calibration.observers`); None: ``max``.
        targets: GPU generations, ``sm89,sm120``.
        backends: engines to build; empty: ONNX Runtime, and TensorRT-RTX if it is installed.
        preset: what engines are shaped for, one of :data:`..engines.tensorrt.shapes.PRESETS`.
        shapes: ranges of axes, ``batch=1:8:32``; they win over the preset.
        options: what else the builder of GPU engines is told.
        cache: whether engines and kernel times of earlier builds are used, and kept for later ones.
        cache_size: the most bytes of engines kept; None: the environment's, see :mod:`..files.cache_dir`.
        components: empty: all that the checkpoint has.
        itm: also build ``qllama_itm``, which scores image and text together.
        features: blocks whose outputs the vision component gives out too (:mod:`..export.features`).
        allow_accuracy_loss: report a loss over budget instead of failing.
        split: parts that each component with blocks is built in.
        budget: percentage points that a task may lose; None: that of the recipe.
    """

    out: Path
    model: Path | None = None
    precision: str = "fp8"
    calib: Path | None = None
    calib_samples: int = 256
    calib_seed: int = 0
    calib_columns: tuple[str, ...] = ()
    scales: Path | None = None
    algorithm: str | None = None
    targets: str = "sm89"
    backends: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    itm: bool = False
    features: tuple[int, ...] = ()
    allow_accuracy_loss: bool = False
    split: int = 1
    budget: float | None = None
    preset: str | None = None
    shapes: tuple[str, ...] = ()
    options: BuildOptions = field(default_factory=BuildOptions)
    cache: bool = True
    cache_size: int | None = None
