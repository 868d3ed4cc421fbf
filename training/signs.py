"""Trains internvl-nano-tiles: first its tower on the contents of places, then its decoder on answers.

A tower that learns from answers alone has to find a character's place in 80 visual tokens before it
can learn what it is. So it learns characters first, from tiles full of text whose places are known: a linear
head names the two areas of 16 x 8 pixels below every visual token. The head is thrown away; the tower stays
as it is while the decoder learns dialogues, of which only answers count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from ..inputs.chat_template import IGNORE, Encoded, Turn, encode
from ..inputs.preprocess import ImageSettings, normalised, read_images
from ..models.pixel_shuffle import pixel_shuffle
from ..models.tiles_chat import TilesChatModel
from ..synthetic.sign_questions import SignDialogue, dialogues
from ..synthetic.signs import classes, draw, page, places
from .conversations import ChatBatch, collate
from .muon import Muon
from .presets import Stage, TilesPreset
from .tiles_model import image_settings, initialised, prompt_format, sign_tokenizer
from .trainer import Options, TrainingProgress, freeze, read_state, save_state, schedule, shortened_stage

_EMPTY = 0.3
"""Weight of an empty place; others have 1."""
_PAGES = 0x9A6E


@dataclass(frozen=True)
class Pages:
    """Tiles ``pixel_values`` [B, 3, S, S] and the classes [B, V, 2] of both halves of each visual token."""

    pixel_values: Tensor
    classes: Tensor


class PageBatches(Dataset[Pages]):
    """Batch ``i`` of the stage ``places``: a pure function of the preset and ``i``."""

    def __init__(self, preset: TilesPreset) -> None:
        self.preset, self.settings = preset, image_settings(preset.model)

    def __len__(self) -> int:
        return self.preset.places.steps

    def __getitem__(self, index: int) -> Pages:
        rng = np.random.default_rng([_PAGES, self.preset.seed, index])
        drawn = [page(rng) for _ in range(self.preset.places.batch)]
        images = normalised(np.stack([draw(sign) for sign in drawn]), self.settings)
        table = np.concatenate([places(sign) for sign in drawn])
        return Pages(torch.from_numpy(images), torch.from_numpy(table.reshape(len(table), -1, 2)))


class DialogueBatches(Dataset[ChatBatch]):
    """Batch ``i`` of the stage ``answers``: a pure function of the preset and ``i``."""

    def __init__(self, preset: TilesPreset) -> None:
        self.preset, self.settings = preset, image_settings(preset.model)

    def __len__(self) -> int:
        return self.preset.answers.steps

    def __getitem__(self, index: int) -> ChatBatch:
        p = self.preset
        rows = dialogues(p.seed, index, p.answers.batch, "train", p.turns)
        whole = p.answers.batch - round(p.single * p.answers.batch)
        shown = [_encoded(p, self.settings, row, None if i < whole else 1) for i, row in enumerate(rows)]
        return collate(np.concatenate([pixels for pixels, _ in shown]), [row for _, row in shown])


def _encoded(
    preset: TilesPreset, settings: ImageSettings, row: SignDialogue, max_tiles: int | None
) -> tuple[np.ndarray[Any, Any], Encoded]:
    pixels = read_images([draw(sign) for sign in row.signs], settings, max_tiles=max_tiles)
    turns = [
        Turn(question.question, question.answer, len(row.signs) if number == 0 else 0)
        for number, question in enumerate(row.questions)
    ]
    template, images = prompt_format(preset.model)
    return pixels.values, encode(turns, sign_tokenizer(), template, images, pixels.tiles)


class Learner(nn.Module):
    """The model, and the head that names places: [B, V, H] -> [B, V, 2, classes]."""

    def __init__(self, model: TilesChatModel) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.decoder.hidden_size, 2 * len(classes()))

    def named(self, pixel_values: Tensor) -> Tensor:
        """Logits [B, V, 2, classes] of the content of each place."""
        out: Tensor = self.head(self.model.visual_embeds(pixel_values))
        return out.reshape(*out.shape[:2], 2, -1)


def places_loss(learner: Learner, batch: Pages) -> Tensor:
    """Mean cross entropy over places; empty places count less."""
    weights = torch.where(batch.classes > 0, 1.0, _EMPTY).flatten()
    losses = F.cross_entropy(
        learner.named(batch.pixel_values).flatten(0, 2), batch.classes.flatten(), reduction="none"
    )
    return (losses * weights).sum() / weights.sum()


def answers_loss(learner: Learner, batch: ChatBatch) -> Tensor:
    """Mean cross entropy of the answers' tokens, each predicted from all tokens before it."""
    model, ids = learner.model, batch.input_ids
    frozen = not any(p.requires_grad for p in model.vision_model.parameters())
    with torch.set_grad_enabled(not frozen):
        tiles = model.vision(batch.pixel_values)[:, 1:]
    visual = model.mlp1(pixel_shuffle(tiles, model.config.factor, model.config.shuffle))
    here = torch.eq(ids, model.config.image_token_id or 0)[..., None]
    x = model.language_model.model.embed_tokens(ids).masked_scatter(here, visual.flatten(0, 1))
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden, _ = model(x, positions, batch.mask)
    learnt = batch.labels[:, 1:] != IGNORE
    return F.cross_entropy(model.language_model.lm_head(hidden[:, :-1][learnt]), batch.labels[:, 1:][learnt])


def train(
    preset: TilesPreset, options: Options, report: Callable[[TrainingProgress], None]
) -> tuple[TilesChatModel, float]:
    """Both stages: the trained model (fp32, eval mode) and the seconds that its steps took.

    A stopped run resumes from ``options.work_dir`` and ends with the same weights.

    Raises:
        InputError: ``options.work_dir`` holds the state of a run with other settings.
        RuntimeError: gradients are not finite.
    """
    learner = Learner(initialised(preset))
    stages = (preset.places, preset.answers)
    identity = {"preset": repr(preset)}
    state: dict[str, Any] = {"stage": 0, "step": 0, "optimizers": [], "seconds": 0.0}
    if (stored := read_state(options.work_dir, identity)) is not None:
        state = stored
        learner.load_state_dict(state["model"])
    total, seconds = sum(stage.steps for stage in stages), float(state["seconds"])
    started = time.perf_counter() - seconds
    for number, stage in enumerate(stages):
        if number < state["stage"]:
            continue
        own = _optimizers(learner, stage, preset.weight_decay)
        first = 0
        if number == state["stage"]:
            first = state["step"]
            for optimizer, values in zip(own, state["optimizers"], strict=False):
                optimizer.load_state_dict(values)
        before = sum(earlier.steps for earlier in stages[:number])
        for step, batch in enumerate(_batches(preset, stage, first, options.workers), first):
            loss = places_loss if isinstance(batch, Pages) else answers_loss
            losses = _step(learner, own, preset, stage, step, lambda: loss(learner, batch))  # noqa: B023
            seconds = time.perf_counter() - started
            report(TrainingProgress(stage.name, step + 1, before + step + 1, total, losses, seconds))
            if (step + 1) % options.save_every == 0 or step + 1 == stage.steps:
                place = {"identity": identity, "stage": number, "step": step + 1, "seconds": seconds}
                save_state(options.work_dir, learner, own, place)
    return learner.model.eval(), seconds


def _batches(preset: TilesPreset, stage: Stage, first: int, workers: int) -> Iterator[Any]:
    data: Dataset[Any] = PageBatches(preset) if stage.loss == "places" else DialogueBatches(preset)
    rest = Subset(data, range(first, stage.steps))
    ahead = 4 if workers else None
    return iter(DataLoader(rest, batch_size=None, num_workers=workers, prefetch_factor=ahead))


def _optimizers(learner: Learner, stage: Stage, weight_decay: float) -> list[torch.optim.Optimizer]:
    freeze(learner, stage)
    learning = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learning if p.dim() == 2 and ".layers." in name]
    rest = [p for name, p in learning if not (p.dim() == 2 and ".layers." in name)]
    return [
        Muon(matrices, lr=stage.matrix_lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _step(
    learner: Learner,
    own: list[torch.optim.Optimizer],
    preset: TilesPreset,
    stage: Stage,
    step: int,
    loss: Callable[[], Tensor],
) -> dict[str, float]:
    for optimizer in own:
        peak = stage.matrix_lr if isinstance(optimizer, Muon) else stage.lr
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(stage, step)
    learner.train()
    learner.zero_grad(set_to_none=True)
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    learning = [p for p in learner.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(learning, preset.max_grad_norm, error_if_nonfinite=True)
    for optimizer in own:
        optimizer.step()
    return {stage.name: float(value.detach()), "grad_norm": float(norm)}


def shortened(preset: TilesPreset, steps: int | None, batch: int | None) -> TilesPreset:
    """``preset`` with fewer steps a stage or a smaller batch, for tests and dry runs."""
    return replace(
        preset,
        places=shortened_stage(preset.places, steps, batch),
        answers=shortened_stage(preset.answers, steps, batch),
    )
