"""Fine-tuning a fake-quantised model: by its stage's losses (QAT), or by distillation (QAD).

In distillation the quantised model learns the answers of the full-precision one. Both run as the deployed
components chain: image, queries, contrastive text, and caption steps after the queries' cache. Captions need
not be right: the teacher gives the targets. A chat model learns the answers of conversations, or the
teacher's distribution of each of their tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from ..calibration.dataset import CalibrationSet, prompt_for
from ..errors import InputError
from ..files.write import atomic
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import SentencePieceTokenizer
from ..models.generate import step_mask
from ..models.internvl import InternVLModel
from ..models.qllama import Visible
from . import distributed as dist
from .collate import SceneBatches, collate, pixel_values
from .conversations import ChatBatch
from .fake_quant import keep_in_bounds
from .losses import IGNORE, Stage2Batch
from .presets import Stage
from .stage3 import ChatModel
from .trainer import MAX_LOGIT_SCALE, Options, TrainingProgress, freeze, schedule, stage_losses

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Answers:
    """Outputs of a model for B images and texts.

    Args:
        hidden: states that other components take: vision tokens [B, N, D], query rows [B, Q, H].
        embeds: image and text embeddings [B, E], not normalised.
        logits: of the caption's predicted tokens [tokens, V]; None without generation.
    """

    hidden: tuple[Tensor, ...]
    embeds: tuple[Tensor, ...]
    logits: Tensor | None


def answers(model: InternVLModel, batch: Stage2Batch, generative: bool) -> Answers:
    """Run ``model`` on a batch; not ``generative``: InternVL-C's image and text only."""
    tokens = model.vision(batch.pixel_values)
    image, text = model.clip_projector(tokens), model.encode_text(batch.summarize.input_ids)
    if not generative:
        return Answers((tokens,), (image, text), None)
    queries, cache = model.query_pass(tokens)
    ids, count = batch.caption.input_ids, queries.shape[1]
    keys = F.pad(batch.caption.mask, (count, 0), value=1)
    positions = torch.arange(count, count + ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
    visible = Visible(step_mask(keys, ids.shape[1]))
    states, _ = model.qllama(model.qllama.embed(ids), positions, visible, past=cache)
    spoken = batch.labels[:, 1:] != IGNORE
    logits = model.qllama.lm_head(states[:, :-1][spoken])
    return Answers((tokens, queries), (image, model.clip_projector2(queries), text), logits)


def distillation_losses(student: Answers, teacher: Answers) -> dict[str, Tensor]:
    """How far ``student`` is from ``teacher``; their sum is trained.

    ``hidden`` is the squared error of each state over its variance, ``embed`` one minus the cosine of the
    embeddings, ``kl`` the divergence of the next token's distribution (Hinton et al. 2015, temperature 1).
    Each is a mean over the compared values, so that none grows with the batch.
    """
    pairs = list(zip(student.hidden, teacher.hidden, strict=True))
    hidden = torch.stack([((s - t).square().mean(-1) / t.var(-1)).mean() for s, t in pairs]).mean()
    losses = {"hidden": hidden}
    pairs = list(zip(student.embeds, teacher.embeds, strict=True))
    losses["embed"] = torch.stack([1 - F.cosine_similarity(s, t).mean() for s, t in pairs]).sum()
    if student.logits is not None and teacher.logits is not None:
        losses["kl"] = F.kl_div(
            student.logits.log_softmax(-1),
            teacher.logits.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    return losses


def chat_losses(model: ChatModel, batch: ChatBatch, teacher: ChatModel | None) -> dict[str, Tensor]:
    """Mean cross entropy of the answers' tokens, or mean divergence from ``teacher`` there."""
    inputs = (batch.pixel_values, batch.input_ids, batch.mask, batch.labels)
    logits, tokens = model.answer_logits(*inputs)
    count = torch.tensor(len(tokens), device=logits.device)
    share = dist.weight(count) / count.clamp_min(1)  # no token of this process's rows may be an answer's
    if teacher is None:
        return {"answers": F.cross_entropy(logits, tokens, reduction="sum") * share}
    with torch.no_grad():
        target = teacher.answer_logits(*inputs)[0].log_softmax(-1)
    return {"kl": F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True) * share}


STEP = 0xA7
"""Keeps the order of the samples apart from other random streams of the same seed."""


@dataclass(frozen=True)
class Tuning:
    """Settings of a run.

    Args:
        stage: its losses, steps, batch, learning rates and trained parameters; ``matrix_lr`` is not used:
            everything is trained by AdamW, whose small steps keep the model's knowledge.
        scale_lr: peak learning rate of the scales, as a share of their ranges a step.
        seed: of the data's order.
        max_grad_norm: gradients are clipped to it.
    """

    stage: Stage
    scale_lr: float = 5e-3
    seed: int = 0
    max_grad_norm: float = 1.0


@dataclass
class History:
    """Losses of every step so far, and the seconds they took."""

    losses: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


class SampleBatches(Dataset[Stage2Batch]):
    """Batch ``i`` of a user's images and captions: a pure function of (set, seed, i).

    Every epoch has its own order; a batch may reach into the next one. Images of equal captions share an id.
    """

    def __init__(
        self, chosen: CalibrationSet, tuning: Tuning, settings: ImageSettings, tokenizer: bytes, rows: slice
    ) -> None:
        self.chosen, self.stage, self.seed = chosen, tuning.stage, tuning.seed
        self.settings, self.tokenizer, self.rows = settings, tokenizer, rows

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, index: int) -> Stage2Batch:
        samples = [self.chosen.samples[i] for i in self._order(index)]
        captions = [sample.text for sample in samples]
        ids = torch.tensor([captions.index(caption) for caption in captions])
        languages = ["zh" if prompt_for(c) == prompt_for("一") else "en" for c in captions]
        texts = collate(np.zeros(0, np.uint8), captions, languages, SentencePieceTokenizer(self.tokenizer))
        pixels = [sample.pixels(self.settings) for sample in samples[self.rows]]
        whole = replace(texts.stage2(torch.zeros(len(captions), 0)), ids=ids)
        return replace(
            dist.select_rows(whole, self.rows), pixel_values=torch.from_numpy(np.concatenate(pixels))
        )

    def _order(self, index: int) -> Iterator[int]:
        size = len(self.chosen)
        for place in range(index * self.stage.batch, (index + 1) * self.stage.batch):
            epoch, within = divmod(place, size)
            yield int(np.random.default_rng([STEP, self.seed, epoch]).permutation(size)[within])


class SceneSamples(Dataset[Stage2Batch]):
    """Batch ``i`` of drawn scenes, of combinations that nano was trained on."""

    def __init__(
        self, tuning: Tuning, settings: ImageSettings, tokenizer: bytes, rows: slice, chinese: float = 0.25
    ) -> None:
        self.scenes = SceneBatches(STEP + tuning.seed, tuning.stage, chinese, settings.size, tokenizer)
        self.settings, self.rows = settings, rows

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Stage2Batch:
        drawn = self.scenes[index]
        batch = drawn.stage2(torch.zeros(len(drawn.images), 0))
        pixels = pixel_values(drawn.images[self.rows], self.settings)
        return replace(dist.select_rows(batch, self.rows), pixel_values=pixels)


def fine_tune(
    student: M,
    teacher: M | None,
    tuning: Tuning,
    data: Dataset[Any],
    identity: Mapping[str, Any],
    options: Options,
    report: Callable[[TrainingProgress], None],
    inspect: Callable[[int, M], None] = lambda step, model: None,
) -> History:
    """Train ``student`` in place.

    State is saved after every ``options.save_every`` steps; a killed run resumes there and ends
    with the same weights (same machine, threads and processes). It learns in fp32: bf16 would round the
    quantisers' results again.

    Args:
        student: an InternVL or a chat model, made by :func:`.fake_quant.fake_quantised`.
        teacher: the model before quantisation, whose answers are learned; None: the stage's losses.
        tuning: settings of the run.
        data: ``tuning.stage.steps`` batches, :class:`Stage2Batch` or of a chat model :class:`ChatBatch`: this
            process's rows of each.
        identity: plain data that identifies model and data; a saved state of others is refused.
        options: where and how often the state is saved; how processes share the work.
        report: callback with every step.
        inspect: called after every saved step, with a student that it must not change.

    Raises:
        InputError: ``options.work_dir`` holds the state of another run.
        BuildError: gradients are not finite.
    """
    stage, device = tuning.stage, dist.device()
    student.to(device).train()
    freeze(student, stage)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
    objective = dist.Objective(student, partial(_losses, teacher=teacher, stage=stage))
    wrapped = dist.parallel(objective, options.strategy)
    optimizer = _optimizer(student, tuning)
    history, first = History(), 0
    file = options.work_dir / "state.pt"
    identity = {**identity, "tuning": repr(tuning), "teacher": teacher is not None}
    if file.exists():
        state = torch.load(file, weights_only=True, map_location=device)
        if state["identity"] != identity:
            raise InputError(
                f"{options.work_dir} holds another run.",
                "Its model, recipe, data or settings differ from this run's.",
                "Use another -O work-dir, or delete that one.",
            )
        dist.load_model(student, state["model"])
        dist.load_optimizer(optimizer, state["optimizer"])
        first, history = state["step"], History(state["losses"], state["seconds"])
    started = time.perf_counter() - history.seconds
    rest: Subset[Any] = Subset(data, range(first, stage.steps))
    ahead = 2 if options.workers else None
    batches = DataLoader(rest, batch_size=None, num_workers=options.workers, prefetch_factor=ahead)
    for step, batch in enumerate(batches, first):
        parts = _step(wrapped, optimizer, tuning, dist.to_device(batch, device), step)
        history.losses.append(parts)
        history.seconds = time.perf_counter() - started
        report(TrainingProgress(stage.name, step + 1, step + 1, stage.steps, parts, history.seconds))
        if (step + 1) % options.save_every == 0 or step + 1 == stage.steps:
            tensors = {
                "model": dist.whole(student.state_dict()),
                "optimizer": dist.whole(optimizer.state_dict()),
            }
            if dist.rank() == 0:
                options.work_dir.mkdir(parents=True, exist_ok=True)
                place = {"identity": identity, "step": step + 1, "seconds": history.seconds}
                with atomic(file, exclusive=True) as unfinished:
                    torch.save({**place, **tensors, "losses": history.losses}, unfinished)
            before = time.perf_counter()
            inspect(step + 1, student)
            started += time.perf_counter() - before
            student.train()
    student.eval()
    return history


def _losses(model: Any, batch: Any, *, teacher: Any | None, stage: Stage) -> dict[str, Tensor]:
    if stage.loss == "answers":
        return chat_losses(model, batch, teacher)
    generative = stage.loss == "generative"
    if teacher is not None:
        with torch.no_grad():
            targets = answers(teacher, batch, generative)
        parts = distillation_losses(answers(model, batch, generative), targets)
        if "kl" in parts:
            parts["kl"] = parts["kl"] * dist.weight((batch.labels[:, 1:] != IGNORE).sum())
        return parts
    return stage_losses(model, batch, stage)


def _optimizer(model: nn.Module, tuning: Tuning) -> torch.optim.Optimizer:
    scales: list[nn.Parameter] = []
    weights: list[nn.Parameter] = []
    learning = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for name, parameter in learning:
        (scales if name.endswith((".clip", ".stretch")) else weights).append(parameter)
    groups = [
        {"params": weights, "peak": tuning.stage.lr},
        {"params": scales, "peak": tuning.scale_lr},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=tuning.stage.lr, betas=(0.9, 0.98), weight_decay=0.0)


def _step(
    objective: nn.Module, optimizer: torch.optim.Optimizer, tuning: Tuning, batch: Any, step: int
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * schedule(tuning.stage, step)
    parts: dict[str, Tensor] = objective(batch)
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    norm = dist.clip_gradients(learning, tuning.max_grad_norm)
    optimizer.step()
    for model in objective.modules():
        if isinstance(model, InternVLModel):
            with torch.no_grad():
                model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    keep_in_bounds(objective)
    return {**dist.averaged(parts), "grad_norm": norm}
