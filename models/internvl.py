"""InternVL: InternViT, QLLaMA and the heads chained into the modes of the paper (figure 4)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CapabilityError, UsageError
from .config import InternViTConfig, InternVLConfig
from .heads import AttentionPool
from .qllama import KeyValue, QLlama, Visible, query_pass
from .vit import InternViT

Mode = Literal["InternVL-C", "InternVL-G"]


class InternVLModel(nn.Module):
    """The whole model; ``state_dict`` keys are the published ones.

    Args:
        config: sizes. ``contrastive_only`` leaves out queries, cross-attention, ITM head and lm_head.
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        width, embed = config.qllama.hidden_size, config.clip_embed_dim
        generative = not config.contrastive_only
        self.config = config
        self.vision_model = InternViT(config.vision)
        self.qllama = QLlama(config, lm_head=generative, cross_attention=generative)
        self.clip_projector = AttentionPool(config.vision.hidden_size, config.attn_pool_num_heads, embed)
        self.text_projection = nn.Parameter(torch.randn(width, embed) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07), as CLIP
        if generative:
            self.query_tokens = nn.Parameter(torch.randn(1, config.num_query_token, width) * 0.02)
            self.clip_projector2 = AttentionPool(width, config.attn_pool_num_heads, embed)
            self.itm_head = nn.Linear(width, 2)

    def vision(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> last hidden state [B, N, D]."""
        dtype = self.vision_model.embeddings.class_embedding.dtype
        out: Tensor = self.vision_model(pixel_values.to(dtype))
        return out

    def query_pass(self, tokens: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Vision tokens [B, N, D] -> query rows after the final norm [B, Q, H], their keys and values."""
        return query_pass(self.qllama, self.query_tokens, tokens)

    def query_features(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> query rows after the final norm [B, Q, H]."""
        return self.query_pass(self.vision(pixel_values))[0]

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T] -> [B, T, H] after the final norm; ids 0 are padding unless a mask [B, T] says otherwise."""
        mask = (input_ids > 0) if attention_mask is None else attention_mask.bool()
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        positions = torch.arange(length, device=input_ids.device)[None]
        visible = Visible(causal & mask[:, None, None, :])
        out: Tensor = self.qllama(self.qllama.embed(input_ids), positions, visible)[0]
        return out

    def pool_image(self, tokens: Tensor, queries: Tensor | None) -> Tensor:
        """Vision tokens (C), and query rows (G) -> [B, E], not normalised."""
        embed: Tensor = self.clip_projector(tokens)
        if queries is None:
            return embed
        return F.normalize(embed, dim=-1) + F.normalize(self.clip_projector2(queries), dim=-1)

    def encode_image(self, pixel_values: Tensor, mode: Mode = "InternVL-C") -> Tensor:
        """[B, 3, S, S] -> [B, E], not normalised."""
        tokens = self.vision(pixel_values)
        return self.pool_image(tokens, self.query_pass(tokens)[0] if _is_g(mode) else None)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, E], not normalised: the state at the last position of ``sum(ids > 0)``, projected.

        An id 0 inside a text is masked and shifts that position, as in the published code.
        """
        last = (input_ids > 0).sum(1) - 1
        states = self.text_features(input_ids)
        return states[torch.arange(len(states), device=states.device), last] @ self.text_projection

    def logits(self, pixel_values: Tensor, input_ids: Tensor, mode: Mode = "InternVL-C") -> Tensor:
        """exp(logit_scale) times the cosine of every pair: [images, texts]."""
        image = F.normalize(self.encode_image(pixel_values, mode), dim=-1)
        text = F.normalize(self.encode_text(input_ids), dim=-1)
        return self.logit_scale.exp() * image @ text.t()

    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int = 30,
        num_beams: int = 1,
        min_new_tokens: int = 0,
    ) -> Tensor:
        """Caption: prompt ids [B, T] and mask [B, T] -> new token ids [B, <= max_new_tokens], 0 after EOS."""
        from .generate import generate

        return generate(
            self, pixel_values, input_ids, attention_mask, max_new_tokens, num_beams, min_new_tokens
        )


class InternViTModel(InternVLModel):
    """An InternViT alone: :meth:`vision` works, all that needs other weights raises CapabilityError."""

    def __init__(self, config: InternViTConfig) -> None:
        nn.Module.__init__(self)
        self.vision_model = InternViT(config.vision)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise CapabilityError(
                f"An InternViT alone has no {name}.",
                "Its checkpoint holds the vision model only.",
                "Load an InternVL-C or InternVL-G checkpoint.",
            ) from error


def _is_g(mode: str) -> bool:
    if mode not in ("InternVL-C", "InternVL-G"):
        raise UsageError(f"Unknown mode {mode!r}.", fix="Use 'InternVL-C' or 'InternVL-G'.")
    return mode == "InternVL-G"
