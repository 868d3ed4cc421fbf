"""A build's plan: its config with everything that it names opened and checked, before anything runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.dataset import CalibrationSet, set_notices
from ..calibration.sources import KINDS, open_calibration, scenes_calibration, signs_calibration
from ..calibration.tensor_cache import TensorCache
from ..engines.gpu import Gpu, gpus
from ..engines.targets import check_types, parse_targets
from ..engines.tensorrt import library as trt
from ..engines.tensorrt.build import NATIVE
from ..engines.tensorrt.config import check_options
from ..engines.tensorrt.options import BuildOptions
from ..engines.tensorrt.shapes import EDGE_WORKSPACE, check_shape_names, parse_shapes, profiles_of
from ..errors import CapabilityError, CheckpointError, InputError, UsageError
from ..export.features import with_features
from ..export.split import check_split
from ..files.cache_dir import cache_folder
from ..files.text import read_text
from ..inputs.chat_template import ChatFormat
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import Tokenizer
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.registry import (
    block_places,
    component_module,
    component_of,
    component_spec,
    family_of,
    image_settings,
)
from ..models.shipped import checkpoint_path
from ..quantization.algorithms import algorithm_name
from ..quantization.attention import attentions, operand_names
from ..quantization.ranges import ActivationRanges
from ..quantization.recipe import LayerPlan, Recipe, for_blocks, load_recipe, plan_layers
from ..quantization.schemes import element_types, folded_layers
from .config import BACKENDS, ORT, RTX, TENSORRT, BuildConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..bundle.spec import ComponentSpec
    from ..engines.tensorrt.shapes import Profile, Range

EVALUATION = "evaluation.json"
SIGNS = "signs"
TASKS = ("scenes", "chat scenes", SIGNS)
"""What it may name: :mod:`..synthetic.tasks`, :mod:`..synthetic.chat_tasks`, or ``sign_tasks`` there."""
OWN_CALIBRATION = ("calibration.jsonl", "calibration")
"""A manifest or folder next to the weights: the calibration set that a checkpoint brings along."""
HELD_OUT = 32
"""Calibration samples kept back to measure accuracy on."""
SMOOTHING = "smoothing.safetensors"
"""File of the divisors of norms and layers, next to ``ranges.json``, if the recipe folds."""


@dataclass(frozen=True)
class RangesFile:
    """Ranges that were measured before.

    Args:
        ranges: as read and checked.
        factors: content of :data:`SMOOTHING` next to them; None where the recipe folds nothing.
    """

    ranges: ActivationRanges
    factors: bytes | None


@dataclass(frozen=True)
class BuildPlan:
    """A build's config with everything that it names, opened and checked; made by :func:`plan_build`.

    Args:
        config: the arguments.
        recipe: the build's.
        layers: the recipe applied to this model's layers.
        linear_shapes: every linear layer of the model and its weight's shape [out, in].
        checkpoint: with the features that the config asks for.
        folder: the checkpoint's.
        components: to build, in the registry's order.
        parts: component -> number of parts it is built in.
        targets: GPU generations.
        backends: whose engines are built.
        shapes: ranges by axis name.
        tokenizer: the checkpoint's.
        chat: how it is prompted; None: it does not chat.
        settings: of images, with the size that the model takes.
        evaluation: one of :data:`TASKS`; None: the model has no evaluation set.
        algorithm: how ranges are picked.
        ranges_file: ranges that were measured before; None: they are measured, if any are needed.
        calibration: samples to calibrate on.
        held_out: samples reserved to measure accuracy on.
        notices: sentences to show the user.
        searched: whether the recipe comes from the search, not from a file.
    """

    config: BuildConfig
    recipe: Recipe
    layers: LayerPlan
    linear_shapes: dict[str, tuple[int, int]]
    checkpoint: Checkpoint
    folder: Path
    components: tuple[str, ...]
    parts: dict[str, int]
    targets: tuple[str, ...]
    backends: tuple[str, ...]
    shapes: dict[str, Range]
    tokenizer: Tokenizer
    chat: ChatFormat | None
    settings: ImageSettings
    evaluation: str | None
    algorithm: str
    ranges_file: RangesFile | None
    calibration: CalibrationSet
    held_out: CalibrationSet
    notices: tuple[str, ...]
    searched: bool = False

    @property
    def engines(self) -> tuple[tuple[str, str], ...]:
        """Backend and target of all engines that a builder makes."""
        return _engines_of(self.backends, self.targets)

    @property
    def engine_options(self) -> BuildOptions:
        """The builder's settings; the preset ``edge`` bounds the workspace unless the config does."""
        return _engine_options(self.config)

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that native engines are built for; None where there are none of them."""
        return gpus()[0] if TENSORRT in self.backends else None

    @property
    def measures(self) -> bool:
        """Whether anything is measured: input ranges, or factors to fold away."""
        return _measures(self.config, self.layers)

    @property
    def runs_tasks(self) -> bool:
        """Whether the model has an evaluation set, and all components that it takes are built."""
        return bool(self.evaluation) and set(self.components) >= set(self.checkpoint.components)

    @property
    def identity(self) -> dict[str, Any]:
        """The step input that says which checkpoint is read."""
        return {"revision": self.checkpoint.revision}

    def profiles(self, spec: ComponentSpec) -> tuple[Profile, ...]:
        """The optimization profiles of a component or a part of one."""
        return profiles_of(spec, self.config.preset, self.shapes)


def plan_build(
    config: BuildConfig,
    progress: Callable[[int, int], None] | None = None,
    recipe: Recipe | None = None,
) -> BuildPlan:
    """Open and check everything that ``config`` names; nothing is written.

    Args:
        config: the arguments.
        progress: callback with the number of calibration samples read, and of all.
        recipe: the recipe of ``config.precision``, if it is not in a file: a searched one.

    Raises:
        UsageError: unknown precision, target, backend or component; more parts than blocks.
        CheckpointError: the checkpoint or its files cannot be read.
        CapabilityError: a target lacks the precision, or a backend that was named is not installed.
        InputError: no usable calibration data, or none given where some is needed.
    """
    searched, recipe = recipe is not None, recipe or load_recipe(config.precision)
    targets = parse_targets(config.targets)
    target_names = tuple(target.name for target in targets)
    backends, notices = _backends(config.backend)
    path = checkpoint_path(config.model)
    checkpoint = with_features(open_checkpoint(path), config.features)
    folder = path if path.is_dir() else path.parent
    components = _components(checkpoint, config.components, config.itm)
    parts = {name: _part_count(checkpoint, name, config.split) for name in components}
    shapes = parse_shapes(config.shapes)
    _check_engines(config, checkpoint, components, shapes, _engines_of(backends, target_names))
    recipe = for_blocks(recipe, block_places(checkpoint.model))
    linears = _linear_shapes(checkpoint)
    layers = plan_layers(recipe, linears, attentions(checkpoint.model, components))
    if RTX in backends:
        types = element_types(recipe.base, frozenset(layers.quantised.values()))
        types |= {"fp8"} if any(layers.attention.values()) else set()
        check_types(f"Precision {recipe.name}", types, targets)
    family = family_of(checkpoint.model)
    tokenizer = family.tokenizer(checkpoint.model, folder)
    chat = family.chat_format(checkpoint.model, folder, tokenizer)
    if family.vocabulary(checkpoint.model) and not tokenizer.reads_texts:
        notices += (f"No tokenizer in {folder}: the bundle takes token ids; random ones are calibrated on.",)
    settings = image_settings(checkpoint.model, folder)
    if settings.unknown:
        notices += (f"preprocessor_config.json: no effect here: {', '.join(settings.unknown)}.",)
    evaluation = _evaluation(folder)
    algorithm = algorithm_name(config.algorithm or "max")
    ranges_file = _ranges_file(config, recipe, layers, checkpoint, components, linears)
    calibration, held_out = _calibration_sets(config, recipe, layers, folder, evaluation, progress)
    if ranges_file is not None:
        measured = ranges_file.ranges
        notices += set_notices(measured.samples, measured.synthetic, measured.without_caption)
    elif _measures(config, layers):
        notices += calibration.notices
    notices += checkpoint.notes
    notices += tuple(f"{e.layer} stays {recipe.base}: {e.reason}." for e in layers.exclusions)
    return BuildPlan(
        config=config,
        recipe=recipe,
        layers=layers,
        linear_shapes=linears,
        checkpoint=checkpoint,
        folder=folder,
        components=components,
        parts=parts,
        targets=target_names,
        backends=backends,
        shapes=shapes,
        tokenizer=tokenizer,
        chat=chat,
        settings=settings,
        evaluation=evaluation,
        algorithm=algorithm,
        ranges_file=ranges_file,
        calibration=replace(calibration, chat=chat),
        held_out=replace(held_out, chat=chat, scored=True),
        notices=notices,
        searched=searched,
    )


def _engines_of(backends: tuple[str, ...], targets: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Backend and target of all engines that a builder makes."""
    rtx = [(RTX, target) for target in targets if RTX in backends]
    return (*rtx, *((TENSORRT, NATIVE) for backend in backends if backend == TENSORRT))


def _linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Every linear layer of the model and its weight's shape [out, in]."""
    from torch import nn

    from ..models.load import meta_model

    modules = meta_model(checkpoint).named_modules()
    return {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, nn.Linear)}


def _component_linears(checkpoint: Checkpoint, components: tuple[str, ...]) -> dict[str, list[str]]:
    """Component -> the linear layers that run in it."""
    import torch

    layers = {}
    for component in components:
        with torch.device("meta"):
            module = component_module(component, checkpoint.model)
        layers[component] = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
    return layers


def _engine_options(config: BuildConfig) -> BuildOptions:
    options = config.engine_options
    if config.preset == "edge" and options.workspace_bytes is None:
        return replace(options, workspace_bytes=EDGE_WORKSPACE)
    return options


def _check_engines(
    config: BuildConfig,
    checkpoint: Checkpoint,
    components: tuple[str, ...],
    shapes: Mapping[str, Range],
    engines: tuple[tuple[str, str], ...],
) -> None:
    """Raise where the graphs do not take the shapes, or a builder lacks an option."""
    options = _engine_options(config)
    for backend in dict.fromkeys(backend for backend, _ in engines):
        if options != BuildOptions():
            check_options(trt.library(backend), options)
    specs = {name: component_spec(name, checkpoint.model) for name in components}
    check_shape_names(dict(shapes), specs)
    for spec in specs.values():
        profiles_of(spec, config.preset, shapes)


def _part_count(checkpoint: Checkpoint, component: str, split: int) -> int:
    blocks = component_of(component, checkpoint.model).depth(checkpoint.model)
    if blocks == 0 and split > 0:
        return 1
    check_split(component, blocks, split)
    return split


def _backends(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Backends to build for, and the notices about those that are not installed."""
    unknown = [b for b in names if b not in BACKENDS]
    if unknown:
        raise UsageError(
            f"Unknown backend {unknown[0]!r}.", f"Known: {', '.join(BACKENDS)}.", f"Give --backend {ORT}."
        )
    missing = {b: problem for b in (RTX, TENSORRT) if (problem := trt.release_problem(b)) is not None}
    for backend in missing:
        if backend in names:
            raise missing[backend]
    if TENSORRT in names and not gpus():
        raise CapabilityError(
            f"{TENSORRT} cannot build here.",
            "It builds for the GPU of this machine, and there is none, or no driver for it.",
            f"Build on the machine that will run it, or with --backend {RTX} --targets sm89.",
        )
    if names:
        return tuple(dict.fromkeys((ORT, *names))), ()
    usable = [b for b in BACKENDS if b not in missing and (b != TENSORRT or gpus())]
    notices = [f"{RTX} is not installed: no GPU engines are built (pip install 'ivl-export[rtx]')."]
    if trt.installed_release(TENSORRT) and gpus() and TENSORRT in missing:
        notices = [f"No engine is built with it: {missing[TENSORRT].what} {missing[TENSORRT].fix}"]
    return tuple(usable), tuple(notices) if len(usable) == 1 else ()


def _components(checkpoint: Checkpoint, names: tuple[str, ...], itm: bool) -> tuple[str, ...]:
    family = family_of(checkpoint.model)
    known = tuple(c.name for c in family.components)
    optional = tuple(c.name for c in family.components if c.optional)
    if itm and not optional:
        raise UsageError(
            f"{checkpoint.path} is {family.title}.", "It has no image-text matching.", "Leave --itm out."
        )
    names = (*(names or checkpoint.components), *(optional if itm else ()))
    unknown = [c for c in names if c not in known]
    if unknown:
        raise UsageError(
            f"Unknown component {unknown[0]!r}.",
            f"Known: {', '.join(known)}.",
            "Give --components some of these, or leave it out.",
        )
    missing = [c for c in names if not checkpoint.has(c)]
    if missing:
        raise CapabilityError(
            f"This checkpoint has no weights for {', '.join(missing)}.",
            f"It has {', '.join(checkpoint.components)}.",
            "Leave them out of --components, or use a checkpoint that has them.",
        )
    return tuple(c for c in known if c in names)


def _evaluation(folder: Path) -> str | None:
    """Tasks that the model can be evaluated on, as its folder names them; None: it names none."""
    path = folder / EVALUATION
    if not path.is_file():
        return None
    try:
        data = json.loads(read_text(path, CheckpointError))
        tasks = data["tasks"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read.", str(error), "Remove it or repair it.") from error
    if tasks not in TASKS:
        raise CheckpointError(f"{path} names unknown tasks {tasks!r}.", fix=f"Known: {', '.join(TASKS)}.")
    return str(tasks)


def _measures(config: BuildConfig, layers: LayerPlan) -> bool:
    return config.ranges is None and bool(layers.rounded or folded_layers(layers.quantised))


def _calibration_sets(
    config: BuildConfig,
    recipe: Recipe,
    layers: LayerPlan,
    folder: Path,
    evaluation: str | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[CalibrationSet, CalibrationSet]:
    """(to calibrate on, held back to measure accuracy on).

    Raises:
        InputError: no usable data, or none given where some is needed.
    """
    count, measured = config.calib_samples + HELD_OUT, _measures(config, layers)
    own = next((p for name in OWN_CALIBRATION if (p := folder / name).exists()), None)
    source = config.calib or own
    if source is not None:
        # Otherwise only accuracy is measured; ranges from a file may come from this set, cut in the same way.
        needed = count if measured or config.ranges else min(count, 4 * HELD_OUT)
        columns = config.calib_columns
        samples = open_calibration(source, needed, config.calib_seed, progress, columns)
        samples = replace(samples, cache=TensorCache(cache_folder() / "images"))
    elif evaluation == SIGNS:
        samples = signs_calibration(count)
    elif evaluation is not None:
        samples = scenes_calibration(count)
    elif measured:
        raise InputError(
            f"Precision {recipe.name} needs calibration data.",
            "The ranges of activations are measured on images and captions like those you will serve.",
            f"Give --calib {'; '.join(KINDS)}.",
        )
    else:
        # Only to compare the graphs with fp32: any images will do for that.
        samples = scenes_calibration(min(count, HELD_OUT))
    # A small set keeps fewer samples back: the rest is more than the config's number.
    rest, held_out = samples.split(HELD_OUT)
    target_count = config.calib_samples
    return replace(rest, samples=rest.samples[:target_count], requested=target_count), held_out


def _ranges_file(
    config: BuildConfig,
    recipe: Recipe,
    layers: LayerPlan,
    checkpoint: Checkpoint,
    components: tuple[str, ...],
    linears: dict[str, tuple[int, int]],
) -> RangesFile | None:
    """The ranges of ``config.ranges``, checked against model and recipe.

    Raises:
        UsageError: an algorithm was named too; the recipe measures nothing.
        InputError: the file is broken, of another model, or lacks layers that the recipe quantises.
    """
    path = config.ranges
    if path is None:
        return None
    kinds, folds = layers.rounded, bool(folded_layers(layers.quantised))
    if config.algorithm is not None:
        raise UsageError(
            "-O algorithm and --ranges were both given.",
            "The ranges have been measured already.",
            "Give one of them.",
        )
    if not kinds and not folds:
        raise UsageError(
            f"Precision {recipe.name} takes no ranges.", "It measures nothing.", "Leave --ranges out."
        )
    ranges = ActivationRanges.load(path)
    fused = {c: [o for n in names for o in operand_names(n)] for c, names in layers.attention.items()}
    rounded = {
        component: {name: kinds[name] for name in (*names, *fused.get(component, ())) if name in kinds}
        for component, names in _component_linears(checkpoint, components).items()
    }
    ranges.check(linears, rounded, checkpoint.revision)
    return RangesFile(ranges, _factors(recipe, path, ranges, folds) if folds or ranges.folded else None)


def _factors(recipe: Recipe, path: Path, ranges: ActivationRanges, folds: bool) -> bytes:
    """The factors next to ``path`` that the ranges were measured with."""
    if not folds or not ranges.folded:
        without = "without" if ranges.folded else "with"
        raise InputError(
            f"The ranges are not those of precision {recipe.name}.",
            f"They were measured on weights {'with' if ranges.folded else 'without'} folded factors; "
            f"this recipe is {without} them.",
            f"ivl-export calibrate --precision {recipe.name}",
        )
    file = path.parent / SMOOTHING
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"{file} cannot be read.",
            f"{error.strerror or error}. The ranges were measured with the factors in it.",
            "Keep both files together.",
        ) from error
    if hashlib.sha256(data).hexdigest() != ranges.folded:
        raise InputError(
            f"{file} does not belong to {path.name}.", "Its hash is another.", "Calibrate again."
        )
    return data
