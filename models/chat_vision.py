"""Visual embeddings of a chat model: the vision towers and projectors of both forms (:mod:`.config`).

Modules and their names are the published ones: ``vision_tower.vision_tower`` is an InternViT, or an InternVL
without its heads, and the projector is one two-layer MLP, or ``mlp1`` for InternViT and ``mlp2`` for QLLaMA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import ChatConfig, InternVLConfig
from .qllama import QLlama, query_pass
from .vit import InternViT


class SelectedVisionTower(nn.Module):
    """InternViT up to the selected layer."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        self.vision_tower = InternViT(config.vision, config.vision_blocks)
        self.first = _first(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> features [B, P, D]."""
        return self.selected(pixel_values)[:, self.first :]

    def selected(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> hidden state of the selected layer [B, N, D], class token first."""
        out: Tensor = self.vision_tower(pixel_values)
        return out


class QueryTower(nn.Module):
    """InternViT and QLLaMA's query pass: all of InternViT, for QLLaMA reads its last layer.

    Args:
        config: of a model with queries.
    """

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        assert config.queries is not None
        self.vision_tower = Tower(config.queries)
        self.first, self.read_blocks = _first(config), config.read_blocks

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> features of the selected layer [B, P, D], outputs of the queries [B, Q, W]."""
        features, tokens = self.features(pixel_values)
        return features, self.query(tokens)

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> features of the selected layer [B, P, D], tokens of the last one [B, N, D]."""
        states = self.vision_tower.vision_model.hidden_states(pixel_values)
        return states[self.read_blocks][:, self.first :], states[-1]

    def selected(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> hidden state of the selected layer [B, N, D], class token first."""
        return self.vision_tower.vision_model.hidden_states(pixel_values)[self.read_blocks]

    def query(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> outputs of the queries after the final norm [B, Q, W]."""
        return query_pass(self.vision_tower.qllama, self.vision_tower.query_tokens, tokens)[0]


class Tower(nn.Module):
    """The weights of an InternVL that look at images; QLLaMA's text embeddings and lm_head are not read."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.vision_model = InternViT(config.vision)
        self.qllama = QLlama(config, lm_head=False)
        del self.qllama.model.embed_tokens
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, config.qllama.hidden_size))


class TwoMLP(nn.Module):
    """The projectors of a model with queries, whose embeddings come first."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__()
        assert config.queries is not None
        width = config.decoder.hidden_size
        self.mlp1 = mlp(config.vision.hidden_size, width)
        self.mlp2 = mlp(config.queries.qllama.hidden_size, width)

    def forward(self, seen: tuple[Tensor, Tensor]) -> Tensor:
        """Features [B, P, D] and outputs of the queries [B, Q, W] -> [B, Q + P, H]."""
        features, queries = seen
        return torch.cat([self.mlp2(queries), self.mlp1(features)], 1)


def vision_tower(config: ChatConfig) -> SelectedVisionTower | QueryTower:
    """The tower of either form; its outputs are the inputs of :func:`projector`."""
    return QueryTower(config) if config.queries else SelectedVisionTower(config)


def projector(config: ChatConfig) -> nn.Module:
    """Outputs of the tower to embeddings of the decoder [B, V, H]."""
    return TwoMLP(config) if config.queries else mlp(config.vision.hidden_size, config.decoder.hidden_size)


def mlp(width: int, out: int) -> nn.Sequential:
    """Two linear layers and an exact GELU: [..., width] -> [..., out]."""
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def _first(config: ChatConfig) -> int:
    return 1 if config.select_feature == "patch" else 0
