"""internvl-nano-tiles in PyTorch: before training, while it is evaluated, and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files.write import atomic
from ..inputs.chat_template import (
    CONTEXT,
    ChatTemplate,
    ImageTokens,
    Turn,
    encode,
    image_tokens,
    template_of,
)
from ..inputs.preprocess import ImageSettings, read_images
from ..inputs.tiles import Tiling
from ..inputs.tokenizer import FastTokenizer, Tokenizer
from ..models.tiles_chat import TilesChatModel
from ..models.tiles_config import TilesConfig
from ..synthetic.render import Image8
from ..synthetic.sign_questions import pieces
from ..synthetic.sign_tasks import LONGEST_ANSWER
from .presets import TilesPreset
from .tokenizer import byte_level_tokenizer
from .trainer import initialise

END = "<|im_end|>"
PAD = "<|endoftext|>"


@cache
def tokenizer_json() -> str:
    """The ``tokenizer.json`` of internvl-nano-tiles."""
    return byte_level_tokenizer(pieces())


@cache
def sign_tokenizer() -> Tokenizer:
    """The tokenizer of :func:`tokenizer_json`."""
    return FastTokenizer(tokenizer_json(), "tokenizer.json", END)


def completed(config: TilesConfig) -> TilesConfig:
    """``config`` with the special tokens of :func:`sign_tokenizer`."""
    tokens = sign_tokenizer()
    decoder = replace(config.decoder, eos_token_ids=(tokens.special(END),), pad_token_id=tokens.special(PAD))
    return replace(config, decoder=decoder, image_token_id=tokens.special(CONTEXT))


def image_settings(config: TilesConfig) -> ImageSettings:
    """How its pictures are cut and normalised."""
    return ImageSettings(
        config.image_size, tiling=Tiling(config.max_tiles, config.min_tiles, config.thumbnail)
    )


def prompt_format(config: TilesConfig) -> tuple[ChatTemplate, ImageTokens]:
    """Its template, and the tokens of its images."""
    return template_of(config.to_published()), image_tokens(sign_tokenizer(), config.num_visual)


def initialised(preset: TilesPreset) -> TilesChatModel:
    """The untrained model: normal weights, residual outputs scaled down by depth, positions as sines."""
    torch.manual_seed(preset.seed)
    config = completed(preset.model)
    model = TilesChatModel(config)
    initialise(model, config.vision, {"language_model": config.decoder.num_hidden_layers})
    return model


class TorchSigns:
    """Greedy answers of the PyTorch model, as :data:`..synthetic.sign_tasks.Answer`.

    Args:
        model: the model.
        max_tiles: the most tiles of a picture; None: the model's.
        tokenizer: of its checkpoint; None: the one it is trained with.
    """

    def __init__(
        self, model: TilesChatModel, max_tiles: int | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.model, self.max_tiles, self.tokenizer = model, max_tiles, tokenizer or sign_tokenizer()
        self.settings = image_settings(model.config)
        self.template, self.images = prompt_format(model.config)

    def __call__(self, pictures: Sequence[Sequence[Image8]], turns: Sequence[Turn]) -> list[str]:
        """The answers to ``turns``, each about its pictures."""
        flat = [picture for row in pictures for picture in row]
        pixels = read_images(flat, self.settings, max_tiles=self.max_tiles)
        tokenizer, tiles = self.tokenizer, iter(pixels.tiles)
        rows = [
            encode([turn], tokenizer, self.template, self.images, [next(tiles) for _ in row]).ids
            for row, turn in zip(pictures, turns, strict=True)
        ]
        longest = max(map(len, rows))
        pad = self.model.config.decoder.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        said = self.model.generate(torch.from_numpy(pixels.values), ids, mask, LONGEST_ANSWER)
        return [tokenizer.decode(row).strip() for row in said.tolist()]


def write(model: TilesChatModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write OpenGVLab's layout: config, weights, the tokenizer's files, preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
    with atomic(folder / "model.safetensors", exclusive=True) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_published(), indent=1) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer_json() + "\n", encoding="utf-8")
    kind = {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": END, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind, indent=1) + "\n")
    image_settings(model.config).save(folder / "preprocessor_config.json")
