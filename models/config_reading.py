"""Reading the ``config.json`` of InternVL-C and -G, InternViT and InternVL-Chat (LLaVA layout).

Every key is one of four kinds. It is read; or it is fixed: another value would change the model's
results, and is refused by its name; or it is known to change nothing; or it is unknown, and named in the
notes of a build. The lists cover the keys of transformers 4 and 5, OpenGVLab's code and LLaVA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..errors import CapabilityError, CheckpointError
from .misfits import refuse_quantised
from .section import Section

MAX_SIZE = 1 << 40
_PLAIN = "The decoder is a plain LLaMA."
_ROTARY = "The decoder uses plain rotary embeddings of whole heads."
_NO_BIAS = "The decoder's linear layers have no biases."
_FULL = "Every position attends to all before it."
_UNSCALED = "The decoder scales nothing but attention scores, by the root of a head's width."

LLAMA_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), _PLAIN),
    "hidden_activation": (("silu",), _PLAIN),
    "norm_type": (("rms_norm", "rmsnorm"), _PLAIN),
    "is_encoder_decoder": ((False,), _PLAIN),
    "add_cross_attention": ((False,), _PLAIN),
    "use_parallel_residual": ((False,), _PLAIN),
    "parallel_attn": ((False,), _PLAIN),
    "num_experts": ((0, 1), _PLAIN),
    "num_local_experts": ((0, 1), _PLAIN),
    "pruned_heads": (({}, []), _PLAIN),
    "use_rms_norm": ((True,), _PLAIN),
    "rms_norm_unit_offset": ((False,), _PLAIN),
    "attention_bias": ((False,), _NO_BIAS),
    "attention_out_bias": ((False,), _NO_BIAS),
    "qkv_bias": ((False,), _NO_BIAS),
    "mlp_bias": ((False,), _NO_BIAS),
    "bias": ((False,), _NO_BIAS),
    "use_bias": ((False,), _NO_BIAS),
    "lm_head_bias": ((False,), _NO_BIAS),
    "use_qk_norm": ((False,), "The decoder has no norms of queries and keys."),
    "qk_norm": ((False,), "The decoder has no norms of queries and keys."),
    "qk_layernorm": ((False,), "The decoder has no norms of queries and keys."),
    "partial_rotary_factor": ((1,), _ROTARY),
    "rotary_pct": ((1,), _ROTARY),
    "rotary_dim": ((), _ROTARY),
    "rope_interleaved": ((False,), _ROTARY),
    "rope_local_base_freq": ((), _ROTARY),
    "no_rope_layers": (([],), _ROTARY),
    "no_rope_layer_interval": ((), _ROTARY),
    "rope_theta_scaling": ((), _ROTARY),
    "clip_qkv": ((), _UNSCALED),
    "attention_scale": ((), _UNSCALED),
    "attn_temperature_tuning": ((False,), _UNSCALED),
    "attention_sink": ((False,), _FULL),
    "use_mup": ((False,), _UNSCALED),
    "alibi": ((False,), _ROTARY),
    "position_embedding_type": (("rope", "rotary"), _ROTARY),
    "use_sliding_window": ((False,), _FULL),
    "sliding_window_pattern": ((), _FULL),
    "attention_chunk_size": ((), _FULL),
    "attn_logit_softcapping": ((), _UNSCALED),
    "final_logit_softcapping": ((), _UNSCALED),
    "logits_soft_cap": ((), _UNSCALED),
    "query_pre_attn_scalar": ((), _UNSCALED),
    "attention_multiplier": ((), _UNSCALED),
    "residual_multiplier": ((1,), _UNSCALED),
    "embedding_multiplier": ((1,), _UNSCALED),
    "logits_scaling": ((1,), _UNSCALED),
    "scale_embedding": ((False,), _UNSCALED),
    "scale_emb": ((1,), _UNSCALED),
    "scale_depth": ((), _UNSCALED),
    "dim_model_base": ((), _UNSCALED),
}
"""Keys of a LLaMA's section, the values that mean this decoder, and why no other is taken."""

_VIT = "InternViT is a pre-norm ViT with exact GELU and learned positions."
VISION_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("gelu",), _VIT),
    "num_channels": ((3,), "Images have three channels."),
    "use_moe": ((False,), _VIT),
    "mlp_bias": ((True,), _VIT),
    "use_cls_token": ((True,), _VIT),
    "use_absolute_position_embeddings": ((True,), _VIT),
    "use_rope": ((False,), _VIT),
    "use_rotary_embeddings": ((False,), _VIT),
    "num_register_tokens": ((0,), _VIT),
    "use_swiglu_ffn": ((False,), _VIT),
    "use_mask_token": ((False,), _VIT),
    "use_layer_scale": ((True,), _VIT),
    "layerscale": ((True,), _VIT),
    "use_post_layernorm": ((False,), _VIT),
    "use_relative_position_bias": ((False,), _VIT),
    "use_shared_relative_position_bias": ((False,), _VIT),
    "attention_scale": ((), _VIT),
    "interpolate_pos_encoding": ((False,), _VIT),
    "add_cross_attention": ((False,), _VIT),
    "is_encoder_decoder": ((False,), _VIT),
    "pruned_heads": (({}, []), _VIT),
}
"""The same of a vision tower's section."""

_MERGE = "Adapters are not added to the weights here: merge them, and save the model without."
INTERNVL_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_backbone_lora": ((0,), _MERGE),
    "use_qllama_lora": ((0,), _MERGE),
    "use_lora": ((0,), _MERGE),
    "add_cross_attention": ((False,), _PLAIN),
    "is_encoder_decoder": ((False,), _PLAIN),
    "pruned_heads": (({}, []), _PLAIN),
}
"""The same of an InternVL's top level."""

_ONE_VIEW = "A chat model of the LLaVA layout reads an image once, as one square."
CHAT_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "mm_use_im_start_end": ((False,), "No tokens are put around an image."),
    "mm_patch_merge_type": (("flat",), _ONE_VIEW),
    "mm_resampler_type": ((), "Between tower and decoder are two-layer projectors only."),
    "mm_spatial_pool_mode": ((), _ONE_VIEW),
    "mm_spatial_pool_stride": ((1,), _ONE_VIEW),
    "mm_newline_position": ((), _ONE_VIEW),
    "mm_token_compression": ((), _ONE_VIEW),
    "mm_pooling_position": ((), _ONE_VIEW),
    "s2": ((False,), _ONE_VIEW),
    "s2_scales": ((), _ONE_VIEW),
    "mm_vision_s2": ((False,), _ONE_VIEW),
    "use_dynamic_image_size": ((False,), _ONE_VIEW),
    "dynamic_image_size": ((False,), _ONE_VIEW),
    "use_lora": ((0,), _MERGE),
    "lora_enable": ((False,), _MERGE),
}
"""The same for LLaVA's additions to a LLaMA's section."""

LLAMA_HARMLESS = frozenset(
    [
        "attention_dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "max_window_layers",
        "pretraining_tp",
        "original_max_position_embeddings",
    ]
)
VISION_HARMLESS = frozenset(
    [
        "attention_dropout",
        "capacity_factor",
        "drop_path_rate",
        "dropout",
        "ep_size",
        "eval_capacity_factor",
        "hidden_dropout_prob",
        "laux_allreduce",
        "layer_scale_init_value",
        "moe_coeff_ratio",
        "moe_intermediate_size",
        "moe_output_scale",
        "noisy_gate_policy",
        "num_experts",
        "num_routed_experts",
        "num_shared_experts",
        "projection_dim",
        "projection_dropout",
        "shared_expert_intermediate_size",
        "use_residual",
        "use_rts",
        "use_mean_pooling",  # of a pooled output that is not used here
        "use_weighted_residual",
        "initializer_bias",
    ]
)
INTERNVL_HARMLESS = frozenset(
    [
        "hidden_size",
        "vocab_size",
        "qllama_path",
        "tokenizer_path",
        "vision_path",
        "max_txt_len",
        "image_fold",
        "use_custom_trainer",
        "grad_checkpoint",
        "gradient_checkpointing",
        "logit_scale_init_value",
        "projection_dim",
        "cross_attention_layers",
    ]
)
CHAT_HARMLESS = frozenset(
    [
        "freeze_backbone",
        "freeze_mm_mlp_adapter",
        "freeze_mm_vision_resampler",
        "image_crop_resolution",
        "image_grid_pinpoints",
        "image_split_resolution",
        "max_sequence_length",
        "mm_projector_lr",
        "mm_tunable_parts",
        "mm_use_im_patch_token",
        "mm_vision_tower_lr",
        "delay_load",
        "model_max_length",
        "pretrain_mm_mlp_adapter",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "tune_mm_mlp_adapter",
        "tune_mm_vision_resampler",
        "unfreeze_mm_vision_tower",
        "use_mm_proj",
        "use_pos_skipping",
        "pos_skipping_range",
        "vision_tower",
    ]
)
_WINDOWS = ("sliding_window", "attention_window", "local_attention_window")
_THETA_NAMES = ("rotary_base", "rope_base", "rotary_emb_base", "rope_freq_base")
_EPS_NAMES = ("norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")


def read_llama(s: Section, cls: type) -> dict[str, Any]:
    """The fields of ``cls``, a LLaMA's sizes, that the section gives.

    Raises:
        CheckpointError: a value that cannot be right, or a LLaMA that is not the published models'.
        CapabilityError: naming the key, for one that this decoder does not implement.
    """
    _refuse_quantised(s)
    fields = _typed(s, cls, skip=("eos_token_id", "rope_theta"))
    if (eos := _end_token(s)) is not None:
        fields["eos_token_id"] = eos
    if (theta := _theta(s)) is not None:
        fields["rope_theta"] = theta
    sizes = cls(**fields)
    heads = s.get("num_key_value_heads")
    if heads not in (None, sizes.num_attention_heads):
        raise CheckpointError(
            f"{s.where} has grouped-query attention.",
            f"num_key_value_heads is {heads}, num_attention_heads {sizes.num_attention_heads}.",
            "The decoder has one key-value head for each query head.",
        )
    s.only("head_dim", sizes.head_dim, why=f"Heads have the width {sizes.head_dim}, of hidden_size.")
    _fixed(s, LLAMA_FIXED)
    _same(s, _THETA_NAMES, "rope_theta", sizes.rope_theta)
    _same(s, (*_EPS_NAMES, "layer_norm_eps"), "rms_norm_eps", sizes.rms_norm_eps)
    for key in _WINDOWS:
        window = s.get(key)
        whole = type(window) is int and window >= sizes.max_position_embeddings
        if window is not None and s.get("use_sliding_window") is None and not whole:
            raise CapabilityError(f"{s.where}.{key} is {window!r}.", _FULL, "This form is not supported.")
    kinds = s.items("layer_types")
    if kinds is not None and any(kind != "full_attention" for kind in kinds):
        raise CapabilityError(
            f"{s.where}.layer_types is {kinds[:4]!r}.", _FULL, "This form is not supported."
        )
    s.ignore(LLAMA_HARMLESS)
    return fields


def read_vision(s: Section, cls: type) -> dict[str, Any]:
    """The fields of ``cls``, an InternViT's sizes, that the section gives; errors as :func:`read_llama`."""
    _refuse_quantised(s)
    fields = _typed(s, cls, skip=("feature_blocks",))
    if (blocks := s.items("feature_blocks")) is not None:
        if not all(type(number) is int for number in blocks):
            s.bad("feature_blocks", "a list of whole numbers")
        fields["feature_blocks"] = tuple(blocks)
    if s.get("force_image_size"):
        fields["image_size"] = s.integer("force_image_size")
    if norm := s.text("norm_type"):
        fields["norm_type"] = "rms_norm" if norm == "rmsnorm" else norm
    sizes = cls(**fields)
    _fixed(s, VISION_FIXED)
    _same(s, ("attention_bias",), "qkv_bias", sizes.qkv_bias)
    _same(s, ("use_qk_norm", "qk_norm"), "qk_normalization", sizes.qk_normalization)
    _same(s, (*_EPS_NAMES, "rms_norm_eps"), "layer_norm_eps", sizes.layer_norm_eps)
    _same(s, ("head_dim",), "hidden_size / num_attention_heads", sizes.head_dim)
    s.ignore(VISION_HARMLESS)
    return fields


def read_internvl(s: Section, cls: type, qllama: Section) -> dict[str, Any]:
    """The fields of ``cls``, an InternVL's config, that its top level gives; errors as :func:`read_llama`.

    QLLaMA's section repeats some of them.
    """
    _refuse_quantised(s)
    fields = _typed(s, cls, skip=("vision", "qllama", "contrastive_only", "unknown_keys"))
    _fixed(s, INTERNVL_FIXED)
    for name in ("num_query_token", "cross_attention_frequency"):
        said = qllama.get(name)
        if said is not None and said != fields.setdefault(name, said):
            raise CheckpointError(
                f"{s.where} gives two values of {name}.",
                f"{fields[name]} at the top level, {said} in qllama_config.",
                "Use the config.json that was published with these weights.",
            )
    s.ignore(INTERNVL_HARMLESS)
    s.ignore(("vision_config", "qllama_config"))
    return fields


def check_chat(s: Section) -> str:
    """Read LLaVA's additions to a LLaMA's section; returns ``image_aspect_ratio``: ``pad``, or empty."""
    _fixed(s, CHAT_FIXED)
    ratio = s.text("image_aspect_ratio")
    if ratio not in ("pad", "square", ""):
        raise CapabilityError(
            f"{s.where}.image_aspect_ratio is {ratio!r}.", _ONE_VIEW, "This form is not supported."
        )
    s.ignore(CHAT_HARMLESS)
    return ratio


def _typed(s: Section, cls: type, skip: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of dataclass ``cls`` that the section has, each of its type."""
    typed_values: dict[str, Any] = {}
    for field in fields(cls):
        key = field.name
        if key in skip or s.get(key) is None:
            continue
        if field.type == "int":
            typed_values[key] = s.integer(key, least=-1 if key.endswith("token_id") else 1, most=MAX_SIZE)
        elif field.type == "float":
            typed_values[key] = s.number(key, 0.0)
        elif field.type == "bool":
            typed_values[key] = s.flag(key, False)
    return typed_values


def _fixed(s: Section, table: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    for key, (values, why) in table.items():
        s.only(key, *values, why=why)


def _same(s: Section, others: Iterable[str], key: str, value: Any) -> None:
    """Other names of ``key``, which must not say something else than ``value``."""
    for other in others:
        s.only(other, value, why=f"{key} is {value!r}, and is the key that this model reads.")


def _end_token(s: Section) -> int | None:
    """The token that ends an answer; CheckpointError where there are several."""
    value = s.get("eos_token_id")
    if value is None or type(value) is int:
        return None if value is None else s.integer("eos_token_id", least=0)
    if isinstance(value, list) and all(type(token) is int for token in value):
        if len(set(value)) == 1:
            return int(value[0])
        raise CheckpointError(
            f"{s.where}.eos_token_id has {len(set(value))} end tokens: {', '.join(map(str, value[:8]))}.",
            "Answers of this model end at one token.",
            "Give one: the one its conversations were trained to end with.",
        )
    s.bad("eos_token_id", "a token id")


def _theta(s: Section) -> float | None:
    """The rotary base, at the section's top or where transformers 5 writes it; None where neither says it."""
    bases = {}
    if s.get("rope_theta") is not None:
        bases["rope_theta"] = _base(s)
    for key in ("rope_parameters", "rope_scaling"):
        if data := s.object(key):
            base = _plain_rotary(Section(data, f"{s.where}.{key}"))
            if base is not None:
                bases[f"{key}.rope_theta"] = base
    if len(set(bases.values())) > 1:
        raise CheckpointError(
            f"{s.where} gives two rotary bases.",
            f"{' and '.join(f'{key} is {base:g}' for key, base in bases.items())}.",
            "Use the config.json that was published with these weights.",
        )
    return next(iter(bases.values()), None)


def _plain_rotary(s: Section) -> float | None:
    """The base of rotary settings that scale nothing."""
    if nested := [key for key, value in s.data.items() if isinstance(value, dict)]:
        raise CheckpointError(f"{s.where} has separate settings for {nested[0]}.", "All layers rotate alike.")
    kinds = {key: s.text(key) for key in ("rope_type", "type") if s.get(key) is not None}
    odd = {key: kind for key, kind in kinds.items() if kind != "default"}
    if odd or (not kinds and s.get("factor") is not None):
        said = ", ".join(f"{key} {kind!r}" for key, kind in odd.items()) or f"factor {s.get('factor')!r}"
        raise CheckpointError(f"{s.where} has {said}.", _ROTARY, "Scaled positions are not supported.")
    s.only("partial_rotary_factor", 1, why=_ROTARY)
    s.ignore(("factor",))
    base = None if s.get("rope_theta") is None else _base(s)
    if unknown := s.unknown():
        raise CheckpointError(
            f"{s.where} has {unknown[0].rpartition('.')[2]!r}.",
            "Every setting there may change the positions of all tokens.",
            "Remove it if it means the plain rotary embeddings of a LLaMA.",
        )
    return base


def _base(s: Section) -> float:
    base = s.number("rope_theta", 0.0)
    if base <= 1:
        s.bad("rope_theta", "a number over 1")
    return base


def _refuse_quantised(s: Section) -> None:
    if how := s.get("quantization_config") or s.get("compression_config"):
        refuse_quantised(how, s.where)
