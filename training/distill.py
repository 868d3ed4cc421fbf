"""Distillation: a quantised model learns to answer as the full-precision one does (QAD).

Both run as the deployed components chain: image, queries, contrastive text, and caption steps behind the
queries' cache. No caption needs to be right: the teacher says what to answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.generate import step_mask
from ..models.internvl import InternVLModel
from ..models.qllama import Visible
from .losses import IGNORE, Stage2Batch


@dataclass(frozen=True)
class Answers:
    """What a model says to B images and texts.

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
    Each is a mean over what it compares, so that none grows with the batch.
    """
    pairs = list(zip(student.hidden, teacher.hidden, strict=True))
    hidden = torch.stack([((s - t).square().mean(-1) / t.var(-1)).mean() for s, t in pairs]).mean()
    found = {"hidden": hidden}
    pairs = list(zip(student.embeds, teacher.embeds, strict=True))
    found["embed"] = torch.stack([1 - F.cosine_similarity(s, t).mean() for s, t in pairs]).sum()
    if student.logits is not None and teacher.logits is not None:
        found["kl"] = F.kl_div(
            student.logits.log_softmax(-1),
            teacher.logits.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    return found
