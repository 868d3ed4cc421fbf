"""Reading a decoder's section of a published ``config.json``: eight kinds, one config."""

from __future__ import annotations

from ..errors import CapabilityError, CheckpointError
from .decoder_config import KINDS, DecoderConfig, MoEConfig
from .rope_config import read_rope
from .section import Section

# fmt: off
_HARMLESS = frozenset({
    "attention_bias", "attention_dropout", "bias", "decoder_sparse_step", "dropout", "embd_pdrop",
    "experts_per_token", "head_dim", "initial_context_length", "intermediate_size", "layer_types",
    "max_window_layers", "mlp_bias", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
    "num_experts", "num_experts_per_tok", "num_local_experts", "num_replicate_key_value_heads",
    "original_max_position_embeddings", "output_router_logits", "pretraining_tp", "qkv_bias",
    "resid_pdrop", "rms_norm_eps", "rope_theta", "router_aux_loss_coef", "sliding_window",
    "swiglu_alpha", "swiglu_limit", "use_sliding_window",
})
# fmt: on


def kind_of(section: Section, default: str | None = None) -> str:
    """The decoder's kind.

    Args:
        section: the decoder's section.
        default: None: ``architectures`` must say it, as in OpenGVLab's layout. Else ``model_type`` does, as
            in that of transformers, and this is the kind where it is absent.

    Raises:
        CheckpointError: it is not said.
        CapabilityError: another decoder.
    """
    if default is not None:
        kind, said = section.text("model_type", default), "model_type"
    else:
        names = section.items("architectures")
        if not names or not isinstance(names[0], str):
            raise CheckpointError(
                f"{section.where} has no architectures.",
                "Its first entry says which decoder the model has.",
                "Use the config.json that was published with these weights.",
            )
        kind, said = KINDS.get(names[0], names[0]), "architectures"
    if kind not in KINDS.values():
        raise CapabilityError(
            f"{section.where}.{said} has the decoder {kind}.", f"Known: {', '.join(KINDS.values())}."
        )
    return kind


def read_decoder(section: Section, kind: str, eos: tuple[int, ...] = ()) -> DecoderConfig:
    """A decoder's section of a published config.

    Args:
        section: the section.
        kind: see :func:`kind_of`.
        eos: more tokens that end an answer, which other places name.

    Raises:
        CheckpointError, CapabilityError: naming the key.
    """
    s = section
    s.choice("hidden_act", "silu")
    heads, width = s.integer("num_attention_heads", most=4096), s.integer("hidden_size")
    layers = s.integer("num_hidden_layers", most=1024)
    own_width = {"qwen3": 128, "gpt_oss": 64}.get(kind)
    if own_width is None and s.get("head_dim") is None and width % heads:
        s.bad("num_attention_heads", f"a number that divides hidden_size, {width}")
    head_dim = s.integer("head_dim", own_width or width // heads)
    moe = _read_moe(s, kind, layers)
    positions = s.integer("max_position_embeddings", 4096 if kind == "phi3" else 32768, most=1 << 31)
    qkv, o, mlp = _read_biases(s, kind)
    window, sliding = _read_window(s, kind, layers, positions)
    eps = 1e-5 if kind in ("phi3", "gpt_oss", "internlm3") else 1e-6
    ids = tuple(dict.fromkeys((*s.tokens("eos_token_id"), *eos)))
    pads = s.tokens("pad_token_id")
    bos = s.tokens("bos_token_id")
    tied = s.get("tie_word_embeddings")
    config = DecoderConfig(
        kind=kind,
        vocab_size=s.integer("vocab_size"),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=s.integer("num_key_value_heads", heads, most=4096),
        head_dim=head_dim,
        intermediate_size=moe.width if moe and moe.gpt_oss else s.integer("intermediate_size"),
        rms_norm_eps=s.number("rms_norm_eps", eps),
        max_position_embeddings=positions,
        rope=read_rope(s, kind, positions),
        qkv_bias=qkv,
        o_bias=o,
        mlp_bias=mlp,
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        sliding_window=window,
        sliding_layers=sliding,
        sinks=kind == "gpt_oss",
        moe=moe,
        tied=None if tied is None else s.flag("tie_word_embeddings", False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=ids,
        pad_token_id=pads[0] if pads else 0,
    )
    s.ignore(_HARMLESS)
    return config


def _read_biases(s: Section, kind: str) -> tuple[bool, bool, bool]:
    """Of q, k, v; of o; of the feed-forward."""
    if kind == "internlm2":
        both = s.flag("bias", True)
        return both, both, False
    if kind == "internlm3":
        others = s.flag("bias", s.flag("mlp_bias", False))
        return s.flag("qkv_bias", s.flag("attention_bias", False)), others, others
    if kind in ("qwen2", "phi3"):  # they read no such key
        return kind == "qwen2", False, False
    both = s.flag("attention_bias", kind == "gpt_oss")
    return both, both, kind == "llama" and s.flag("mlp_bias", False)


def _read_moe(s: Section, kind: str, layers: int) -> MoEConfig | None:
    if kind == "gpt_oss":
        experts = s.integer("num_local_experts", 128, most=4096)
        return MoEConfig(
            experts,
            s.integer("num_experts_per_tok", s.integer("experts_per_token", 4, most=4096), most=4096),
            s.integer("intermediate_size"),
            gpt_oss=True,
            limit=s.number("swiglu_limit", 7.0),
            alpha=s.number("swiglu_alpha", 1.702),
        )
    if kind != "qwen3_moe":
        return None
    every = s.integer("decoder_sparse_step", 1, most=1024)
    dense = s.items("mlp_only_layers") or []
    return MoEConfig(
        s.integer("num_experts", s.integer("num_local_experts", 128, most=4096), most=4096),
        s.integer("num_experts_per_tok", 8, most=4096),
        s.integer("moe_intermediate_size", 768),
        s.flag("norm_topk_prob", False),
        dense_layers=tuple(i for i in range(layers) if i in dense or (i + 1) % every),
    )


def _read_window(s: Section, kind: str, layers: int, positions: int) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the layers that have it; one as long as the context is none."""
    if kind in ("llama", "internlm2", "internlm3"):
        return None, ()
    window = s.integer("sliding_window", 128 if kind == "gpt_oss" else positions, most=1 << 31)
    if (kind.startswith("qwen") and not s.flag("use_sliding_window", False)) or window >= positions:
        return None, ()
    types = s.items("layer_types")
    if kind in ("phi3", "qwen3_moe"):
        sliding = tuple(range(layers))  # they read no layer_types
    elif types is not None:
        if len(types) < layers or {*types[:layers]} - {"sliding_attention", "full_attention"}:
            s.bad("layer_types", f"sliding_attention or full_attention for each of {layers} layers")
        sliding = tuple(i for i in range(layers) if types[i] == "sliding_attention")
    elif kind == "gpt_oss":
        sliding = tuple(range(0, layers, 2))
    else:
        sliding = tuple(range(min(layers, s.integer("max_window_layers", 28, least=0)), layers))
    return (window, sliding) if sliding else (None, ())
