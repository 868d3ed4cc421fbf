"""Names and shapes of every tensor: the published layout, and the older single-file ``internvl_c`` layout.

Source: the state dict of InternVL-14B-224px (1,048 tensors) and ``internvl_c_13b_224px.pth``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import CheckpointError
from .config import InternVLConfig, QLlamaConfig, VisionConfig

Shape = tuple[int, ...]

VISION = "vision_model."
CHAT_TOWER = "model.vision_tower.vision_tower."
HEADS = ("clip_projector.", "clip_projector2.", "text_projection", "logit_scale", "itm_head.")
"""Tensors of an InternVL outside its towers: not part of a chat model."""
PUBLISHED_HEAD_DIM = 128
PUBLISHED_POOL_HEADS = 16

# Old transformers releases stored the rotary frequencies as a buffer; they follow from the config.
_ROTARY = re.compile(r"(\w+\.)*layers\.\d+\.(self_attn|attention)\.rotary_emb\.inv_freq")


def is_ignored(name: str) -> bool:
    """Whether a stored tensor is a rotary frequency buffer, the only surplus a checkpoint may carry."""
    return _ROTARY.fullmatch(name) is not None


def vit_shapes(v: VisionConfig, prefix: str, blocks: int | None = None) -> dict[str, Shape]:
    """Tensors of InternViT under ``prefix``; of its first ``blocks`` only, if given."""
    width, mlp = v.hidden_size, v.intermediate_size
    base = f"{prefix}embeddings."
    shapes: dict[str, Shape] = {
        base + "class_embedding": (1, 1, width),
        base + "position_embedding": (1, v.num_tokens, width),
        base + "patch_embedding.weight": (width, 3, v.patch_size, v.patch_size),
        base + "patch_embedding.bias": (width,),
    }
    for i in range(v.num_hidden_layers if blocks is None else blocks):
        layer = f"{prefix}encoder.layers.{i}."
        shapes[layer + "attn.qkv.weight"] = (3 * width, width)
        if v.qkv_bias:
            shapes[layer + "attn.qkv.bias"] = (3 * width,)
        if v.qk_normalization:
            shapes[layer + "attn.q_norm.weight"] = shapes[layer + "attn.k_norm.weight"] = (width,)
        shapes[layer + "attn.proj.weight"] = (width, width)
        shapes[layer + "mlp.fc1.weight"], shapes[layer + "mlp.fc1.bias"] = (mlp, width), (mlp,)
        shapes[layer + "mlp.fc2.weight"] = (width, mlp)
        for name in ("attn.proj.bias", "mlp.fc2.bias", "norm1.weight", "norm2.weight", "ls1", "ls2"):
            shapes[layer + name] = (width,)
        if v.norm_type == "layer_norm":
            shapes[layer + "norm1.bias"] = shapes[layer + "norm2.bias"] = (width,)
    return shapes


def llama_layer_shapes(layer: str, q: QLlamaConfig, vision_width: int | None = None) -> dict[str, Shape]:
    """Tensors of a LLaMA layer, with cross-attention over tokens of ``vision_width`` if given."""
    width, mlp = q.hidden_size, q.intermediate_size
    shapes: dict[str, Shape] = {layer + f"self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
    shapes[layer + "mlp.gate_proj.weight"] = shapes[layer + "mlp.up_proj.weight"] = (mlp, width)
    shapes[layer + "mlp.down_proj.weight"] = (width, mlp)
    shapes[layer + "input_layernorm.weight"] = shapes[layer + "post_attention_layernorm.weight"] = (width,)
    if vision_width is not None:
        for p, size in (("q", width), ("k", vision_width), ("v", vision_width), ("o", width)):
            shapes[layer + f"cross_attn.{p}_proj.weight"] = (width, size)
        shapes[layer + "cross_attn.norm1.weight"] = (width,)
        shapes[layer + "cross_attn.norm2.weight"] = (vision_width,)
    return shapes


def pool_shapes(head: str, width: int, out: int) -> dict[str, Shape]:
    """Tensors of an attention pooling head under the prefix ``head``."""
    shapes: dict[str, Shape] = {}
    for p in "qkv":
        shapes[head + f"norm1_{p}.weight"] = shapes[head + f"norm1_{p}.bias"] = (width,)
        shapes[head + f"cross_attn.{p}_bias"] = (width,)
        shapes[head + f"cross_attn.{p}.weight"] = (width, width)
    shapes[head + "cross_attn.proj.weight"], shapes[head + "cross_attn.proj.bias"] = (out, width), (out,)
    return shapes


def published_key(older: str) -> str:
    """The published name of a tensor of the older layout."""
    fixed = {
        "cls_token": "vision_model.embeddings.class_embedding",
        "pos_embed": "vision_model.embeddings.position_embedding",
    }
    if older in fixed:
        return fixed[older]
    for prefix, new in (
        ("patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
        ("blocks.", "vision_model.encoder.layers."),
        ("transformer.", "qllama.model."),
    ):
        if older.startswith(prefix):
            key = new + older[len(prefix) :]
            return re.sub(r"\.(ls[12])\.gamma$", r".\1", key) if prefix == "blocks." else key
    return older


def infer_config(shapes: Mapping[str, Shape], source: str) -> InternVLConfig:
    """Sizes of an InternVL-C from its tensors' shapes (published keys), for files without a config.

    Head counts cannot be read from shapes: the published head width (128 in both towers) and the published
    16 pooling heads are assumed, as are the epsilons and the rotary base. CheckpointError if that does not
    fit; a ``config.json`` next to the file then gives the sizes.
    """
    fix = "Put the model's config.json next to the file."
    try:
        patch = shapes["vision_model.embeddings.patch_embedding.weight"]
        _, tokens, width = shapes["vision_model.embeddings.position_embedding"]
        vocab, text_width = shapes["qllama.model.embed_tokens.weight"]
        fc1 = shapes["vision_model.encoder.layers.0.mlp.fc1.weight"]
        gate = shapes["qllama.model.layers.0.mlp.gate_proj.weight"]
        _, embed = shapes["text_projection"]
        patch_size, mlp, text_mlp = patch[3], fc1[0], gate[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{source} is not an InternVL-C checkpoint of the older layout.",
            f"Its sizes cannot be read from its tensors ({error}).",
            "Give the folder of a published checkpoint, or a whole internvl_c file.",
        ) from error
    grid = round((tokens - 1) ** 0.5)
    if grid * grid != tokens - 1:
        raise CheckpointError(f"{source}: {tokens - 1} patch positions make no square grid.", "", fix)
    for name, size in (("vision", width), ("text", text_width)):
        if size % PUBLISHED_HEAD_DIM:
            raise CheckpointError(
                f"{source}: the number of {name} attention heads is unknown.",
                f"The width {size} does not split into heads of {PUBLISHED_HEAD_DIM}, the published width.",
                fix,
            )
    layer0 = "vision_model.encoder.layers.0.attn."
    return InternVLConfig(
        vision=VisionConfig(
            hidden_size=width,
            num_hidden_layers=_layers(shapes, "vision_model.encoder.layers."),
            num_attention_heads=width // PUBLISHED_HEAD_DIM,
            intermediate_size=mlp,
            image_size=grid * patch_size,
            patch_size=patch_size,
            qkv_bias=layer0 + "qkv.bias" in shapes,
            qk_normalization=layer0 + "q_norm.weight" in shapes,
        ),
        qllama=QLlamaConfig(
            hidden_size=text_width,
            num_hidden_layers=_layers(shapes, "qllama.model.layers."),
            num_attention_heads=text_width // PUBLISHED_HEAD_DIM,
            intermediate_size=text_mlp,
            vocab_size=vocab,
        ),
        clip_embed_dim=embed,
        attn_pool_num_heads=PUBLISHED_POOL_HEADS,
    )


def _layers(shapes: Mapping[str, Shape], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
    numbers = [int(m.group(1)) for m in map(pattern.match, shapes) if m]
    return max(numbers) + 1 if numbers else 0
