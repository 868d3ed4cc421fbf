"""Sizes of InternVL 1.1 to 3.5: a tower that reads tiles, pixel shuffle, projector and decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from .config import VisionConfig
from .decoder_config import DecoderConfig


@dataclass(frozen=True)
class TilesConfig:
    """A chat model of the family.

    Args:
        vision: the tower as stored; its ``image_size`` is the grid of the stored position embedding.
        decoder: the decoder.
        image_size: side of a tile in pixels; the position embedding is resized to it.
        select_layer: which of the tower's L + 1 hidden states (the embeddings are the first) is read.
        factor: patches of a tile that become one token, along each side.
        shuffle: order of these tokens, ``v1`` or ``v2`` (:func:`.pixel_shuffle.pixel_shuffle`).
        image_token_id: token of one visual embedding; None: the tokenizer's.
        template: name of the conversation template; empty: not named.
        system_message: overrides the template's; None: it does not.
        min_tiles, max_tiles: of one image, where it is cut into several; both 1 where it is not.
        thumbnail: an image of several tiles also comes whole, as the last tile.
        layout: ``opengvlab`` or ``native``: how the weights are named.
        unknown_keys: keys of ``config.json`` that the reader does not know.

    Raises:
        CheckpointError: the tower has no such state, or tiles do not split into patches and tokens.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    image_size: int = 448
    select_layer: int = -1
    factor: int = 2
    shuffle: str = "v2"
    image_token_id: int | None = None
    template: str = ""
    system_message: str | None = None
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    layout: str = field(default="opengvlab", compare=False)
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        states = self.vision.num_hidden_layers + 1
        if not -states <= self.select_layer < states:
            raise CheckpointError(
                f"The hidden state {self.select_layer} of the vision tower does not exist.",
                f"It has {states}: the embeddings and the output of every block.",
            )
        step = self.vision.patch_size * self.factor
        if self.image_size < step or self.image_size % step:
            raise CheckpointError(
                f"Tiles of {self.image_size} pixels do not split into tokens of {step} pixels.",
                f"A patch has {self.vision.patch_size}; {self.factor} x {self.factor} of them are a token.",
            )
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise CheckpointError(
                f"Images are cut into {self.min_tiles} to {self.max_tiles} tiles.", "That is not a range."
            )
        if self.image_token_id is not None and self.image_token_id >= self.decoder.vocab_size:
            raise CheckpointError(
                f"The image token is {self.image_token_id}.",
                f"The decoder has the tokens 0 to {self.decoder.vocab_size - 1}.",
                "Use the config.json and the tokenizer that were published with these weights.",
            )

    @property
    def llama(self) -> DecoderConfig:
        """The decoder, as :attr:`.config.InternVLConfig.llama`."""
        return self.decoder

    @property
    def vision_blocks(self) -> int:
        """How many of the tower's blocks are run: those up to the state that is read."""
        return self.select_layer % (self.vision.num_hidden_layers + 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of one tile in the tower: patches and the class token."""
        return (self.image_size // self.vision.patch_size) ** 2 + 1

    @property
    def num_visual(self) -> int:
        """Visual embeddings of one tile, 256 in all published models."""
        return (self.image_size // self.vision.patch_size // self.factor) ** 2

    @property
    def projector_width(self) -> int:
        """Width of a token after the pixel shuffle."""
        return self.vision.hidden_size * self.factor**2

    def to_published(self) -> dict[str, Any]:
        """The ``config.json`` of the OpenGVLab layout, and ``image_token_id``, which is not of it."""
        single = self.max_tiles == 1
        return {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                **self.vision.to_published(),
                "norm_type": self.vision.norm_type,
                "hidden_act": "gelu",
            },
            "llm_config": self.decoder.to_published(),
            "force_image_size": self.image_size,
            "select_layer": self.select_layer,
            "downsample_ratio": 1 / self.factor,
            "ps_version": self.shuffle,
            "template": self.template,
            "system_message": self.system_message,
            "dynamic_image_size": not single,
            "min_dynamic_patch": self.min_tiles,
            "max_dynamic_patch": self.max_tiles,
            "use_thumbnail": self.thumbnail,
            "image_token_id": self.image_token_id,
        }
