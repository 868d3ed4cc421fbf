"""A chat model in PyTorch: before training, while it is evaluated, and in the published layout on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..dtypes import dtype_of
from ..files.write import atomic
from ..inputs.chat_template import Turn, encode
from ..inputs.preprocess import ImageSettings, preprocess_images
from ..inputs.tokenizer import Tokenizer
from ..models.chat import InternVLChatModel
from ..models.checkpoint import Checkpoint
from ..models.layout import CHAT_TOWER, VISION
from ..models.registry import expected_shapes
from ..synthetic.chat_tasks import LONGEST_ANSWER
from ..synthetic.render import Image8
from .presets import ChatPreset

STD = 0.04


def initialised(preset: ChatPreset, tower: Checkpoint) -> InternVLChatModel:
    """The untrained model: normal weights as in stage 1, and the vision tower of an InternVL."""
    torch.manual_seed(preset.seed)
    model = InternVLChatModel(preset.model)
    depth = preset.model.decoder.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.startswith(CHAT_TOWER):
            parameter.data = tower.load(name.replace(CHAT_TOWER, VISION), torch.float32).clone()
        elif parameter.dim() >= 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.trunc_normal_(parameter, std=STD / (2 * depth) ** 0.5 if residual else STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


class TorchChat:
    """Greedy answers of the PyTorch model, as :data:`..synthetic.chat_tasks.Answer`."""

    def __init__(self, model: InternVLChatModel, tokenizer: Tokenizer, settings: ImageSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def __call__(self, images: Image8, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        """The answer to the last turn of each conversation."""
        rows = [encode(turns, self.tokenizer).ids for turns in conversations]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        pixels = torch.from_numpy(preprocess_images(list(images), self.settings))
        said = self.model.generate(pixels, ids, mask, LONGEST_ANSWER)
        return [self.tokenizer.decode(row).strip() for row in said.tolist()]


def write_as_stored(model: nn.Module, opened: Checkpoint, folder: Path) -> bool:
    """Write ``model`` as the checkpoint ``opened`` is stored: its tensors' names and forms, its other files.

    Returns:
        False, and nothing is written, where the checkpoint has tensors of another folder (a tower apart).
    """
    source = opened.path if opened.path.is_dir() else opened.path.parent
    parts = [rows.ref for ref in opened.tensors.values() if ref.view for rows in ref.view.rows]
    if any(ref.file.parent != source for ref in (*opened.tensors.values(), *parts)):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    stored = {ref.name: torch.empty(ref.shape, dtype=dtype_of(ref.dtype).torch) for ref in parts}
    for key, ref in opened.tensors.items():
        tensor = (state[key] if key in state else opened.load(key)).to("cpu", dtype_of(ref.dtype).torch)
        if ref.view is None:
            stored[ref.name] = tensor.contiguous()
        else:
            ref.view.write(tensor, stored)
    with atomic(folder / "model.safetensors", exclusive=True) as partial:
        save_file(stored, partial, metadata={"format": "pt"})
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pth", ".pt") or path.name.endswith(".index.json")
        if path.is_file() and not weights:
            (folder / path.name).write_bytes(path.read_bytes())
    return True


def write(
    model: InternVLChatModel,
    folder: Path,
    tokenizer: bytes,
    settings: ImageSettings,
    rest: Checkpoint,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the published layout: config.json, model.safetensors, tokenizer.model, preprocessor_config.json.

    ``rest`` has the blocks of the vision tower that the model does not run, in an InternVL or a chat model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    tensors = {}
    for key in expected_shapes(model.config):
        other = key if key in rest.tensors else key.replace(CHAT_TOWER, VISION)
        tensor = state[key] if key in state else rest.load(other)
        tensors[key] = tensor.to("cpu", dtype).contiguous()
    with atomic(folder / "model.safetensors", exclusive=True) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_published(), indent=1) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    settings.save(folder / "preprocessor_config.json")
