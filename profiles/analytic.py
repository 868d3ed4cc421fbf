"""Multiply-accumulates of InternVL from its configuration alone.

The independent count that the graph's own (:mod:`.flops`) is checked against; keys are the graph's layer
types. Counted are matrix products, the patch convolution and the two products of attention (all key positions
of a causal mask included, as the published counts do), not norms, activations and other elementwise work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.config import InternVLConfig

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


def component_macs(name: str, config: InternVLConfig, sizes: Mapping[str, int]) -> Macs:
    """Layer type to MACs of one call of component ``name``.

    ``sizes`` are its dynamic axes: ``batch`` (1 if not given), ``text``, ``past``. KeyError for an unknown
    component or a size that is missing.
    """
    queries = config.num_query_token
    if name == "vision":
        macs = _vision(config)
    elif name == "qllama_query":
        macs = _llama(config, queries, queries) | _cross(config, queries)
        macs |= _pool("clip_projector2", queries, config.qllama.hidden_size, config.clip_embed_dim)
    elif name == "qllama_text":
        macs = _llama(config, sizes["text"], sizes["text"])
        macs["text_projection"] = config.qllama.hidden_size * config.clip_embed_dim
    elif name == "qllama_itm":
        macs = _llama(config, queries + sizes["text"], queries + sizes["text"]) | _cross(config, queries)
        macs["itm_head"] = queries * config.qllama.hidden_size * 2
    elif name == "qllama_step":
        macs = _llama(config, sizes["text"], sizes["past"] + sizes["text"])
        macs["qllama.lm_head"] = config.qllama.hidden_size * config.qllama.vocab_size
    else:
        raise KeyError(name)
    return {key: count * sizes.get("batch", 1) for key, count in macs.items()}


def _vision(config: InternVLConfig) -> Macs:
    v = config.vision
    tokens, width, layer = v.num_tokens, v.hidden_size, "vision_model.encoder.layers.*."
    per_layer = {
        "attn.qkv": 3 * tokens * width**2,
        "attn/Attention": 2 * tokens**2 * width,
        "attn.proj": tokens * width**2,
        "mlp.fc1": tokens * width * v.intermediate_size,
        "mlp.fc2": tokens * width * v.intermediate_size,
    }
    macs = {layer + key: v.num_hidden_layers * count for key, count in per_layer.items()}
    macs["vision_model.embeddings.patch_embedding"] = (tokens - 1) * 3 * v.patch_size**2 * width
    return macs | _pool("clip_projector", tokens, width, config.clip_embed_dim)


def _llama(config: InternVLConfig, new: int, total: int) -> Macs:
    """``new`` positions that attend to ``total``."""
    q = config.qllama
    layer, square = "qllama.model.layers.*.", new * q.hidden_size**2
    mlp = new * q.hidden_size * q.intermediate_size
    per_layer = {f"self_attn.{p}_proj": square for p in "qkvo"}
    per_layer["self_attn/Attention"] = 2 * new * total * q.hidden_size
    per_layer |= {f"mlp.{p}_proj": mlp for p in ("gate", "up", "down")}
    return {layer + key: q.num_hidden_layers * count for key, count in per_layer.items()}


def _cross(config: InternVLConfig, queries: int) -> Macs:
    width, tokens = config.qllama.hidden_size, config.vision.num_tokens
    count = sum(config.has_cross_attention(i) for i in range(config.qllama.num_hidden_layers))
    layer = "qllama.model.layers.*.cross_attn"
    macs = {f"{layer}.{p}_proj": count * queries * width**2 for p in "qo"}
    macs |= {f"{layer}.{p}_proj": count * tokens * width * config.vision.hidden_size for p in "kv"}
    macs[f"{layer}/Attention"] = count * 2 * queries * tokens * width
    return macs


def _pool(head: str, tokens: int, width: int, embed: int) -> Macs:
    return {
        f"{head}.cross_attn.q": width**2,
        f"{head}.cross_attn.k": tokens * width**2,
        f"{head}.cross_attn.v": tokens * width**2,
        f"{head}.cross_attn/Attention": 2 * tokens * width,
        f"{head}.cross_attn.proj": width * embed,
    }
