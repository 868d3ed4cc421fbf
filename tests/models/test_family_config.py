"""Configs of InternVL 1.1 to 3.5: both layouts, published quirks, and refusals by name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.errors import CapabilityError, CheckpointError, IvlError
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.decoder_config import DecoderConfig
from ivl_export.models.registry import config_from_published
from ivl_export.models.rope_config import RopeConfig
from ivl_export.models.tiles_config import TilesConfig

FAMILY = Path(__file__).parent.parent / "goldens" / "family"
FOLDERS = sorted(p.parent.name for p in FAMILY.glob("*/config.json"))


def published(folder: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FAMILY / folder / "config.json").read_text())
    return data


def read(data: dict[str, Any]) -> TilesConfig:
    config = config_from_published(data)
    assert isinstance(config, TilesConfig)
    return config


def changed(folder: str, **sections: Any) -> dict[str, Any]:
    """A golden's config with keys changed: of a section where the value is an object; None removes a key."""
    data = published(folder)
    for name, value in sections.items():
        inside = isinstance(data.get(name), dict) and value is not None
        part, values = (data[name], value) if inside else (data, {name: value})
        part.update(copy.deepcopy(values))
        for key in [k for k, v in values.items() if v is None]:
            del part[key]
    return data


def decoder(folder: str = "chat_qwen2_300m", /, **values: Any) -> DecoderConfig:
    section = "llm_config" if folder.startswith("chat") else "text_config"
    return read(changed(folder, **{section: values})).decoder


@pytest.mark.parametrize("folder", FOLDERS)
def test_goldens_are_read_whole_and_written_back(folder: str) -> None:
    config = read(published(folder))
    assert config.unknown_keys == ()
    again = json.loads(json.dumps(config.to_published()))
    assert read(again) == config
    assert read(again).unknown_keys == ()
    assert hash(config) == hash(read(again))


def test_defaults_of_the_two_layouts_differ() -> None:
    """An absent key has the default of its layout's class."""
    ours = read({
        "model_type": "internvl_chat",
        "vision_config": {"image_size": 448},
        "llm_config": {**published("chat_qwen2_300m")["llm_config"], "architectures": ["Qwen2ForCausalLM"]},
    })  # fmt: skip
    v = ours.vision
    assert (v.hidden_size, v.num_hidden_layers, v.norm_type) == (3200, 48, "rms_norm")
    assert (v.qk_normalization, v.qkv_bias) == (True, False)
    assert (ours.shuffle, ours.select_layer, ours.max_tiles, ours.thumbnail) == ("v1", -4, 1, False)
    assert (ours.num_tokens, ours.num_visual, ours.vision_blocks) == (1025, 256, 45)
    text = published("native_qwen3_6b")["text_config"]
    theirs = read(
        {"model_type": "internvl", "vision_config": {}, "text_config": {**text, "vocab_size": 151936}}
    )
    v = theirs.vision
    assert (v.hidden_size, v.num_hidden_layers, v.norm_type) == (1024, 24, "layer_norm")
    assert (v.qk_normalization, v.qkv_bias) == (False, False)
    assert (theirs.shuffle, theirs.select_layer, theirs.image_token_id) == ("v2", -1, 151667)
    assert read(changed("native_qwen3_6b", image_token_id=None)).image_token_id is None, (
        "of 203 tokens none is 151667"
    )


def test_select_layer_of_the_first_classes() -> None:
    assert read(changed("chat_qwen2_300m", select_layer=None)).select_layer == -1
    older = read(changed("chat_qwen2_300m", select_layer=None, ps_version=None))
    assert (older.select_layer, older.shuffle, older.vision_blocks) == (-4, "v1", 0)


def test_tiles_are_cut_only_where_the_config_says_so() -> None:
    assert read(published("chat_qwen2_300m")).max_tiles == 12
    assert read(changed("chat_qwen2_300m", max_dynamic_patch=None)).max_tiles == 6
    whole = read(changed("chat_qwen2_300m", dynamic_image_size=False))
    assert (whole.min_tiles, whole.max_tiles) == (1, 1)
    assert read(changed("chat_qwen2_300m", system_message=None)).system_message is None


@pytest.mark.parametrize("key", ["image_token_id", "image_token_index"])
def test_the_image_token_has_two_names(key: str) -> None:
    data = changed("native_qwen3_6b", image_token_id=None)
    assert read({**data, key: 77}).image_token_id == 77
    with pytest.raises(CheckpointError, match=r"image token is 203.*0 to 202"):
        read({**data, key: 203})
    with pytest.raises(CheckpointError, match="two image tokens"):
        read({**data, "image_token_id": 5, "image_token_index": 6})


TOKENIZERS: dict[str, Any] = {
    "added_tokens.json": {"<img>": 190, "<IMG_CONTEXT>": 195},
    "tokenizer_config.json": {"added_tokens_decoder": {"195": {"content": "<IMG_CONTEXT>", "special": True}}},
    "tokenizer.json": {"added_tokens": [{"id": 195, "content": "<IMG_CONTEXT>"}], "model": {}},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_says_the_image_token(name: str, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(FAMILY / "chat_qwen2_300m" / file, tmp_path / file)
    assert read(published("chat_qwen2_300m")).image_token_id is None
    text = json.dumps(TOKENIZERS[name])
    (tmp_path / name).write_text(text)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    config: Any = open_checkpoint(tmp_path).model
    assert config.image_token_id == 195
    assert config.decoder.eos_token_ids == (2, 9)
    (tmp_path / name).write_text(text.replace("195", "151667"))
    with pytest.raises(CheckpointError, match=r"another model's.*151667.*0 to 198"):
        open_checkpoint(tmp_path)
    (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({**published("chat_qwen2_300m"), "image_token_id": 3}))
    with pytest.raises(CheckpointError, match=r"disagree.*3 in the config.*195"):
        open_checkpoint(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{name} is not JSON"):
        open_checkpoint(tmp_path)


# Rotary embeddings

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("kind", "settings", "scaling"),
    [
        ("default", {}, RopeConfig(1e6)),
        ("linear", {"factor": 3}, RopeConfig(1e6, "linear", 3.0)),
        ("dynamic", {"factor": 2.0}, RopeConfig(1e6, "dynamic", 2.0, 32768)),
        ("llama3", LLAMA3, RopeConfig(1e6, "llama3", 8.0, 64, fast=4.0)),
        ("yarn", {"factor": 1.0, "original_max_position_embeddings": 64}, RopeConfig(1e6, "yarn", 1.0, 64)),
        ("su", {**FACTORS, "factor": 1.0}, RopeConfig(
            1e6, "longrope", 1.0, 32768, short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.0, 3.0, 4.0, 5.0),
        )),
    ],
)  # fmt: skip
def test_rotary_settings_under_all_their_names(
    key: str, name: str, kind: str, settings: dict[str, Any], scaling: RopeConfig
) -> None:
    assert decoder("chat_qwen2_300m", **{key: {name: kind, **settings}}).rope == scaling


def test_rotary_settings_of_transformers_5_hold_the_base() -> None:
    own = {"rope_type": "default", "rope_theta": 5e5}
    assert decoder(rope_theta=None, rope_parameters=own).rope == RopeConfig(5e5)
    assert decoder(rope_theta=None).rope == RopeConfig(1e4)
    assert decoder("native_gptoss_300m", rope_scaling=None, rope_theta=None).rope.scaling == "yarn"


def test_the_published_scale_of_phi3() -> None:
    rope = decoder("chat_phi3_300m").rope
    assert (rope.scaling, rope.original, rope.factor) == ("longrope", 4096, 32.0)
    assert rope.attention_factor == pytest.approx(1.190, abs=5e-4)
    assert decoder("native_gptoss_300m").rope.attention_factor == pytest.approx(1.347, abs=5e-4)


def test_what_acts_only_beyond_a_length_is_left_out_within_it() -> None:
    dynamic = RopeConfig(1e6, "dynamic", 2.0, 32768)
    assert dynamic.within(32768) == RopeConfig(1e6)
    assert dynamic.within(32769) == dynamic
    rope = decoder("chat_phi3_300m").rope
    assert rope.within(4096).long_factor == rope.short_factor
    assert rope.within(5000) == rope


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "mrope", "mrope_section": [1, 1, 2]}, "mrope_section"),
        ({"rope_type": "proportional"}, "rope_type is 'proportional'"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "1 factors.*4 frequencies"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": "no"}, "long_factor"),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"full_attention": {"rope_type": "default"}}, "differs between layers"),
        ({"rope_type": "default", "rope_theta": 1.0}, "rope_theta"),
    ],
)
def test_other_rotary_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, CapabilityError), match=message):
        decoder(rope_parameters=settings)


# Windows, biases, heads


def test_windows() -> None:
    assert decoder(use_sliding_window=False, sliding_window=4).sliding_window is None
    own = decoder(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert (own.sliding_window, own.sliding_layers, own.period) == (4, (1, 2), 3)
    assert decoder("chat_phi3_300m").sliding_window is None, "262144, beyond all positions"
    assert decoder("chat_phi3_300m", sliding_window=7).sliding_layers == (0, 1, 2)
    alternating = decoder("native_gptoss_300m")
    assert (alternating.sliding_layers, alternating.period) == ((0, 2), 2)
    assert decoder("native_gptoss_300m", layer_types=None) == alternating
    with pytest.raises(CheckpointError, match="layer_types"):
        decoder("native_gptoss_300m", layer_types=["chunked_attention"] * 4)


def test_biases_are_what_each_class_makes_of_its_keys() -> None:
    def biases(folder: str, **values: Any) -> tuple[bool, bool, bool]:
        c = decoder(folder, **values)
        return c.qkv_bias, c.o_bias, c.mlp_bias

    assert biases("chat_qwen2_300m", attention_bias=False) == (True, False, False)
    assert biases("chat_llama_6b_v1", attention_bias=True) == (True, True, False)
    assert biases("chat_llama_6b_v1", mlp_bias=True) == (False, False, True)
    assert biases("chat_internlm2_6b", bias=None) == (True, True, False), "the class's default"
    three = {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"}
    assert biases("chat_llama_6b_v1", **three, qkv_bias=True, bias=False) == (True, False, False)
    assert biases("chat_llama_6b_v1", **three, bias=True) == (False, True, True)


def test_head_dim_is_free_of_the_width() -> None:
    assert decoder("native_qwen3_6b").query_width == 96
    assert decoder("native_qwen3_6b", head_dim=None).head_dim == 128
    assert decoder("chat_llama_6b_v1", head_dim=20).head_dim == 20
    with pytest.raises(CheckpointError, match="Heads of width 7"):
        decoder(head_dim=7)
    with pytest.raises(CheckpointError, match="6 query heads do not share 4"):
        decoder("native_qwen3_6b", num_key_value_heads=4)
    with pytest.raises(CheckpointError, match=r"num_attention_heads.*divides hidden_size, 56"):
        decoder(num_attention_heads=5)


def test_experts() -> None:
    moe = decoder("native_qwen3moe_300m", decoder_sparse_step=2, mlp_only_layers=[1]).moe
    assert moe is not None
    assert moe.dense_layers == (0, 1, 2)
    with pytest.raises(CheckpointError, match="9 of 8 experts"):
        decoder("native_qwen3moe_300m", num_experts_per_tok=9)


# Refused and harmless keys


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("chat_qwen2_300m", {"flash_relative_threshold": 0.5}, r"InternVL3.5-Flash.*without -Flash"),
        ("chat_qwen2_300m", {"model_type": "internvl_flash"}, "InternVL3.5-Flash"),
        ("chat_qwen2_300m", {"quantization_config": {"quant_method": "awq"}}, r"an AWQ checkpoint.*in bf16"),
        (
            "chat_qwen2_300m",
            {"llm_config": {"quantization_config": {"quant_method": "gptq"}}},
            "a GPTQ checkpoint",
        ),
        ("native_gptoss_300m", {"quantization_config": {"quant_method": "mxfp4"}}, "a mxfp4 checkpoint"),
        ("chat_qwen2_300m", {"ps_version": "v3"}, "ps_version is 'v3'"),
        ("chat_qwen2_300m", {"pad2square": True}, "pad2square"),
        ("chat_qwen2_300m", {"downsample_ratio": 0.3}, "downsample_ratio"),
        ("chat_qwen2_300m", {"select_layer": -9}, "hidden state -9.*has 4"),
        ("chat_qwen2_300m", {"force_image_size": 50}, "50 pixels do not split into tokens of 28"),
        ("chat_qwen2_300m", {"llm_config": {"architectures": None}}, r"llm_config has no architectures"),
        (
            "chat_qwen2_300m",
            {"llm_config": {"architectures": ["MistralForCausalLM"]}},
            r"Mistral.*Known: llama",
        ),
        ("chat_qwen2_300m", {"llm_config": {"hidden_act": "gelu"}}, "hidden_act"),
        ("chat_qwen2_300m", {"llm_config": {"hidden_size": None}}, "llm_config has no hidden_size"),
        ("chat_qwen2_300m", {"llm_config": None}, "no llm_config section"),
        ("chat_qwen2_300m", {"vision_config": {"norm_type": "batch_norm"}}, "norm_type"),
        ("chat_qwen2_300m", {"vision_config": {"hidden_act": "quick_gelu"}}, "hidden_act"),
        ("native_qwen3_6b", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("native_qwen3_6b", {"vision_feature_layer": [-1, -2]}, "vision_feature_layer"),
        ("native_qwen3_6b", {"projector_hidden_act": "silu"}, "projector_hidden_act"),
        ("native_qwen3_6b", {"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling"),
        ("native_qwen3_6b", {"vision_config": {"image_size": [56, 84]}}, "image_size"),
        ("native_qwen3_6b", {"text_config": {"model_type": "gemma3"}}, "gemma3"),
        ("native_qwen3_6b", {"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
    ],
)
def test_what_changes_the_computation_is_refused_by_name(
    folder: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, CapabilityError), match=message):
        read(changed(folder, **change))


def test_keys_of_published_configs_are_known() -> None:
    """Leftovers of InternVL3's towers, generation defaults, and what 3.5 adds."""
    vision = {"capacity_factor": 1.2, "moe_coeff_ratio": 0.5, "noisy_gate_policy": "RSample_before",
              "shared_expert_intermediate_size": 3072, "use_moe": False, "use_residual": True, "ep_size": 1,
              "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5", "auto_map": {}}  # fmt: skip
    text = {"moe_config": None, "_attn_implementation_autoset": True, "top_k": 50, "is_decoder": False,
            "num_beams": 1, "attn_implementation": "eager", "quantization_config": None}  # fmt: skip
    top = {"_commit_hash": None, "pad2square": False, "hidden_size": 56, "system_message": None, "fp16": True,
           "pad_token_id": 1, "eos_token_id": 9, "transformers_version": None}  # fmt: skip
    config = read(changed("chat_qwen2_300m", vision_config=vision, llm_config=text) | top)
    assert config.unknown_keys == ()
    assert config == read(changed("chat_qwen2_300m", eos_token_id=9))
    assert config.decoder.eos_token_ids == (2, 9)


def test_unknown_keys_are_named_with_their_section() -> None:
    config = read(changed("native_qwen3_6b", swirl=1, vision_config={"whirl": 2}, text_config={"twirl": [3]}))
    assert config.unknown_keys == ("swirl", "vision_config.whirl", "text_config.twirl")
    assert config == read(published("native_qwen3_6b"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(folder=st.sampled_from(FOLDERS), data=st.data(), value=JSON)
@pytest.mark.slow
def test_any_value_is_read_or_refused(folder: str, data: st.DataObject, value: Any) -> None:
    config = published(folder)
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    part = data.draw(st.sampled_from(parts))
    part[data.draw(st.sampled_from(sorted(part)))] = value
    try:
        model = config_from_published(config)
    except IvlError:
        return
    assert config_from_published(json.loads(json.dumps(model.to_published()))) == model
