"""What is asked of quantisation-aware training, opened and checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..calibration.dataset import CalibrationSet
from ..calibration.sources import open_calibration
from ..errors import CapabilityError, InputError, UsageError
from ..models.config import ChatConfig
from .job import Job
from .request import ORT, Request

if TYPE_CHECKING:
    from ..training.distributed import Strategy
    from ..training.finetune import Tuning


RECEIPT = "qat.json"


@dataclass(frozen=True)
class Asked:
    """The arguments of ``ivl-export train qat``.

    Args:
        out: the new checkpoint's folder.
        model: a checkpoint; None is the shipped internvl-nano.
        precision: the recipe to train for.
        stage: whose losses, and whose data: 1 (contrastive) or 2.
        teacher: learn the answers of the model before quantisation instead (QAD).
        data: images and captions to train on; None: drawn scenes, for a model trained on them.
        calib, scales, algorithm: as in :class:`.request.Request`.
        steps, batch, lr, scale_lr: of the run.
        learn_scales: whether scales are trained too.
        seed: of the data's order.
        evaluate_every: steps between evaluations on scenes; 0: only before and after.
        save_every: steps between kept states.
        work_dir: where the state lies; None: beside ``out``.
        strategy: how several processes share the model.
    """

    out: Path
    model: Path | None = None
    precision: str = "w4a4"
    stage: Literal[1, 2] = 2
    teacher: bool = False
    data: Path | None = None
    calib: Path | None = None
    scales: Path | None = None
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
        """Where the state of the run lies."""
        return self.work_dir or self.out.with_name(f"{self.out.name}.work")

    @property
    def tuning(self) -> Tuning:
        """What the run does."""
        from ..training.finetune import Tuning
        from ..training.presets import Stage

        loss: Literal["contrastive", "generative"] = "contrastive" if self.stage == 1 else "generative"
        warmup = min(20, self.steps // 4)
        stage = Stage(f"stage{self.stage}", loss, self.steps, self.batch, self.lr, 0.0, warmup)
        return Tuning(stage, self.scale_lr, self.seed)


class QatJob:
    """What is asked, opened and checked.

    Raises (on construction):
        UsageError: a recipe that quantises nothing, or that folds factors; a stage that the model lacks.
        CapabilityError: a chat model.
        InputError: no data; captions are missing that the stage's losses need; ``out`` is something else.
    """

    def __init__(self, asked: Asked, progress: Callable[[int, int], None] | None = None) -> None:
        from ..training.fake_quant import check_trainable

        self.asked = asked
        request = Request(
            asked.out,
            asked.model,
            asked.precision,
            asked.calib or asked.data,
            scales=asked.scales,
            algorithm=asked.algorithm,
            backends=(ORT,),
        )
        self.job = Job(request, progress)
        if isinstance(self.job.checkpoint.model, ChatConfig):
            raise CapabilityError(
                "A chat model is not fine-tuned for a precision.",
                "Its decoder has the loss of stage 3; here the losses are those of stages 1 and 2.",
                "Build it in one that needs no training: --precision mixed searches the fastest.",
            )
        if not self.job.plan.quantised:
            raise UsageError(
                f"Precision {self.job.recipe.name} quantises nothing.",
                "There is nothing to train.",
                "Give --recipe int8, for example.",
            )
        check_trainable(self.job.plan.quantised)
        if any(self.job.plan.attention.values()):
            raise UsageError(
                f"Precision {self.job.recipe.name} quantises attention.",
                "Training simulates linear layers only.",
                "Use the recipe without.",
            )
        if self.job.checkpoint.contrastive_only and asked.stage == 2:
            raise UsageError("This model has no generation to train.", "It is InternVL-C.", "Use --stage 1.")
        if asked.evaluate_every and asked.strategy == "fsdp":
            raise UsageError(
                "--evaluate-every does not go with --strategy fsdp.",
                "One process evaluates, and has only a part of the model.",
                "Leave it out: the result is evaluated.",
            )
        if asked.out.exists() and not (asked.out / RECEIPT).is_file() and any(asked.out.iterdir()):
            raise InputError(f"{asked.out} is not empty.", f"It holds no {RECEIPT}.", "Give another --out.")
        self.data = self._data(progress)

    @property
    def data_hash(self) -> str:
        """What says which data the run learns from."""
        return "scenes" if self.data is None else self.data.hash

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user must be told about the data."""
        return self.job.notices + (self.data.notices if self.data is not None else ())

    def plan(self, processes: int) -> dict[str, Any]:
        """What a run would do."""
        from ..training.distributed import own_rows

        asked, schemes = self.asked, self.job.plan.quantised
        own_rows(asked.batch, processes)
        return {
            "checkpoint": str(asked.out),
            "recipe": self.job.recipe.name,
            "layers": {
                scheme: list(schemes.values()).count(scheme) for scheme in dict.fromkeys(schemes.values())
            },
            "learns from": "the full-precision model"
            if asked.teacher
            else f"the losses of stage {asked.stage}",
            "data": self.data_hash,
            "steps": asked.steps,
            "batch": asked.batch,
            "scales": "learned" if asked.learn_scales else "kept",
            "processes": processes,
        }

    def _data(self, progress: Callable[[int, int], None] | None) -> CalibrationSet | None:
        asked = self.asked
        if asked.data is None:
            if self.job.evaluation == "scenes":
                return None
            raise InputError(
                "There is nothing to train on.",
                "Scenes are drawn only for models that were trained on them.",
                "Give --data a folder or JSONL of images and captions.",
            )
        wanted = asked.steps * asked.batch
        chosen = open_calibration(asked.data, wanted, asked.seed, progress=progress)
        if chosen.without_caption and not asked.teacher:
            raise InputError(
                f"{chosen.without_caption} of {len(chosen)} images have no caption.",
                "The stage's losses learn from right captions.",
                "Add captions, or use --teacher, which needs none to be right.",
            )
        if len(chosen) < asked.batch:
            raise InputError(
                f"{len(chosen)} images are fewer than a batch.",
                f"A batch has {asked.batch}.",
                "Add images, or give a smaller --batch.",
            )
        return replace(chosen, asked=len(chosen))
