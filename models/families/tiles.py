"""InternVL 1.1 to 3.5: a tower that reads tiles, pixel shuffle and projector, a decoder of eight kinds.

Both published layouts are one family: the weights of either are read under one set of keys
(:mod:`..tiles_layout`), and its manifests hold the config in OpenGVLab's layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.spec import Axis, ComponentSpec, TensorSpec
from ...errors import CheckpointError
from ...inputs.chat_template import (
    CONTEXT,
    IMAGE_TOKEN,
    VICUNA,
    ChatFormat,
    ImageTokens,
    image_tokens,
    template_of,
)
from ...inputs.preprocess import SAMPLE_TILES, ImageSettings
from ...inputs.tiles import Tiling
from ...inputs.tokenizer import NoTokenizer, Tokenizer, check_vocabulary, load_tokenizer, tokenizer_files
from .. import macs
from ..calls import LONGEST_PROMPT, LONGEST_STEP, Arrays, Call, SampleBatch
from ..config import read_json
from ..decoder_config import DecoderConfig
from ..layout import vit_shapes
from ..registry import CHAT, Context, Family, Link, Macs, Ranges, Shape, register
from ..tiles_checkpoint import tiles_tensors
from ..tiles_config import TilesConfig
from ..tiles_layout import decoder_shapes, projector_shapes, published_shapes, tiles_shapes
from ..tiles_reading import is_tiles, load_tiles_config, read_tiles
from ..tiles_splits import BLOCKS, EMBEDDINGS, LANGUAGE, VISION
from . import chat, internvit, internvl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..storage import TensorRef


HISTORY = (1, 2048, 16384)
"""Positions of the decoder's cache: 41 tiles of 256 tokens and a conversation about them, unless the model's
context is shorter."""


def sample_tiles(config: TilesConfig) -> int:
    """Tiles of an image of a calibration set (:func:`...inputs.preprocess.sample_tiles`), or all of it."""
    return 1 if config.max_tiles == 1 else SAMPLE_TILES


class Vision(internvit.Vision):
    """The blocks of the tower that are run, pixel shuffle and projector."""

    name = "vision_chat"
    tower = "vision_chat"

    def spec(self, config: TilesConfig, ranges: Ranges) -> ComponentSpec:
        pixels = TensorSpec("pixel_values", "float", ("batch", 3, config.image_size, config.image_size))
        shape = ("batch", config.num_visual, config.decoder.hidden_size)
        visual = TensorSpec("visual_embeds", "float", shape)
        return ComponentSpec(self.name, (pixels,), (visual,), (Axis("batch", *ranges.batch),))

    def module(self, config: TilesConfig) -> nn.Module:
        from ..tiles_modules import TileVision

        return TileVision(config)

    def shapes(self, config: TilesConfig) -> dict[str, Shape]:
        return vit_shapes(config.vision, VISION, config.vision_blocks) | projector_shapes(config)

    def depth(self, config: TilesConfig) -> int:
        return config.vision_blocks

    def period(self, config: TilesConfig) -> tuple[TilesConfig, int]:
        if not config.vision_blocks:
            return config, 1
        one = replace(config.vision, num_hidden_layers=1)
        return replace(config, vision=one, select_layer=1), config.vision_blocks

    def taps(self, config: TilesConfig) -> tuple[int, ...]:
        return ()

    def leave(self, config: TilesConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        return {"visual_embeds": module.project(x)}

    def tokens(self, config: TilesConfig) -> int:
        return config.num_tokens

    def sample_rows(self, config: TilesConfig) -> int:
        return sample_tiles(config)

    def hidden(self, config: TilesConfig) -> tuple[int, int]:
        return sample_tiles(config) * config.num_tokens, config.vision.hidden_size

    def macs(self, config: TilesConfig, sizes: Mapping[str, int]) -> Macs:
        rows, out = config.num_visual, config.decoder.hidden_size
        projector = {"mlp1.1": rows * config.projector_width * out, "mlp1.3": rows * out**2}
        return super().macs(config, sizes) | projector


class Embed(chat.Embed):
    """The token embeddings, apart from the decoder: visual embeddings take the places of image tokens."""

    entry = (EMBEDDINGS,)

    def module(self, config: Any) -> nn.Module:
        from ..tiles_modules import TileEmbed

        return TileEmbed(config)

    def shapes(self, config: Any) -> dict[str, Shape]:
        return {EMBEDDINGS: (config.decoder.vocab_size, config.decoder.hidden_size)}

    def place(self, config: Any) -> str:
        return BLOCKS.rstrip(".")

    def enter(self, config: Any, module: Any, context: Context) -> Tensor:
        x: Tensor = module.embed(context.inputs["input_ids"])
        return x


class Decoder(chat.Decoder):
    """New positions over a cache of keys and values."""

    def spec(self, config: Any, ranges: Ranges) -> ComponentSpec:
        context = config.decoder.max_position_embeddings
        history = ranges.history if ranges != Ranges() else HISTORY
        low, best, high = (min(size, context) for size in history)
        axes = Axis("batch", *ranges.chats), *internvl.step_axes(ranges.turn, (low, best, high))
        return internvl.step_spec(self.name, chat.input_embeds(config), config.decoder, axes)

    def module(self, config: Any) -> nn.Module:
        from ..tiles_modules import TileStep

        return TileStep(config)

    def shapes(self, config: Any) -> dict[str, Shape]:
        return decoder_shapes(config)

    def links(self, config: Any) -> dict[str, Link]:
        visual = {"visual_embeds": Link("vision_chat", "visual_embeds", rows=sample_tiles(config))}
        return {**visual, "input_embeds": Link("decoder_embed", "input_embeds")}

    def place(self, config: Any) -> str:
        return BLOCKS.rstrip(".")

    def period(self, config: Any) -> tuple[Any, int]:
        layers, period = config.decoder.num_hidden_layers, config.decoder.period
        return replace(config, decoder=replace(config.decoder, num_hidden_layers=period)), layers // period

    def enter(self, config: Any, module: Any, context: Context) -> Tensor:
        import torch

        embed: Any = context.modules["decoder_embed"]
        x: Tensor = embed.embed(context.inputs["input_ids"])
        if context.cut is None:
            return x
        return torch.cat([x[:, : context.cut], context.linked["visual_embeds"], x[:, context.cut :]], 1)

    def run_block(
        self, config: Any, module: Any, block: int, x: Tensor, context: Context
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        # A prompt's mask begins with the one hidden position that engines need; here it has no past.
        mask = context.inputs["attention_mask"]
        mask = mask if context.past is not None else mask[:, -x.shape[1] :]
        out: tuple[Tensor, tuple[Tensor, Tensor]] = module.language_model.model.run_layer(
            block, x, context.inputs["positions"], mask, context.past
        )
        return out

    def leave(self, config: Any, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        language = module.language_model
        return {"logits": language.lm_head(language.model.norm(x)[:, -1:]).squeeze(1)}

    def _empty_past(self, config: Any, rows: int) -> Arrays:
        q = config.decoder
        zero = np.zeros((rows, q.num_key_value_heads, 1, q.head_dim), np.float32)
        return {f"past_{kind}.{i}": zero for i in range(q.num_hidden_layers) for kind in ("key", "value")}

    def macs(self, config: Any, sizes: Mapping[str, int]) -> Macs:
        c = config.decoder
        counts = macs.decoder(c, sizes["text"], sizes["past"] + sizes["text"], f"{LANGUAGE}model.")
        return counts | {f"{LANGUAGE}lm_head": c.hidden_size * c.vocab_size}

    def attention_values(self, config: Any, layer: str, sizes: Mapping[str, int]) -> int:
        c: DecoderConfig = config.decoder
        total = sizes["past"] + sizes["text"]
        return 2 * sizes["text"] * c.query_width + 2 * total * c.key_width

    def hidden(self, config: Any) -> tuple[int, int]:
        positions = sample_tiles(config) * config.num_visual + LONGEST_PROMPT + LONGEST_STEP
        return positions, config.decoder.hidden_size

    def swept(self, config: Any) -> tuple[str, int]:
        return "past", config.num_visual


class Tiles(Family[TilesConfig]):
    """InternVL 1.1 to 3.5, in OpenGVLab's layout and in that of transformers."""

    name = "tiles"
    title = "an InternVL of 1.1 to 3.5"
    config_type = TilesConfig
    components = (Vision(), Embed(), Decoder())
    form = CHAT
    runtime = "chat:InternVLChat"
    preprocessor = ImageSettings()

    def claims(self, data: Mapping[str, Any]) -> bool:
        return is_tiles(data)

    def read_config(self, data: dict[str, Any], source: str, folder: Path | None = None) -> TilesConfig:
        """The image token is the tokenizer's, if its files are next to the config."""
        return read_tiles(data, source) if folder is None else load_tiles_config(data, source, folder)

    def shapes(self, config: TilesConfig) -> dict[str, Shape]:
        """All of the tower, blocks after the selected one too."""
        return tiles_shapes(config)

    def locate(
        self, config: TilesConfig, tensors: dict[str, TensorRef], folder: Path, readers: dict[Path, Any]
    ) -> dict[str, TensorRef]:
        return tiles_tensors(config, tensors, folder)

    def stored(self, config: TilesConfig) -> dict[str, tuple[str, Shape]]:
        """As published: q, k and v of InternLM2 and Phi-3 joined, experts of GPT-OSS stacked."""
        return {name: (name, shape) for name, shape in published_shapes(config).items()}

    def depths(self, config: TilesConfig) -> tuple[int, int]:
        return config.vision_blocks, config.decoder.num_hidden_layers

    def sliced(self, config: TilesConfig, vision: int, text: int) -> TilesConfig:
        """Features are read as far from the end of the tower, and blocks that are never run are kept."""
        unread = config.vision.num_hidden_layers - config.vision_blocks
        return replace(
            config,
            vision=replace(config.vision, num_hidden_layers=vision + unread),
            decoder=replace(config.decoder, num_hidden_layers=text),
            select_layer=-(unread + 1),
        )

    def model(self, config: TilesConfig) -> nn.Module:
        from ..tiles_chat import TilesChatModel

        return TilesChatModel(config)

    def calls(self, config: TilesConfig, components: Sequence[str], batch: SampleBatch) -> Iterator[Call]:
        """Those of an InternVL-Chat, an image as two of its tiles."""
        visual = sample_tiles(config) * config.num_visual
        return chat.chat_calls(config, self.components, components, batch, visual)

    def image_settings(self, config: TilesConfig, settings: ImageSettings) -> ImageSettings:
        """OpenGVLab's layout has the tiling in ``config.json``; in that of transformers it is the
        processor's, which always makes tiles.
        """
        own = Tiling.of_chat_config(config.to_published())
        tiling = own if config.layout == "opengvlab" else settings.tiling or own
        return replace(settings, size=config.image_size, mode="square", tiling=tiling)

    def resized(self, config: TilesConfig, image_size: int) -> TilesConfig:
        return replace(config, image_size=image_size)

    def patch_size(self, config: TilesConfig) -> int:
        return config.vision.patch_size * config.factor

    def vocabulary(self, config: TilesConfig) -> int:
        return config.decoder.vocab_size

    def photograph_tiles(self, config: TilesConfig) -> int:
        tiling = Tiling.of_chat_config(config.to_published())
        return 1 if tiling is None else tiling.count(1024, 768, config.image_size)

    def positions(self, config: TilesConfig) -> int:
        return config.decoder.max_position_embeddings

    def turning_point(self, config: TilesConfig) -> int:
        """Phi-3's: it has factors for short sequences, and for long ones."""
        rope = config.decoder.rope.within(self.positions(config))
        return rope.original if rope.long_factor != rope.short_factor else 0

    def tokenizer(self, config: TilesConfig, folder: Path) -> Tokenizer:
        """Whichever files it has; without any, a bundle takes token ids alone."""
        if not tokenizer_files(folder):
            return NoTokenizer(config.decoder.vocab_size)
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, config.decoder.vocab_size)
        return tokenizer

    def chat_format(self, config: TilesConfig, folder: Path, tokenizer: Tokenizer) -> ChatFormat:
        """Its own template; an image is ``<img>``, image tokens for each of its tiles, and ``</img>``."""
        ends, pad = config.decoder.eos_token_ids, config.decoder.pad_token_id
        if not tokenizer.reads_texts:
            token = IMAGE_TOKEN if config.image_token_id is None else config.image_token_id
            return ChatFormat(VICUNA, ImageTokens(token, config.num_visual), ends, pad)
        template = template_of(read_json(folder / "config.json"), folder)
        template.check(tokenizer)
        images = image_tokens(tokenizer, config.num_visual)
        if config.image_token_id not in (None, images.context):
            raise CheckpointError(
                f"The tokenizer in {folder} is of another model.",
                f"Its {CONTEXT} is {images.context}, the image token of config.json is "
                f"{config.image_token_id}.",
                "Use the config.json and the tokenizer that were published with these weights.",
            )
        return ChatFormat(template, images, ends, pad)


register(Tiles())
