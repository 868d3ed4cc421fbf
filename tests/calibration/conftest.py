from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer, Tokenizer
from ivl_export.models.checkpoint import Checkpoint, open_checkpoint
from ivl_export.models.config import InternVLConfig, QLlamaConfig, VisionConfig
from ivl_export.models.internvl import InternVLModel
from ivl_export.training.tokenizer import train_tokenizer

CONFIG = InternVLConfig(
    vision=VisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=28,
        patch_size=7,
    ),
    qllama=QLlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, vocab_size=512
    ),
    clip_embed_dim=32,
    attn_pool_num_heads=4,
    num_query_token=6,
)


def written(folder: Path, config: InternVLConfig) -> Checkpoint:
    """Random bf16 weights in the published layout."""
    torch.manual_seed(0)
    model = InternVLModel(config).to(torch.bfloat16)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_published()))
    return open_checkpoint(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny InternVL."""
    return written(tmp_path_factory.mktemp("tiny"), CONFIG)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One layer of each kind: the model that the tests trace, which takes seconds a layer."""
    vision = replace(CONFIG.vision, num_hidden_layers=1)
    qllama = replace(CONFIG.qllama, num_hidden_layers=1)
    return written(tmp_path_factory.mktemp("shallow"), replace(CONFIG, vision=vision, qllama=qllama))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer(train_tokenizer())


@pytest.fixture(scope="session")
def settings() -> ImageSettings:
    return ImageSettings(size=28)


@pytest.fixture(scope="session")
def scenes() -> tuple[CalibrationSet, CalibrationSet]:
    """(to calibrate on, held out)"""
    return scenes_calibration(20).split(4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 12 images, two with captions, one of them in a subfolder."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(12):
        name = f"more/{i}.png" if i == 11 else f"{i}.jpg"
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / name)
    (folder / "0.txt").write_text("a red circle\n")
    (folder / "more/11.txt").write_text("一个红色的小圆形", encoding="utf-8")
    return folder
