"""A request, opened and checked before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..engines.gpu import Gpu, gpus
from ..engines.targets import check_types, parse_targets
from ..engines.tensorrt import library as trt
from ..engines.tensorrt.build import NATIVE
from ..engines.tensorrt.config import check_options
from ..engines.tensorrt.options import BuildOptions
from ..engines.tensorrt.shapes import EDGE_WORKSPACE, check_shape_names, parse_shapes, profiles_of
from ..errors import CapabilityError, CheckpointError, UsageError
from ..export.components import component_spec
from ..export.features import with_features
from ..export.split import block_count, check_split
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import SentencePieceTokenizer
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.config import ChatConfig
from ..models.shipped import checkpoint_path
from ..quantization.algorithms import algorithm_name
from ..quantization.attention import attentions
from ..quantization.recipe import LayerPlan, Recipe, load_recipe, plan_layers
from ..quantization.schemes import element_types
from .calibration import choose_sets, given_scales, needs_data
from .request import BACKENDS, ORT, RTX, TENSORRT, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..bundle.spec import ComponentSpec
    from ..engines.tensorrt.shapes import Profile

EVALUATION = "evaluation.json"
TASKS = ("scenes", "chat scenes")
"""What it may name: :mod:`..synthetic.tasks`, :mod:`..synthetic.chat_tasks`."""


class Job:
    """A request together with what it names, opened and checked.

    Raises (on construction):
        UsageError: unknown precision, target, backend or component; more parts than blocks.
        CheckpointError: the checkpoint or what belongs to it cannot be read.
        CapabilityError: a target lacks the precision, or a backend that was asked for is not installed.
        InputError: no usable calibration data, or none given where some is needed.
    """

    def __init__(
        self,
        request: Request,
        progress: Callable[[int, int], None] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """``recipe``: what ``request.precision`` means, where no file says it."""
        self.request, self.searched = request, recipe is not None
        self.recipe: Recipe = recipe or load_recipe(request.precision)
        if self.recipe.name == "fp32":
            raise UsageError(
                "A recipe cannot be called fp32.",
                "The accuracy report compares with the unquantised model under that name.",
                "Rename it.",
            )
        self.targets = tuple(t.name for t in parse_targets(request.targets))
        self.backends, self.notices = _backends(request.backends)
        source = checkpoint_path(request.model)
        self.checkpoint: Checkpoint = with_features(open_checkpoint(source), request.features)
        self.folder = source if source.is_dir() else source.parent
        self.components = _components(self.checkpoint, request.components, request.itm)
        self.parts = {name: self._split(name) for name in self.components}
        self.shapes = parse_shapes(request.shapes)
        self._check_engines()
        self.plan: LayerPlan = plan_layers(
            self.recipe, self.linear_shapes, attentions(self.checkpoint.whole, self.components)
        )
        if RTX in self.backends:
            types = element_types(self.recipe.base, frozenset(self.plan.quantised.values()))
            types |= {"fp8"} if any(self.plan.attention.values()) else set()
            check_types(f"Precision {self.recipe.name}", types, parse_targets(request.targets))
        self.tokenizer = SentencePieceTokenizer(self._beside("tokenizer.model"))
        if len(self.tokenizer) > self.checkpoint.whole.llama.vocab_size:
            raise CheckpointError(
                f"{self.folder / 'tokenizer.model'} is not of this model.",
                f"It has {len(self.tokenizer)} pieces, the model knows "
                f"{self.checkpoint.whole.llama.vocab_size}.",
                "Copy the tokenizer.model of the published model there.",
            )
        settings = ImageSettings.load(self._beside("preprocessor_config.json"))
        self.settings = replace(settings, size=self.checkpoint.whole.image_size)
        self.evaluation = _evaluation(self.folder)
        self.algorithm = algorithm_name(request.algorithm or "max")
        self.given = given_scales(self)
        self.calibration, self.held_out = choose_sets(self, progress)
        if self.given is not None:
            self.notices += self.given.notices
        elif needs_data(self):
            self.notices += self.calibration.notices
        self.notices += tuple(
            f"{e.layer} stays {self.recipe.base}: {e.reason}." for e in self.plan.exclusions
        )

    @property
    def engines(self) -> tuple[tuple[str, str], ...]:
        """Backend and target of all engines that a builder makes."""
        rtx = [(RTX, target) for target in self.targets if RTX in self.backends]
        return (*rtx, *((TENSORRT, NATIVE) for backend in self.backends if backend == TENSORRT))

    @property
    def options(self) -> BuildOptions:
        """What the builder is told; the preset ``edge`` bounds the workspace unless something else does."""
        options = self.request.options
        if self.request.preset == "edge" and options.workspace_bytes is None:
            return replace(options, workspace_bytes=EDGE_WORKSPACE)
        return options

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that native engines are built for; None where there are none of them."""
        return gpus()[0] if TENSORRT in self.backends else None

    def profiles(self, spec: ComponentSpec) -> tuple[Profile, ...]:
        """The optimization profiles of a component or a part of one."""
        return profiles_of(spec, self.request.preset, self.shapes)

    def _check_engines(self) -> None:
        """What every builder can be asked: shapes that the graphs take, options that it has."""
        for backend in dict.fromkeys(backend for backend, _ in self.engines):
            if self.options != BuildOptions():
                check_options(trt.library(backend), self.options)
        specs = {name: component_spec(name, self.checkpoint.whole) for name in self.components}
        check_shape_names(self.shapes, specs)
        for spec in specs.values():
            self.profiles(spec)

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear layer of the model and its weight's shape [out, in]."""
        from torch import nn

        from ..models.load import meta_chat, meta_model

        make = meta_chat if isinstance(self.checkpoint.model, ChatConfig) else meta_model
        modules = make(self.checkpoint).named_modules()
        return {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, nn.Linear)}

    @cached_property
    def component_linears(self) -> dict[str, list[str]]:
        """Component -> the linear layers that run in it."""
        import torch

        from ..export.components import component_module

        found = {}
        for component in self.components:
            with torch.device("meta"):
                module = component_module(component, self.checkpoint.whole, self.checkpoint.contrastive_only)
            found[component] = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
        return found

    def _split(self, component: str) -> int:
        """Parts that ``component`` is built in."""
        blocks = block_count(component, self.checkpoint.tensors)
        if blocks == 0 and self.request.split > 0:
            return 1
        check_split(component, blocks, self.request.split)
        return self.request.split

    def _beside(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(
                f"No {name} in {self.folder}.",
                "A bundle carries it, so that nothing is fetched at run time.",
                f"Copy the {name} of the published model there.",
            )
        return path


def _backends(asked: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Backends to build for, and what there is to say of those that are not installed."""
    unknown = [b for b in asked if b not in BACKENDS]
    if unknown:
        raise UsageError(
            f"Unknown backend {unknown[0]!r}.", f"Known: {', '.join(BACKENDS)}.", f"Give --backend {ORT}."
        )
    missing = [b for b in (RTX, TENSORRT) if trt.installed_release(b) is None]
    for backend in missing:
        if backend in asked:
            extra = "rtx" if backend == RTX else "gpu"
            raise CapabilityError(
                f"{backend} is not installed.",
                "It builds the engines.",
                f"pip install 'ivl-export[{extra}]'",
            )
    if TENSORRT in asked and not gpus():
        raise CapabilityError(
            f"{TENSORRT} cannot build here.",
            "It builds for the GPU of this machine, and there is none, or no driver for it.",
            f"Build on the machine that will run it, or with --backend {RTX} --targets sm89.",
        )
    if asked:
        return tuple(dict.fromkeys((ORT, *asked))), ()
    found = [b for b in BACKENDS if b not in missing and (b != TENSORRT or gpus())]
    notice = f"{RTX} is not installed: no GPU engines are built (pip install 'ivl-export[rtx]')."
    return tuple(found), (notice,) if len(found) == 1 else ()


def _components(checkpoint: Checkpoint, asked: tuple[str, ...], itm: bool) -> tuple[str, ...]:
    from ..models.layout import OPTIONAL, components_of, optional_of

    known = (*components_of(checkpoint.model), *optional_of(checkpoint.model))
    asked = (*(asked or checkpoint.components), *(OPTIONAL if itm else ()))
    unknown = [c for c in asked if c not in known]
    if unknown:
        raise UsageError(
            f"Unknown component {unknown[0]!r}.",
            f"Known: {', '.join(known)}.",
            "Give --components some of these, or leave it out.",
        )
    missing = [c for c in asked if not checkpoint.has(c)]
    if missing:
        raise CapabilityError(
            f"This checkpoint has no weights for {', '.join(missing)}.",
            f"It has {', '.join(checkpoint.components)}.",
            "Leave them out of --components, or use a checkpoint that has them.",
        )
    return tuple(c for c in known if c in asked)


def _evaluation(folder: Path) -> str | None:
    """What the model can be evaluated on, as its folder says; None where it says nothing."""
    path = folder / EVALUATION
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tasks = data["tasks"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read.", str(error), "Remove it or repair it.") from error
    if tasks not in TASKS:
        raise CheckpointError(f"{path} names unknown tasks {tasks!r}.", fix=f"Known: {', '.join(TASKS)}.")
    return str(tasks)
