"""The training loop: Muon for the blocks' matrices, AdamW for the rest, checkpoints, exact resume.

Muon (orthogonalised momentum) makes minutes on two cores enough: in a probe that trained the ViT
alone to name four shapes, 150 steps gave 87%, with AdamW for everything 51%.

State is written after every ``save_every`` steps to one file that replaces the last one; a run that was
killed resumes from it and ends with the same weights bit for bit (same machine, same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset

from ..errors import InputError
from ..files.write import atomic
from ..inputs.preprocess import ImageSettings
from ..models.config import VisionConfig
from ..models.internvl import InternVLModel
from . import distributed as dist
from .collate import Drawn, SceneBatches, pixel_values
from .losses import (
    IGNORE,
    Gather,
    Stage2Batch,
    Text,
    across_ranks,
    local,
    matching_texts,
    stage1_loss,
    stage2_losses,
)
from .presets import Preset, Stage
from .products import ProductsInFp32

MAX_LOGIT_SCALE = math.log(100)
STATE = "state.pt"


@dataclass(frozen=True)
class TrainingProgress:
    """One finished step: stage, step within it, all steps of the run done and to do, and the losses.

    ``seconds`` is the time of all steps done, those before a resume too.
    """

    stage: str
    step: int
    done: int
    total: int
    losses: dict[str, float]
    seconds: float = 0.0


@dataclass(frozen=True)
class Options:
    """How to run, apart from model and data.

    ``workers`` make batches; ``strategy`` is how several processes share the model
    (:func:`.distributed.parallel`).
    """

    work_dir: Path
    save_every: int = 100
    workers: int = 1
    bf16: bool = True
    strategy: dist.Strategy = "ddp"


def silent(progress: TrainingProgress) -> None:
    """Ignores the progress of a run."""


def train(
    preset: Preset, tokenizer: bytes, options: Options, report: Callable[[TrainingProgress], None] = silent
) -> tuple[InternVLModel, float]:
    """Run all stages of ``preset``: the trained model (fp32, eval mode) and the seconds its steps took.

    In a group (:func:`.distributed.together`) every process calls it, and trains on its rows of each batch.

    Raises:
        InputError: ``work_dir`` holds the state of a run with other settings.
        UsageError: a batch that the processes cannot share.
        BuildError: gradients are not finite.
    """
    model, device = initialised(preset), dist.device()
    rows = {stage.name: dist.own_rows(stage.batch) for stage in preset.stages}
    identity = {"preset": repr(preset), "tokenizer": tokenizer.hex()[:64]}
    state: dict[str, Any] = {"stage": 0, "step": 0, "optimizers": [], "seconds": 0.0}
    if (kept_state := read_state(options.work_dir, identity)) is not None:
        state = kept_state
        model.load_state_dict(state["model"])
    objective = dist.Objective(model.to(device), stage_losses)
    steps_done = sum(s.steps for s in preset.stages[: state["stage"]])
    total = sum(s.steps for s in preset.stages)
    seconds: float = state["seconds"]
    started = time.perf_counter() - seconds
    for number, stage in enumerate(preset.stages):
        if number < state["stage"]:
            continue
        freeze(model, stage)
        wrapped = dist.parallel(objective, options.strategy, unused=stage.loss == "contrastive")
        chosen = optimizers(model, stage, preset.weight_decay)
        first = 0
        if number == state["stage"]:
            first = state["step"]
            for optimizer, saved in zip(chosen, state["optimizers"], strict=False):
                dist.load_optimizer(optimizer, saved)
        for step, drawn in enumerate(_batches(preset, stage, tokenizer, first, options.workers), first):
            own = dist.to_device(dist.select_rows(drawn, rows[stage.name]), device)
            losses = _step(wrapped, model, chosen, stage, preset, own, step, options.bf16)
            seconds = time.perf_counter() - started
            report(TrainingProgress(stage.name, step + 1, steps_done + step + 1, total, losses, seconds))
            if (step + 1) % options.save_every == 0 or step + 1 == stage.steps:
                place = {"identity": identity, "stage": number, "step": step + 1, "seconds": seconds}
                save_state(options.work_dir, model, chosen, place)
        steps_done += stage.steps
    if dist.world() > 1:
        trained = InternVLModel(preset.model)
        trained.load_state_dict(dist.whole(model.state_dict()))
        model = trained
    return model.cpu().eval(), seconds


def _batches(preset: Preset, stage: Stage, tokenizer: bytes, first: int, workers: int) -> Iterator[Drawn]:
    # Each stage draws from its own stream.
    seed = preset.seed * 100 + preset.stages.index(stage)
    size = preset.model.vision.image_size
    data = SceneBatches(seed, stage, preset.chinese, size, tokenizer)
    rest: Subset[Drawn] = Subset(data, range(first, stage.steps))
    return iter(
        DataLoader(rest, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    )


def freeze(model: nn.Module, stage: Stage) -> None:
    """Let the parameters learn that ``stage`` names, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in stage.trainable))


def optimizers(model: nn.Module, stage: Stage, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Freeze what ``stage`` does not train. Muon for matrices of blocks if they have a rate, else AdamW."""
    freeze(model, stage)
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage.matrix_lr and parameter.dim() == 2 and ".layers." in name:
            matrices.append(parameter)
        else:
            (decayed if parameter.dim() >= 2 and "embed" not in name else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))
    if not matrices:  # a stage that trains heads alone
        return [adamw]
    return [torch.optim.Muon(matrices, lr=stage.matrix_lr, weight_decay=weight_decay), adamw]


def schedule(stage: Stage, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to almost zero."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - stage.warmup) / (stage.steps - stage.warmup)))


def _step(
    objective: nn.Module,
    model: InternVLModel,
    chosen: list[torch.optim.Optimizer],
    stage: Stage,
    preset: Preset,
    drawn: Drawn,
    step: int,
    bf16: bool,
) -> dict[str, float]:
    for optimizer in chosen:
        peak = stage.matrix_lr if isinstance(optimizer, torch.optim.Muon) else stage.lr
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(stage, step)
    model.train()
    settings = ImageSettings()
    pixels = pixel_values(drawn.images, settings)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
        parts: dict[str, Tensor] = objective(_batch(stage, drawn, pixels), stage)
    loss = torch.stack(list(parts.values())).sum()
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    learning = [p for p in model.parameters() if p.grad is not None]
    norm = dist.clip_gradients(learning, preset.max_grad_norm)
    with ProductsInFp32():  # Muon's iteration is in bf16
        for optimizer in chosen:
            optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    return {**dist.averaged(parts), "grad_norm": norm}


def stage_losses(model: InternVLModel, batch: Stage2Batch, stage: Stage) -> dict[str, Tensor]:
    """Losses of stage 1 or 2 by name; of several processes' rows the mean is that of the whole batch."""
    gather: Gather = across_ranks if dist.world() > 1 else local
    if stage.loss == "contrastive":
        return {"itc": stage1_loss(model, batch.pixel_values, batch.summarize, batch.ids, gather)}
    result = stage2_losses(model, batch, gather)
    assert result.itg is not None
    if dist.world() == 1:
        return {"itc": result.itc, "itm": result.itm, "itg": result.itg}
    matched = (matching_texts(batch)[1] != IGNORE).sum()
    spoken = (batch.labels[:, 1:] != IGNORE).sum()
    itm, itg = result.itm * dist.weight(matched), result.itg * dist.weight(spoken)
    return {"itc": result.itc, "itm": itm, "itg": itg}


def _batch(stage: Stage, drawn: Drawn, pixels: Tensor) -> Stage2Batch:
    batch = drawn.stage2(pixels)
    if stage.loss == "contrastive":
        return replace(batch, summarize=_trim(batch.summarize), ids=None)
    # Each row is its own class, also among those of other processes.
    return replace(batch, ids=batch.ids * dist.world() + dist.rank()) if batch.ids is not None else batch


def _trim(text: Text) -> Text:
    longest = int(text.lengths().max())
    return Text(text.input_ids[:, :longest], text.mask[:, :longest])


def shortened(preset: Preset, steps: int | None, batch: int | None) -> Preset:
    """``preset`` with fewer steps a stage or a smaller batch, for tests and dry runs."""
    return replace(preset, stages=tuple(shortened_stage(s, steps, batch) for s in preset.stages))


def shortened_stage(stage: Stage, steps: int | None, batch: int | None) -> Stage:
    """``stage`` with fewer steps or a smaller batch."""
    steps = steps or stage.steps
    return replace(stage, steps=steps, batch=batch or stage.batch, warmup=min(stage.warmup, steps // 2))


def initialised(preset: Preset) -> InternVLModel:
    """The untrained model: normal weights, residual outputs scaled down by depth (as GPT-2).

    Positions start as sines and cosines about as large as the patches' content: from small random ones a
    short run hardly learns positions.
    """
    torch.manual_seed(preset.seed)
    model = InternVLModel(preset.model)
    initialise(model, preset.model.vision, {"qllama": preset.model.qllama.num_hidden_layers})
    nn.init.trunc_normal_(model.vision_model.embeddings.patch_embedding.weight, std=0.02)
    return model


def initialise(model: nn.Module, vision: VisionConfig, decoder: Mapping[str, int]) -> None:
    """Draw the parameters of a model with a ``vision_model``; ``decoder``: module -> number of blocks."""
    depths = {"vision_model": vision.num_hidden_layers, **decoder}
    for name, parameter in model.named_parameters():
        depth = depths.get(name.split(".")[0], 1)
        residual = name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight"))
        if name.endswith((".ls1", ".ls2")):
            nn.init.constant_(parameter, 1.0)  # so shallow a ViT needs no damping
        elif name.endswith("position_embedding"):
            grid = vision.image_size // vision.patch_size
            parameter.data[:, 1:] = sine_positions(grid, vision.hidden_size)
            nn.init.zeros_(parameter.data[:, :1])
        elif parameter.dim() >= 2:
            nn.init.trunc_normal_(parameter, std=0.04 / (2 * depth) ** 0.5 if residual else 0.04)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def sine_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D sines and cosines [grid * grid, width], half of the channels for each axis (as MAE)."""
    quarter = width // 4
    frequencies = 1.0 / 100.0 ** (torch.arange(quarter) / quarter)
    angles = torch.arange(grid)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    table = torch.cat([rows, columns], -1).flatten(0, 1)
    return nn.functional.pad(table, (0, width - table.shape[1]))


def read_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state that :func:`save_state` wrote into ``folder``; None if there is none.

    Raises:
        InputError: it is the state of a run of another ``identity``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / STATE).exists():
        return None
    state: dict[str, Any] = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    if state["identity"] != identity:
        raise InputError(
            f"{folder} holds another run.",
            "Its model, data or settings differ from this run's.",
            "Use another -O work-dir, or delete that one.",
        )
    return state


def save_state(
    folder: Path, model: nn.Module, chosen: list[torch.optim.Optimizer], place: dict[str, Any]
) -> None:
    """Write the state of a run, in place of the last one; every process of a group calls it, the first
    writes.

    ``place`` identifies the run, and the step it has reached.
    """
    states = dist.whole([o.state_dict() for o in chosen])
    state = {**place, "model": dist.whole(model.state_dict()), "optimizers": states}
    if dist.rank() > 0:
        return
    with atomic(folder / STATE, exclusive=True) as partial:
        torch.save(state, partial)
