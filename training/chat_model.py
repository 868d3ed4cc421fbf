"""A chat model in PyTorch: before training, while it is evaluated, and in the published layout on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..dtypes import dtype_of
from ..files.write import atomic
from ..inputs.chat_template import Turn, encode
from ..inputs.preprocess import ImageSettings, preprocess_images
from ..inputs.tokenizer import Tokenizer
from ..models.chat import InternVLChatModel
from ..models.checkpoint import Checkpoint
from ..models.config import ChatConfig
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


def write_as_stored(
    state: Mapping[str, Tensor],
    opened: Checkpoint,
    folder: Path,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> bool:
    """Write ``state`` as the checkpoint ``opened`` is stored: its tensors' names and forms, its other files.

    Args:
        state: tensors by key; those that are not there are the checkpoint's.
        opened: the checkpoint.
        folder: the new one's.
        dtypes: types of tensors by key, else as they are stored. A stored tensor of several keys has a type
            that holds the values of all.

    Returns:
        False, and nothing is written, where the checkpoint has tensors of another folder (a tower apart).
    """
    source = opened.path if opened.path.is_dir() else opened.path.parent
    parts = [rows.ref for ref in opened.tensors.values() if ref.view for rows in ref.view.rows]
    if any(ref.file.parent != source for ref in (*opened.tensors.values(), *parts)):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    types: dict[str, torch.dtype] = {}
    for key, ref in opened.tensors.items():
        own = dtypes.get(key, dtype_of(ref.dtype).torch)
        for name in [ref.name] if ref.view is None else [rows.ref.name for rows in ref.view.rows]:
            types[name] = torch.promote_types(types.get(name, own), own)
    stored = {ref.name: torch.empty(ref.shape, dtype=types[ref.name]) for ref in parts}
    for key, ref in opened.tensors.items():
        tensor = (state[key] if key in state else opened.load(key)).to("cpu")
        if ref.view is None:
            stored[ref.name] = tensor.to(types[ref.name]).contiguous()
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
    state: Mapping[str, Tensor],
    config: ChatConfig,
    folder: Path,
    tokenizer: bytes,
    settings: ImageSettings,
    rest: Checkpoint,
    dtype: torch.dtype = torch.bfloat16,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Write LLaVA's layout: config.json, model.safetensors, tokenizer.model, preprocessor_config.json.

    Args:
        state: tensors by key.
        config: of the model.
        folder: where the files go.
        tokenizer: its ``tokenizer.model``.
        settings: of images.
        rest: an InternVL or a chat model that has the blocks of the vision tower that the model does not run.
        dtype: of the tensors that ``dtypes`` does not name by their keys.
        dtypes: of the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key in expected_shapes(config):
        other = key if key in rest.tensors else key.replace(CHAT_TOWER, VISION)
        tensor = state[key] if key in state else rest.load(other)
        tensors[key] = tensor.to("cpu", dtypes.get(key, dtype)).contiguous()
    with atomic(folder / "model.safetensors", exclusive=True) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_published(), indent=1) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    settings.save(folder / "preprocessor_config.json")
