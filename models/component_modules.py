"""Torch modules of the components. Each has only the weights it reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .chat_vision import QueryTower, SelectedVisionTower, TwoMLP, projector
from .config import ChatConfig, InternViTConfig, InternVLConfig
from .generate import step_mask
from .heads import AttentionPool
from .qllama import Decoder, KeyValue, QLlama, Visible, query_pass, run_layers
from .vit import InternViT


class Vision(nn.Module):
    """InternViT and the InternVL-C head."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.vision_model = InternViT(config.vision)
        self.clip_projector = AttentionPool(
            config.vision.hidden_size, config.attn_pool_num_heads, config.clip_embed_dim
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, S, S] -> tokens [B, N, D], image_embed [B, E], outputs of the feature blocks [B, N, D]."""
        tokens, features = self.vision_model.features(pixel_values)
        return (tokens, self.clip_projector(tokens), *features)


class Query(nn.Module):
    """The query pass (all queries see each other, so no mask) and the InternVL-G head."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        width = config.qllama.hidden_size
        self.qllama = QLlama(config, lm_head=False)
        del self.qllama.model.embed_tokens  # queries are not looked up
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_token, width))
        self.clip_projector2 = AttentionPool(width, config.attn_pool_num_heads, config.clip_embed_dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """[B, N, D] -> query_hidden [B, Q, H], query_embed [B, E], then key and value of every layer."""
        hidden, new = query_pass(self.qllama, self.query_tokens, tokens)
        return (hidden, self.clip_projector2(hidden), *_flat(new))


class Text(nn.Module):
    """A causal LLaMA over right-padded text, read at its last token.

    Padding comes after every token that is read, so causal attention hides it: no mask input.
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.qllama = QLlama(config, lm_head=False, cross_attention=False)
        self.text_projection = nn.Parameter(torch.empty(config.qllama.hidden_size, config.clip_embed_dim))

    def forward(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor]:
        """[B, T], [B] -> text_embed [B, E]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden, _ = self.qllama(self.qllama.embed(input_ids), positions, Visible(causal=True))
        last = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return ((hidden.gather(1, last) @ self.text_projection).squeeze(1),)


class Match(nn.Module):
    """Image-text matching (ITM, paper section 3.3): queries and text see each other, and the image.

    Every position attends to all but padding; the head reads the query rows.
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        width = config.qllama.hidden_size
        self.qllama = QLlama(config, lm_head=False)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_token, width))
        self.itm_head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor]:
        """[B, N, D], [B, T], [B] -> itm_logits [B, 2]: no match, match."""
        count, length = self.query_tokens.shape[1], input_ids.shape[1]
        queries = self.query_tokens.expand(tokens.shape[0], -1, -1)
        rows = torch.cat([queries, self.qllama.embed(input_ids)], 1)
        positions = torch.arange(count + length, device=tokens.device)[None]
        seen = (positions < count + lengths[:, None])[:, None, None].expand(-1, -1, count + length, -1)
        hidden, _ = self.qllama(rows, positions, Visible(seen), tokens, count)
        return (self.itm_head(hidden[:, :count]).mean(1),)


class Step(nn.Module):
    """New text tokens over a cache of keys and values: plain LLaMA, no cross-attention."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.qllama = QLlama(config, cross_attention=False)

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """[B, T], [B, T], [B, P + T], 2 L x [B, heads, P, d] -> logits [B, V], 2 L x [B, heads, T, d]."""
        visible = Visible(step_mask(attention_mask, input_ids.shape[1]))
        pairs = list(zip(past[::2], past[1::2], strict=True))
        hidden, new = self.qllama(self.qllama.embed(input_ids), positions, visible, past=pairs)
        return (self.qllama.lm_head(hidden[:, -1:]).squeeze(1), *_flat(new))


class VisionTokens(nn.Module):
    """InternViT alone."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.vision_model = InternViT(config.vision)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, S, S] -> tokens [B, N, D], outputs of the feature blocks [B, N, D]."""
        tokens, features = self.vision_model.features(pixel_values)
        return (tokens, *features)


class ChatVision(nn.Module):
    """The blocks of InternViT that a chat model reads, and its projector."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {"vision_tower": SelectedVisionTower(config), "mm_projector": projector(config)}
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """[B, 3, S, S] -> visual_embeds [B, V, H]."""
        return (self.model["mm_projector"](self.model["vision_tower"](pixel_values)),)


class ChatFeatures(nn.Module):
    """InternViT under QLLaMA, and the projector of the selected layer's features."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        self.model = _Sight(config)
        del self.model.vision_tower.vision_tower.qllama, self.model.vision_tower.vision_tower.query_tokens
        del self.model.mm_projector.mlp2

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> visual_embeds [B, P, H], tokens [B, N, D]."""
        features, tokens = self.model.vision_tower.features(pixel_values)
        return self.model.mm_projector.mlp1(features), tokens


class ChatQueries(nn.Module):
    """The query pass of a chat model's QLLaMA, and its projector."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        self.model = _Sight(config)
        del self.model.vision_tower.vision_tower.vision_model, self.model.mm_projector.mlp1

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        """[B, N, D] -> query_embeds [B, Q, H]."""
        return (self.model.mm_projector.mlp2(self.model.vision_tower.query(tokens)),)


class _Sight(nn.Module):
    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        self.vision_tower, self.mm_projector = QueryTower(config), TwoMLP(config)


class ChatEmbed(nn.Module):
    """The token embeddings of a chat model, apart from its decoder: visual embeddings go between them."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        llama = config.decoder
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(llama.vocab_size, llama.hidden_size)})

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        """[B, T] -> [B, T, H]."""
        return (self.model["embed_tokens"](input_ids),)


class ChatStep(nn.Module):
    """New positions over a cache of keys and values: the chat model's LLaMA."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        llama = config.decoder
        self.model = Decoder(llama, [None] * llama.num_hidden_layers)
        del self.model.embed_tokens
        self.lm_head = nn.Linear(llama.hidden_size, llama.vocab_size, bias=False)

    def forward(
        self, input_embeds: Tensor, positions: Tensor, attention_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """[B, T, H], [B, T], [B, P + T], 2 L x [B, heads, P, d] -> [B, V], 2 L x [B, heads, T, d]."""
        visible = Visible(step_mask(attention_mask, input_embeds.shape[1]))
        pairs = list(zip(past[::2], past[1::2], strict=True))
        hidden, new = run_layers(self.model, input_embeds, positions, visible, past=pairs)
        return (self.lm_head(hidden[:, -1:]).squeeze(1), *_flat(new))


def _flat(pairs: list[KeyValue]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]
