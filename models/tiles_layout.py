"""Names and places of InternVL 1.1 to 3.5's tensors in published checkpoints, and their keys here.

One set of keys serves both layouts and all decoders: OpenGVLab's for the tower and the projector, LLaMA's for
the decoder, an expert's weights one by one. Published files name and join them in other ways:

- transformers has other prefixes, of two styles, and the tower's q, k and v apart;
- InternLM2 has q, k and v in ``wqkv``, a group of query heads, its key and its value after another;
- Phi-3 has ``qkv_proj`` and ``gate_up_proj``;
- experts may be stacked; GPT-OSS's are, as [in, out], and gates and ups alternate.

:func:`sources` gives the rows of stored tensors that make up each key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from .decoder_config import DecoderConfig
from .layout import Shape, vit_shapes
from .tiles_config import TilesConfig
from .tiles_splits import (
    BLOCKS,
    EMBEDDINGS,
    LANGUAGE,
    LM_HEAD,
    PROJECTOR,
    VISION,
    Part,
    Source,
    split_decoder,
)

NEWER = "model.vision_tower."
"""Prefix of a tower's names in the newer style of transformers; the older one lacks ``model.``."""


def tiles_shapes(config: TilesConfig) -> dict[str, Shape]:
    """Key to shape, for every tensor a model of ``config`` has."""
    shapes = vit_shapes(config.vision, VISION) | projector_shapes(config) | decoder_shapes(config)
    return shapes | {EMBEDDINGS: (config.decoder.vocab_size, config.decoder.hidden_size)}


def projector_shapes(config: TilesConfig) -> dict[str, Shape]:
    """Those of the projector."""
    width, hidden = config.projector_width, config.decoder.hidden_size
    return {
        f"{PROJECTOR}0.weight": (width,),
        f"{PROJECTOR}0.bias": (width,),
        f"{PROJECTOR}1.weight": (hidden, width),
        f"{PROJECTOR}1.bias": (hidden,),
        f"{PROJECTOR}3.weight": (hidden, hidden),
        f"{PROJECTOR}3.bias": (hidden,),
    }


def decoder_shapes(config: TilesConfig) -> dict[str, Shape]:
    """Those of the decoder and its lm_head, without the embeddings."""
    c = config.decoder
    shapes: dict[str, Shape] = {LM_HEAD: (c.vocab_size, c.hidden_size)}
    shapes[f"{LANGUAGE}model.norm.weight"] = (c.hidden_size,)
    for i in range(c.num_hidden_layers):
        shapes |= {f"{BLOCKS}{i}.{name}": shape for name, shape in _block(c, i)}
    return shapes


def _block(c: DecoderConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    hidden = c.hidden_size
    widths = {"q": c.query_width, "k": c.key_width, "v": c.key_width}
    for name, width in widths.items():
        yield from _linear(f"self_attn.{name}_proj", width, hidden, c.qkv_bias)
    yield from _linear("self_attn.o_proj", hidden, c.query_width, c.o_bias)
    if c.qk_norm:
        yield from ((f"self_attn.{name}_norm.weight", (c.head_dim,)) for name in "qk")
    if c.sinks:
        yield "self_attn.sinks", (c.num_attention_heads,)
    yield from ((f"{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
    if c.moe is None or not c.sparse(layer):
        yield from _mlp("mlp", hidden, c.intermediate_size, c.mlp_bias)
        return
    yield from _linear("mlp.gate", c.moe.experts, hidden, c.moe.gpt_oss)
    for e in range(c.moe.experts):
        yield from _mlp(f"mlp.experts.{e}", hidden, c.moe.width, c.moe.gpt_oss)


def _mlp(name: str, hidden: int, width: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.gate_proj", width, hidden, bias)
    yield from _linear(f"{name}.up_proj", width, hidden, bias)
    yield from _linear(f"{name}.down_proj", hidden, width, bias)


def _linear(name: str, out: int, width: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, width)
    if bias:
        yield f"{name}.bias", (out,)


def sources(config: TilesConfig, stored: Collection[str]) -> dict[str, Source]:
    """Key -> its source, in a checkpoint with tensors named ``stored``.

    ``stored`` decides between styles of prefixes, between experts that are stacked and those that are not,
    and whether embeddings are tied: a stored lm_head always wins, and the embeddings are used where there is
    none, unless the config says that there is one.
    """
    shapes = tiles_shapes(config)
    by_key = {key: Source(shape, (Part(key, shape),)) for key, shape in shapes.items()}
    by_key = split_decoder(config.decoder, by_key, stored)
    if config.layout == "native":
        by_key = {key: _native(source, _native_names(stored)) for key, source in by_key.items()}
    if by_key[LM_HEAD].parts[0].name not in stored and config.decoder.tied is not False:
        by_key[LM_HEAD] = by_key[EMBEDDINGS]
    return by_key


def published_shapes(config: TilesConfig) -> dict[str, Shape]:
    """Stored name to shape of a checkpoint as it is published: the other direction of :func:`sources`.

    In the layout of transformers with the newer prefixes; experts of Qwen3-MoE one by one; with an lm_head,
    unless the config says that embeddings are tied.
    """
    tied = config.decoder.tied is True
    written = replace(config, decoder=replace(config.decoder, tied=tied))
    return stored_shapes(sources(written, (NEWER,)))


def stored_shapes(sources: dict[str, Source]) -> dict[str, Shape]:
    """Stored name to shape, for every tensor that :func:`sources` reads."""
    return {part.name: part.shape for source in sources.values() for part in source.parts}


def _native(source: Source, rename: Callable[[str], str]) -> Source:
    """``source`` as transformers stores it."""
    (part,) = source.parts
    if ".attn.qkv." not in part.name:
        return replace(source, parts=(replace(part, name=rename(part.name)),))
    rows = part.shape[0] // 3
    names = (part.name.replace(".attn.qkv.", f".attn.{p}_proj.") for p in "qkv")
    return replace(source, parts=tuple(Part(rename(name), (rows, *part.shape[1:])) for name in names))


_NATIVE = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
_NATIVE_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def _native_names(stored: Collection[str]) -> Callable[[str], str]:
    """From OpenGVLab's names to those of transformers, in the style of prefixes that ``stored`` has.

    The newer style has ``model.`` before all but the lm_head; the conversions of 2025 have it in the decoder.
    """
    newer = any(name.startswith(NEWER) for name in stored)
    before = "model." if newer else ""

    def rename(name: str) -> str:
        if name.startswith(VISION):
            rest = name.removeprefix(VISION)
            for ours, theirs in _NATIVE:
                rest = rest.replace(ours, theirs)
            return f"{before}vision_tower.{rest}"
        if name.startswith(PROJECTOR):
            number, _, leaf = name.removeprefix(PROJECTOR).partition(".")
            return f"{before}multi_modal_projector.{_NATIVE_PROJECTOR[number]}.{leaf}"
        if not newer:
            return name
        return name.replace(f"{LANGUAGE}model.", f"model.{LANGUAGE}").replace(LM_HEAD, "lm_head.weight")

    return rename
