"""Keys of a config.json: read, refused by name, passed over, or named as unknown."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.cli import main
from ivl_export.errors import CapabilityError, CheckpointError, IvlError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.config import ChatConfig, InternViTConfig, InternVLConfig
from ivl_export.models.registry import ModelConfig, config_from_published, family_of

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = json.loads((GOLDENS / "tiny" / "config.json").read_text())
CHAT = json.loads((GOLDENS / "chat" / "config.json").read_text())
TOWER = json.loads((GOLDENS / "chat" / "vision_tower_config.json").read_text())
# Keys that transformers 5.24 writes for a LLaMA and for any config, besides the sizes.
TRANSFORMERS_5 = {
    "transformers_version": "5.24.0",
    "architectures": None,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
    "dtype": "bfloat16",
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    "_name_or_path": "",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
}
LLAMA_5 = {
    **TRANSFORMERS_5,
    "use_cache": True,
    "pretraining_tp": 1,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAVA = {
    "freeze_mm_mlp_adapter": False,
    "image_grid_pinpoints": None,
    "image_aspect_ratio": "pad",
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_mm_proj": True,
}


def settings_of(config: ModelConfig, settings: ImageSettings) -> ImageSettings:
    return family_of(config).image_settings(config, settings)


def internvl(qllama: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **top: Any) -> InternVLConfig:
    data = copy.deepcopy(TINY)
    data["qllama_config"].update(qllama or {})
    for key in drop:
        data["qllama_config"].pop(key)
    config = config_from_published({**data, **top})
    assert isinstance(config, InternVLConfig)
    return config


def chat(drop: tuple[str, ...] = (), **changes: Any) -> ChatConfig:
    data = {k: v for k, v in {**CHAT, "vision_config": TOWER, **changes}.items() if k not in drop}
    config = config_from_published(data)
    assert isinstance(config, ChatConfig)
    return config


def vit(**changes: Any) -> InternViTConfig:
    config = config_from_published({**TOWER, **changes})
    assert isinstance(config, InternViTConfig)
    return config


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", [{"rope_type": "default"}, {"type": "default"}, {}])
def test_the_rotary_base_where_transformers_5_writes_it(key: str, kind: dict[str, str]) -> None:
    settings = {key: {"rope_theta": 500000.0, **kind}}
    assert internvl(settings, ("rope_theta",)).qllama.rope_theta == 500000.0
    assert chat(("rope_theta",), **settings).decoder.rope_theta == 500000.0
    assert internvl({**settings, "rope_theta": 500000}).qllama.rope_theta == 500000.0
    with pytest.raises(CheckpointError, match=rf"two rotary bases.*10000 and {key}\.rope_theta is 500000"):
        internvl(settings)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}, "rope_type 'linear'"),
        ({"type": "linear", "factor": 4.0}, "type 'linear'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "llama3"),
        ({"rope_type": "dynamic", "type": "default", "factor": 2.0}, "dynamic"),
        ({"factor": 4.0}, "factor 4"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "mrope_section": [1, 2, 3]}, "mrope_section"),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "full_attention"),
        ({"rope_type": ["default"]}, "rope_type"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ("default", "rope_"),
    ],
)
def test_other_rotary_embeddings_are_refused_by_name(key: str, settings: Any, names: str) -> None:
    for make in (lambda: internvl({key: settings}), lambda: chat(**{key: settings})):
        with pytest.raises(IvlError, match=names):
            make()


LLAMA_OTHERS: dict[str, Any] = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "bias": True,
    "qkv_bias": True,
    "use_qk_norm": True,
    "qk_layernorm": True,
    "norm_type": "layer_norm",
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.25,
    "rope_base": 5e5,
    "rotary_emb_base": 5e5,
    "rope_interleaved": True,
    "no_rope_layers": [0],
    "no_rope_layer_interval": 4,
    "clip_qkv": 8.0,
    "attention_scale": 0.3,
    "attn_temperature_tuning": True,
    "alibi": True,
    "position_embedding_type": "alibi",
    "sliding_window": 128,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "attention_chunk_size": 64,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "layer_norm_eps": 1e-3,
    "head_dim": 32,
    "num_local_experts": 8,
    "add_cross_attention": True,
    "use_parallel_residual": True,
    "pruned_heads": {"0": [1]},
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
    "quantization_config": {"quant_method": "awq", "bits": 4},
}
VISION_OTHERS: dict[str, Any] = {
    "use_layer_scale": False,
    "use_post_layernorm": True,
    "use_shared_relative_position_bias": True,
    "hidden_act": "quick_gelu",
    "norm_type": "batch_norm",
    "num_channels": 4,
    "use_moe": True,
    "attention_bias": True,
    "use_qk_norm": False,
    "rms_norm_eps": 1e-3,
    "head_dim": 64,
    "num_register_tokens": 4,
    "use_rope": True,
    "use_absolute_position_embeddings": False,
    "quantization_config": {"quant_method": "fp8"},
}
CHAT_OTHERS: dict[str, Any] = {
    "mm_token_compression": 4,
    "mm_use_im_start_end": True,
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "mm_resampler_type": "perceiver",
    "s2": True,
    "mm_vision_select_layer": "last",
    "mm_image_size": "336",
}
INTERNVL_OTHERS: dict[str, Any] = {
    "use_backbone_lora": 16,
    "use_qllama_lora": 16,
    "num_query_token": 0,
    "clip_embed_dim": "768",
    "label_smoothing": "0.1",
    "force_image_size": "224",
}


@pytest.mark.parametrize("key", LLAMA_OTHERS)
def test_another_llama_is_refused_by_name(key: str) -> None:
    names = {
        "num_key_value_heads": "grouped-query",
        "quantization_config": "an AWQ checkpoint.*quantised already",
    }
    names["tie_word_embeddings"] = "ties the word embeddings"
    with pytest.raises((CheckpointError, CapabilityError), match=names.get(key, key)):
        internvl({key: LLAMA_OTHERS[key]})
    with pytest.raises((CheckpointError, CapabilityError), match=names.get(key, key)):
        chat(**{key: LLAMA_OTHERS[key]})


@pytest.mark.parametrize("key", VISION_OTHERS)
def test_another_tower_is_refused_by_name(key: str) -> None:
    value = {key: VISION_OTHERS[key]}
    name = "an FP8 checkpoint.*quantised already" if key == "quantization_config" else key
    for make in (
        lambda: internvl(vision_config={**TINY["vision_config"], **value}),
        lambda: chat(vision_config={**TOWER, **value}),
        lambda: vit(**value),
    ):
        with pytest.raises((CheckpointError, CapabilityError), match=name):
            make()


@pytest.mark.parametrize("key", CHAT_OTHERS)
def test_another_chat_is_refused_by_name(key: str) -> None:
    with pytest.raises((CheckpointError, CapabilityError), match=key):
        chat(**{key: CHAT_OTHERS[key]})


@pytest.mark.parametrize("key", INTERNVL_OTHERS)
def test_another_internvl_is_refused_by_name(key: str) -> None:
    with pytest.raises((CheckpointError, CapabilityError), match=key):
        internvl(**{key: INTERNVL_OTHERS[key]})


def test_two_values_of_one_number_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"two values of cross_attention_frequency.*2.*4"):
        internvl({"cross_attention_frequency": 4})
    data = copy.deepcopy(TINY)
    del data["num_query_token"]
    config = config_from_published(data)  # said in qllama_config alone
    assert isinstance(config, InternVLConfig)
    assert config.num_query_token == data["qllama_config"]["num_query_token"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", math.inf),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", True),
        ("rope_theta", "10000"),
        ("rope_theta", [10000.0]),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("num_attention_heads", "4"),
        ("num_hidden_layers", 1 << 41),
        ("vocab_size", -5),
        ("eos_token_id", "2"),
        ("bos_token_id", 1.5),
    ],
)
def test_numbers_are_numbers(key: str, value: Any) -> None:
    for make in (lambda: internvl({key: value}), lambda: chat(**{key: value})):
        with pytest.raises(CheckpointError, match=key):
            make()


def test_several_end_tokens_are_refused_and_one_in_a_list_is_one() -> None:
    assert internvl({"eos_token_id": [7]}).qllama.eos_token_id == 7
    assert chat(eos_token_id=[7, 7]).decoder.eos_token_id == 7
    for make in (lambda: internvl({"eos_token_id": [2, 7]}), lambda: chat(eos_token_id=[2, 7])):
        with pytest.raises(CheckpointError, match=r"eos_token_id has 2 end tokens: 2, 7.*Give one"):
            make()


def test_what_the_published_code_writes_is_known() -> None:
    rope = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    vision = {**TINY["vision_config"], **TRANSFORMERS_5, "attention_bias": False}
    config = internvl({**LLAMA_5, **rope, "head_dim": 16}, vision_config=vision, force_image_size=None)
    assert config.unknown_keys == ()
    assert config == internvl()
    written: dict[str, Any] = {**LLAMA_5, **rope, **LLAVA, "head_dim": 12}
    assert chat((), **written).unknown_keys == ()
    assert vit(**TRANSFORMERS_5).unknown_keys == ()
    published = InternVLConfig()
    assert config_from_published(published.to_published()) == published
    assert ChatConfig.from_published(chat().to_published()) == chat()


@pytest.mark.slow
def test_unknown_keys_are_named_once(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    data = json.loads((folder / "config.json").read_text())
    data["swirl"], data["qllama_config"]["twirl"], data["vision_config"]["whirl"] = 1, [2], "3"
    (folder / "config.json").write_text(json.dumps(data))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.model.unknown_keys == ("swirl", "vision_config.whirl", "qllama_config.twirl")
    (note,) = checkpoint.notes
    args = ["build", "--model", str(folder), "--precision", "bf16", "--dry-run", "--json"]
    assert main([*args, "--out", str(tmp_path / "out"), "--backend", "onnxruntime"]) == 0
    assert json.loads(capsys.readouterr().out)["notices"].count(note) == 1
    assert open_checkpoint(tiny_model).notes == ()
    assert checkpoint.revision == open_checkpoint(tiny_model).revision
    assert (
        main(["export", "--model", str(folder), "--components", "qllama_text", "--out", str(tmp_path / "x")])
        == 0
    )
    assert "swirl" in capsys.readouterr().err


def test_padding_is_read_from_a_chat_config() -> None:
    crop = ImageSettings(84, mode="center_crop")
    assert settings_of(chat(image_aspect_ratio="pad"), crop).mode == "pad"
    for ratio in ("square", None):
        assert settings_of(chat(image_aspect_ratio=ratio), crop).mode == "center_crop"
    assert settings_of(internvl(), crop) == ImageSettings(56, mode="center_crop")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(key=st.sampled_from([*TINY["qllama_config"], *LLAMA_OTHERS, "rope_parameters"]), value=JSON)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    try:
        config = internvl({key: value})
    except IvlError:
        return
    assert all(type(getattr(config.qllama, f)) is type(getattr(InternVLConfig().qllama, f)) for f in (
        "hidden_size", "rms_norm_eps", "rope_theta", "eos_token_id"
    ))  # fmt: skip
