"""InternVL-Chat in the LLaVA layout: a vision tower, its projector, a LLaMA decoder (paper section 3.3).

On InternViT the last blocks are not run and there is no ``query_chat``. With QLLaMA (``two_mlp``) all of
InternViT is run: the features of the selected layer are an intermediate output, the queries read the last
one, and an image is
``query_embeds``, then ``visual_embeds``. That is two components, for a component is one stack of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.spec import Axis, ComponentSpec, TensorSpec
from ...errors import CheckpointError
from ...inputs.chat_template import ONE_PLACEHOLDER, VICUNA, ChatFormat
from ...inputs.preprocess import ImageSettings
from ...inputs.tokenizer import Tokenizer
from .. import macs
from ..calls import LONGEST_PROMPT, LONGEST_STEP, Arrays, Call, SampleBatch, runs, splice, step_inputs
from ..config import (
    TOWER_CONFIG,
    ChatConfig,
    InternViTConfig,
    InternVLConfig,
    read_json,
    tower_configs,
    tower_from_published,
)
from ..layout import CHAT_TOWER, HEADS, VISION, is_ignored, llama_layer_shapes, vit_shapes
from ..registry import CHAT, AttentionSize, Component, Context, Family, Link, Macs, Ranges, Shape, register
from . import internvit, internvl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..storage import TensorRef

PROJECTOR = "model.mm_projector."
NEW_TOKENS = 128
"""Of a typical answer."""
TEXT_TOKENS = 64
"""Of a typical prompt, besides its image."""


class Vision(internvit.Vision):
    """The blocks of InternViT that are run, and the projector of the selected layer's features."""

    name = "vision_chat"
    tower = "vision_chat"
    entry = (f"{CHAT_TOWER}embeddings.", f"{CHAT_TOWER}{VISION}embeddings.")

    def spec(self, config: ChatConfig, ranges: Ranges) -> ComponentSpec:
        pixels = TensorSpec("pixel_values", "float", ("batch", 3, config.image_size, config.image_size))
        shape = ("batch", config.num_features, config.decoder.hidden_size)
        visual = TensorSpec("visual_embeds", "float", shape)
        tokens = (vision_tokens(config),) if config.queries else ()
        return ComponentSpec(self.name, (pixels,), (visual, *tokens), (Axis("batch", *ranges.batch),))

    def module(self, config: ChatConfig) -> nn.Module:
        from ..component_modules import ChatFeatures, ChatVision

        return ChatFeatures(config) if config.queries else ChatVision(config)

    def shapes(self, config: ChatConfig) -> dict[str, Shape]:
        blocks, width = config.vision_blocks, config.vision.hidden_size
        name = f"{PROJECTOR}mlp1." if config.queries else PROJECTOR
        shapes = vit_shapes(config.vision, tower_prefix(config), blocks)
        return shapes | projector_shapes(name, width, config.decoder.hidden_size)

    def place(self, config: ChatConfig) -> str:
        return f"{tower_prefix(config)}encoder.layers"

    def depth(self, config: ChatConfig) -> int:
        return config.vision_blocks

    def period(self, config: ChatConfig) -> tuple[ChatConfig, int]:
        if not config.read_blocks:
            return config, 1
        one = replace(config.vision, num_hidden_layers=1)
        tower = replace(config.queries, vision=one) if config.queries else one
        return replace(config, tower=tower, select_layer=1), config.vision_blocks

    def taps(self, config: ChatConfig) -> tuple[int, ...]:
        return ()

    def exit_reads(self, config: ChatConfig) -> int | None:
        return config.read_blocks

    def segment(self, config: ChatConfig, key: str) -> int:
        if config.queries and key.startswith(PROJECTOR):  # features are an intermediate output
            return config.read_blocks - 1
        return super().segment(config, key)

    def vit(self, module: Any) -> Any:
        tower = module.model.vision_tower.vision_tower
        return getattr(tower, "vision_model", tower)

    def after_block(self, config: ChatConfig, module: Any, number: int, x: Tensor) -> dict[str, Tensor]:
        if not config.queries or number != config.read_blocks:
            return {}
        return {"visual_embeds": module.model.mm_projector.mlp1(self._features(module, x))}

    def leave(self, config: ChatConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        if config.queries:
            return {"tokens": x}
        return {"visual_embeds": module.model.mm_projector(self._features(module, x))}

    def _features(self, module: Any, x: Tensor) -> Tensor:
        features: Tensor = x[:, module.model.vision_tower.first :]
        return features

    def tokens(self, config: ChatConfig) -> int:
        return config.num_tokens

    def macs(self, config: ChatConfig, sizes: Mapping[str, int]) -> Macs:
        name = f"{PROJECTOR}mlp1" if config.queries else PROJECTOR.rstrip(".")
        width, out = config.vision.hidden_size, config.decoder.hidden_size
        return super().macs(config, sizes) | macs.mlp(name, config.num_features, width, out)


class Query(Component[ChatConfig]):
    """The query pass of a chat model's QLLaMA, and its projector."""

    name = "query_chat"
    tower = "query_chat"
    entry = (f"{CHAT_TOWER}query_tokens",)

    def spec(self, config: ChatConfig, ranges: Ranges) -> ComponentSpec:
        queries = TensorSpec(
            "query_embeds", "float", ("batch", config.num_queries, config.decoder.hidden_size)
        )
        return ComponentSpec(self.name, (vision_tokens(config),), (queries,), (Axis("batch", *ranges.batch),))

    def module(self, config: ChatConfig) -> nn.Module:
        from ..component_modules import ChatQueries

        return ChatQueries(config)

    def shapes(self, config: ChatConfig) -> dict[str, Shape]:
        queries, stack = _queries(config), f"{CHAT_TOWER}qllama.model."
        q, width = queries.qllama, config.vision.hidden_size
        shapes: dict[str, Shape] = {
            f"{CHAT_TOWER}query_tokens": (1, queries.num_query_token, q.hidden_size),
            f"{stack}norm.weight": (q.hidden_size,),
        }
        for i in range(q.num_hidden_layers):
            cross = width if queries.has_cross_attention(i) else None
            shapes |= llama_layer_shapes(f"{stack}layers.{i}.", q, cross)
        return shapes | projector_shapes(f"{PROJECTOR}mlp2.", q.hidden_size, config.decoder.hidden_size)

    def links(self, config: ChatConfig) -> dict[str, Link]:
        return {"tokens": Link("vision_chat", "tokens", hidden=True)}

    def place(self, config: ChatConfig) -> str:
        return f"{CHAT_TOWER}qllama.model.layers"

    def depth(self, config: ChatConfig) -> int:
        return _queries(config).qllama.num_hidden_layers

    def period(self, config: ChatConfig) -> tuple[ChatConfig, int]:
        queries, times = internvl.one_query_period(_queries(config))
        return replace(config, tower=queries), times

    def enter(self, config: ChatConfig, module: Any, context: Context) -> Tensor:
        x: Tensor = module.model.vision_tower.vision_tower.query_tokens.expand(context.rows, -1, -1)
        return x

    def run_block(
        self, config: ChatConfig, module: Any, block: int, x: Tensor, context: Context
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        from ..qllama import Visible

        decoder, tokens = module.model.vision_tower.vision_tower.qllama.model, context.linked["tokens"]
        return internvl.run_layer(decoder, block, x, context, Visible(), tokens, config.num_queries)

    def leave(self, config: ChatConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        hidden = module.model.vision_tower.vision_tower.qllama.model.norm(x)
        return {"query_embeds": module.model.mm_projector.mlp2(hidden)}

    def hidden(self, config: ChatConfig) -> tuple[int, int]:
        return config.num_queries, _queries(config).qllama.hidden_size

    def attentions(self, config: ChatConfig) -> dict[str, AttentionSize]:
        queries, sizes = _queries(config), {}
        for i in range(queries.qllama.num_hidden_layers):
            block, head = f"{self.place(config)}.{i}", queries.qllama.head_dim
            sizes[f"{block}.self_attn"] = AttentionSize(head, queries.num_query_token)
            if queries.has_cross_attention(i):
                sizes[f"{block}.cross_attn"] = AttentionSize(head, config.num_tokens)
        return sizes

    def macs(self, config: ChatConfig, sizes: Mapping[str, int]) -> Macs:
        queries, stack, count = _queries(config), f"{CHAT_TOWER}qllama.model.", config.num_queries
        counts = macs.llama(queries.qllama, count, count, stack)
        counts |= macs.cross_attention(queries, config.num_tokens, stack)
        width = queries.qllama.hidden_size
        return counts | macs.mlp(f"{PROJECTOR}mlp2", count, width, config.decoder.hidden_size)

    def attention_values(self, config: ChatConfig, layer: str, sizes: Mapping[str, int]) -> int:
        count = config.num_queries
        keys = config.num_tokens if ".cross_attn" in layer else count
        return 2 * (count + keys) * _queries(config).qllama.hidden_size


class Embed(Component[ChatConfig]):
    """The token embeddings, apart from the decoder: visual embeddings go between them."""

    name = "decoder_embed"
    tower = "decoder"
    unit = "tokens"
    entry = ("model.embed_tokens.",)

    def spec(self, config: ChatConfig, ranges: Ranges) -> ComponentSpec:
        ids = TensorSpec("input_ids", "int64", ("batch", "text"))
        axes = Axis("batch", *ranges.chats), Axis("text", *ranges.turn)
        return ComponentSpec(self.name, (ids,), (input_embeds(config),), axes)

    def module(self, config: ChatConfig) -> nn.Module:
        from ..component_modules import ChatEmbed

        return ChatEmbed(config)

    def shapes(self, config: ChatConfig) -> dict[str, Shape]:
        return {"model.embed_tokens.weight": (config.decoder.vocab_size, config.decoder.hidden_size)}

    def place(self, config: ChatConfig) -> str:
        return "model.layers"

    def depth(self, config: ChatConfig) -> int:
        return 0

    def period(self, config: ChatConfig) -> tuple[ChatConfig, int]:
        return config, 1

    def enter(self, config: ChatConfig, module: Any, context: Context) -> Tensor:
        x: Tensor = module.model["embed_tokens"](context.inputs["input_ids"])
        return x

    def leave(self, config: ChatConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        return {"input_embeds": x}

    def hidden(self, config: ChatConfig) -> tuple[int, int]:
        return LONGEST_PROMPT + LONGEST_STEP, config.decoder.hidden_size

    def macs(self, config: ChatConfig, sizes: Mapping[str, int]) -> Macs:
        return {}


class Decoder(Component[ChatConfig]):
    """New positions over a cache of keys and values: the chat model's LLaMA."""

    name = "decoder"
    tower = "decoder"
    unit = "tokens"
    cached = True
    continues = "decoder"

    def spec(self, config: ChatConfig, ranges: Ranges) -> ComponentSpec:
        axes = Axis("batch", *ranges.chats), *internvl.step_axes(ranges.turn, ranges.history)
        return internvl.step_spec(self.name, input_embeds(config), config.decoder, axes)

    def module(self, config: ChatConfig) -> nn.Module:
        from ..component_modules import ChatStep

        return ChatStep(config)

    def shapes(self, config: ChatConfig) -> dict[str, Shape]:
        q = config.decoder
        shapes: dict[str, Shape] = {}
        for i in range(q.num_hidden_layers):
            shapes |= llama_layer_shapes(f"model.layers.{i}.", q)
        head: dict[str, Shape] = {"lm_head.weight": (q.vocab_size, q.hidden_size)}
        return shapes | {"model.norm.weight": (q.hidden_size,)} | head

    def links(self, config: ChatConfig) -> dict[str, Link]:
        queries = {"query_embeds": Link("query_chat", "query_embeds")} if config.queries else {}
        visual = {"visual_embeds": Link("vision_chat", "visual_embeds")}
        return {**queries, **visual, "input_embeds": Link("decoder_embed", "input_embeds")}

    def place(self, config: ChatConfig) -> str:
        return "model.layers"

    def depth(self, config: ChatConfig) -> int:
        return config.decoder.num_hidden_layers

    def period(self, config: ChatConfig) -> tuple[ChatConfig, int]:
        return replace(config, decoder=replace(config.decoder, num_hidden_layers=1)), self.depth(config)

    def enter(self, config: ChatConfig, module: Any, context: Context) -> Tensor:
        import torch

        embed: Any = context.modules["decoder_embed"]
        x: Tensor = embed.model["embed_tokens"](context.inputs["input_ids"])
        if context.cut is None:
            return x
        visual = [context.linked[name] for name in visual_names(config)]
        return torch.cat([x[:, : context.cut], *visual, x[:, context.cut :]], 1)

    def run_block(
        self, config: ChatConfig, module: Any, block: int, x: Tensor, context: Context
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        from ..generate import step_mask
        from ..qllama import Visible

        # A prompt has no past: the mask is causal among its own positions.
        visible = Visible(causal=True)
        if context.past is not None:
            visible = Visible(step_mask(context.inputs["attention_mask"], x.shape[1]))
        return internvl.run_layer(module.model, block, x, context, visible)

    def leave(self, config: ChatConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        return {"logits": module.lm_head(module.model.norm(x)[:, -1:]).squeeze(1)}

    def hidden(self, config: ChatConfig) -> tuple[int, int]:
        return config.num_visual + LONGEST_PROMPT + LONGEST_STEP, config.decoder.hidden_size

    def feeds(self, config: ChatConfig, call: Call, outputs: Mapping[str, Arrays]) -> Arrays:
        inputs = {name: array for name, array in call.inputs.items() if name != "input_ids"}
        links = self.links(config)
        shown = {name: link for name, link in links.items() if name != "input_embeds"}
        images = [link.taken(outputs[link.component][name], call.rows) for name, link in shown.items()]
        visual = np.concatenate(images, 1) if call.cut is not None else None
        embeds = splice(outputs["decoder_embed"]["input_embeds"], visual, call.cut)
        if call.continues is None:
            return {"input_embeds": embeds, **inputs, **self._empty_past(config, len(call.rows))}
        past = {f"past_{n}": a for n, a in outputs[self.name].items() if n.startswith(("key.", "value."))}
        return {"input_embeds": embeds, **inputs, **past}

    def _empty_past(self, config: ChatConfig, rows: int) -> Arrays:
        """The one hidden position that a prompt's mask begins with, in every layer."""
        q = config.decoder
        zero = np.zeros((rows, q.num_attention_heads, 1, q.head_dim), np.float32)
        return {f"past_{kind}.{i}": zero for i in range(q.num_hidden_layers) for kind in ("key", "value")}

    def attentions(self, config: ChatConfig) -> dict[str, AttentionSize]:
        least = next(axis.min for axis in self.spec(config, Ranges()).axes if axis.name == "total")
        size = AttentionSize(config.decoder.head_dim, least)
        return {f"{self.place(config)}.{i}.self_attn": size for i in range(self.depth(config))}

    def macs(self, config: ChatConfig, sizes: Mapping[str, int]) -> Macs:
        q = config.decoder
        counts = macs.llama(q, sizes["text"], sizes["past"] + sizes["text"], "model.")
        return counts | {"lm_head": q.hidden_size * q.vocab_size}

    def attention_values(self, config: ChatConfig, layer: str, sizes: Mapping[str, int]) -> int:
        return 2 * (2 * sizes["text"] + sizes["past"]) * config.decoder.hidden_size

    def swept(self, config: ChatConfig) -> tuple[str, int]:
        return "past", config.num_visual

    def typical_calls(self, config: ChatConfig) -> list[tuple[dict[str, int], int]]:
        """A prompt with its image, and the steps of an answer."""
        prompt = config.num_visual + TEXT_TOKENS
        step = {"batch": 1, "text": 1, "past": prompt + NEW_TOKENS // 2}
        return [({"batch": 1, "text": prompt, "past": 1}, 1), (step, NEW_TOKENS - 1)]


def vision_tokens(config: ChatConfig) -> TensorSpec:
    """InternViT's last states [B, N, D], which the queries see."""
    return TensorSpec("tokens", "float", ("batch", config.num_tokens, config.vision.hidden_size))


def input_embeds(config: Any) -> TensorSpec:
    """Embeddings of new positions [B, T, H]."""
    return TensorSpec("input_embeds", "float", ("batch", "text", config.decoder.hidden_size))


def visual_names(config: ChatConfig) -> tuple[str, ...]:
    """The outputs that represent an image, in the decoder's order."""
    return ("query_embeds", "visual_embeds") if config.queries else ("visual_embeds",)


def tower_prefix(config: ChatConfig) -> str:
    """Prefix of InternViT's weights: alone, or within an InternVL."""
    return f"{CHAT_TOWER}{VISION}" if config.queries else CHAT_TOWER


def projector_shapes(name: str, width: int, out: int) -> dict[str, Shape]:
    """Tensors of the two-layer projector under the prefix ``name``."""
    shapes: dict[str, Shape] = {f"{name}0.weight": (out, width), f"{name}2.weight": (out, out)}
    return shapes | {f"{name}0.bias": (out,), f"{name}2.bias": (out,)}


def chat_calls(
    config: Any,
    own: Sequence[Component[Any]],
    components: Sequence[str],
    batch: SampleBatch,
    visual: int | None = None,
) -> Iterator[Call]:
    """Images first, then each group's prompts with an empty past, and its answers after their cache.

    Args:
        config: of any model whose last two components are embeddings and decoder.
        own: all components of its family, in the order they run.
        components: names of those that are called.
        batch: the samples.
        visual: embeddings of an image; None: the config's.
    """
    visual = config.num_visual if visual is None else visual
    for component in own[:-2]:
        if component.name in components:
            yield from component.calls(config, batch)
    decoding = [c.name for c in own[-2:] if c.name in components]
    width, past = config.decoder.hidden_size, 0
    for run in runs(batch.dialogues) if decoding else ():
        rows, length = len(run.rows), run.length(visual)
        past = past if run.cut is None else 0
        embed, decoder = own[-2:]
        if embed.name in decoding:
            yield Call(embed.name, batch.number, run.rows, {"input_ids": run.ids}, (rows, 0, width))
        if decoder.name in decoding:
            inputs = {"input_ids": run.ids, **step_inputs(rows, length, past)}
            prompt = run.cut is not None
            yield Call(
                decoder.name, batch.number, run.rows, inputs, (rows, length, width), run.cut, prompt,
                None if prompt else list(range(rows)),
            )  # fmt: skip
        past = length if run.cut is not None else past  # every call of an answer follows the prompt


def _queries(config: ChatConfig) -> InternVLConfig:
    assert config.queries is not None  # the family has no such component otherwise
    return config.queries


class Chat(Family[ChatConfig]):
    """InternVL-Chat on InternViT, or on InternViT and QLLaMA."""

    name = "chat"
    title = "an InternVL-Chat"
    config_type = ChatConfig
    components = (Vision(), Query(), Embed(), Decoder())
    form = CHAT
    runtime = "chat:InternVLChat"

    def claims(self, data: Mapping[str, Any]) -> bool:
        return str(data.get("model_type", "")).startswith("llava")

    def read_config(self, data: dict[str, Any], source: str, folder: Path | None = None) -> ChatConfig:
        """The tower is described by ``vision_tower_config.json`` next to the config, or by the
        ``config.json`` of the folder that ``mm_vision_tower`` names, if it is next to or inside the
        checkpoint. The image size is that of ``preprocessor_config.json``.
        """
        if folder is None:
            return ChatConfig.from_published(data, source)
        tower = next((p for p in tower_configs(folder, data) if p.is_file()), None)
        settings = folder / "preprocessor_config.json"
        return ChatConfig.from_published(
            data,
            source,
            tower_from_published(data, read_json(tower), str(tower)) if tower else None,
            ImageSettings.load(settings).size if settings.is_file() else None,
        )

    def has(self, config: ChatConfig, component: Component[Any]) -> bool:
        return config.queries is not None or not isinstance(component, Query)

    def shapes(self, config: ChatConfig) -> dict[str, Shape]:
        """Stored tensors include blocks after the selected one, QLLaMA's text embeddings and lm_head."""
        shapes = super().shapes(config)
        if config.queries is None:
            return vit_shapes(config.vision, CHAT_TOWER) | shapes
        tower = internvl.InternVL().shapes(config.queries)
        return {CHAT_TOWER + key: s for key, s in tower.items() if not key.startswith(HEADS)} | shapes

    def locate(
        self, config: ChatConfig, tensors: dict[str, TensorRef], folder: Path, readers: dict[Path, Any]
    ) -> dict[str, TensorRef]:
        """The tower may be a separate checkpoint, in the folder of its config."""
        if any(key.startswith(CHAT_TOWER) for key in tensors):
            return tensors
        from ..weight_files import read_folder

        data = read_json(folder / "config.json")
        tower = next((p.parent for p in tower_configs(folder, data)[1:] if p.is_file()), None)
        if tower is None:
            raise CheckpointError(
                f"{folder} has no weights of its vision tower.",
                f"They are not among its own; no checkpoint {data.get('mm_vision_tower')} is next to it.",
                "Put the folder of the checkpoint it was trained with next to it, under that name.",
            )
        stored = read_folder(tower, readers)[1]
        own = {n: ref for n, ref in stored.items() if not (is_ignored(n) or n.startswith(HEADS))}
        return tensors | {CHAT_TOWER + name: ref for name, ref in own.items()}

    def companions(self, config: ChatConfig) -> dict[str, dict[str, Any]]:
        return {TOWER_CONFIG: (config.queries or InternViTConfig(config.vision)).to_published()}

    def depths(self, config: ChatConfig) -> tuple[int, int]:
        return config.vision_blocks, config.decoder.num_hidden_layers

    def sliced(self, config: ChatConfig, vision: int, text: int) -> ChatConfig:
        """Features are read as far from the end of the tower, blocks that are never run are kept, and
        QLLaMA has at most its own depth.
        """
        depth = config.vision.num_hidden_layers
        after_read, unread = depth - config.read_blocks, depth - config.vision_blocks
        tower = replace(config.vision, num_hidden_layers=vision + unread)
        sizes: Any = tower
        if config.queries is not None:
            layers = min(text, config.queries.qllama.num_hidden_layers)
            sizes = replace(internvl.with_layers(config.queries, layers), vision=tower)
        return replace(
            config,
            tower=sizes,
            decoder=replace(config.decoder, num_hidden_layers=text),
            select_layer=-(min(after_read, vision + unread - 1) + 1),
        )

    def model(self, config: ChatConfig) -> nn.Module:
        from ..chat import InternVLChatModel

        return InternVLChatModel(config)

    def calls(self, config: ChatConfig, components: Sequence[str], batch: SampleBatch) -> Iterator[Call]:
        return chat_calls(config, self.components, components, batch)

    def image_settings(self, config: ChatConfig, settings: ImageSettings) -> ImageSettings:
        pad = config.image_aspect_ratio == "pad"
        return settings.at(config.image_size).resized("pad" if pad else None)

    def resized(self, config: ChatConfig, image_size: int) -> ChatConfig:
        return replace(config, image_size=image_size)

    def patch_size(self, config: ChatConfig) -> int:
        return config.vision.patch_size

    def vocabulary(self, config: ChatConfig) -> int:
        return config.decoder.vocab_size

    def chat_format(self, config: ChatConfig, folder: Path, tokenizer: Tokenizer) -> ChatFormat:
        """Vicuna's, with one placeholder for an image."""
        return ChatFormat(
            VICUNA, ONE_PLACEHOLDER, (config.decoder.eos_token_id,), config.decoder.pad_token_id
        )


register(Chat())
