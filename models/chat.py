"""InternVL-Chat (paper section 3.3, LLaVA layout): a vision tower, its projector, a LLaMA decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..inputs.chat_template import IMAGE_TOKEN
from ..sampling import StopCriteria
from .chat_vision import projector, vision_tower
from .config import ChatConfig
from .generate import search, step_mask
from .qllama import Decoder, KeyValue, Visible, run_layers


class InternVLChatModel(nn.Module):
    """The chat model; ``state_dict`` keys are the published ones.

    The vision tower holds only the blocks that are run: what lies behind the selected layer is not read.
    """

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        self.config = config
        self.model = ChatDecoder(config)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)

    def visual(self, pixel_values: Tensor) -> Tensor:
        """[I, 3, S, S] normalised pixels -> [I, V, H]: what stands in for each image's placeholder."""
        out: Tensor = self.model.mm_projector(
            self.model.vision_tower(pixel_values.to(self.lm_head.weight.dtype))
        )
        return out

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
        attention_mask: Tensor,
        max_new_tokens: int = 256,
        num_beams: int = 1,
    ) -> Tensor:
        """New token ids [B, <= max_new_tokens], pad ids after each row's EOS.

        Args:
            pixel_values: [I, 3, S, S]: the images of all placeholders, row after row.
            input_ids: [B, T] with :data:`IMAGE_TOKEN` where an image goes; padding on either side.
            attention_mask: [B, T].
            max_new_tokens: how many at most.
            num_beams: 1 is greedy.

        Raises:
            InputError: there are more or fewer images than placeholders.
        """
        x, mask = splice(
            self.model.embed_tokens, input_ids, attention_mask, self.visual(pixel_values), pad_left=True
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        first, past = self.step(x, positions, mask)

        def step(
            ids: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue]
        ) -> tuple[Tensor, list[KeyValue]]:
            return self.step(self.model.embed_tokens(ids), positions, mask, past)

        decoder = self.config.decoder
        stop = StopCriteria(decoder.eos_token_id, decoder.pad_token_id, max_new_tokens)
        return search(step, first, past, mask, stop, num_beams)

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


def splice(
    embed: nn.Module, input_ids: Tensor, attention_mask: Tensor, visual: Tensor, pad_left: bool = False
) -> tuple[Tensor, Tensor]:
    """Embed prompts, and put each image's embeddings where its placeholder stands.

    Args:
        embed: token ids to embeddings.
        input_ids: [B, T] with any number of :data:`IMAGE_TOKEN`.
        attention_mask: [B, T], nonzero where a position is used; others are dropped.
        visual: [I, V, H], taken in the order of the placeholders, row after row.
        pad_left: where the shorter rows are padded.

    Returns:
        Embeddings [B, S, H], zero where padded, and their mask [B, S] int64.

    Raises:
        InputError: there are more or fewer images than placeholders.
    """
    places = int(((input_ids == IMAGE_TOKEN) & attention_mask.bool()).sum())
    if places != len(visual):
        raise InputError(
            f"The prompts have {places} image placeholders.", f"{len(visual)} images were given."
        )
    images = iter(visual)
    rows = []
    for ids, used in zip(input_ids, attention_mask.bool(), strict=True):
        kept = ids[used]
        cuts = (kept == IMAGE_TOKEN).nonzero()[:, 0].tolist()
        parts, start = [], 0
        for cut in cuts:
            parts += [embed(kept[start:cut]), next(images)]
            start = cut + 1
        rows.append(torch.cat([*parts, embed(kept[start:])]))
    longest = max(len(row) for row in rows)
    out = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.int64, device=input_ids.device)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if pad_left else slice(len(row))
        out[i, where], mask[i, where] = row, 1
    return out, mask
