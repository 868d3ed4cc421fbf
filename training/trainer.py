"""The training loop: Muon for the blocks' matrices, AdamW for the rest, checkpoints, exact resume.

Muon (orthogonalised momentum) is what makes minutes on two cores enough: in a probe that trained the ViT
alone to name four shapes, 150 steps gave 87%, with AdamW for everything 51%.

State is written after every ``save_every`` steps to one file that replaces the last one; a run that was
killed goes on from it and ends with the same weights bit for bit (same machine, same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset

from ..errors import InputError
from ..models.internvl import InternVL
from ..preprocess import ImageSettings
from .collate import Drawn, SceneBatches, normalise
from .losses import Text, stage1_loss, stage2_losses
from .presets import Preset, Stage

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Progress:
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
    """How to run, apart from what is trained."""

    work_dir: Path
    save_every: int = 100
    workers: int = 1
    bf16: bool = True


def train(
    preset: Preset, tokenizer: bytes, options: Options, report: Callable[[Progress], None]
) -> tuple[InternVL, float]:
    """Run all stages of ``preset``: the trained model (fp32, eval mode) and the seconds its steps took.

    Raises:
        InputError: ``work_dir`` holds the state of a run with other settings.
    """
    state_file = options.work_dir / "state.pt"
    options.work_dir.mkdir(parents=True, exist_ok=True)
    model = initialised(preset)
    identity = {"preset": repr(preset), "tokenizer": tokenizer.hex()[:64]}
    state: dict[str, Any] = {"stage": 0, "step": 0, "optimizers": [], "seconds": 0.0}
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["identity"] != identity:
            raise InputError(
                f"{options.work_dir} holds another run.",
                "Its preset, seed or tokenizer differs from what is asked now.",
                "Use another --work-dir, or delete that one.",
            )
        model.load_state_dict(state["model"])
    done = sum(s.steps for s in preset.stages[: state["stage"]])
    total = sum(s.steps for s in preset.stages)
    seconds: float = state["seconds"]
    started = time.perf_counter() - seconds
    for number, stage in enumerate(preset.stages):
        if number < state["stage"]:
            continue
        chosen = optimizers(model, stage, preset.weight_decay)
        first = 0
        if number == state["stage"]:
            first = state["step"]
            for optimizer, kept in zip(chosen, state["optimizers"], strict=False):
                optimizer.load_state_dict(kept)
        for step, drawn in enumerate(_batches(preset, stage, tokenizer, first, options.workers), first):
            losses = _step(model, chosen, stage, preset, drawn, step, options.bf16)
            seconds = time.perf_counter() - started
            report(Progress(stage.name, step + 1, done + step + 1, total, losses, seconds))
            if (step + 1) % options.save_every == 0 or step + 1 == stage.steps:
                place = {"identity": identity, "stage": number, "step": step + 1, "seconds": seconds}
                save_state(state_file, model, chosen, place)
        done += stage.steps
    return model.eval(), seconds


def initialised(preset: Preset) -> InternVL:
    """The untrained model: normal weights, residual outputs scaled down by depth (as GPT-2).

    Positions start as sines and cosines about as large as the patches' content: from small random ones a
    short run hardly learns where things stand.
    """
    torch.manual_seed(preset.seed)
    model = InternVL(preset.model)
    config = preset.model
    depths = {"vision_model": config.vision.num_hidden_layers, "qllama": config.qllama.num_hidden_layers}
    for name, parameter in model.named_parameters():
        depth = next((n for part, n in depths.items() if name.startswith(part)), 1)
        residual = name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight"))
        if name.endswith((".ls1", ".ls2")):
            nn.init.constant_(parameter, 1.0)  # so shallow a ViT needs no damping
        elif name.endswith("position_embedding"):
            grid = config.vision.image_size // config.vision.patch_size
            parameter.data[:, 1:] = sine_positions(grid, config.vision.hidden_size)
            nn.init.zeros_(parameter.data[:, :1])
        elif parameter.dim() >= 2:
            nn.init.trunc_normal_(parameter, std=0.04 / (2 * depth) ** 0.5 if residual else 0.04)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.trunc_normal_(model.vision_model.embeddings.patch_embedding.weight, std=0.02)
    return model


def sine_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D sines and cosines [grid * grid, width], half of the channels for each axis (as MAE)."""
    quarter = width // 4
    frequencies = 1.0 / 100.0 ** (torch.arange(quarter) / quarter)
    angles = torch.arange(grid)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    table = torch.cat([rows, columns], -1).flatten(0, 1)
    return nn.functional.pad(table, (0, width - table.shape[1]))


def _batches(preset: Preset, stage: Stage, tokenizer: bytes, first: int, workers: int) -> Iterator[Drawn]:
    # Each stage draws from its own stream.
    seed = preset.seed * 100 + preset.stages.index(stage)
    size = preset.model.vision.image_size
    data = SceneBatches(seed, stage, preset.chinese, size, tokenizer)
    rest: Subset[Drawn] = Subset(data, range(first, stage.steps))
    return iter(
        DataLoader(rest, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    )


def optimizers(model: nn.Module, stage: Stage, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Freeze what ``stage`` does not train. Muon for the blocks' matrices where it has a rate, else AdamW."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in stage.trainable))
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
    model: InternVL,
    optimizers: list[torch.optim.Optimizer],
    stage: Stage,
    preset: Preset,
    drawn: Drawn,
    step: int,
    bf16: bool,
) -> dict[str, float]:
    for optimizer in optimizers:
        peak = stage.matrix_lr if isinstance(optimizer, torch.optim.Muon) else stage.lr
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(stage, step)
    model.train()
    settings = ImageSettings()
    pixels = normalise(drawn.images, settings.mean, settings.std)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
        parts = _losses(model, stage, drawn, pixels)
    loss = torch.stack(list(parts.values())).sum()
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    learning = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(learning, preset.max_grad_norm, error_if_nonfinite=True)
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    return {**{k: float(v.detach()) for k, v in parts.items()}, "grad_norm": float(norm)}


def _losses(model: InternVL, stage: Stage, drawn: Drawn, pixels: Tensor) -> dict[str, Tensor]:
    if stage.loss == "contrastive":
        return {"itc": stage1_loss(model, pixels, _trim(drawn.summarize))}
    result = stage2_losses(model, drawn.stage2(pixels))
    assert result.itg is not None
    return {"itc": result.itc, "itm": result.itm, "itg": result.itg}


def _trim(text: Text) -> Text:
    longest = int(text.lengths().max())
    return Text(text.input_ids[:, :longest], text.mask[:, :longest])


def save_state(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], place: dict[str, Any]
) -> None:
    """Replace ``path`` by weights, optimizer states and ``place``, which says how far the run has come."""
    optimizer_states = [o.state_dict() for o in optimizers]
    state = {**place, "model": model.state_dict(), "optimizers": optimizer_states}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def shortened(preset: Preset, steps: int | None, batch: int | None) -> Preset:
    """``preset`` with fewer steps a stage or a smaller batch, for tests and dry runs."""
    return replace(preset, stages=tuple(shortened_stage(s, steps, batch) for s in preset.stages))


def shortened_stage(stage: Stage, steps: int | None, batch: int | None) -> Stage:
    """``stage`` with fewer steps or a smaller batch."""
    steps = steps or stage.steps
    return replace(stage, steps=steps, batch=batch or stage.batch, warmup=min(stage.warmup, steps // 2))
