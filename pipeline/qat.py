"""Quantisation-aware training: a checkpoint and a recipe in, a checkpoint and its ranges out.

The output has the published layout: quantised weights have exactly the values that the graph will
dequantise, so ``build --model OUT --precision OUT/recipe.yaml --ranges OUT/ranges.json`` stores the integers
and scales that training simulated, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..calibration.dataset import CalibrationSet
from ..calibration.sources import open_calibration
from ..dtypes import dtype_of
from ..errors import InputError, UsageError
from ..files.hashing import sha256_file, sha256_json
from ..inputs.chat_template import ChatFormat
from ..inputs.tokenizer import MODEL
from ..models.registry import CHAT, family_of
from ..progress import Progress
from ..quantization.ranges import ActivationRanges
from . import plots
from .accuracy_steps import evaluate_module
from .config import ORT, BuildConfig, QatConfig
from .graph_steps import RANGES
from .plan import EVALUATION, OWN_CALIBRATION, SIGNS, BuildPlan, plan_build
from .run import calibrate

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from ..models.config import ChatConfig
    from ..training.conversations import LlavaFile
    from ..training.finetune import History, Tuning
    from ..training.trainer import TrainingProgress

RECEIPT = "qat.json"
RECIPE = "recipe.yaml"
CURVE = "curve.png"
QUESTIONS = {"n_classify": 500, "n_retrieve": 200, "n_galleries": 2, "n_caption": 500, "n_caption_zh": 200}
"""Questions of the tasks before and after; low precision degrades captions first."""


@dataclass(frozen=True)
class QatPlan:
    """A run's config with everything that it names, opened and checked; made by :func:`plan_qat`.

    Args:
        config: the arguments.
        build: the plan of the build that the run trains for.
        data: samples or conversations to train on; None: drawn scenes or signs.
    """

    config: QatConfig
    build: BuildPlan
    data: CalibrationSet | LlavaFile | None

    @property
    def chats(self) -> bool:
        """Whether it is a chat model."""
        return family_of(self.build.checkpoint.model).form == CHAT

    @property
    def stage(self) -> Literal[1, 2, 3]:
        """Whose losses are trained."""
        return self.config.stage or (3 if self.chats else 2)

    @property
    def data_hash(self) -> str:
        """Identifies the data that the run learns from."""
        if self.data is None:
            return str(self.build.evaluation)
        if isinstance(self.data, CalibrationSet):
            return self.data.hash
        assert self.config.data is not None
        return sha256_file(self.config.data)

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices about the data, to show the user."""
        return self.build.notices + (self.data.notices if isinstance(self.data, CalibrationSet) else ())

    @property
    def tuning(self) -> Tuning:
        """The run's losses, steps and learning rates."""
        from ..training.finetune import Tuning
        from ..training.presets import Stage
        from ..training.stage3 import TRAINS

        config, number = self.config, self.stage
        losses: dict[int, Literal["contrastive", "generative", "answers"]] = {
            1: "contrastive",
            2: "generative",
            3: "answers",
        }
        schedule = (config.steps, config.batch, config.lr, 0.0, min(20, config.steps // 4))
        learning = TRAINS[config.trains]
        stage = Stage(f"stage{number}", losses[number], *schedule, trainable=learning)
        return Tuning(stage, config.scale_lr, config.seed)

    def summary(self, processes: int) -> dict[str, Any]:
        """Plan of a run, for a dry run."""
        from ..training.distributed import own_rows

        config, schemes = self.config, self.build.layers.quantised
        own_rows(config.batch, processes)
        return {
            "checkpoint": str(config.out),
            "recipe": self.build.recipe.name,
            "layers": {
                scheme: list(schemes.values()).count(scheme) for scheme in dict.fromkeys(schemes.values())
            },
            "learns from": "the full-precision model"
            if config.teacher
            else f"the losses of stage {self.stage}",
            "trains": config.trains,
            "data": self.data_hash,
            "steps": config.steps,
            "batch": config.batch,
            "scales": "learned" if config.learn_scales else "kept",
            "processes": processes,
        }


def plan_qat(config: QatConfig, progress: Callable[[int, int], None] | None = None) -> QatPlan:
    """Open and check everything that ``config`` names; nothing is written.

    Args:
        config: the arguments.
        progress: callback with the number of samples read, and of all.

    Raises:
        UsageError: a recipe that quantises nothing, or that folds factors; a stage that the model lacks.
        InputError: no data; captions are missing that the stage's losses need; ``out`` is something else.
    """
    from ..training.fake_quant import check_trainable

    build = plan_build(
        BuildConfig(
            config.out,
            config.model,
            config.recipe,
            calib=config.calib or config.data,
            ranges=config.ranges,
            algorithm=config.algorithm,
            backend=(ORT,),
        ),
        progress,
    )
    chats = family_of(build.checkpoint.model).form == CHAT
    _check_stage(config, build, chats)
    if not build.layers.quantised:
        raise UsageError(
            f"Precision {build.recipe.name} quantises nothing.",
            "There is nothing to train.",
            "Give --recipe int8, for example.",
        )
    check_trainable(build.layers.quantised)
    _check_apart(build)
    if any(build.layers.attention.values()):
        raise UsageError(
            f"Precision {build.recipe.name} quantises attention.",
            "Training simulates linear layers only.",
            "Use the recipe without.",
        )
    if config.evaluate_every and config.strategy == "fsdp":
        raise UsageError(
            "-O evaluate-every cannot be combined with -O strategy=fsdp.",
            "One process evaluates, and has only a part of the model.",
            "Leave it out: the result is evaluated.",
        )
    if config.out.exists() and not (config.out / RECEIPT).is_file() and any(config.out.iterdir()):
        raise InputError(f"{config.out} is not empty.", f"It holds no {RECEIPT}.", "Give another --out.")
    data = _conversations(config, build) if chats else _training_data(config, build.evaluation, progress)
    return QatPlan(config, build, data)


def _check_stage(config: QatConfig, build: BuildPlan, chats: bool) -> None:
    """UsageError where the model has no such losses, or no part of its own that could learn alone."""
    if chats and config.stage in (1, 2):
        raise UsageError(
            f"A chat model has no losses of stage {config.stage}.",
            "It learns the answers of conversations.",
            "Leave -O stage out, or give -O stage=3.",
        )
    if chats:
        return
    if config.stage == 3 or config.trains != "all":
        raise UsageError(
            f"{build.checkpoint.path} is {family_of(build.checkpoint.model).title}.",
            "Stage 3 and its parts are a chat model's.",
            "Leave -O stage=3 and -O trains out.",
        )
    if build.checkpoint.config.contrastive_only and config.stage != 1:
        raise UsageError("This model has no generation to train.", "It is InternVL-C.", "Use -O stage=1.")


def _check_apart(build: BuildPlan) -> None:
    """UsageError for a quantised layer whose weight is stored as that of something else, too."""
    tensors = build.checkpoint.tensors
    for layer in build.layers.quantised:
        key = f"{layer}.weight"
        other = next((k for k, ref in tensors.items() if k != key and ref == tensors[key]), None)
        if other is not None:
            raise UsageError(
                f"{layer} cannot be fine-tuned quantised.",
                f"Its weight is that of {other.removesuffix('.weight')}, which is not.",
                "Take it out of the recipe.",
            )


def _conversations(config: QatConfig, build: BuildPlan) -> LlavaFile | None:
    from ..training.conversations import read_llava

    if not build.tokenizer.reads_texts:
        raise InputError(
            f"No tokenizer in {build.folder}.",
            "A chat model is trained on texts.",
            "Copy the tokenizer's files of the published model there.",
        )
    if config.data is not None:
        return read_llava(config.data, seed=config.seed)
    if build.evaluation is not None:
        return None
    raise InputError(
        "There is nothing to train on.",
        "Scenes and signs are drawn only for models that were trained on them.",
        "Give --data a file of conversations in LLaVA's layout.",
    )


def _training_data(
    config: QatConfig, evaluation: str | None, progress: Callable[[int, int], None] | None
) -> CalibrationSet | None:
    if config.data is None:
        if evaluation == "scenes":
            return None
        raise InputError(
            "There is nothing to train on.",
            "Scenes are drawn only for models that were trained on them.",
            "Give --data a folder or JSONL of images and captions.",
        )
    count = config.steps * config.batch
    samples = open_calibration(config.data, count, config.seed, progress=progress)
    if samples.without_caption and not config.teacher:
        raise InputError(
            f"{samples.without_caption} of {len(samples)} images have no caption.",
            "The stage's losses learn from right captions.",
            "Add captions, or use --teacher, which needs none to be right.",
        )
    if len(samples) < config.batch:
        raise InputError(
            f"{len(samples)} images are fewer than a batch.",
            f"A batch has {config.batch}.",
            "Add images, or give a smaller --batch.",
        )
    return replace(samples, requested=len(samples))


@dataclass(frozen=True)
class Outcome:
    """A finished run: the receipt (the content of :data:`RECEIPT`) and its folder."""

    out: Path
    receipt: dict[str, Any]
    rounded: bool

    @property
    def build_command(self) -> str:
        """The command that builds a bundle of it."""
        ranges = f" --ranges {self.out / RANGES}" if self.rounded else ""
        return f"ivl-export build --model {self.out} --precision {self.out / RECIPE}{ranges}"


def measured_ranges(plan: BuildPlan, work: Path, progress: Progress) -> ActivationRanges:
    """The ranges that training starts from: a file's, those measured before in ``work``, or new ones."""
    if plan.ranges_file is not None:
        return plan.ranges_file.ranges
    if not plan.layers.rounded:
        nothing: dict[str, dict[str, float]] = {component: {} for component in plan.components}
        return ActivationRanges(nothing, "none", 0, "", False, 0, plan.checkpoint.revision)
    parts = [plan.checkpoint.revision, plan.calibration.hash, plan.algorithm, plan.recipe.to_json()]
    key = sha256_json(parts)[:16]
    path = work / f"ranges-{key}.json"
    if path.is_file():
        return ActivationRanges.load(path)
    work.mkdir(parents=True, exist_ok=True)
    return calibrate(replace(plan, config=replace(plan.config, out=path)), progress)


def student_of(plan: BuildPlan, ranges: ActivationRanges, learn: bool) -> Any:
    """The model of ``plan`` that computes as its graphs will."""
    from ..models.load import load_torch
    from ..training.fake_quant import fake_quantised

    return fake_quantised(
        load_torch(plan.checkpoint), plan.layers.quantised, plan.recipe.base, ranges.amax, learn=learn
    )


def task_scores(plan: BuildPlan, model: Any) -> dict[str, Any] | None:
    """Task scores on held-out questions, of a model that was trained on drawn scenes or signs."""
    return None if plan.evaluation is None else evaluate_module(plan, model.eval(), QUESTIONS)


def train_rank(
    config: QatConfig,
    ranges: ActivationRanges,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
    inspect: Callable[[int, Any], None] = lambda step, model: None,
) -> tuple[History, dict[str, Any]]:
    """One process's part of a run: the history, and the whole trained state of the model."""
    from ..models.load import load_torch
    from ..training import distributed as dist
    from ..training.finetune import fine_tune
    from ..training.trainer import Options

    qat = plan_qat(config)
    plan, data = qat.build, _batches(qat, dist.own_rows(config.batch))
    student = student_of(plan, ranges, config.learn_scales)
    teacher = load_torch(plan.checkpoint) if config.teacher else None
    identity = {
        "model": plan.checkpoint.revision,
        "recipe": json.dumps(plan.recipe.to_json(), sort_keys=True),
        "ranges": json.dumps(ranges.amax, sort_keys=True),
        "data": qat.data_hash,
        "learn": config.learn_scales,
    }
    options = Options(config.work, config.save_every, workers=1, bf16=False, strategy=config.strategy)
    history = fine_tune(student, teacher, qat.tuning, data, identity, options, report, inspect)
    return history, dist.whole(student.state_dict())


def _batches(qat: QatPlan, rows: slice) -> Dataset[Any]:
    """``rows`` of every batch."""
    from ..training.conversations import ChatBatches, SceneDialogues, SignQuestions, context_for_text
    from ..training.finetune import STEP, SampleBatches, SceneSamples

    plan, tuning, seed = qat.build, qat.tuning, STEP + qat.config.seed
    if qat.chats:
        chat = plan.chat or ChatFormat()
        drawn = SignQuestions(seed) if plan.evaluation == SIGNS else SceneDialogues(seed, plan.settings.size)
        source = drawn if qat.data is None else cast("LlavaFile", qat.data)
        longest = context_for_text(plan.checkpoint.model, chat)
        return ChatBatches(source, tuning.stage, plan.settings, plan.tokenizer, longest, chat, rows)
    inputs = (tuning, plan.settings, plan.tokenizer.files[MODEL], rows)
    if qat.data is None:
        return SceneSamples(*inputs)
    return SampleBatches(cast(CalibrationSet, qat.data), *inputs)


def run(
    qat: QatPlan, processes: int, progress: Progress, report: Callable[[TrainingProgress], None]
) -> Outcome | None:
    """Train, write the checkpoint, and measure the gain; None in processes that torchrun added.

    Raises:
        InputError: the work folder holds another run.
        BuildError: gradients are not finite; another process failed.
    """
    from ..models.load import load_torch
    from ..training.distributed import run_processes
    from ..training.trainer import freeze

    config, plan = qat.config, qat.build
    ranges = measured_ranges(plan, config.work, progress)
    curve: list[dict[str, Any]] = []

    def inspect(step: int, model: Any) -> None:
        if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
            curve.append({"step": step, "scores": task_scores(plan, model)})

    cpu = _cpu_seconds()
    progress.started("train", config.steps)
    result = run_processes(processes, train_rank, (config, ranges), report=report, inspect=inspect)
    if result is None:
        return None
    history, state = result
    cpu = _cpu_seconds() - cpu
    progress.finished("train", history.seconds, False)
    started = time.perf_counter()
    student = student_of(plan, ranges, config.learn_scales)
    student.load_state_dict(state)
    freeze(student, qat.tuning.stage)
    progress.started("measure", None)
    before = {
        "fp32": task_scores(plan, load_torch(plan.checkpoint)),
        "ptq": task_scores(plan, student_of(plan, ranges, False)),
    }
    with tempfile.TemporaryDirectory(
        dir=config.out.absolute().parent, prefix=f".{config.out.name}."
    ) as folder:
        staging = Path(folder) / config.out.name
        new = write_checkpoint(plan, student, ranges, staging)
        after = task_scores(new, student_of(new, ActivationRanges.load(staging / RANGES), False))
        receipt = _receipt(qat, history, cpu, processes, {**before, "qat": after}, curve)
        (staging / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        if find_spec("matplotlib") is not None:
            plots.training_curve(receipt, staging / CURVE)
        if config.out.exists():
            shutil.rmtree(config.out)
        staging.replace(config.out)
    progress.finished("measure", time.perf_counter() - started, False)
    return Outcome(config.out, receipt, bool(plan.layers.rounded))


def write_checkpoint(plan: BuildPlan, student: Any, ranges: ActivationRanges, folder: Path) -> BuildPlan:
    """Write ``student`` in its published layout with recipe and ranges; the plan of it.

    Quantised weights that learned are in fp32, which holds integer times scale exactly; those that did not
    are as they were stored. The rest is in the base type.
    """
    from ..training.fake_quant import quantised_layers, trained_ranges, trained_weights

    folder.mkdir(parents=True)
    exact = {f"{name}.weight" for name, layer in quantised_layers(student) if layer.learns}
    write = _write_chat if family_of(plan.checkpoint.model).form == CHAT else _write_internvl
    write(plan, trained_weights(student), exact, folder)
    (folder / RECIPE).write_text(plan.recipe.to_yaml(), encoding="utf-8")
    if plan.evaluation:
        (folder / EVALUATION).write_text(json.dumps({"tasks": plan.evaluation}) + "\n", encoding="utf-8")
    recipe = str(folder / RECIPE)
    new = plan_build(replace(plan.config, model=folder, precision=recipe, ranges=None, algorithm=None))
    amax = trained_ranges(student, ranges.amax)
    replace(ranges, amax=amax, model=new.checkpoint.revision).save(folder / RANGES)
    return new


def _write_internvl(plan: BuildPlan, state: dict[str, Tensor], exact: set[str], folder: Path) -> None:
    from safetensors.torch import save_file

    base = dtype_of(plan.recipe.base).torch
    tensors = {k: (v if k in exact else v.to(base)).contiguous() for k, v in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    published = json.dumps(plan.checkpoint.model.to_published(), indent=1)
    (folder / "config.json").write_text(published + "\n", encoding="utf-8")
    (folder / MODEL).write_bytes(plan.tokenizer.files[MODEL])
    plan.settings.save(folder / "preprocessor_config.json")


def _write_chat(plan: BuildPlan, state: dict[str, Tensor], exact: set[str], folder: Path) -> None:
    from torch import float32

    from ..training.chat_model import write, write_as_stored

    opened, base = plan.checkpoint, dtype_of(plan.recipe.base).torch
    frozen = {f"{name}.weight" for name in plan.layers.quantised} - exact
    dtypes = {key: float32 if key in exact else base for key in state if key not in frozen}
    if not write_as_stored(state, opened, folder, dtypes):
        config, stored = cast("ChatConfig", opened.model), opened.load("lm_head.weight").dtype
        write(state, config, folder, plan.tokenizer.files[MODEL], plan.settings, opened, stored, dtypes)
    (folder / OWN_CALIBRATION[0]).unlink(missing_ok=True)  # its images were not copied


def recovered(scores: dict[str, Any]) -> dict[str, float]:
    """Share of the loss that training won back, of each task that lost more than a point."""
    shares = {}
    for group, tasks in scores["fp32"].items():
        for task, score in tasks.items() if group != "settings" else ():
            whole, low = score["accuracy"], scores["ptq"][group][task]["accuracy"]
            if whole - low > 0.01:
                shares[f"{group} {task}"] = (scores["qat"][group][task]["accuracy"] - low) / (whole - low)
    return shares


def _receipt(
    qat: QatPlan,
    history: History,
    cpu: float,
    processes: int,
    scores: dict[str, Any],
    curve: list[dict[str, Any]],
) -> dict[str, Any]:
    from ..profiles.measure import machine

    config, plan = qat.config, qat.build
    settings = {
        "stage": qat.stage,
        "trains": config.trains,
        "teacher": config.teacher,
        "steps": config.steps,
        "batch": config.batch,
        "lr": config.lr,
        "scale_lr": config.scale_lr,
        "learn_scales": config.learn_scales,
        "seed": config.seed,
        "processes": processes,
        "strategy": config.strategy if processes > 1 else None,
    }
    measured = {} if scores["fp32"] is None else {"scores": scores, "recovered": recovered(scores)}
    return {
        "recipe": plan.recipe.name,
        "model": plan.checkpoint.revision,
        "algorithm": plan.algorithm if plan.ranges_file is None else plan.ranges_file.ranges.algorithm,
        "data": qat.data_hash,
        "settings": settings,
        "seconds": history.seconds,
        "cpu_seconds": cpu,
        **measured,
        "losses": history.losses,
        "curve": curve,
        "machine": asdict(machine.machine()),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }


def _cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    return sum(os.times()[:4])
