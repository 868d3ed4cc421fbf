"""InternVL-Chat on InternViT and QLLaMA: without golden numbers, checked against those of its parts.

The model is assembled from two golden ones, the tower of the tiny InternVL and the decoder of the chat
model, and of random projectors, which are spelled out here. Full-size names are those of InternVL-14B.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ivl_export.errors import CheckpointError
from ivl_export.inputs.chat_template import IMAGE_TOKEN
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.models import ChatConfig, InternVLConfig, load_chat
from ivl_export.models.chat import InternVLChatModel, splice
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.config import VICUNA_7B, VICUNA_13B
from ivl_export.models.layout import CHAT_TOWER, HEADS
from ivl_export.models.registry import expected_shapes, load_config
from ivl_export.tests.components import QUERY_CHAT_COMPONENTS
from ivl_export.tests.numbers import FEATURES, LOGITS, near

from ..conftest import CHAT, ROOT, TINY

pytestmark = pytest.mark.numeric


def golden_config(select_layer: int = -2) -> ChatConfig:
    """Images of the tower's own size: the golden numbers are at that."""
    tower, decoder = load_config(TINY / "config.json"), load_config(CHAT / "config.json")
    assert isinstance(tower, InternVLConfig)
    assert isinstance(decoder, ChatConfig)
    return ChatConfig(tower, decoder.decoder, 56, select_layer)


def golden_tensors(config: ChatConfig) -> dict[str, Tensor]:
    tower, decoder = load_file(TINY / "model.safetensors"), load_file(CHAT / "model.safetensors")
    tensors = {CHAT_TOWER + key: value for key, value in tower.items() if not key.startswith(HEADS)}
    generator = torch.Generator().manual_seed(0)
    for key, shape in expected_shapes(config).items():
        if "mm_projector" in key:
            tensors[key] = 0.2 * torch.randn(shape, generator=generator)
        elif key in decoder:
            tensors[key] = decoder[key]
    return tensors


def write(folder: Path, config: ChatConfig, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_published()))
    ImageSettings(config.image_size, mode="pad").save(folder / "preprocessor_config.json")
    return folder


@pytest.fixture(scope="module")
def config() -> ChatConfig:
    return golden_config()


@pytest.fixture(scope="module")
def tensors(config: ChatConfig) -> dict[str, Tensor]:
    return golden_tensors(config)


@pytest.fixture
def folder(tmp_path: Path, config: ChatConfig, tensors: dict[str, Tensor]) -> Path:
    return write(tmp_path / "chat", config, tensors)


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, config: ChatConfig, tensors: dict[str, Tensor]
) -> InternVLChatModel:
    return load_chat(write(tmp_path_factory.mktemp("model"), config, tensors))


def projected(x: Tensor, name: str, tensors: dict[str, Tensor]) -> Tensor:
    first, second = (f"model.mm_projector.{name}.{i}." for i in (0, 2))
    hidden = x @ tensors[first + "weight"].T + tensors[first + "bias"]
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return hidden @ tensors[second + "weight"].T + tensors[second + "bias"]


@torch.no_grad()
@pytest.mark.parametrize(("select_layer", "feature"), [(-2, "patch"), (-1, "patch"), (1, "cls_patch")])
def test_visual_embeddings_are_those_of_the_golden_parts(
    tmp_path: Path, tensors: dict[str, Tensor], select_layer: int, feature: str
) -> None:
    config = replace(golden_config(select_layer), select_feature=feature)
    model = load_chat(write(tmp_path, config, tensors))
    seen = load_file(TINY / "contrastive.safetensors")
    pixels = seen["pixel_values"]
    vision = load_file(TINY / "vision.safetensors")
    assert torch.equal(vision["pixel_values"], pixels)
    states = vision["hidden_states"][select_layer][:, int(feature == "patch") :]
    queries = projected(seen["get_image_features_queries"], "mlp2", tensors)
    want = torch.cat([queries, projected(states, "mlp1", tensors)], 1)
    near(model.visual_embeds(pixels), want, FEATURES)
    assert want.shape[1] == config.num_visual == 8 + states.shape[1]


@torch.no_grad()
def test_larger_images_are_seen_by_both_stacks(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """At 84 pixels InternViT's last state is golden; the queries' results of it are this model's own part."""
    config = replace(golden_config(-1), image_size=84)
    model = load_chat(write(tmp_path, config, tensors))
    golden = load_file(TINY / "vision.safetensors")
    want = projected(golden["resize_up_last_hidden_state"][:, 1:], "mlp1", tensors)
    result = model.visual_embeds(golden["resize_up_pixel_values"])
    assert result.shape == (2, config.num_visual, 72)
    near(result[:, 8:], want, FEATURES)
    small = model.visual_embeds(golden["resize_up_pixel_values"][:, :, :56, :56])
    assert (result[:, :8] - small[:, :8]).abs().max() > 1e-2


@torch.no_grad()
def test_the_decoder_is_the_golden_one(model: InternVLChatModel) -> None:
    golden = load_file(CHAT / "chat.safetensors")
    x, visible = golden["img.inputs_embeds"], golden["img.new_attention_mask"]
    hidden, _ = model(x, torch.arange(x.shape[1])[None], visible.long())
    near(model.lm_head(hidden)[visible], golden["img.logits"][visible], LOGITS)


@torch.no_grad()
def test_generation_is_a_loop_over_the_whole_prompt(model: InternVLChatModel) -> None:
    """Greedy tokens with a cache are those of prompts computed again each time; the prompt has two turns."""
    pixels = load_file(TINY / "contrastive.safetensors")["pixel_values"][:1]
    ids = torch.tensor([[1, 11, IMAGE_TOKEN, 12, 13, 2, 1, 14, 15]])
    got = model.generate(pixels, ids, torch.ones_like(ids), 6)[0].tolist()
    tokens: list[int] = []
    for _ in range(6):
        whole = torch.tensor([[*ids[0].tolist(), *tokens]])
        x, mask = splice(model.model.embed_tokens, whole, torch.ones_like(whole), model.visual_embeds(pixels))
        assert x.shape[1] == whole.shape[1] - 1 + 8 + 16
        hidden, _ = model(x, torch.arange(x.shape[1])[None], mask)
        tokens.append(int(model.lm_head(hidden[:, -1]).argmax()))
    assert got == tokens[: len(got)]


def test_published_sizes_and_names() -> None:
    full = ChatConfig(InternVLConfig())
    assert (full.vision_blocks, full.read_blocks, full.num_visual) == (48, 45, 96 + 576)
    assert full.to_published()["mm_hidden_size"] == 4096
    lines = (ROOT / "tests/goldens/full/keys_InternVL-14B-224px.txt").read_text().splitlines()
    names = {line.split("\t")[0] for line in lines if not line.startswith("#")}
    for decoder, width in ((VICUNA_7B, 4096), (VICUNA_13B, 5120)):
        config = ChatConfig(InternVLConfig(), decoder)
        shapes = expected_shapes(config)
        tower = {key.removeprefix(CHAT_TOWER) for key in shapes if key.startswith(CHAT_TOWER)}
        assert tower == {name for name in names if not name.startswith(HEADS)}
        projectors = {key: shape for key, shape in shapes.items() if "mm_projector" in key}
        assert projectors == {
            f"model.mm_projector.mlp{n}.{i}.{kind}": shape
            for n, wide in ((1, 3200), (2, 4096))
            for i, kind, shape in (
                (0, "weight", (width, wide)), (0, "bias", (width,)),
                (2, "weight", (width, width)), (2, "bias", (width,)),
            )
        }  # fmt: skip
        assert ChatConfig.from_published(json.loads(json.dumps(config.to_published()))) == config


def test_module_reads_just_its_part_of_the_published_keys() -> None:
    config = ChatConfig(InternVLConfig())
    with torch.device("meta"):
        state = InternVLChatModel(config).state_dict()
    shapes = expected_shapes(config)
    assert {k: tuple(v.shape) for k, v in state.items()}.items() <= shapes.items()
    unread = {k.removeprefix(CHAT_TOWER) for k in shapes if k not in state}
    assert unread == {"qllama.model.embed_tokens.weight", "qllama.lm_head.weight"}


def test_the_tower_may_be_an_internvl_next_to_it(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A whole InternVL, whose heads are left out; rotary buffers are let through in both places."""
    revision = open_checkpoint(folder).revision
    assert open_checkpoint(folder).components == QUERY_CHAT_COMPONENTS
    data = json.loads((folder / "config.json").read_text())
    name = data["mm_vision_tower"]
    assert "internvl_14b" in name, "the published code knows the tower by its name"
    rotary = {f"{CHAT_TOWER}qllama.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file({**tensors, **rotary}, folder / "model.safetensors")
    assert open_checkpoint(folder).revision == revision
    own = {k: v for k, v in tensors.items() if not k.startswith(CHAT_TOWER)}
    save_file(own, folder / "model.safetensors")
    del data["vision_config"]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"mm_hidden_size is 64, the tower's width 4096"):
        open_checkpoint(folder)
    shutil.copytree(TINY, folder.parent / name)
    pixels = load_file(TINY / "contrastive.safetensors")["pixel_values"]
    config = open_checkpoint(folder).model
    assert config == golden_config()
    separate, whole = load_chat(folder), load_chat(write(folder, golden_config(), tensors))
    with torch.no_grad():
        assert torch.equal(separate.visual_embeds(pixels), whole.visual_embeds(pixels))


def test_missing_unexpected_and_misshaped_tensors_are_named(folder: Path, tensors: dict[str, Tensor]) -> None:
    changed = dict(tensors)
    del changed["model.mm_projector.mlp2.0.weight"]
    changed["model.mm_projector.0.weight"] = torch.zeros(72, 60)
    changed["model.mm_projector.mlp1.0.weight"] = torch.zeros(72, 64)
    changed[f"{CHAT_TOWER}logit_scale"] = torch.tensor(1.0)
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    for part in (
        "missing: 1 tensor: model.mm_projector.mlp2.0.weight",
        f"unexpected: 2 tensors: model.mm_projector.0.weight, {CHAT_TOWER}logit_scale",
        "model.mm_projector.mlp1.0.weight [72, 64] instead of [72, 60]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_hidden_size": 60}, r"mm_hidden_size is 60, the tower's width 64"),
        ({"mm_projector_type": "mlp2x_gelu"}, r"config of an InternVL\..*mlp2x_gelu reads an InternViT"),
        ({"mm_vision_select_layer": -5}, "4 states"),
        ({"vision_config": {"hidden_size": 60}}, r"config of an InternViT\..*two_mlp reads an InternVL"),
    ],
)
def test_configs_that_are_not_this_model(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
