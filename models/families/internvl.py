"""InternVL-C and InternVL-G (paper figure 4): InternViT and QLLaMA with their heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.spec import Axis, ComponentSpec, TensorSpec
from ...inputs.tokenizer import MAX_LENGTH
from .. import macs
from ..calls import LONGEST_STEP, Call, SampleBatch, groups, step_inputs
from ..config import InternVLConfig, QLlamaConfig
from ..decoder_config import DecoderConfig
from ..layout import llama_layer_shapes, pool_shapes
from ..registry import (
    CONTRASTIVE,
    AttentionSize,
    Component,
    Context,
    Family,
    Link,
    Macs,
    Range,
    Ranges,
    Shape,
    register,
)
from . import internvit

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..qllama import Decoder, Visible

QLLAMA = "qllama.model."
_LACKING = (
    "It is an InternVL-C file, without queries, cross-attention and lm_head.",
    "Use an InternVL-14B-224px checkpoint, or leave the component out.",
)


class Vision(internvit.Vision):
    """InternViT and the InternVL-C head."""

    def heads(self, config: InternVLConfig) -> tuple[TensorSpec, ...]:
        return (TensorSpec("image_embed", "float", ("batch", config.clip_embed_dim)),)

    def module(self, config: InternVLConfig) -> nn.Module:
        from ..component_modules import Vision as Module

        return Module(config)

    def shapes(self, config: InternVLConfig) -> dict[str, Shape]:
        width = config.vision.hidden_size
        return super().shapes(config) | pool_shapes("clip_projector.", width, config.clip_embed_dim)

    def leave(self, config: InternVLConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        return {"tokens": x, "image_embed": module.clip_projector(x)}

    def macs(self, config: InternVLConfig, sizes: Mapping[str, int]) -> Macs:
        v = config.vision
        head = macs.pool("clip_projector", v.num_tokens, v.hidden_size, config.clip_embed_dim)
        return super().macs(config, sizes) | head

    def attention_values(self, config: InternVLConfig, layer: str, sizes: Mapping[str, int]) -> int:
        if layer.startswith("clip_projector"):
            return 2 * (1 + config.vision.num_tokens) * config.vision.hidden_size
        return super().attention_values(config, layer, sizes)


class _QLlama(Component[InternVLConfig]):
    """A pass through QLLaMA's layers."""

    tower = "qllama"
    crosses = False
    """Whether its queries attend to the image."""
    entry = ("query_tokens", f"{QLLAMA}embed_tokens.")

    def place(self, config: InternVLConfig) -> str:
        return f"{QLLAMA}layers"

    def depth(self, config: InternVLConfig) -> int:
        return config.qllama.num_hidden_layers

    def period(self, config: InternVLConfig) -> tuple[InternVLConfig, int]:
        if self.crosses:
            return one_query_period(config)
        return with_layers(config, 1), config.qllama.num_hidden_layers

    def links(self, config: InternVLConfig) -> dict[str, Link]:
        return {"tokens": Link("vision", "tokens", hidden=True)} if self.crosses else {}

    def layers(self, config: InternVLConfig, embeddings: bool) -> dict[str, Shape]:
        """Tensors of the layers that this pass reads, of the final norm, and of the embeddings."""
        q, width = config.qllama, config.vision.hidden_size
        shapes: dict[str, Shape] = {}
        if embeddings:
            shapes[f"{QLLAMA}embed_tokens.weight"] = (q.vocab_size, q.hidden_size)
        for i in range(q.num_hidden_layers):
            cross = self.crosses and config.has_cross_attention(i)
            shapes |= llama_layer_shapes(f"{QLLAMA}layers.{i}.", q, width if cross else None)
        return shapes | {f"{QLLAMA}norm.weight": (q.hidden_size,)}

    def run_block(
        self, config: InternVLConfig, module: Any, block: int, x: Tensor, context: Context
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        queries = config.num_query_token if self.crosses else 0
        visible, tokens = self.visible(x, context), context.linked["tokens"] if self.crosses else None
        return run_layer(module.qllama.model, block, x, context, visible, tokens, queries)

    def visible(self, x: Tensor, context: Context) -> Visible:
        """Visible keys of the rows of a call; all of them, for there is no padding."""
        from ..qllama import Visible

        return Visible()

    def attentions(self, config: InternVLConfig) -> dict[str, AttentionSize]:
        head, tokens = config.qllama.head_dim, config.vision.num_tokens
        least = {axis.name: axis.min for axis in self.spec(config, Ranges()).axes}
        own = least.get("total", least.get("text", 0)) + (config.num_query_token if self.crosses else 0)
        sizes = {}
        for i in range(config.qllama.num_hidden_layers):
            sizes[f"{self.place(config)}.{i}.self_attn"] = AttentionSize(head, own)
            if self.crosses and config.has_cross_attention(i):
                sizes[f"{self.place(config)}.{i}.cross_attn"] = AttentionSize(head, tokens)
        return sizes

    def attention_values(self, config: InternVLConfig, layer: str, sizes: Mapping[str, int]) -> int:
        queries, width = config.num_query_token if self.crosses else 0, config.qllama.hidden_size
        if layer.startswith("clip_projector2"):
            return 2 * (1 + queries) * width
        if ".cross_attn" in layer:
            return 2 * (queries + config.vision.num_tokens) * width
        new = queries + sizes.get("text", 0)
        return 2 * (2 * new + sizes.get("past", 0)) * width


class Query(_QLlama):
    """The query pass and the InternVL-G head; its keys and values are the caption decoder's first past."""

    name = "qllama_query"
    crosses = cached = True
    lacking = _LACKING

    def spec(self, config: InternVLConfig, ranges: Ranges) -> ComponentSpec:
        q, queries = config.qllama, config.num_query_token
        hidden = TensorSpec("query_hidden", "float", ("batch", queries, q.hidden_size))
        pooled = TensorSpec("query_embed", "float", ("batch", config.clip_embed_dim))
        outputs = (hidden, pooled, *key_values(q, "", queries))
        return ComponentSpec(self.name, (vision_tokens(config),), outputs, (Axis("batch", *ranges.batch),))

    def module(self, config: InternVLConfig) -> nn.Module:
        from ..component_modules import Query as Module

        return Module(config)

    def shapes(self, config: InternVLConfig) -> dict[str, Shape]:
        q = config.qllama
        queries: dict[str, Shape] = {"query_tokens": (1, config.num_query_token, q.hidden_size)}
        head = pool_shapes("clip_projector2.", q.hidden_size, config.clip_embed_dim)
        return queries | self.layers(config, embeddings=False) | head

    def enter(self, config: InternVLConfig, module: Any, context: Context) -> Tensor:
        x: Tensor = module.query_tokens.expand(context.rows, -1, -1)
        return x

    def leave(self, config: InternVLConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        hidden = module.qllama.model.norm(x)
        return {"query_hidden": hidden, "query_embed": module.clip_projector2(hidden)}

    def calls(self, config: InternVLConfig, batch: SampleBatch) -> Iterator[Call]:
        for call in super().calls(config, batch):
            yield replace(call, keeps=True)

    def hidden(self, config: InternVLConfig) -> tuple[int, int]:
        return config.num_query_token, config.qllama.hidden_size

    def macs(self, config: InternVLConfig, sizes: Mapping[str, int]) -> Macs:
        q, queries = config.qllama, config.num_query_token
        counts = macs.llama(q, queries, queries, QLLAMA)
        counts |= macs.cross_attention(config, config.vision.num_tokens, QLLAMA)
        return counts | macs.pool("clip_projector2", queries, q.hidden_size, config.clip_embed_dim)


class Text(_QLlama):
    """The text tower: a causal LLaMA read at the last token."""

    name = "qllama_text"
    unit = "texts"

    def spec(self, config: InternVLConfig, ranges: Ranges) -> ComponentSpec:
        pooled = TensorSpec("text_embed", "float", ("batch", config.clip_embed_dim))
        return ComponentSpec(self.name, text_inputs(), (pooled,), text_axes(ranges))

    def module(self, config: InternVLConfig) -> nn.Module:
        from ..component_modules import Text as Module

        return Module(config)

    def shapes(self, config: InternVLConfig) -> dict[str, Shape]:
        projection: dict[str, Shape] = {"text_projection": (config.qllama.hidden_size, config.clip_embed_dim)}
        return self.layers(config, embeddings=True) | projection

    def enter(self, config: InternVLConfig, module: Any, context: Context) -> Tensor:
        x: Tensor = module.qllama.embed(context.inputs["input_ids"])
        return x

    def visible(self, x: Tensor, context: Context) -> Visible:
        from ..qllama import Visible

        return Visible(causal=True)

    def leave(self, config: InternVLConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        hidden = module.qllama.model.norm(x)
        last = (context.inputs["lengths"] - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return {"text_embed": (hidden.gather(1, last) @ module.text_projection).squeeze(1)}

    def calls(self, config: InternVLConfig, batch: SampleBatch) -> Iterator[Call]:
        texts, width = batch.texts, config.qllama.hidden_size
        for rows, length in groups(texts.lengths.tolist()):
            inputs = {"input_ids": texts.input_ids[rows, :length], "lengths": texts.lengths[rows]}
            yield Call(self.name, batch.number, rows, inputs, (len(rows), length, width))

    def hidden(self, config: InternVLConfig) -> tuple[int, int]:
        return MAX_LENGTH, config.qllama.hidden_size

    def macs(self, config: InternVLConfig, sizes: Mapping[str, int]) -> Macs:
        counts = macs.llama(config.qllama, sizes["text"], sizes["text"], QLLAMA)
        return counts | {"text_projection": config.qllama.hidden_size * config.clip_embed_dim}

    def swept(self, config: InternVLConfig) -> tuple[str, int]:
        return "text", 0


class Step(_QLlama):
    """The caption decoder: new tokens over a cache that begins with the queries; no cross-attention."""

    name = "qllama_step"
    unit = "tokens"
    cached = True
    continues = "qllama_query"
    lacking = _LACKING

    def spec(self, config: InternVLConfig, ranges: Ranges) -> ComponentSpec:
        past = tuple(config.num_query_token + n for n in ranges.caption)
        ids = TensorSpec("input_ids", "int64", ("batch", "text"))
        axes = (Axis("batch", *ranges.batch), *step_axes(ranges.prompt, past))
        return step_spec(self.name, ids, config.qllama, axes)

    def module(self, config: InternVLConfig) -> nn.Module:
        from ..component_modules import Step as Module

        return Module(config)

    def shapes(self, config: InternVLConfig) -> dict[str, Shape]:
        q = config.qllama
        head: dict[str, Shape] = {"qllama.lm_head.weight": (q.vocab_size, q.hidden_size)}
        return self.layers(config, embeddings=True) | head

    def enter(self, config: InternVLConfig, module: Any, context: Context) -> Tensor:
        x: Tensor = module.qllama.embed(context.inputs["input_ids"])
        return x

    def visible(self, x: Tensor, context: Context) -> Visible:
        from ..generate import step_mask
        from ..qllama import Visible

        return Visible(step_mask(context.inputs["attention_mask"], x.shape[1]))

    def leave(self, config: InternVLConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        hidden = module.qllama.model.norm(x)
        return {"logits": module.qllama.lm_head(hidden[:, -1:]).squeeze(1)}

    def calls(self, config: InternVLConfig, batch: SampleBatch) -> Iterator[Call]:
        """Prompt and caption at once after the queries (teacher forcing).

        The activations are those of the same tokens decoded one at a time, but ``lm_head``, which only the
        last position reaches, has one row a sample.
        """
        captions, width = batch.texts.caption_ids, config.qllama.hidden_size
        for rows, length in groups([len(ids) for ids in captions]):
            ids = np.array([captions[row] for row in rows], np.int64)
            inputs = {"input_ids": ids, **step_inputs(len(rows), length, config.num_query_token)}
            shape = (len(rows), length, width)
            yield Call(self.name, batch.number, rows, inputs, shape, continues=rows)

    def hidden(self, config: InternVLConfig) -> tuple[int, int]:
        return LONGEST_STEP, config.qllama.hidden_size

    def macs(self, config: InternVLConfig, sizes: Mapping[str, int]) -> Macs:
        q = config.qllama
        counts = macs.llama(q, sizes["text"], sizes["past"] + sizes["text"], QLLAMA)
        return counts | {"qllama.lm_head": q.hidden_size * q.vocab_size}

    def swept(self, config: InternVLConfig) -> tuple[str, int]:
        return "past", config.num_query_token


class Match(_QLlama):
    """Image-text matching (ITM, paper section 3.3): queries and text see each other, and the image."""

    name = "qllama_itm"
    optional = crosses = True
    unit = "pairs"
    lacking = _LACKING

    def spec(self, config: InternVLConfig, ranges: Ranges) -> ComponentSpec:
        logits = TensorSpec("itm_logits", "float", ("batch", 2))
        inputs = (vision_tokens(config), *text_inputs())
        return ComponentSpec(self.name, inputs, (logits,), text_axes(ranges))

    def module(self, config: InternVLConfig) -> nn.Module:
        from ..component_modules import Match as Module

        return Module(config)

    def shapes(self, config: InternVLConfig) -> dict[str, Shape]:
        width = config.qllama.hidden_size
        shapes: dict[str, Shape] = {"query_tokens": (1, config.num_query_token, width)}
        shapes |= self.layers(config, embeddings=True)
        return shapes | {"itm_head.weight": (2, width), "itm_head.bias": (2,)}

    def enter(self, config: InternVLConfig, module: Any, context: Context) -> Tensor:
        import torch

        queries = module.query_tokens.expand(context.rows, -1, -1)
        return torch.cat([queries, module.qllama.embed(context.inputs["input_ids"])], 1)

    def leave(self, config: InternVLConfig, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        hidden = module.qllama.model.norm(x)
        return {"itm_logits": module.itm_head(hidden[:, : config.num_query_token]).mean(1)}

    def calls(self, config: InternVLConfig, batch: SampleBatch) -> Iterator[Call]:
        texts, width = batch.texts, config.qllama.hidden_size
        for rows, length in groups(texts.match_lengths.tolist()):
            inputs = {"input_ids": texts.match_ids[rows, :length], "lengths": texts.match_lengths[rows]}
            shape = (len(rows), config.num_query_token + length, width)
            yield Call(self.name, batch.number, rows, inputs, shape)

    def hidden(self, config: InternVLConfig) -> tuple[int, int]:
        return config.num_query_token + MAX_LENGTH, config.qllama.hidden_size

    def macs(self, config: InternVLConfig, sizes: Mapping[str, int]) -> Macs:
        rows = config.num_query_token + sizes["text"]
        counts = macs.llama(config.qllama, rows, rows, QLLAMA)
        counts |= macs.cross_attention(config, config.vision.num_tokens, QLLAMA)
        return counts | {"itm_head": config.num_query_token * config.qllama.hidden_size * 2}

    def swept(self, config: InternVLConfig) -> tuple[str, int]:
        return "text", 0


def vision_tokens(config: InternVLConfig) -> TensorSpec:
    """The input ``tokens`` [B, N, D]."""
    return TensorSpec("tokens", "float", ("batch", config.vision.num_tokens, config.vision.hidden_size))


def text_inputs() -> tuple[TensorSpec, TensorSpec]:
    """Right-padded token ids [B, T] and their lengths [B]."""
    ids = TensorSpec("input_ids", "int64", ("batch", "text"))
    return ids, TensorSpec("lengths", "int64", ("batch",))


def text_axes(ranges: Ranges) -> tuple[Axis, Axis]:
    """The axes of :func:`text_inputs`."""
    return Axis("batch", *ranges.batch), Axis("text", *ranges.text)


def step_spec(
    name: str, first: TensorSpec, llama: QLlamaConfig | DecoderConfig, axes: tuple[Axis, ...]
) -> ComponentSpec:
    """A LLaMA over a cache: ``first`` holds the new positions, [B, T] or [B, T, H]."""
    positions = TensorSpec("positions", "int64", ("batch", "text"))
    mask = TensorSpec("attention_mask", "int64", ("batch", "total"))
    logits = TensorSpec("logits", "float", ("batch", llama.vocab_size))
    inputs = (first, positions, mask, *key_values(llama, "past_", "past"))
    return ComponentSpec(name, inputs, (logits, *key_values(llama, "", "text")), axes)


def step_axes(text: Range, past: tuple[int, ...]) -> tuple[Axis, Axis, Axis]:
    """The axes ``text``, ``past`` and their sum, the second axis of the mask."""
    total = (a + b for a, b in zip(text, past, strict=True))
    return Axis("text", *text), Axis("past", *past), Axis("total", *total)


def key_values(llama: QLlamaConfig | DecoderConfig, prefix: str, length: int | str) -> list[TensorSpec]:
    """Keys and values [B, heads, length, d] of every layer."""
    heads = llama.num_key_value_heads if isinstance(llama, DecoderConfig) else llama.num_attention_heads
    shape = ("batch", heads, length, llama.head_dim)
    return [
        TensorSpec(f"{prefix}{kind}.{i}", "float", shape)
        for i in range(llama.num_hidden_layers)
        for kind in ("key", "value")
    ]


def run_layer(
    decoder: Decoder,
    block: int,
    x: Tensor,
    context: Context,
    visible: Visible,
    tokens: Tensor | None = None,
    queries: int = 0,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LLaMA layer: [B, T, H] -> [B, T, H], new keys and values."""
    import torch

    from ..qllama import rotary_tables

    positions: torch.Tensor | None = context.inputs.get("positions")
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)[None]
    rotary = rotary_tables(positions, decoder.config, x.dtype)
    out: tuple[Tensor, tuple[Tensor, Tensor]] = decoder.layers[block](
        x, rotary, visible, tokens, queries, context.past
    )
    return out


def one_query_period(config: InternVLConfig) -> tuple[InternVLConfig, int]:
    """The blocks up to the next with cross-attention, and how many times they come."""
    period, layers = config.cross_attention_frequency, config.qllama.num_hidden_layers
    return (config, 1) if layers % period else (with_layers(config, period), layers // period)


def with_layers(config: InternVLConfig, layers: int) -> InternVLConfig:
    """``config`` with so many QLLaMA layers."""
    return replace(config, qllama=replace(config.qllama, num_hidden_layers=layers))


class InternVL(Family[InternVLConfig]):
    """InternVL-C and InternVL-G; a file of the older layout holds InternVL-C alone."""

    name = "internvl"
    title = "an InternVL-C or InternVL-G"
    config_type = InternVLConfig
    components = (Vision(), Query(), Text(), Step(), Match())
    form = CONTRASTIVE
    runtime = "model:InternVL"

    def claims(self, data: Mapping[str, Any]) -> bool:
        return "qllama_config" in data and not str(data.get("model_type", "")).startswith("llava")

    def read_config(self, data: dict[str, Any], source: str, folder: Path | None = None) -> InternVLConfig:
        return InternVLConfig.from_published(data, source)

    def has(self, config: InternVLConfig, component: Component[Any]) -> bool:
        return not config.contrastive_only or component.lacking is None

    def shapes(self, config: InternVLConfig) -> dict[str, Shape]:
        return {"logit_scale": (), **super().shapes(config)}

    def depths(self, config: InternVLConfig) -> tuple[int, int]:
        return config.vision.num_hidden_layers, config.qllama.num_hidden_layers

    def sliced(self, config: InternVLConfig, vision: int, text: int) -> InternVLConfig:
        tower = replace(config.vision, num_hidden_layers=vision)
        return replace(with_layers(config, text), vision=tower)

    def model(self, config: InternVLConfig) -> nn.Module:
        from ..internvl import InternVLModel

        return InternVLModel(config)

    def resized(self, config: InternVLConfig, image_size: int) -> InternVLConfig:
        return replace(config, vision=replace(config.vision, image_size=image_size))

    def patch_size(self, config: InternVLConfig) -> int:
        return config.vision.patch_size

    def with_features(self, config: InternVLConfig, blocks: tuple[int, ...]) -> InternVLConfig:
        return replace(config, vision=replace(config.vision, feature_blocks=blocks))

    def feature_depth(self, config: InternVLConfig) -> int:
        return config.vision.num_hidden_layers

    def identity(self, config: InternVLConfig) -> dict[str, Any]:
        return self.with_features(config, ()).to_published()

    def vocabulary(self, config: InternVLConfig) -> int:
        return config.qllama.vocab_size


register(InternVL())
