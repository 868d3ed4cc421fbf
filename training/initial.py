"""Where training starts from: an untrained model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.internvl import InternVLModel
from .presets import Preset


def initialised(preset: Preset) -> InternVLModel:
    """The untrained model: normal weights, residual outputs scaled down by depth (as GPT-2).

    Positions start as sines and cosines about as large as the patches' content: from small random ones a
    short run hardly learns where things stand.
    """
    torch.manual_seed(preset.seed)
    model = InternVLModel(preset.model)
    config = preset.model
    depths = {"vision_model": config.vision.num_hidden_layers, "qllama": config.qllama.num_hidden_layers}
    for name, parameter in model.named_parameters():
        depth = next((n for part, n in depths.items() if name.startswith(part)), 1)
        residual = name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight"))
        if name.endswith((".ls1", ".ls2")):
            nn.init.constant_(parameter, 1.0)  # so shallow a ViT needs no damping
        elif name.endswith("position_embedding"):
            grid = config.vision.image_size // config.vision.patch_size
            parameter.data[:, 1:] = sine_positions(grid, config.vision.hidden_size)
            nn.init.zeros_(parameter.data[:, :1])
        elif parameter.dim() >= 2:
            nn.init.trunc_normal_(parameter, std=0.04 / (2 * depth) ** 0.5 if residual else 0.04)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.trunc_normal_(model.vision_model.embeddings.patch_embedding.weight, std=0.02)
    return model


def sine_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D sines and cosines [grid * grid, width], half of the channels for each axis (as MAE)."""
    quarter = width // 4
    frequencies = 1.0 / 100.0 ** (torch.arange(quarter) / quarter)
    angles = torch.arange(grid)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    table = torch.cat([rows, columns], -1).flatten(0, 1)
    return nn.functional.pad(table, (0, width - table.shape[1]))
