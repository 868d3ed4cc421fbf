"""Low-rank adaptation of linear layers (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / r) B A x.

A and B are parameters of the adapted layer itself, so that the names of everything else stay as published.
Adapters are stored in the layout of the PEFT library.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, UsageError
from ..files.text import read_text

DECODER = "model.layers.*_proj"
"""The linear layers of a chat model's decoder blocks."""
_PEFT = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """Rank, scale and place of the adapters: ``pattern`` (fnmatch) over names of linear layers."""

    rank: int = 8
    alpha: float = 16.0
    pattern: str = DECODER

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UsageError("These LoRA settings cannot be right.", f"rank {self.rank}, alpha {self.alpha}.")


def add(model: nn.Module, lora: Lora, seed: int = 0) -> list[str]:
    """Give every matching linear layer an A (random, as a linear layer's weight) and a B (zero): names.

    The model's outputs do not change yet. UsageError if no layer matches.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and fnmatch(n, lora.pattern)]
    if not names:
        raise UsageError(
            "LoRA has nothing to adapt.",
            f"No linear layer matches {lora.pattern!r}.",
            "Name layers that the model has.",
        )
    for name in names:
        layer: Any = model.get_submodule(name)
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(lora.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        _attach(layer, a, torch.zeros(layer.out_features, lora.rank), lora)
    return names


def merge(model: nn.Module, lora: Lora) -> None:
    """Add scale * B A to the weights of the adapted layers, and take the adapters away."""
    for layer in _adapted(model).values():
        with torch.no_grad():
            layer.weight += (lora.alpha / lora.rank) * (layer.lora_b.float() @ layer.lora_a.float()).to(
                layer.weight.dtype
            )
        layer.lora_hook.remove()
        del layer.lora_a, layer.lora_b, layer.lora_hook


def save(model: nn.Module, lora: Lora, folder: Path) -> None:
    """Write the adapters of ``model`` into ``folder``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    layers = _adapted(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PEFT}{name}.lora_A.weight"] = layer.lora_a.detach().contiguous()
        tensors[f"{_PEFT}{name}.lora_B.weight"] = layer.lora_b.detach().contiguous()
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def load(model: nn.Module, folder: Path) -> Lora:
    """Put the adapters of ``folder`` on ``model``; CheckpointError where they do not fit it."""
    from safetensors.torch import load_file

    try:
        config = json.loads(read_text(folder / _CONFIG, CheckpointError))
        tensors = load_file(folder / _WEIGHTS)
        lora = Lora(int(config["r"]), float(config["lora_alpha"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no LoRA adapters.",
            str(error),
            "Give a folder that a training with -O lora-rank wrote.",
        ) from error
    names = sorted({key.removeprefix(_PEFT).rpartition(".lora_")[0] for key in tensors})
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in names:
        a, b = (tensors.get(f"{_PEFT}{name}.lora_{x}.weight") for x in "AB")
        layer = linear.get(name)
        if layer is None or a is None or b is None:
            raise CheckpointError(f"{folder} does not fit this model.", f"It adapts {name}.")
        if a.shape != (lora.rank, layer.in_features) or b.shape != (layer.out_features, lora.rank):
            raise CheckpointError(
                f"{folder} does not fit this model.", f"{name}: A {list(a.shape)}, B {list(b.shape)}."
            )
    for name in names:
        a, b = (tensors[f"{_PEFT}{name}.lora_{x}.weight"] for x in "AB")
        _attach(linear[name], a, b, lora)
    return lora


def _attach(layer: Any, a: Tensor, b: Tensor, lora: Lora) -> None:
    layer.lora_a, layer.lora_b = nn.Parameter(a.to(layer.weight)), nn.Parameter(b.to(layer.weight))
    layer.lora_hook = layer.register_forward_hook(_adapt(lora.alpha / lora.rank))


def _adapt(scale: float) -> Any:
    def hook(layer: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out + scale * F.linear(F.linear(args[0], layer.lora_a), layer.lora_b)

    return hook


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_a")}
