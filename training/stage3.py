"""Stage 3: supervised fine-tuning through the chat decoder, loss on answers only (paper section 3.3)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset

from ..models.chat import InternVLChatModel
from ..models.tiles_chat import TilesChatModel
from . import lora as low_rank
from .conversations import ChatBatch, ChatBatches
from .lora import Lora
from .presets import Stage
from .products import ProductsInFp32
from .trainer import Options, TrainingProgress, optimizers, read_state, save_state, schedule

ChatModel: TypeAlias = "InternVLChatModel | TilesChatModel"
Trains = Literal["projector", "decoder", "all", "lora"]
TRAINS: dict[Trains, tuple[str, ...]] = {
    "projector": ("model.mm_projector.*", "mlp1.*"),
    "decoder": ("model.[!v]*", "lm_head.*", "mlp1.*", "language_model.*"),
    "all": ("*",),
    "lora": ("*.lora_a", "*.lora_b"),
}
"""Trained parameters, as patterns of their names; the rest is frozen. ``decoder`` is all but the tower."""


@dataclass(frozen=True)
class Stage3:
    """A run of stage 3.

    Args:
        stage: schedule, batch size and the trained parameters (one of :data:`TRAINS`).
        lora: adapters that are put on first; None: none.
        seed: of the adapters.
        weight_decay: of matrices.
        max_grad_norm: gradients are clipped to it.
    """

    stage: Stage
    lora: Lora | None = None
    seed: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


def answer_loss(model: ChatModel, batch: ChatBatch) -> Tensor:
    """Mean cross entropy of the answers' tokens, each predicted from all tokens before it."""
    logits, tokens = model.answer_logits(batch.pixel_values, batch.input_ids, batch.mask, batch.labels)
    return F.cross_entropy(logits, tokens)


def fine_tune(
    model: ChatModel,
    what: Stage3,
    data: ChatBatches,
    identity: dict[str, Any],
    options: Options,
    report: Callable[[TrainingProgress], None],
) -> float:
    """Train ``model`` in place and return the seconds the steps took.

    Args:
        model: fp32; with ``what.lora`` it has adapters afterwards.
        what: trained parameters and adapters.
        data: the batches.
        identity: plain data that says which model and data these are; a kept state of others is refused.
        options: where and how often the state is saved.
        report: callback with every step.

    Raises:
        InputError: ``options.work_dir`` holds the state of another run.
    """
    stage = what.stage
    if what.lora is not None:
        low_rank.add(model, what.lora, what.seed)
    chosen = optimizers(model, stage, what.weight_decay)
    identity = {**identity, "what": repr(what)}
    first, seconds = 0, 0.0
    if (state := read_state(options.work_dir, identity)) is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    started = time.perf_counter() - seconds
    rest: Subset[ChatBatch] = Subset(data, range(first, stage.steps))
    ahead = 4 if options.workers else None
    batches = DataLoader(rest, batch_size=None, num_workers=options.workers, prefetch_factor=ahead)
    for step, batch in enumerate(batches, first):
        losses = _step(model, chosen, what, batch, step, options.bf16)
        seconds = time.perf_counter() - started
        report(TrainingProgress(stage.name, step + 1, step + 1, stage.steps, losses, seconds))
        if (step + 1) % options.save_every == 0 or step + 1 == stage.steps:
            place = {"identity": identity, "step": step + 1, "seconds": seconds}
            save_state(options.work_dir, model, chosen, place)
    model.eval()
    return seconds


def _step(
    model: ChatModel,
    chosen: list[torch.optim.Optimizer],
    what: Stage3,
    batch: ChatBatch,
    step: int,
    bf16: bool,
) -> dict[str, float]:
    for optimizer in chosen:
        peak = what.stage.matrix_lr if isinstance(optimizer, torch.optim.Muon) else what.stage.lr
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(what.stage, step)
    model.train()
    device = batch.pixel_values.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
        loss = answer_loss(model, batch)
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    learning = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(learning, what.max_grad_norm, error_if_nonfinite=True)
    with ProductsInFp32():  # Muon's iteration is in bf16
        for optimizer in chosen:
            optimizer.step()
    return {"answers": float(loss.detach()), "grad_norm": float(norm)}
