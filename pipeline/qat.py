"""Quantisation-aware training: a checkpoint and a recipe in, a checkpoint and its scales out.

What is written is the published layout: quantised weights hold the very values that the graph will
dequantise, so ``build --model OUT --precision OUT/recipe.yaml --scales OUT/scales.json`` stores the integers
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
from typing import TYPE_CHECKING, Any, cast

from ..files.hashing import sha256_json
from ..quantization.ranges import Scales
from .graphs import SCALES
from .job import EVALUATION, Job
from .qat_job import RECEIPT, Asked, QatJob
from .qat_plot import plot

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from ..models.internvl import InternVLModel
    from ..training.finetune import History
    from ..training.losses import Stage2Batch
    from ..training.trainer import Progress
    from .workspace import Reporter

RECIPE = "recipe.yaml"
CURVE = "curve.png"
SIZES = {"n_classify": 500, "n_retrieve": 200, "n_galleries": 2, "n_caption": 500, "n_caption_zh": 200}
"""Questions that the model is asked before and after; captions are what low precision costs first."""


@dataclass(frozen=True)
class Outcome:
    """A finished run: the receipt, as it stands in :data:`RECEIPT`, and the folder it lies in."""

    out: Path
    receipt: dict[str, Any]
    rounded: bool

    @property
    def build_command(self) -> str:
        """What makes a bundle of it."""
        scales = f" --scales {self.out / SCALES}" if self.rounded else ""
        return f"ivl-export build --model {self.out} --precision {self.out / RECIPE}{scales}"


def measured_scales(job: Job, work: Path, reporter: Reporter) -> Scales:
    """The ranges that training starts from: those given, those measured before in ``work``, or new ones."""
    from .measure import measure

    if job.given is not None:
        return job.given.scales
    if not job.plan.rounded:
        nothing: dict[str, dict[str, float]] = {component: {} for component in job.components}
        return Scales(nothing, "none", 0, "", False, 0, job.checkpoint.revision)
    parts = [job.checkpoint.revision, job.calibration.hash, job.algorithm, job.recipe.to_json()]
    key = sha256_json(parts)[:16]
    path = work / f"scales-{key}.json"
    if path.is_file():
        return Scales.load(path)
    work.mkdir(parents=True, exist_ok=True)
    return measure(job, path, reporter)


def student_of(job: Job, scales: Scales, learn: bool) -> InternVLModel:
    """The model of ``job`` that computes as its graphs will."""
    from ..models.load import load_model
    from ..training.fake_quant import fake_quantised

    return fake_quantised(
        load_model(job.checkpoint), job.plan.quantised, job.recipe.base, scales.amax, learn=learn
    )


def evaluated(job: Job, model: InternVLModel) -> dict[str, Any] | None:
    """Task scores on held-out scenes, of a model that was trained on scenes."""
    from ..synthetic import tasks
    from ..training.evaluate import TorchModel

    if job.evaluation != "scenes":
        return None
    model.eval()
    return tasks.evaluate(TorchModel(model, job.tokenizer, job.settings), **cast(Any, SIZES))


def train_rank(
    asked: Asked,
    scales: Scales,
    report: Callable[[Progress], None] = lambda progress: None,
    inspect: Callable[[int, InternVLModel], None] = lambda step, model: None,
) -> tuple[History, dict[str, Any]]:
    """One process's part of a run: the history, and the whole trained state of the model."""
    from ..models.load import load_model
    from ..training import distributed as dist
    from ..training.finetune import SampleBatches, SceneSamples, fine_tune
    from ..training.trainer import Options

    opened, tuning = QatJob(asked), asked.tuning
    job, rows = opened.job, dist.own_rows(asked.batch)
    student = student_of(job, scales, asked.learn_scales)
    teacher = load_model(job.checkpoint) if asked.teacher else None
    data: Dataset[Stage2Batch]
    if opened.data is None:
        data = SceneSamples(tuning, job.settings, job.tokenizer.model, rows)
    else:
        data = SampleBatches(opened.data, tuning, job.settings, job.tokenizer.model, rows)
    identity = {
        "model": job.checkpoint.revision,
        "recipe": json.dumps(job.recipe.to_json(), sort_keys=True),
        "scales": json.dumps(scales.amax, sort_keys=True),
        "data": opened.data_hash,
        "learn": asked.learn_scales,
    }
    options = Options(asked.work, asked.save_every, workers=1, bf16=False, strategy=asked.strategy)
    history = fine_tune(student, teacher, tuning, data, identity, options, report, inspect)
    return history, dist.whole(student.state_dict())


def run(
    opened: QatJob, processes: int, reporter: Reporter, report: Callable[[Progress], None]
) -> Outcome | None:
    """Train, write the checkpoint, and measure what it gained; None in processes that torchrun added.

    Raises:
        InputError: the work folder holds another run.
        BuildError: gradients are not finite; another process failed.
    """
    from ..models.load import load_model
    from ..training.launch import together

    asked, job = opened.asked, opened.job
    scales = measured_scales(job, asked.work, reporter)
    curve: list[dict[str, Any]] = []

    def inspect(step: int, model: InternVLModel) -> None:
        if asked.evaluate_every and step % asked.evaluate_every == 0 and step < asked.steps:
            curve.append({"step": step, "scores": evaluated(job, model)})

    cpu = _cpu_seconds()
    reporter.started("train", asked.steps)
    result = together(processes, train_rank, (asked, scales), report=report, inspect=inspect)
    if result is None:
        return None
    history, state = result
    cpu = _cpu_seconds() - cpu
    reporter.finished("train", history.seconds, False)
    started = time.perf_counter()
    student = student_of(job, scales, asked.learn_scales)
    student.load_state_dict(state)
    reporter.started("measure", None)
    before = {
        "fp32": evaluated(job, load_model(job.checkpoint)),
        "ptq": evaluated(job, student_of(job, scales, False)),
    }
    with tempfile.TemporaryDirectory(dir=asked.out.absolute().parent, prefix=f".{asked.out.name}.") as folder:
        staging = Path(folder) / asked.out.name
        new = write_checkpoint(job, student, scales, staging)
        after = evaluated(new, student_of(new, Scales.load(staging / SCALES), False))
        receipt = _receipt(opened, history, cpu, processes, {**before, "qat": after}, curve)
        (staging / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        if find_spec("matplotlib") is not None:
            plot(receipt, staging / CURVE)
        if asked.out.exists():
            shutil.rmtree(asked.out)
        staging.replace(asked.out)
    reporter.finished("measure", time.perf_counter() - started, False)
    return Outcome(asked.out, receipt, bool(job.plan.rounded))


def write_checkpoint(job: Job, student: InternVLModel, scales: Scales, folder: Path) -> Job:
    """Write ``student`` in the published layout with recipe and scales; the job of it, opened again.

    Quantised weights are in fp32, which holds integer times scale exactly; the rest is in the base type.
    """
    import torch
    from safetensors.torch import save_file

    from ..quantization.quantize import BASE_DTYPES
    from ..training.fake_quant import trained_ranges, trained_weights

    folder.mkdir(parents=True)
    base = getattr(torch, BASE_DTYPES[job.recipe.base])
    exact = {f"{layer}.weight" for layer in job.plan.quantised}
    state = {k: (v if k in exact else v.to(base)).contiguous() for k, v in trained_weights(student).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    published = json.dumps(job.checkpoint.model.to_published(), indent=1)
    (folder / "config.json").write_text(published + "\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(job.tokenizer.model)
    job.settings.save(folder / "preprocessor_config.json")
    (folder / RECIPE).write_text(job.recipe.to_yaml(), encoding="utf-8")
    if job.evaluation:
        (folder / EVALUATION).write_text(json.dumps({"tasks": job.evaluation}) + "\n", encoding="utf-8")
    request = replace(job.request, model=folder, precision=str(folder / RECIPE), scales=None)
    new = Job(replace(request, algorithm=None))
    ranges = trained_ranges(student, scales.amax)
    replace(scales, amax=ranges, model=new.checkpoint.revision).save(folder / SCALES)
    return new


def recovered(scores: dict[str, Any]) -> dict[str, float]:
    """Share of the loss that training won back, of each task that lost more than a point."""
    found = {}
    for group, tasks in scores["fp32"].items():
        for task, score in tasks.items() if group != "settings" else ():
            whole, low = score["accuracy"], scores["ptq"][group][task]["accuracy"]
            if whole - low > 0.01:
                found[f"{group} {task}"] = (scores["qat"][group][task]["accuracy"] - low) / (whole - low)
    return found


def _receipt(
    opened: QatJob,
    history: History,
    cpu: float,
    processes: int,
    scores: dict[str, Any],
    curve: list[dict[str, Any]],
) -> dict[str, Any]:
    from ..profiles.measure import machine

    asked, job = opened.asked, opened.job
    settings = {
        "stage": asked.stage,
        "teacher": asked.teacher,
        "steps": asked.steps,
        "batch": asked.batch,
        "lr": asked.lr,
        "scale_lr": asked.scale_lr,
        "learn_scales": asked.learn_scales,
        "seed": asked.seed,
        "processes": processes,
        "strategy": asked.strategy if processes > 1 else None,
    }
    measured = {} if scores["fp32"] is None else {"scores": scores, "recovered": recovered(scores)}
    return {
        "recipe": job.recipe.name,
        "model": job.checkpoint.revision,
        "algorithm": job.algorithm if job.given is None else job.given.scales.algorithm,
        "data": opened.data_hash,
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
