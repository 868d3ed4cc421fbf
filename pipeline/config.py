"""Arguments of a build and of quantisation-aware training, as data; nothing is opened or checked here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..engines.tensorrt import library as trt
from ..engines.tensorrt.options import BuildOptions
from ..models.shipped import shipped_name

if TYPE_CHECKING:
    from ..training.distributed import Strategy

ORT = "onnxruntime"
RTX = trt.RTX
TENSORRT = trt.TENSORRT
BACKENDS = (ORT, RTX, TENSORRT)
MIXED = "mixed"
"""The precision whose recipe is searched (:mod:`.search_steps`)."""


def default_out(model: Path | None, precision: str) -> Path:
    """Where a bundle goes if nothing is said: ``bundles/MODEL-PRECISION``."""
    name = shipped_name(model) or (model or Path()).resolve().name.removesuffix(".pth")
    return Path("bundles") / f"{name}-{Path(precision).stem}"


@dataclass(frozen=True)
class BuildConfig:
    """Arguments of ``ivl-export build``, under the names of its options; :func:`.plan.plan_build` opens them.

    Args:
        out: the bundle's folder.
        model: a checkpoint, or the name of a shipped one (:func:`..models.shipped.checkpoint_path`).
        precision: a shipped recipe, a recipe file, or :data:`MIXED`.
        budget: percentage points that a task may lose; None: that of the recipe.
        calib: images and captions, of :data:`..calibration.sources.KINDS`; None:
            :data:`.plan.OWN_CALIBRATION` in the checkpoint's folder, or drawn scenes for a model trained on
            them.
        calib_samples: number of samples.
        calib_columns: names of the image and caption columns, where they cannot be guessed
            (:func:`..calibration.sources.open_calibration`).
        calib_seed: chooses the samples.
        ranges: a ``ranges.json`` that was measured before; None: measure.
        algorithm: how ranges are picked (:mod:`..calibration.observers`); None: ``max``.
        targets: GPU generations, ``sm89,sm120``.
        backend: engines to build; empty: ONNX Runtime, and TensorRT-RTX if it is installed.
        components: empty: all that the checkpoint has.
        itm: also build ``qllama_itm``, which scores image and text together.
        features: blocks whose outputs the vision component gives too (:mod:`..export.features`).
        split: number of parts that each component with blocks is built in.
        preset: shapes that engines are tuned for, one of :data:`..engines.tensorrt.shapes.PRESETS`.
        shapes: ranges of axes, ``batch=1:8:32``; they win over the preset.
        engine_options: settings of the TensorRT builders.
        no_cache: build every engine, without engines or kernel times of earlier builds.
        cache_size: the most bytes of engines kept for later builds; None: the environment's, see
            :mod:`..files.cache_dir`.
        allow_accuracy_loss: report a loss over budget instead of failing.
        require_proof: fail where an engine does not tell the types of a promised product (``tensorrt``;
            TensorRT-RTX's engines tell all).
    """

    out: Path
    model: Path | None = None
    precision: str = "fp8"
    budget: float | None = None
    calib: Path | None = None
    calib_samples: int = 256
    calib_columns: tuple[str, ...] = ()
    calib_seed: int = 0
    ranges: Path | None = None
    algorithm: str | None = None
    targets: str = "sm89"
    backend: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    itm: bool = False
    features: tuple[int, ...] = ()
    split: int = 1
    preset: str | None = None
    shapes: tuple[str, ...] = ()
    engine_options: BuildOptions = field(default_factory=BuildOptions)
    no_cache: bool = False
    cache_size: int | None = None
    allow_accuracy_loss: bool = False
    require_proof: bool = False


@dataclass(frozen=True)
class QatConfig:
    """Arguments of quantisation-aware training, under the names of the command's options.

    Args:
        out: the new checkpoint's folder.
        model: a checkpoint; None is the shipped internvl-nano.
        recipe: the recipe to train for.
        stage: whose losses, and whose data: 1 (contrastive), 2, or of a chat model 3; None: its last.
        trains: which part of a chat model learns (:data:`..training.stage3.TRAINS`); all of it is quantised.
        teacher: learn the answers of the model before quantisation instead (QAD).
        data: images and captions to train on, of a chat model conversations in LLaVA's layout; None: drawn
            scenes or signs, for a model trained on them.
        calib, ranges, algorithm: as in :class:`BuildConfig`.
        steps: optimiser steps.
        batch: images a step.
        lr, scale_lr: peak learning rates, of the weights and of the scales (as a share of their ranges).
        learn_scales: whether scales are trained too.
        seed: of the data's order.
        evaluate_every: steps between evaluations on scenes; 0: only before and after.
        save_every: steps between saved states.
        work_dir: folder of the saved state; None: next to ``out``.
        strategy: how several processes share the model.
    """

    out: Path
    model: Path | None = None
    recipe: str = "w4a4"
    stage: Literal[1, 2, 3] | None = None
    trains: Literal["projector", "decoder", "all"] = "all"
    teacher: bool = False
    data: Path | None = None
    calib: Path | None = None
    ranges: Path | None = None
    algorithm: str | None = None
    steps: int = 300
    batch: int = 32
    lr: float = 5e-4
    scale_lr: float = 5e-3
    learn_scales: bool = True
    seed: int = 0
    evaluate_every: int = 0
    save_every: int = 50
    work_dir: Path | None = None
    strategy: Strategy = "ddp"

    @property
    def work(self) -> Path:
        """Folder of the run's state."""
        return self.work_dir or self.out.with_name(f"{self.out.name}.work")
