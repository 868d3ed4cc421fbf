"""The checkpoint maker's layouts besides InternVL-14B: InternViT-6B alone, and the chat models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ivl_export.benchmarks.fullsize.make_checkpoint import LAYOUTS, main, make_checkpoint
from ivl_export.inputs.chat_template import IMAGE_TOKEN
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.models import ChatConfig, QLlamaConfig, VisionConfig, load_chat
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.registry import family_of, sliced

NARROW = ChatConfig(VisionConfig(320, 6, 5, 640, 56, 14), QLlamaConfig(256, 4, 4, 384, 1500), image_size=84)
TOWER = 5_902_793_600 + 6_680_883_200 + 956_418_048 + 204_611_584 + 393_216
"""InternViT, QLLaMA with its cross-attention and lm_head, and the queries."""


@pytest.mark.parametrize(
    ("layout", "parameters", "blocks"),
    [
        ("internvit-6b", 5_902_793_600, (48, 0)),
        # with the two layers of the projector, and the three blocks of the tower that are not run
        ("chat-7b", 5_902_793_600 + 6_738_415_616 + 4096 * (3200 + 1 + 4096 + 1), (45, 32)),
        ("chat-13b", 5_902_793_600 + 13_015_864_320 + 5120 * (3200 + 1 + 5120 + 1), (45, 40)),
        ("chat-7b-qllama", TOWER + 6_738_415_616 + 4096 * (3200 + 4096 + 2 * (1 + 4096 + 1)), (48, 32)),
        ("chat-13b-qllama", TOWER + 13_015_864_320 + 5120 * (3200 + 4096 + 2 * (1 + 5120 + 1)), (48, 40)),
    ],
)
def test_full_sizes(tmp_path: Path, layout: str, parameters: int, blocks: tuple[int, int]) -> None:
    assert main([str(tmp_path), "--layout", layout, "--holes"]) == 0
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.model == LAYOUTS[layout]
    assert family_of(checkpoint.model).depths(checkpoint.model) == blocks
    assert sum(ref.nbytes for ref in checkpoint.tensors.values()) == 2 * parameters
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > 2 * parameters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_blocks(tmp_path: Path, layout: str) -> None:
    assert main([str(tmp_path), "--layout", layout, "--holes", "--blocks", "2"]) == 0
    model = open_checkpoint(tmp_path).model
    assert family_of(model).depths(model) == (2, 0 if layout == "internvit-6b" else 2)
    if isinstance(model, ChatConfig):
        assert (model.vision.num_hidden_layers, model.select_layer) == ((2, -2) if model.queries else (5, -4))


def test_a_made_chat_model_runs(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, sliced(NARROW, 2, 3), depth=40)
    assert ImageSettings.load(tmp_path / "preprocessor_config.json") == ImageSettings(84, mode="pad")
    model = load_chat(tmp_path)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 84, 84, generator=generator)
    with torch.no_grad():
        visual = model.visual_embeds(pixels)
        hidden, _ = model(visual, torch.arange(36)[None], torch.ones(1, 36, dtype=torch.int64))
    for values in (visual, hidden):
        assert torch.isfinite(values).all()
        assert 1e-3 < float(values.std()) < 1e3
    ids = torch.tensor([[1, IMAGE_TOKEN, 7]])
    assert model.generate(pixels, ids, torch.ones_like(ids), 4).shape[1] <= 4


def test_a_slice_holds_the_deeper_models_first_layers(tmp_path: Path) -> None:
    for name, text in (("a", 1), ("b", 2)):
        make_checkpoint(tmp_path / name, sliced(NARROW, 1, text), depth=40)
    small, large = (open_checkpoint(tmp_path / name) for name in "ab")
    assert set(small.tensors) < set(large.tensors)
    key = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(small.load(key), large.load(key))


def test_an_internvit_alone_is_stored_without_a_prefix(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--layout", "internvit-6b", "--holes", "--blocks", "1"]) == 0
    (shard,) = tmp_path.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"embeddings", "encoder"}  # noqa: SIM118
    assert not (tmp_path / "tokenizer.model").exists()
