"""Multiply-accumulates of InternVL and of InternVL-Chat from the configuration alone.

The independent count that the graph's own (:mod:`.flops`) is checked against; keys are the graph's layer
types. Counted are matrix products, the patch convolution and the two products of attention (all key positions
of a causal mask included, as the published counts do), not norms, activations and other elementwise work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...models.config import ChatConfig, InternVLConfig, QLlamaConfig, VisionConfig, Whole
from ...models.layout import CHAT_TOWER, VISION

Macs = dict[str, int]


@dataclass(frozen=True)
class Towers:
    """MACs of one sample as papers count them: without pooling heads, text projection and lm_head."""

    vit: int
    qllama_image: int
    qllama_text: int


def towers(config: InternVLConfig, text_tokens: int = 80) -> Towers:
    """MACs of one image through InternViT and QLLaMA's queries, and of one text of ``text_tokens``."""
    counts = (
        component_macs("vision", config, {}),
        component_macs("qllama_query", config, {}),
        component_macs("qllama_text", config, {"text": text_tokens}),
    )
    prefixes = ("vision_model.", "qllama.model.")
    return Towers(*(sum(n for key, n in macs.items() if key.startswith(prefixes)) for macs in counts))


def component_macs(name: str, config: Whole, sizes: Mapping[str, int]) -> Macs:
    """Layer type to MACs of one call of component ``name``.

    ``sizes`` are its dynamic axes: ``batch`` (1 if not given), ``text``, ``past``. KeyError for an unknown
    component or a size that is missing.
    """
    macs = _chat(name, config, sizes) if isinstance(config, ChatConfig) else _internvl(name, config, sizes)
    return {key: count * sizes.get("batch", 1) for key, count in macs.items()}


def _internvl(name: str, config: InternVLConfig, sizes: Mapping[str, int]) -> Macs:
    queries, q, v, stack = config.num_query_token, config.qllama, config.vision, "qllama.model."
    if name == "vision":
        macs = _vit(v, v.num_hidden_layers, v.num_tokens, VISION)
        return macs | _pool("clip_projector", v.num_tokens, v.hidden_size, config.clip_embed_dim)
    if name == "qllama_query":
        macs = _llama(q, queries, queries, stack) | _cross(config, v.num_tokens, stack)
        return macs | _pool("clip_projector2", queries, q.hidden_size, config.clip_embed_dim)
    if name == "qllama_text":
        macs = _llama(q, sizes["text"], sizes["text"], stack)
        return macs | {"text_projection": q.hidden_size * config.clip_embed_dim}
    if name == "qllama_itm":
        rows = queries + sizes["text"]
        macs = _llama(q, rows, rows, stack) | _cross(config, v.num_tokens, stack)
        return macs | {"itm_head": queries * q.hidden_size * 2}
    if name == "qllama_step":
        macs = _llama(q, sizes["text"], sizes["past"] + sizes["text"], stack)
        return macs | {"qllama.lm_head": q.hidden_size * q.vocab_size}
    raise KeyError(name)


def _chat(name: str, config: ChatConfig, sizes: Mapping[str, int]) -> Macs:
    llama, v, queries = config.decoder, config.vision, config.queries
    out, projector = llama.hidden_size, "model.mm_projector"
    if name == "vision_chat":
        tower, mlp = (CHAT_TOWER + VISION, f"{projector}.mlp1") if queries else (CHAT_TOWER, projector)
        macs = _vit(v, config.vision_blocks, config.num_tokens, tower)
        return macs | _mlp(mlp, config.num_features, v.hidden_size, out)
    if name == "query_chat" and queries:
        stack, count = f"{CHAT_TOWER}qllama.model.", config.num_queries
        macs = _llama(queries.qllama, count, count, stack) | _cross(queries, config.num_tokens, stack)
        return macs | _mlp(f"{projector}.mlp2", count, queries.qllama.hidden_size, out)
    if name == "decoder_embed":
        return {}
    if name == "decoder":
        macs = _llama(llama, sizes["text"], sizes["past"] + sizes["text"], "model.")
        return macs | {"lm_head": out * llama.vocab_size}
    raise KeyError(name)


def _vit(v: VisionConfig, blocks: int, tokens: int, tower: str) -> Macs:
    width, layer = v.hidden_size, f"{tower}encoder.layers.*."
    per_layer = {
        "attn.qkv": 3 * tokens * width**2,
        "attn/Attention": 2 * tokens**2 * width,
        "attn.proj": tokens * width**2,
        "mlp.fc1": tokens * width * v.intermediate_size,
        "mlp.fc2": tokens * width * v.intermediate_size,
    }
    macs = {layer + key: blocks * count for key, count in per_layer.items()}
    return macs | {f"{tower}embeddings.patch_embedding": (tokens - 1) * 3 * v.patch_size**2 * width}


def _llama(q: QLlamaConfig, new: int, total: int, stack: str) -> Macs:
    """``new`` positions that attend to ``total``."""
    layer, square = f"{stack}layers.*.", new * q.hidden_size**2
    mlp = new * q.hidden_size * q.intermediate_size
    per_layer = {f"self_attn.{p}_proj": square for p in "qkvo"}
    per_layer["self_attn/Attention"] = 2 * new * total * q.hidden_size
    per_layer |= {f"mlp.{p}_proj": mlp for p in ("gate", "up", "down")}
    return {layer + key: q.num_hidden_layers * count for key, count in per_layer.items()}


def _cross(config: InternVLConfig, tokens: int, stack: str) -> Macs:
    width, queries = config.qllama.hidden_size, config.num_query_token
    count = sum(config.has_cross_attention(i) for i in range(config.qllama.num_hidden_layers))
    layer = f"{stack}layers.*.cross_attn"
    macs = {f"{layer}.{p}_proj": count * queries * width**2 for p in "qo"}
    macs |= {f"{layer}.{p}_proj": count * tokens * width * config.vision.hidden_size for p in "kv"}
    macs[f"{layer}/Attention"] = count * 2 * queries * tokens * width
    return macs


def _mlp(name: str, rows: int, width: int, out: int) -> Macs:
    return {f"{name}.0": rows * width * out, f"{name}.2": rows * out**2}


def _pool(head: str, tokens: int, width: int, embed: int) -> Macs:
    return {
        f"{head}.cross_attn.q": width**2,
        f"{head}.cross_attn.k": tokens * width**2,
        f"{head}.cross_attn.v": tokens * width**2,
        f"{head}.cross_attn/Attention": 2 * tokens * width,
        f"{head}.cross_attn.proj": width * embed,
    }
