"""Sizes of published models of InternVL 2 to 3.5, for estimates, made-up checkpoints and tests."""

from __future__ import annotations

from dataclasses import replace

from .config import VisionConfig
from .decoder_config import DecoderConfig, MoEConfig
from .rope_config import RopeConfig
from .tiles_config import TilesConfig

VIT_300M = VisionConfig(
    1024, 24, 16, 4096, image_size=448, qkv_bias=True, qk_normalization=False, norm_type="layer_norm"
)
VIT_6B = VisionConfig(num_hidden_layers=45, image_size=448)
_QWEN_ROPE = RopeConfig(1e6, "dynamic", 2.0, 32768)


def _qwen2(layers: int, width: int, heads: int, key_heads: int, mlp: int, vocabulary: int) -> DecoderConfig:
    return DecoderConfig(
        "qwen2", vocabulary, width, layers, heads, key_heads, width // heads, mlp, rope=_QWEN_ROPE,
        qkv_bias=True, tied=False, bos_token_id=151643, eos_token_ids=(151643, 151645),
    )  # fmt: skip


def _qwen3(layers: int, width: int, heads: int, mlp: int) -> DecoderConfig:
    return DecoderConfig(
        "qwen3", 151936, width, layers, heads, 8, 128, mlp, max_position_embeddings=40960,
        rope=RopeConfig(1e6), qk_norm=True, tied=False, bos_token_id=151643, eos_token_ids=(151645,),
    )  # fmt: skip


def _chat(tower: VisionConfig, decoder: DecoderConfig, image_token: int, template: str) -> TilesConfig:
    return TilesConfig(tower, decoder, image_token_id=image_token, template=template)


_INTERNLM2 = DecoderConfig(
    "internlm2", 92553, 4096, 32, 32, 8, 128, 14336, 1e-5, rope=RopeConfig(1e6, "dynamic", 2.0, 32768),
    tied=False, bos_token_id=1, eos_token_ids=(2, 92542), pad_token_id=2,
)  # fmt: skip
_A3B = replace(
    _qwen3(48, 2048, 32, 6144), kind="qwen3_moe", num_key_value_heads=4, moe=MoEConfig(128, 8, 768)
)

PUBLISHED: dict[str, TilesConfig] = {
    "internvl2-1b": _chat(VIT_300M, _qwen2(24, 896, 14, 2, 4864, 151655), 151648, "Hermes-2"),
    "internvl2.5-8b": _chat(VIT_300M, _INTERNLM2, 92546, "internvl2_5"),
    "internvl3-1b": _chat(VIT_300M, _qwen2(24, 896, 14, 2, 4864, 151674), 151667, "internvl2_5"),
    "internvl3-14b": _chat(VIT_300M, _qwen2(48, 5120, 40, 8, 13824, 151674), 151667, "internvl2_5"),
    "internvl3-38b": _chat(VIT_6B, _qwen2(64, 5120, 40, 8, 27648, 151674), 151667, "internvl2_5"),
    "internvl3.5-8b": _chat(VIT_300M, _qwen3(36, 4096, 32, 12288), 151671, "internvl2_5"),
    "internvl3.5-30b-a3b": _chat(VIT_300M, _A3B, 151671, "internvl2_5"),
}
"""By the name of the model, in lower case."""
