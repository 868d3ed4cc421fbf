"""Trains internvl-nano-tiles: its tower on the contents of places, its decoder on lines, then on answers.

A tower that learns from answers alone has to find a character's place in 80 visual tokens before it can learn
what it is. So it learns characters first, from tiles full of text whose places are known: a head names the
two areas of 16 x 8 pixels below every visual token. The head is thrown away and the tower is frozen. The
decoder learns to read single tiles from end to end, where most tokens are characters, and then dialogues
about whole pictures, and about several at a time, of which only answers count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from ..arrays import Array
from ..inputs.chat_template import IGNORE, START, Encoded, encode
from ..inputs.preprocess import ImageSettings, normalised, read_images
from ..models.pixel_shuffle import pixel_shuffle
from ..models.tiles_chat import TilesChatModel
from ..synthetic.sign_questions import (
    ALBUM,
    SMALL_GRIDS,
    SignDialogue,
    albums,
    conversation,
    dialogues,
    lines,
    plural,
)
from ..synthetic.signs import COLORS, LONGEST, SHAPES, classes, draw, page, places
from .conversations import ChatBatch, collate
from .muon import Muon
from .presets import Stage, TilesPreset
from .tiles_model import image_settings, initialised, prompt_format, sign_tokenizer
from .trainer import Options, TrainingProgress, freeze, read_state, save_state, schedule, shortened_stage

_EMPTY = 0.3
"""Weight of an empty place; others have 1."""
_REPEAT = 3
_THUMBNAILS = 8
_NUMBERS = 0.5
"""Weight of the numbers of pictures."""
_PAGES = 0x9A6E
_COUNTS = 1 << 20
"""The counting rows of ``lines`` have the numbers after this one in the stream of ``answers``."""


@dataclass(frozen=True)
class Pages:
    """Tiles ``pixel_values`` [B, 3, S, S] and the contents of both places of each visual token.

    ``classes`` [B, V, 2, 3] are class, number and color of :func:`..synthetic.signs.places`.
    """

    pixel_values: Tensor
    classes: Tensor


class PageBatches(Dataset[Pages]):
    """Batch ``i`` of the stage ``places``: a pure function of the preset and ``i``.

    One tile of eight is the thumbnail of a larger picture, whose places are empty: what is squeezed there is
    in the tiles, too, and would be counted twice.
    """

    def __init__(self, preset: TilesPreset) -> None:
        self.preset, self.settings = preset, image_settings(preset.model)

    def __len__(self) -> int:
        return self.preset.places.steps

    def __getitem__(self, index: int) -> Pages:
        rng = np.random.default_rng([_PAGES, self.preset.seed, index])
        batch, seed = self.preset.places.batch, self.preset.seed
        rows = dialogues(seed, index, batch // _THUMBNAILS, "train", 1, by_text=True)
        large = [row.signs[0] for row in rows]
        drawn = [page(rng) for _ in range(batch - len(large))]
        images = normalised(np.stack([draw(sign) for sign in drawn]), self.settings)
        thumbnails = [read_images([draw(sign)], self.settings).values[-1:] for sign in large]
        table = np.concatenate([places(sign) for sign in drawn])
        table = np.concatenate([table, np.zeros((len(large), *table.shape[1:]), np.int64)])
        pixels = torch.from_numpy(np.concatenate([images, *thumbnails]))
        return Pages(pixels, torch.from_numpy(table.reshape(batch, -1, 2, 3)))


class LineBatches(Dataset[ChatBatch]):
    """Batch ``i`` of the stage ``lines``: a function of the preset and ``i``; texts become more.

    One half of the tiles is read from end to end, of the other the shapes are counted.
    """

    def __init__(self, preset: TilesPreset) -> None:
        self.preset, self.settings = preset, image_settings(preset.model)

    def __len__(self) -> int:
        return self.preset.lines.steps

    def __getitem__(self, index: int) -> ChatBatch:
        p = self.preset
        return self.of(index, 1 + min(p.texts - 1, 2 * p.texts * index // p.lines.steps))

    def of(self, index: int, texts: int) -> ChatBatch:
        """Batch ``index``, with up to ``texts`` texts in a tile."""
        p = self.preset
        half = p.lines.batch // 2
        rows = lines(p.seed, index, p.lines.batch - half, texts)
        rows += dialogues(p.seed, _COUNTS + index, half, "train", p.turns, 1, ("count",), by_text=True)
        return _joined([_encoded(self.preset, self.settings, row, None) for row in rows])


class DialogueBatches(Dataset[ChatBatch]):
    """Batch ``i`` of the stage ``answers``: a pure function of the preset and ``i``; pictures get larger.

    The first fifth has pictures of one tile, the second of one or two. Every third batch repeats ``lines``.
    """

    def __init__(self, preset: TilesPreset) -> None:
        self.preset, self.settings = preset, image_settings(preset.model)
        self.lines = LineBatches(preset)

    def __len__(self) -> int:
        return self.preset.answers.steps

    def __getitem__(self, index: int) -> ChatBatch:
        p = self.preset
        if index % _REPEAT == _REPEAT - 1:
            return self.lines.of(p.lines.steps + index, p.texts)
        tiles = 1 + 5 * index // p.answers.steps
        rows = dialogues(
            p.seed,
            index,
            p.answers.batch,
            "train",
            p.turns,
            tiles if tiles in SMALL_GRIDS else None,
            by_text=True,
        )
        whole = p.answers.batch - round(p.single * p.answers.batch)
        return _joined(
            [_encoded(p, self.settings, row, None if i < whole else 1) for i, row in enumerate(rows)]
        )


class AlbumBatches(Dataset[ChatBatch]):
    """Batch ``i`` of the stage ``albums``: a pure function of the preset and ``i``.

    Every third batch has albums of small pictures, the others dialogues as they are evaluated.
    """

    def __init__(self, preset: TilesPreset) -> None:
        self.preset, self.settings = preset, image_settings(preset.model)

    def __len__(self) -> int:
        return self.preset.albums.steps

    def __getitem__(self, index: int) -> ChatBatch:
        p = self.preset
        if index % _REPEAT == _REPEAT - 1:
            rows = albums(p.seed, index, p.albums.batch, p.turns)
        else:
            rows = dialogues(p.seed, p.answers.steps + index, p.albums.batch, "train", p.turns)
        return _joined([_encoded(p, self.settings, row, None) for row in rows])


def _joined(rows: Sequence[tuple[Array, Encoded]]) -> ChatBatch:
    return collate(np.concatenate([pixels for pixels, _ in rows]), [row for _, row in rows])


def _encoded(
    preset: TilesPreset, settings: ImageSettings, row: SignDialogue, max_tiles: int | None
) -> tuple[Array, Encoded]:
    pixels = read_images([draw(sign) for sign in row.signs], settings, max_tiles=max_tiles)
    template, images = prompt_format(preset.model)
    return pixels.values, encode(conversation(row), sign_tokenizer(), template, images, pixels.tiles)


class Learner(nn.Module):
    """The model, and a head that names the contents of both places of each visual token.

    Characters, shapes and colors are named by the rows of the decoder's lm_head for them (a shape by the mean
    of singular and plural), so that the decoder needs no other code for them.
    """

    names: Tensor
    colors: Tensor

    def __init__(self, model: TilesChatModel) -> None:
        super().__init__()
        width, tokens = model.config.decoder.hidden_size, sign_tokenizer()
        self.model = model
        self.halves = nn.Linear(width, 2 * width)
        self.nothing = nn.Linear(width, 1)
        self.order = nn.Linear(width, 1 + LONGEST)
        words = [
            (f" {name}", f" {plural(name)}") if name in SHAPES else (name,) * 2 for name in classes()[1:]
        ]
        ids = [[tokens.encode_parts([word])[0] for word in pair] for pair in words]
        self.register_buffer("names", torch.tensor(ids), persistent=False)
        colors = [tokens.encode_parts([f" {name}"])[0] for name in COLORS]
        self.register_buffer("colors", torch.tensor(colors), persistent=False)

    def named(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the class at each place [B, V, 2, classes], of its number in a text [B, V, 2, 7] and of
        its color [B, V, 2, colors].
        """
        visual = self.model.visual_embeds(pixel_values)
        halves = self.halves(visual).reshape(*visual.shape[:2], 2, -1)
        halves = F.rms_norm(halves, halves.shape[-1:])
        rows = self.model.language_model.lm_head.weight
        kinds = torch.cat([self.nothing(halves), halves @ rows[self.names].mean(1).T], dim=-1)
        return kinds, self.order(halves), halves @ rows[self.colors].T


def places_loss(learner: Learner, batch: Pages) -> Tensor:
    """Mean cross entropy of class, number and color over places; empty places count less."""
    kinds, orders, colors = batch.classes.flatten(0, 2).unbind(-1)
    weights = torch.where(kinds > 0, 1.0, _EMPTY)
    named, ordered, colored = (logits.flatten(0, 2) for logits in learner.named(batch.pixel_values))
    losses = F.cross_entropy(named, kinds, reduction="none")
    losses = losses + F.cross_entropy(ordered, orders, reduction="none")
    losses = losses + F.cross_entropy(colored, colors - 1, reduction="none", ignore_index=-1)
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


def albums_loss(learner: Learner, batch: ChatBatch) -> Tensor:
    """:func:`answers_loss`, and after the first layer each visual token tells the number of its picture.

    From answers alone the decoder read in the picture that a question names, but did not learn to name the
    picture in which something is: for this a visual token has to know where it belongs.
    """
    decoder, tokens = learner.model.language_model, sign_tokenizer()
    states: list[Tensor] = []
    hook = decoder.model.layers[0].register_forward_hook(lambda _, __, outputs: states.append(outputs[0]))
    try:
        loss = answers_loss(learner, batch)
    finally:
        hook.remove()
    ids = batch.input_ids
    numbers = torch.eq(ids, tokens.special(START)).cumsum(1)
    several = torch.eq(ids, learner.model.config.image_token_id or 0) & (numbers[:, -1:] > 1)
    if not several.any():
        return loss
    digits = torch.tensor([tokens.encode_parts([str(number)])[0] for number in range(1, ALBUM + 1)])
    state = states[0][several]
    logits = F.rms_norm(state, state.shape[-1:]) @ decoder.lm_head.weight[digits].T
    return loss + _NUMBERS * F.cross_entropy(logits, numbers[several] - 1)


def train(
    preset: TilesPreset, options: Options, report: Callable[[TrainingProgress], None]
) -> tuple[TilesChatModel, float]:
    """All stages: the trained model (fp32, eval mode) and the seconds that its steps took.

    A stopped run resumes from ``options.work_dir`` and ends with the same weights.

    Raises:
        InputError: ``options.work_dir`` holds the state of a run with other settings.
        RuntimeError: gradients are not finite.
    """
    learner = Learner(initialised(preset))
    stages = preset.stages
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
        if stage is preset.lines and first == 0:
            # The same vectors for characters that are read and written.
            language = learner.model.language_model
            language.model.embed_tokens.weight.data.copy_(language.lm_head.weight.data)
        before = sum(earlier.steps for earlier in stages[:number])
        for step, batch in enumerate(_batches(preset, stage, first, options.workers), first):
            loss = _LOSSES[stage.loss]
            losses = _step(learner, own, preset, stage, step, lambda: loss(learner, batch))  # noqa: B023
            seconds = time.perf_counter() - started
            report(TrainingProgress(stage.name, step + 1, before + step + 1, total, losses, seconds))
            if (step + 1) % options.save_every == 0 or step + 1 == stage.steps:
                place = {"identity": identity, "stage": number, "step": step + 1, "seconds": seconds}
                save_state(options.work_dir, learner, own, place)
    return learner.model.eval(), seconds


_LOSSES: dict[str, Callable[[Learner, Any], Tensor]] = {
    "places": places_loss,
    "lines": answers_loss,
    "answers": answers_loss,
    "albums": albums_loss,
}


def _batches(preset: TilesPreset, stage: Stage, first: int, workers: int) -> Iterator[Any]:
    kinds: dict[str, type[PageBatches | LineBatches | DialogueBatches | AlbumBatches]] = {
        "places": PageBatches,
        "lines": LineBatches,
        "answers": DialogueBatches,
        "albums": AlbumBatches,
    }
    data: Dataset[Any] = kinds[stage.loss](preset)
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
        lines=shortened_stage(preset.lines, steps, batch),
        answers=shortened_stage(preset.answers, steps, batch),
        albums=shortened_stage(preset.albums, steps, batch),
    )
