"""InternVL in the layout of transformers against the installed library, at random sizes and settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ivl_export.models import load_chat
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.tiles_chat import TilesChatModel
from ivl_export.models.tiles_config import TilesConfig

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]

TOLERANCE = 2e-5
IMAGE = 90
ORIGINAL = "original_max_position_embeddings"


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def longrope(rng: random.Random, head: int) -> dict[str, Any]:
    factors = {name: [1 + rng.random() * most for _ in range(head // 2)] for name, most in
               (("short_factor", 0.3), ("long_factor", 8.0))}  # fmt: skip
    return rope("longrope", **factors)


FORMS: dict[str, Callable[[random.Random], tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "llama, llama3, biases, an earlier state": lambda rng: (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10,
         **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **{ORIGINAL: 64})},
        {"vision_feature_layer": -rng.randint(2, 4)},
    ),
    "llama, linear, tied": lambda rng: (
        "Llama", rope("linear", factor=rng.uniform(2, 4)), {"tie_word_embeddings": True}
    ),
    "llama, dynamic, beyond its positions": lambda rng: (
        "Llama", {"max_position_embeddings": rng.randint(10, 20), **rope("dynamic", factor=2.5)}, {}
    ),
    "qwen2, yarn, windows": lambda rng: (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
         **rope("yarn", factor=4.0, **{ORIGINAL: 32})},
        {"vision": {"attention_bias": False}},
    ),
    "qwen3, yarn with its own scale, the tower's 6B form": lambda rng: (
        "Qwen3",
        {"head_dim": 24, "attention_bias": True,
         **rope("yarn", factor=3.0, mscale=0.7, mscale_all_dim=0.4, beta_fast=16.0, **{ORIGINAL: 32})},
        {"vision": {"norm_type": "rms_norm", "use_qk_norm": True, "layer_norm_eps": 1e-3}},
    ),
    "qwen3_moe, some layers without experts": lambda rng: (
        "Qwen3Moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [1],
         "norm_topk_prob": rng.random() < 0.5, "head_dim": 12},
        {"vision": {"use_qk_norm": True}},
    ),
    "phi3, an answer that crosses to the long factors": lambda rng: (
        "Phi3",
        {"max_position_embeddings": 256, ORIGINAL: 26, **longrope(rng, 8)},
        {},
    ),
    "phi3, a prompt of long factors, a window": lambda rng: (
        "Phi3",
        {"max_position_embeddings": 256, ORIGINAL: 8, "sliding_window": 9, **longrope(rng, 8)},
        {"downsample_ratio": 0.25},
    ),
    "gpt_oss, gates at their limit": lambda rng: (
        "GptOss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": rng.randint(1, 3), "sliding_window": 5,
         "swiglu_limit": 0.3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {},
    ),
}  # fmt: skip


def randomised(model: Any, seed: int) -> None:
    """Weights that hide nothing: no norm of ones, no bias of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "position_embed" in name or "cls_token" in name:
            p.data = noise * 0.5
        elif "lambda" in name:
            p.data = 0.4 + 0.1 * noise
        elif p.dim() > 1:
            p.data = noise * (0.05 if p.dim() == 4 else p.shape[-1] ** -0.5)
        else:
            p.data = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)


def saved(folder: Path, form: str, seed: int, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> None:
    """A random model of ``form`` as transformers writes it."""
    import transformers

    rng = random.Random(seed)
    kind, text, top = FORMS[form](rng)
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40,
              "image_size": [56, 56], "attention_bias": True, **top.pop("vision", {})}  # fmt: skip
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 8 * rng.randint(3, 8),
             "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": rng.choice([1, 2, 3]),
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=getattr(transformers, f"{kind}Config")(**{**sizes, **text}).to_dict(),
        image_token_id=IMAGE,
        **{"tie_word_embeddings": False, **top},
    )
    model = transformers.InternVLForConditionalGeneration(config)
    randomised(model, seed)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


def reference(folder: Path) -> Any:
    import transformers

    cls = transformers.InternVLForConditionalGeneration
    return cls.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def prompt(config: TilesConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Three tiles of two images, and a prompt with both."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 85, (12,), generator=generator).tolist()
    v = config.num_visual
    ids = [*text[:4], *[IMAGE] * (2 * v), *text[4:7], *[IMAGE] * v, *text[7:]]
    return torch.randn(3, 3, 56, 56, generator=generator), torch.tensor([ids])


def without_end(chat: TilesChatModel) -> TilesChatModel:
    """``chat``, whose answers do not end."""
    chat.config = replace(chat.config, decoder=replace(chat.config.decoder, eos_token_ids=()))
    return chat


def compare(folder: Path, seed: int) -> None:
    loaded: Any = load_chat(folder)
    theirs, chat = reference(folder), without_end(loaded)
    assert chat.config.unknown_keys == ()
    pixels, ids = prompt(chat.config, seed)
    with torch.no_grad():
        want, got = theirs(input_ids=ids, pixel_values=pixels).logits, chat.logits(ids, pixels)
    assert float((want - got).abs().max() / want.abs().max()) < TOLERANCE
    new = theirs.generate(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=12,
        do_sample=False, suppress_tokens=[IMAGE], eos_token_id=None, pad_token_id=0,
    )[:, ids.shape[1] :]  # fmt: skip
    assert chat.generate(pixels, ids).tolist() == new.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_random_models_equal_transformers(form: str, tmp_path: Path) -> None:
    seed = sum(map(ord, form))
    saved(tmp_path, form, seed)
    compare(tmp_path, seed)


def test_shards_of_sixteen_bits(tmp_path: Path) -> None:
    form = "qwen3_moe, some layers without experts"
    saved(tmp_path, form, 5, torch.bfloat16, "60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    compare(tmp_path, 5)
    checkpoint = open_checkpoint(tmp_path)
    chat: Any = load_chat(checkpoint, dtype=None)
    assert {p.dtype for p in chat.parameters()} == {torch.bfloat16}
    key = "language_model.model.layers.0.mlp.experts.3.up_proj.weight"
    assert chat.state_dict()[key].data_ptr() == checkpoint.load(key).data_ptr(), "a view of the mapped file"


@torch.no_grad()
@pytest.mark.parametrize("side", [28, 84])
def test_tiles_of_another_size_than_the_stored_grid(side: int, tmp_path: Path) -> None:
    saved(tmp_path, "qwen2, yarn, windows", 7)
    theirs, chat = reference(tmp_path), load_chat(tmp_path)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    want = theirs.get_image_features(pixels).pooler_output
    got = chat.visual_embeds(pixels)
    assert float((want - got).abs().max() / want.abs().max()) < TOLERANCE


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    saved(tmp_path, "llama, linear, tied", 3)
    checkpoint = open_checkpoint(tmp_path)
    head, embeddings = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    assert checkpoint.tensors[head] == checkpoint.tensors[embeddings]
    chat: Any = load_chat(checkpoint)
    assert chat.language_model.lm_head.weight is chat.language_model.model.embed_tokens.weight
