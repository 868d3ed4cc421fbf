"""Multiply-accumulates of the building blocks of families, from their sizes.

The independent count that the graph's own (:mod:`..profiles.cost.flops`) is checked against; keys are the
graph's layer types. Counted are matrix products, the patch convolution and the two products of attention
(all key positions of a causal mask included, as the published counts do), not norms, activations and other
elementwise work.
"""

from __future__ import annotations

from .config import InternVLConfig, QLlamaConfig, VisionConfig
from .decoder_config import DecoderConfig
from .registry import Macs


def vit(v: VisionConfig, blocks: int, tokens: int, tower: str) -> Macs:
    """InternViT's ``blocks`` and patch convolution on one image of ``tokens``, under the prefix ``tower``."""
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


def llama(q: QLlamaConfig, new: int, total: int, stack: str) -> Macs:
    """``new`` positions that attend to ``total``, in the layers under the prefix ``stack``."""
    layer, square = f"{stack}layers.*.", new * q.hidden_size**2
    mlp = new * q.hidden_size * q.intermediate_size
    per_layer = {f"self_attn.{p}_proj": square for p in "qkvo"}
    per_layer["self_attn/Attention"] = 2 * new * total * q.hidden_size
    per_layer |= {f"mlp.{p}_proj": mlp for p in ("gate", "up", "down")}
    return {layer + key: q.num_hidden_layers * count for key, count in per_layer.items()}


def decoder(c: DecoderConfig, new: int, total: int, stack: str) -> Macs:
    """As :func:`llama`, of a decoder of any kind. In a graph every expert computes every position."""
    layer, hidden, layers = f"{stack}layers.*.", c.hidden_size, c.num_hidden_layers
    keys = total + c.sinks  # a sink is one more
    per_layer = {
        "self_attn.q_proj": new * hidden * c.query_width,
        "self_attn.k_proj": new * hidden * c.key_width,
        "self_attn.v_proj": new * hidden * c.key_width,
        "self_attn.o_proj": new * hidden * c.query_width,
        "self_attn/Attention": 2 * new * keys * c.query_width,
    }
    counts = {layer + key: layers * count for key, count in per_layer.items()}
    sparse = sum(c.sparse(i) for i in range(layers))
    if dense := (layers - sparse) * new * hidden * c.intermediate_size:
        counts |= {f"{layer}mlp.{p}_proj": dense for p in ("gate", "up", "down")}
    if c.moe is not None and sparse:
        counts[f"{layer}mlp.gate"] = sparse * new * hidden * c.moe.experts
        experts = sparse * new * hidden * c.moe.width * c.moe.experts
        counts |= {f"{layer}mlp.experts.*.{p}_proj": experts for p in ("gate", "up", "down")}
    return counts


def cross_attention(config: InternVLConfig, tokens: int, stack: str) -> Macs:
    """QLLaMA's queries over ``tokens`` vision tokens."""
    width, queries = config.qllama.hidden_size, config.num_query_token
    count = sum(config.has_cross_attention(i) for i in range(config.qllama.num_hidden_layers))
    layer = f"{stack}layers.*.cross_attn"
    macs = {f"{layer}.{p}_proj": count * queries * width**2 for p in "qo"}
    macs |= {f"{layer}.{p}_proj": count * tokens * width * config.vision.hidden_size for p in "kv"}
    macs[f"{layer}/Attention"] = count * 2 * queries * tokens * width
    return macs


def mlp(name: str, rows: int, width: int, out: int) -> Macs:
    """A two-layer projector ``name`` on ``rows``."""
    return {f"{name}.0": rows * width * out, f"{name}.2": rows * out**2}


def pool(head: str, tokens: int, width: int, embed: int) -> Macs:
    """An attention pooling head over ``tokens``."""
    return {
        f"{head}.cross_attn.q": width**2,
        f"{head}.cross_attn.k": tokens * width**2,
        f"{head}.cross_attn.v": tokens * width**2,
        f"{head}.cross_attn/Attention": 2 * tokens * width,
        f"{head}.cross_attn.proj": width * embed,
    }
