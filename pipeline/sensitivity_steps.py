"""``sensitivity``: losses of each layer in each scheme, of its block and on the tasks, as resumable steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..calibration.calibrate import calibration_units, spilled_bytes
from ..calibration.sensitivity import Loss, Sensitivity, check_schemes, measure
from ..calibration.simulate import attention_hook, rounding_hook
from ..files.json import read_json
from ..files.write import write_text
from ..models.registry import CHAT, family_of
from ..progress import Progress
from ..quantization.attention import FP8_ATTENTION, core_attentions, operand_names
from ..quantization.quantize import dequantise, quantise
from ..quantization.ranges import ActivationRanges
from ..quantization.schemes import SCHEMES
from .accuracy_steps import headlines
from .calibration_steps import calibrate_step, finite_step, preprocess_step
from .graph_steps import RANGES
from .plan import SIGNS, BuildPlan
from .workspace import Step, StepResult, Workspace, after, run_step, write_receipt

if TYPE_CHECKING:
    from torch import nn

RECEIPT = Path("receipts") / "sensitivity.json"
QUESTIONS = 64
"""Questions of each task. One is 1.6 points: enough to see which layers break the model, and no more."""


def sensitivity_step(plan: BuildPlan, schemes: Sequence[str], before: list[Step]) -> Step:
    """SQNR and cosine of every block with one layer quantised, on the held-out samples."""
    inputs = {
        **plan.identity,
        "held_out": plan.held_out.hash,
        "components": list(plan.components),
        "schemes": list(schemes),
        "base": plan.recipe.base,
        **after(before),
    }

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        folder = space.work_dir / "sensitivity"
        result = measure(
            plan.checkpoint,
            plan.components,
            schemes,
            ActivationRanges.load(space.staging_dir / RANGES),
            plan.held_out,
            plan.settings,
            plan.tokenizer,
            folder,
            base=plan.recipe.base,
            progress=advanced,
        )
        files = [write_receipt(space, RECEIPT.stem, result.to_json())]
        shutil.rmtree(folder, ignore_errors=True)
        return files, {"variants": len(result.losses)}

    config, samples = plan.checkpoint.model, len(plan.held_out)
    return Step(
        "sensitivity",
        inputs,
        run,
        calibration_units(config, plan.components, samples),
        spilled_bytes(config, plan.components, samples),
        "samples x blocks",
    )


def tasks_step(plan: BuildPlan, questions: int, before: Step, variants: int) -> Step:
    """Task accuracy of the whole model with one layer quantised; continues at the variant it was in."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        result = read_sensitivity(space.staging_dir)
        known = space.work_dir / "layer-tasks.jsonl"
        lost = _read_lines(known, before.digest)
        variants_left = list(result.worst())
        tasks: LayerTasks | None = None
        with known.open("a", encoding="utf-8") as lines:
            for count, key in enumerate(variants_left, 1):
                if key not in lost:
                    tasks = tasks or LayerTasks(
                        plan, ActivationRanges.load(space.staging_dir / RANGES), questions
                    )
                    lost[key] = tasks.lost(*key)
                    lines.write(json.dumps([before.digest, *key, lost[key]]) + "\n")
                    lines.flush()
                advanced(count)
        losses = (replace(x, tasks=lost.get((x.layer, x.scheme), {})) for x in result.losses)
        whole = replace(result, losses=tuple(losses))
        return [write_receipt(space, "layer-tasks", whole.to_json())], {}

    return Step(
        "layer-tasks",
        {"questions": questions, **after([before])},
        run,
        variants or None,
        unit="layers x schemes",
    )


def sensitivity(
    plan: BuildPlan, schemes: Sequence[str], out: Path, progress: Progress, questions: int = 0
) -> Sensitivity:
    """Losses of every layer of ``plan``'s components, written to ``out``/sensitivity.json.

    Args:
        plan: names model, components, calibration and held-out samples; its recipe gives the base type.
        schemes: schemes to try, see :func:`..calibration.sensitivity.measure`.
        out: a folder.
        progress: shows the steps.
        questions: of each task, where the model has an evaluation set; 0: no tasks.

    Raises:
        UsageError: a scheme that cannot be tried on a layer alone.
        BuildError: NaN or infinity at a layer's input; too little disk.
    """
    check_schemes(schemes)
    preprocess = preprocess_step(plan)
    calibrate = calibrate_step(plan, [preprocess])
    losses = sensitivity_step(plan, schemes, [preprocess, calibrate])
    with Workspace(out.parent / f"{out.name}.sensitivity", progress) as space:
        for step in (finite_step(plan), preprocess, calibrate, losses):
            run_step(space, step)
        name = RECEIPT.stem
        if questions and plan.evaluation:
            first_losses = read_sensitivity(space.staging_dir)
            run_step(space, tasks_step(plan, questions, losses, len(first_losses.worst())))
            name = "layer-tasks"
        result = Sensitivity.from_json(read_json(space.staging_dir / "receipts" / f"{name}.json"))
        out.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(report(plan, result, questions), indent=1) + "\n", out / "sensitivity.json")
        space.discard()
    return result


def report(plan: BuildPlan, result: Sensitivity, questions: int) -> dict[str, object]:
    """``result`` with the model, samples and questions it was measured on."""
    return {
        "schema": "ivl-export.sensitivity/1",
        "model": plan.folder.resolve().name,
        "revision": plan.checkpoint.revision,
        "calibration": {"hash": plan.calibration.hash, "samples": len(plan.calibration)},
        "held_out": {"hash": plan.held_out.hash, "samples": len(plan.held_out)},
        "synthetic": plan.calibration.synthetic,
        "questions": questions if plan.evaluation else 0,
        "tasks": plan.evaluation or "none: the model has no evaluation set",
        **result.to_json(),
    }


def read_sensitivity(root: Path) -> Sensitivity:
    """The losses that the step wrote below ``root``."""
    return Sensitivity.from_json(read_json(root / RECEIPT))


def _read_lines(path: Path, digest: str) -> dict[tuple[str, str], dict[str, float]]:
    """Task losses saved by an interrupted run with the same digest; an incomplete last line is ignored."""
    losses: dict[tuple[str, str], dict[str, float]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                own, layer, scheme, lost = json.loads(line)
            except ValueError:
                continue
            if own == digest:
                losses[layer, scheme] = lost
    return losses


def noisiest(result: Sensitivity, count: int) -> list[Loss]:
    """The ``count`` variants that lose most, worst first."""
    return sorted(result.worst().values(), key=lambda loss: -loss.noise)[:count]


class LayerTasks:
    """Task scores of a model with one layer quantised; the model is loaded once.

    Args:
        plan: names the model and its questions.
        ranges: input ranges; each pass through QLLaMA has its own.
        questions: of each task; of a chat model scenes, which get one or two.
    """

    model: nn.Module

    def __init__(self, plan: BuildPlan, ranges: ActivationRanges, questions: int = QUESTIONS) -> None:
        self.plan, self.ranges = plan, ranges
        self.chat = family_of(plan.checkpoint.model).form == CHAT
        self.model, self._answers = (_chat if self.chat else _internvl)(plan, questions)
        self._pass = "vision"
        self.reference = self._scores()

    def lost(self, layer: str, scheme: str) -> dict[str, float]:
        """Percentage points lost on each task when ``layer`` alone has ``scheme``."""
        with self._quantised(layer, scheme):
            scores = self._scores()
        return {task: round(100 * (self.reference[task] - value), 6) for task, value in scores.items()}

    def _scores(self) -> dict[str, float]:
        return headlines(self._answers())

    @contextmanager
    def _quantised(self, layer: str, scheme: str) -> Iterator[None]:
        import torch

        base, ranges = self.plan.recipe.base, self.ranges.amax
        hooks: Mapping[str, Callable[..., Any]]
        with ExitStack() as stack:
            if not self.chat:
                qllama = self.model.get_submodule("qllama")
                follow = qllama.register_forward_pre_hook(self._follow, with_kwargs=True)
                stack.callback(follow.remove)
            if scheme == FP8_ATTENTION:
                names = set(operand_names(layer))
                measured = {c: amax for c, amax in ranges.items() if names <= set(amax)}
                hooks = {c: attention_hook(layer, amax, base) for c, amax in measured.items()}
                core = core_attentions(self.model)[layer]
                stack.callback(core.register_forward_hook(self._by_component(layer, hooks)).remove)
            else:
                linear = self.model.get_submodule(layer)
                assert isinstance(linear, torch.nn.Linear)
                stack.callback(setattr, linear, "weight", linear.weight)
                values = dequantise(*quantise(linear.weight.detach(), scheme, base))
                linear.weight = torch.nn.Parameter(values, requires_grad=False)
                if kind := SCHEMES[scheme].activation:
                    tops = {c: amax[layer] for c, amax in ranges.items() if layer in amax}
                    hooks = {c: rounding_hook(top, kind, base) for c, top in tops.items()}
                    hook = self._by_component(layer, hooks)
                    stack.callback(linear.register_forward_pre_hook(hook).remove)
            yield

    def _by_component(self, layer: str, hooks: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
        """The hook of the component that is running; it changes nothing where there is none.

        A layer of a chat model runs in one component only.
        """
        only = next(iter(hooks.values()), None) if self.chat else None

        def hook(*arguments: Any) -> Any:
            own = only or hooks.get("vision" if layer.startswith("vision_model.") else self._pass)
            return own(*arguments) if own is not None else None

        return hook

    def _follow(self, _: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note which component a pass through QLLaMA belongs to, by the arguments it is called with."""
        from ..models.qllama import component_running

        self._pass = component_running(args, kwargs)[0]


def _internvl(plan: BuildPlan, questions: int) -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """The model, and a function that scores its current state."""
    import torch

    from ..models.load import load_model
    from ..synthetic import tasks
    from ..training.evaluate import TorchModel

    model = load_model(plan.checkpoint, torch.float32)
    sizes: dict[str, Any] = {
        "n_classify": questions,
        "n_retrieve": questions,
        "n_galleries": 1,
        "n_caption": questions,
        "n_caption_zh": 0,
    }
    # An adapter caches its answers, so each score has an adapter.
    return model, lambda: tasks.evaluate(TorchModel(model, plan.tokenizer, plan.settings), **sizes)


def _chat(plan: BuildPlan, scenes: int) -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """As :func:`_internvl`, of a chat model."""
    import torch

    from ..models.load import load_chat
    from ..models.tiles_chat import TilesChatModel
    from ..synthetic import chat_tasks, sign_tasks
    from ..training.chat_model import TorchChat
    from ..training.tiles_model import TorchSigns

    model = load_chat(plan.checkpoint, torch.float32)
    if plan.evaluation == SIGNS:
        signs = TorchSigns(cast(TilesChatModel, model), tokenizer=plan.tokenizer)
        return model, lambda: sign_tasks.evaluate(signs, scenes)
    return model, lambda: chat_tasks.evaluate(TorchChat(model, plan.tokenizer, plan.settings), scenes)
