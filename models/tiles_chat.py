"""InternVL 1.1 to 3.5 in PyTorch: tiles to visual embeddings, and the decoder that reads them in a prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..inputs.chat_template import IGNORE
from ..sampling import StopCriteria
from .generate import search
from .pixel_shuffle import pixel_shuffle, tile_projector
from .qllama import KeyValue
from .tiles_config import TilesConfig
from .tiles_modules import LanguageModel
from .vit import InternViT


class TilesChatModel(nn.Module):
    """A chat model of the family; keys of its ``state_dict`` are those of :mod:`.tiles_layout`.

    The tower has only the blocks that are run: those after the selected layer are not read.
    """

    def __init__(self, config: TilesConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = InternViT(config.vision, config.vision_blocks)
        self.mlp1 = tile_projector(config.projector_width, config.decoder.hidden_size)
        self.language_model = LanguageModel(config.decoder)

    def vision(self, pixel_values: Tensor) -> Tensor:
        """[I, 3, S, S] normalised tiles -> the state that the projector reads [I, N, D], class token first.

        Raises:
            InputError: no images, or their sides are not multiples of the patches'.
        """
        check_pixels(pixel_values, self.config.vision.patch_size)
        weight = self.vision_model.embeddings.class_embedding
        out: Tensor = self.vision_model(pixel_values.to(weight.dtype))
        return out

    def visual_embeds(self, pixel_values: Tensor) -> Tensor:
        """[I, 3, S, S] -> [I, V, H]: the embeddings of each tile in a prompt.

        Raises:
            InputError: tiles that do not split into tokens.
        """
        features = self.vision(pixel_values)[:, 1:]
        out: Tensor = self.mlp1(pixel_shuffle(features, self.config.factor, self.config.shuffle))
        return out

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None = None,
        image_token_id: int | None = None,
    ) -> Tensor:
        """Prompts with the visual embeddings of all tiles, in order, at their image tokens.

        Args:
            input_ids: [B, T]; V image tokens a tile.
            pixel_values: [I, 3, S, S]: the tiles of all images, row after row; None: no images.
            attention_mask: [B, T], nonzero where a position is used; None: everywhere.
            image_token_id: None: the config's.

        Returns:
            [B, T, H].

        Raises:
            InputError: the image token is unknown, an id is not the decoder's, tiles and tokens do not fit.
        """
        vocab = self.config.decoder.vocab_size
        least, most = (int(end) for end in input_ids.aminmax()) if input_ids.numel() else (0, 0)
        if least < 0 or most >= vocab:
            raise InputError(
                "The prompt holds a token that the decoder does not have.",
                f"Its ids go from {least} to {most}, the decoder's from 0 to {vocab - 1}.",
                "Use the tokenizer that was published with these weights.",
            )
        x: Tensor = self.language_model.model.embed_tokens(input_ids)
        count = 0 if pixel_values is None else len(pixel_values)
        token = self._image_token(image_token_id, needed=count > 0)
        places = torch.zeros_like(input_ids, dtype=torch.bool) if token is None else input_ids == token
        if attention_mask is not None:
            places = places & attention_mask.bool()
        places_in_prompt, each = int(places.sum()), self.config.num_visual
        visual = None if pixel_values is None or not count else self.visual_embeds(pixel_values)
        if places_in_prompt != (0 if visual is None else visual.shape[0] * visual.shape[1]):
            raise InputError(
                f"The prompts have {places_in_prompt} image tokens (id {token}).",
                f"{count} tiles were given, each takes {each if visual is None else visual.shape[1]}.",
                "Write as many image tokens for an image as its tiles take.",
            )
        return x if visual is None else x.masked_scatter(places[..., None], visual.flatten(0, 1).to(x.dtype))

    def _image_token(self, chosen: int | None, needed: bool) -> int | None:
        token = self.config.image_token_id if chosen is None else chosen
        if token is None and needed:
            raise InputError(
                "The image token is not known.",
                "Neither the config nor a tokenizer next to it names <IMG_CONTEXT>.",
                "Give image_token_id, or put the tokenizer's files next to the weights.",
            )
        if token is not None and not 0 <= token < self.config.decoder.vocab_size:
            raise InputError(
                f"The image token cannot be {token}.",
                f"The decoder has the tokens 0 to {self.config.decoder.vocab_size - 1}.",
            )
        return token

    def forward(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        mask: Tensor,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the decoder on T new positions after P past ones, as :meth:`.CausalDecoder.forward`."""
        out: tuple[Tensor, list[KeyValue]] = self.language_model.model(inputs_embeds, positions, mask, past)
        return out

    def step(
        self, inputs_embeds: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """As :meth:`forward`, with the logits of the last position [B, vocab] for the hidden states."""
        hidden, new = self(inputs_embeds, positions, mask, past)
        return self.language_model.lm_head(hidden[:, -1]), new

    def logits(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_token_id: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token after every position [B, T, vocab]; arguments as :meth:`embed`.

        At padding, on either side, they mean nothing.
        """
        x = self.embed(input_ids, pixel_values, attention_mask, image_token_id)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        hidden, _ = self(x, (mask.cumsum(1) - 1).clamp(min=0), mask)
        out: Tensor = self.language_model.lm_head(hidden)
        return out

    def answer_logits(
        self, pixel_values: Tensor, input_ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, vocab] before every learnt token of a batch padded on the right, and those tokens [N].

        Args:
            pixel_values: [I, 3, S, S]: the tiles of all images, row after row.
            input_ids, mask: as :meth:`embed`.
            labels: [B, T], :data:`~ivl_export.inputs.chat_template.IGNORE` where nothing is learnt.
        """
        x = self.embed(input_ids, pixel_values if len(pixel_values) else None, mask)
        hidden, _ = self(x, (mask.cumsum(1) - 1).clamp(min=0), mask)
        learnt = labels[:, 1:] != IGNORE
        return self.language_model.lm_head(hidden[:, :-1][learnt]), labels[:, 1:][learnt]

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 12,
        image_token_id: int | None = None,
    ) -> Tensor:
        """The likeliest new ids [B, <= max_new_tokens], never the image token; pad ids after a row's end.

        Args:
            pixel_values, input_ids, image_token_id: as :meth:`embed`.
            attention_mask: [B, T], 0 at padding, on either side; None: no padding.
            max_new_tokens: how many at most.

        Raises:
            InputError: see :meth:`embed`.
        """
        ids, mask = input_ids, torch.ones_like(input_ids)
        if attention_mask is not None:
            ids, mask = padded_left(input_ids, attention_mask)
        decoder, suppressed = self.config.decoder, self._image_token(image_token_id, needed=False)
        x = self.embed(ids, pixel_values, mask, image_token_id)

        def without_images(logits: Tensor) -> Tensor:
            if suppressed is not None:
                logits[:, suppressed] = -torch.inf
            return logits

        def step(
            new_ids: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue]
        ) -> tuple[Tensor, list[KeyValue]]:
            logits, new = self.step(self.language_model.model.embed_tokens(new_ids), positions, mask, past)
            return without_images(logits), new

        first, past = self.step(x, (mask.cumsum(1) - 1).clamp(min=0), mask)
        more = decoder.eos_token_ids[1:]
        stop = StopCriteria(decoder.eos_token_id, decoder.pad_token_id, max_new_tokens, more=more)
        return search(step, without_images(first), past, mask, stop, 1)


def padded_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts [B, T] and their mask with all padding on the left; the contents there do not matter."""
    used = attention_mask.bool()
    order = used.long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), used.long().gather(1, order)


def check_pixels(pixel_values: Tensor, patch: int) -> None:
    """InputError where ``pixel_values`` are not images [I, 3, H, W] that split into patches."""
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] % patch or shape[3] % patch:
        raise InputError(
            f"Pixels of shape {list(shape)} are not images for this model.",
            f"Needed are [images, 3, height, width], sides in multiples of {patch}.",
        )
