"""Sizes of the decoders that InternVL 1.1 to 3.5 chat with: one parametrised block in eight published forms.

LLaMA (also Yi), InternLM2, InternLM3, Qwen2, Qwen3, Qwen3-MoE, Phi-3 and GPT-OSS differ in biases, in the
norms of queries and keys, in rotary scaling and in the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from .rope_config import RopeConfig, write_rope

KINDS = {
    "LlamaForCausalLM": "llama",
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Phi3ForCausalLM": "phi3",
    "GptOssForCausalLM": "gpt_oss",
}
"""Published architecture to ``model_type``."""


@dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts feed-forward.

    Args:
        experts: number of experts.
        per_token: experts that a token is routed to.
        width: hidden width of one expert.
        normalised: the weights of a token's experts are scaled to the sum 1.
        gpt_oss: GPT-OSS's form: biases, the softmax over the chosen experts only, gates and ups clamped to
            ``limit``, and ``(up + 1) * gate * sigmoid(alpha * gate)``.
        dense_layers: layers that have a plain feed-forward instead.
    """

    experts: int
    per_token: int
    width: int
    normalised: bool = True
    gpt_oss: bool = False
    limit: float = 7.0
    alpha: float = 1.702
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.experts:
            raise CheckpointError(
                f"A token is routed to {self.per_token} of {self.experts} experts.",
                "num_experts_per_tok must be from 1 to num_experts.",
            )


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder.

    Args:
        kind: ``model_type`` of the published form; it decides how the weights are stored.
        head_dim: width of one head; heads times ``head_dim`` need not be ``hidden_size``.
        qkv_bias, o_bias, mlp_bias: whether these linear layers have biases.
        qk_norm: an RMSNorm of each head's queries and keys before they are rotated.
        sliding_window: positions visible to the layers of ``sliding_layers``, their own included.
        sinks: GPT-OSS: a logit of each head that takes part in every softmax without a position.
        moe: the experts; None: a plain feed-forward in all layers.
        tied: ``tie_word_embeddings`` of the config; None: absent. A stored lm_head wins over it.
        eos_token_ids: tokens that end an answer.
    """

    kind: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    sinks: bool = False
    moe: MoEConfig | None = None
    tied: bool | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"{self.num_attention_heads} query heads do not share {self.num_key_value_heads} key heads.",
                "num_attention_heads must be a multiple of num_key_value_heads.",
            )
        if self.head_dim % 2:
            raise CheckpointError(f"Heads of width {self.head_dim} cannot be rotated.", "It must be even.")
        self.rope.check(self.head_dim)

    @property
    def eos_token_id(self) -> int:
        """The first token that ends an answer; -1: none does."""
        return self.eos_token_ids[0] if self.eos_token_ids else -1

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads, or value heads, together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def period(self) -> int:
        """After how many layers the kinds of layers repeat: 1 where all are alike, 2 in GPT-OSS."""
        kinds = [(self.window(i), self.sparse(i)) for i in range(self.num_hidden_layers)]
        count = len(kinds)
        periods = (p for p in range(1, count) if count % p == 0 and kinds == kinds[:p] * (count // p))
        return next(periods, count)

    def window(self, layer: int) -> int | None:
        """Number of positions visible to ``layer``; None: all."""
        return self.sliding_window if layer in self.sliding_layers else None

    def sparse(self, layer: int) -> bool:
        """Whether ``layer`` has experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def to_published(self) -> dict[str, Any]:
        """The decoder's section of a ``config.json``; :func:`read_decoder` reads the same back."""
        layers = range(self.num_hidden_layers)
        kinds = {False: "full_attention", True: "sliding_attention"}
        data: dict[str, Any] = {
            "architectures": [next(a for a, kind in KINDS.items() if kind == self.kind)],
            "model_type": self.kind,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            **write_rope(self.rope),
            **_BIASES[self.kind](self),
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        if self.sliding_window is not None:
            data |= {"sliding_window": self.sliding_window, "use_sliding_window": True}
            data |= {"layer_types": [kinds[i in self.sliding_layers] for i in layers]}
        if self.moe is not None:
            data |= _publish_moe(self.moe)
        return data


_BIASES: dict[str, Callable[[DecoderConfig], dict[str, Any]]] = {
    "llama": lambda c: {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias},
    "internlm2": lambda c: {"bias": c.qkv_bias},
    "internlm3": lambda c: {"qkv_bias": c.qkv_bias, "bias": c.o_bias},
    "qwen2": lambda c: {},
    "qwen3": lambda c: {"attention_bias": c.qkv_bias},
    "qwen3_moe": lambda c: {"attention_bias": c.qkv_bias},
    "phi3": lambda c: {},
    "gpt_oss": lambda c: {"attention_bias": c.qkv_bias},
}


def _publish_moe(moe: MoEConfig) -> dict[str, Any]:
    data: dict[str, Any] = {"num_experts_per_tok": moe.per_token}
    if moe.gpt_oss:
        return data | {
            "num_local_experts": moe.experts,
            "swiglu_limit": moe.limit,
            "swiglu_alpha": moe.alpha,
        }
    return data | {
        "num_experts": moe.experts,
        "moe_intermediate_size": moe.width,
        "norm_topk_prob": moe.normalised,
        "mlp_only_layers": list(moe.dense_layers),
    }
