"""InternVL-Chat (paper section 3.3, LLaVA layout): a vision tower, its projector, a LLaMA decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..inputs.chat_template import IGNORE, IMAGE_TOKEN
from ..sampling import StopCriteria
from .chat_vision import projector, vision_tower
from .config import ChatConfig
from .generate import search, step_mask
from .qllama import Decoder, KeyValue, Visible, run_layers


class InternVLChatModel(nn.Module):
    """The chat model; ``state_dict`` keys are the published ones.

    The vision tower holds only the blocks that are run, not those after the selected layer.
    """

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        self.config = config
        self.model = ChatDecoder(config)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)

    def vision(self, pixel_values: Tensor) -> Tensor:
        """[I, 3, S, S] normalised pixels -> [I, N, D]: the hidden state that the projector reads.

        It is InternViT's state at the config's ``select_layer``, the class token first.
        """
        return self.model.vision_tower.selected(pixel_values.to(self.lm_head.weight.dtype))

    def visual_embeds(self, pixel_values: Tensor) -> Tensor:
        """[I, 3, S, S] normalised pixels -> [I, V, H]: the decoder's embeddings of each image."""
        out: Tensor = self.model.mm_projector(
            self.model.vision_tower(pixel_values.to(self.lm_head.weight.dtype))
        )
        return out

    def logits(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        image_token_id: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token after every position [B, T, vocab].

        Args:
            input_ids: [B, T] with placeholders where images go: one for each visual embedding, or one for
                each image, which becomes V positions of the result.
            pixel_values: [I, 3, S, S]: the images of all placeholders, row after row.
            image_token_id: the placeholder; None: :data:`IMAGE_TOKEN`.
            attention_mask: [B, T], 0 at padding, which is dropped and comes on the right in the result;
                None: no padding.

        Raises:
            InputError: there are more or fewer images than placeholders.
        """
        x, mask = self._prompt(pixel_values, input_ids, attention_mask, image_token_id, pad_left=False)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        out: Tensor = self.lm_head(self(x, positions, mask)[0])
        return out

    def answer_logits(
        self, pixel_values: Tensor, input_ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, vocab] before every learnt token of a batch padded on the right, and those tokens [N].

        Args:
            pixel_values: [I, 3, S, S]: the images of all placeholders, row after row.
            input_ids: [B, T] with one placeholder for each image.
            mask: [B, T], 0 at padding.
            labels: [B, T], :data:`~ivl_export.inputs.chat_template.IGNORE` where nothing is learnt.
        """
        visual = self.visual_embeds(pixel_values)
        x, _ = splice(self.model.embed_tokens, input_ids, mask, visual)
        spliced = splice_labels(input_ids, labels, mask, visual.shape[1])
        positions = torch.arange(x.shape[1], device=x.device)[None]
        # Padding follows every token that is learnt: causal attention alone hides it.
        hidden, _ = run_layers(self.model, x, positions, Visible(causal=True))
        learnt = spliced[:, 1:] != IGNORE
        return self.lm_head(hidden[:, :-1][learnt]), spliced[:, 1:][learnt]

    def forward(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        mask: Tensor,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the decoder on T new positions after P past ones.

        Args:
            inputs_embeds: [B, T, H].
            positions: [B, T] rotary positions.
            mask: [B, P + T], nonzero where a position may be seen.
            past: keys and values of P positions, one pair a layer.

        Returns:
            Hidden states after the final norm [B, T, H], and the keys and values of the T new positions.
        """
        visible = Visible(step_mask(mask, inputs_embeds.shape[1]))
        return run_layers(self.model, inputs_embeds, positions, visible, past=past)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 12,
        image_token_id: int | None = None,
        *,
        num_beams: int = 1,
    ) -> Tensor:
        """New token ids [B, <= max_new_tokens], pad ids after each row's EOS; never the placeholder.

        Args:
            pixel_values: [I, 3, S, S]: the images of all placeholders, row after row.
            input_ids: [B, T] with placeholders as :meth:`logits` takes them; padding on either side.
            attention_mask: [B, T], 0 at padding; None: no padding.
            max_new_tokens: at most so many.
            image_token_id: the placeholder; None: :data:`IMAGE_TOKEN`.
            num_beams: 1 is greedy.

        Raises:
            InputError: there are more or fewer images than placeholders.
        """
        x, mask = self._prompt(pixel_values, input_ids, attention_mask, image_token_id, pad_left=True)

        def step(
            inputs_embeds: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue] | None
        ) -> tuple[Tensor, list[KeyValue]]:
            logits, new = self.step(inputs_embeds, positions, mask, past)
            if image_token_id is not None and 0 <= image_token_id < logits.shape[1]:
                logits[:, image_token_id] = -torch.inf
            return logits, new

        def next_step(
            ids: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue]
        ) -> tuple[Tensor, list[KeyValue]]:
            return step(self.model.embed_tokens(ids), positions, mask, past)

        first, past = step(x, (mask.cumsum(1) - 1).clamp(min=0), mask, None)
        decoder = self.config.decoder
        stop = StopCriteria(decoder.eos_token_id, decoder.pad_token_id, max_new_tokens)
        return search(next_step, first, past, mask, stop, num_beams)

    def _prompt(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_token_id: int | None,
        pad_left: bool,
    ) -> tuple[Tensor, Tensor]:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        visual, token = self.visual_embeds(pixel_values), image_token_id
        return splice(
            self.model.embed_tokens,
            input_ids,
            mask,
            visual,
            pad_left,
            IMAGE_TOKEN if token is None else token,
        )

    def step(
        self, inputs_embeds: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """As :meth:`forward`, with the logits of the last position [B, V] for the hidden states."""
        hidden, new = self(inputs_embeds, positions, mask, past)
        return self.lm_head(hidden[:, -1]), new


class ChatDecoder(Decoder):
    """The decoder stack, which in this layout also holds the vision tower and the projector."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__(config.decoder, [None] * config.decoder.num_hidden_layers)
        self.vision_tower = vision_tower(config)
        self.mm_projector = projector(config)


def splice_labels(input_ids: Tensor, labels: Tensor, mask: Tensor, visual: int) -> Tensor:
    """Labels [B, S] of the rows of :func:`splice`, ``visual`` for each image."""
    rows = []
    for ids, own, used in zip(input_ids, labels, mask.bool(), strict=True):
        times = torch.where(ids == IMAGE_TOKEN, visual, 1)[used]
        rows.append(own[used].repeat_interleave(times))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)


def splice(
    embed: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    visual: Tensor,
    pad_left: bool = False,
    image_token_id: int = IMAGE_TOKEN,
) -> tuple[Tensor, Tensor]:
    """Embed prompts, and put images' embeddings in the places of their placeholders.

    Args:
        embed: token ids to embeddings.
        input_ids: [B, T] with placeholders: one an image, or one for each of its V embeddings.
        attention_mask: [B, T], nonzero where a position is used; others are dropped.
        visual: [I, V, H], taken in the order of the placeholders, row after row.
        pad_left: where the shorter rows are padded.
        image_token_id: the placeholder.

    Returns:
        Embeddings [B, S, H], zero where padded, and their mask [B, S] int64.

    Raises:
        InputError: there are more or fewer images than placeholders.
    """
    used = attention_mask.bool()
    places, (count, each, _) = int(((input_ids == image_token_id) & used).sum()), visual.shape
    if places == count * each:  # of each embedding; the same thing where an image has one
        visual = visual.flatten(0, 1)[:, None]
    elif places != count:
        raise InputError(f"The prompts have {places} image placeholders.", f"{count} images were given.")
    images = iter(visual)
    rows = []
    for row_ids, row_used in zip(input_ids, used, strict=True):
        ids = row_ids[row_used]
        pieces, start = [], 0
        for place in (ids == image_token_id).nonzero()[:, 0].tolist():
            pieces += [embed(ids[start:place]), next(images)]
            start = place + 1
        rows.append(torch.cat([*pieces, embed(ids[start:])]))
    longest = max(len(row) for row in rows)
    out = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.int64, device=input_ids.device)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if pad_left else slice(len(row))
        out[i, where], mask[i, where] = row, 1
    return out, mask
