"""The losses of the paper's stages 1 and 2 and of retrieval fine-tuning (section 3.3).

Stage 2 runs three stacked copies of [queries | text] through QLLaMA in one pass, each with its own mask:
matching (ITM: every position attends to all), contrastive (ITC: queries and text blind to each other) and
generation (ITG: text attends to the queries and its own past).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.internvl import InternVLModel
from ..models.qllama import Visible

IGNORE = -100
EMPTY_TEXT = 2
"""A text of this many tokens is begin and end of sequence alone."""


@dataclass(frozen=True)
class Text:
    """Right-padded token ids [B, T] and their mask [B, T]."""

    input_ids: Tensor
    mask: Tensor

    def lengths(self) -> Tensor:
        """Tokens per row [B]."""
        return self.mask.sum(1)


@dataclass(frozen=True)
class Stage2Batch:
    """B images and four views of their captions.

    ``positive`` and ``negative`` are plain captions, right and wrong ones; ``summarize`` is the contrastive
    form; ``caption`` is prompt and caption, with ``labels`` [B, T] (-100 where nothing is to be predicted).
    ``ids`` [B]: images of equal id have the same captions; None where every image has its own.
    """

    pixel_values: Tensor
    positive: Text
    negative: Text
    summarize: Text
    caption: Text
    labels: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """Scalars; ``total`` is their sum, which is trained."""

    itc: Tensor
    itm: Tensor
    itg: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """itc + itm + itg."""
        return self.itc + self.itm + (0 if self.itg is None else self.itg)


class Gather(Protocol):
    """Collect a tensor of every rank along axis 0, and say where this rank's rows start."""

    def __call__(self, x: Tensor) -> tuple[Tensor, int]:
        """[B, ...] -> ([world * B, ...], first own row)."""
        ...


def local(x: Tensor) -> tuple[Tensor, int]:
    """Gather of a single process."""
    return x, 0


def across_ranks(x: Tensor) -> tuple[Tensor, int]:
    """Gather over ``torch.distributed``, differentiable: gradients reach the rank a row came from."""
    from torch import distributed
    from torch.distributed.nn.functional import all_gather

    # Named, since the default is the group that was there when torch was imported.
    rows = all_gather(x, distributed.group.WORLD)  # type: ignore[no-untyped-call]
    return torch.cat(rows), distributed.get_rank() * len(x)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    valid: Tensor | None = None,
    ids: Tensor | None = None,
    smoothing: float = 0.0,
    gather: Gather = local,
) -> Tensor:
    """Symmetric cross entropy of image [B, E] against all texts and text [B, E] against all images.

    Args:
        image, text: embeddings [B, E], not normalised.
        scale: exp(logit_scale), scalar.
        valid: bool [B]; rows that are False (their text is empty) are not counted, but serve as negatives.
        ids: int [B]; rows of equal id are right answers for each other, with equal weight.
        smoothing: label smoothing.
        gather: collects the rows of all ranks.
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    (images, first), (texts, _) = gather(image), gather(text)
    target = torch.arange(first, first + len(image), device=image.device)
    if ids is not None:
        equal = (ids[:, None] == gather(ids)[0][None, :]).to(image.dtype)
        target = equal / equal.sum(1, keepdim=True)
    elif valid is not None:
        target = target.masked_fill(~valid, IGNORE)
    to_text = F.cross_entropy(scale * image @ texts.t(), target, label_smoothing=smoothing)
    to_image = F.cross_entropy(scale * text @ images.t(), target, label_smoothing=smoothing)
    return (to_text + to_image) / 2


def stage1_loss(
    model: InternVLModel, pixel_values: Tensor, text: Text, ids: Tensor | None = None, gather: Gather = local
) -> Tensor:
    """Contrastive loss of InternVL-C: pooled ViT tokens against the text embedding (paper figure 3)."""
    image, embed = model.encode_image(pixel_values), model.encode_text(text.input_ids)
    smoothing = model.config.label_smoothing
    return contrastive_loss(
        image, embed, model.logit_scale.exp(), ids=ids, smoothing=smoothing, gather=gather
    )


def matching_texts(batch: Stage2Batch) -> tuple[Text, Tensor]:
    """Texts of the ITM rows and their labels [B]: the first half wrong captions (0), the rest right ones (1).

    Rows whose text is empty are ignored.
    """
    size = len(batch.pixel_values)
    wrong = size - size // 2
    rows = torch.arange(size, device=batch.labels.device) < wrong
    text = Text(
        torch.where(rows[:, None], batch.negative.input_ids, batch.positive.input_ids),
        torch.where(rows[:, None], batch.negative.mask, batch.positive.mask),
    )
    return text, (~rows).long().masked_fill(text.lengths() <= EMPTY_TEXT, IGNORE)


def stage2_mask(matching: Tensor, summarize: Tensor, caption: Tensor, queries: int) -> Tensor:
    """Text masks [B, T] of the three parts -> bool [3B, 1, Q + T, Q + T], True = visible."""
    size, length = matching.shape
    total = queries + length
    keys = torch.cat([matching, summarize, caption]).bool()
    keys = F.pad(keys, (queries, 0), value=True)[:, None, None, :]
    is_query = torch.arange(total, device=keys.device) < queries
    same_side = is_query[:, None] == is_query[None, :]
    causal = torch.ones(total, total, dtype=torch.bool, device=keys.device).tril()
    to_queries = is_query[None, :].expand(total, total)
    among_queries = is_query[:, None] & is_query[None, :]
    everything = torch.ones_like(causal)
    contrastive = same_side & (causal | among_queries)
    generation = torch.where(is_query[:, None], among_queries, causal | to_queries)
    pattern = torch.stack([everything, contrastive, generation]).repeat_interleave(size, 0)
    return pattern[:, None] & keys


def stage2_losses(model: InternVLModel, batch: Stage2Batch, gather: Gather = local) -> Losses:
    """ITC + ITM + ITG over one pass of 3B stacked rows.

    The contrastive image vector is the G head over the query rows; the text vector is read at the last
    token of ``summarize``. With ``batch.ids`` both heads are trained, as in retrieval fine-tuning.
    """
    tokens = model.vision(batch.pixel_values)
    hidden, labels = stage2_hidden(model, batch, tokens)
    queries = model.config.num_query_token
    matching, contrastive, generation = hidden.chunk(3)
    itm = matching_loss(model, matching[:, :queries], labels)
    heads = [model.clip_projector2(contrastive[:, :queries])]
    if batch.ids is not None:
        heads.append(model.clip_projector(tokens))
    text = _pool_text(model, contrastive[:, queries:], batch.summarize)
    valid = batch.positive.lengths() > EMPTY_TEXT
    scale, smoothing = model.logit_scale.exp(), model.config.label_smoothing
    parts = [
        contrastive_loss(h, text, scale, valid=valid, ids=batch.ids, smoothing=smoothing, gather=gather)
        for h in heads
    ]
    logits = model.qllama.lm_head(generation[:, queries:-1])
    itg = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE)
    return Losses(torch.stack(parts).sum(), itm, itg)


def retrieval_losses(model: InternVLModel, batch: Stage2Batch, gather: Gather = local) -> Losses:
    """Retrieval fine-tuning: ITM over 2B rows (right, then wrong captions) and ITC of both heads.

    Needs ``batch.ids``: images of equal id share their captions.
    """
    tokens = model.vision(batch.pixel_values)
    query_rows, _ = model.query_pass(tokens)
    text = model.encode_text(batch.summarize.input_ids)
    scale = model.logit_scale.exp()
    heads = (model.clip_projector2(query_rows), model.clip_projector(tokens))
    itc = sum(contrastive_loss(h, text, scale, ids=batch.ids, gather=gather) for h in heads)
    ids = torch.cat([batch.positive.input_ids, batch.negative.input_ids])
    keys = torch.cat([batch.positive.mask, batch.negative.mask]).bool()
    queries = model.query_tokens.expand(len(ids), -1, -1)
    count = queries.shape[1]
    visible = Visible(F.pad(keys, (count, 0), value=True)[:, None, None, :])
    rows = torch.cat([queries, model.qllama.embed(ids)], 1)
    positions = torch.arange(rows.shape[1], device=rows.device)[None]
    hidden, _ = model.qllama(rows, positions, visible, tokens.repeat(2, 1, 1), count)
    labels = torch.arange(len(ids), device=ids.device) < len(ids) // 2
    return Losses(torch.as_tensor(itc), matching_loss(model, hidden[:, :count], labels.long()))


def stage2_hidden(model: InternVLModel, batch: Stage2Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [3B, Q + T, H] of the three stacked parts, and the ITM labels [B]."""
    text, labels = matching_texts(batch)
    ids = torch.cat([text.input_ids, batch.summarize.input_ids, batch.caption.input_ids])
    queries = model.query_tokens.expand(len(ids), -1, -1)
    rows = torch.cat([queries, model.qllama.embed(ids)], 1)
    mask = stage2_mask(text.mask, batch.summarize.mask, batch.caption.mask, queries.shape[1])
    positions = torch.arange(rows.shape[1], device=rows.device)[None]
    hidden, _ = model.qllama(rows, positions, Visible(mask), tokens.repeat(3, 1, 1), queries.shape[1])
    return hidden, labels


def matching_loss(model: InternVLModel, queries: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the mean match logits over query rows [B, Q, H]; labels [B], 1 = right caption."""
    return F.cross_entropy(model.itm_head(queries).mean(1), labels, ignore_index=IGNORE)


def _pool_text(model: InternVLModel, states: Tensor, text: Text) -> Tensor:
    last = text.lengths() - 1
    return states[torch.arange(len(states), device=states.device), last] @ model.text_projection
