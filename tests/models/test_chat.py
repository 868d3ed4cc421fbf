"""InternVL-Chat against the numbers of the published implementation, and its checkpoint layouts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ivl_export.errors import CapabilityError, CheckpointError, InputError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.models import ChatConfig, InternViTConfig, VisionConfig, load_chat, load_model
from ivl_export.models.chat import InternVLChatModel, splice
from ivl_export.models.chat_vision import SelectedVisionTower
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.config import VICUNA_7B, VICUNA_13B
from ivl_export.models.layout import CHAT_TOWER
from ivl_export.models.registry import expected_shapes, load_config
from ivl_export.models.vit import resize_positions
from ivl_export.tests.numbers import GRADIENT, HIDDEN, LOGITS, LOSS, near

pytestmark = pytest.mark.numeric

CHAT = Path(__file__).parents[1] / "goldens" / "chat"
TINY = CHAT.parent / "tiny"


@pytest.fixture(scope="module")
def model() -> InternVLChatModel:
    return load_chat(CHAT)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(CHAT / "chat.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    copy = tmp_path / "chat"
    shutil.copytree(CHAT, copy, ignore=shutil.ignore_patterns("chat.safetensors"))
    return copy


@torch.no_grad()
def test_visual_embeddings(model: InternVLChatModel, golden: dict[str, Tensor]) -> None:
    tower = model.model.vision_tower
    assert isinstance(tower, SelectedVisionTower)
    embeddings = tower.vision_tower.embeddings
    grid = resize_positions(embeddings.position_embedding, (6, 6))
    near(grid[:, 1:], golden["vit_interpolated_position_embedding"], HIDDEN)
    states = tower.vision_tower.hidden_states(golden["images"])
    assert len(states) == 4, "6 blocks are stored, the fourth state from the end is read"
    near(torch.stack(states), golden["vit_hidden_states"][:4], HIDDEN)
    near(tower(golden["images"]), golden["vit_features"], HIDDEN)
    near(model.visual_embeds(golden["images"]), golden["projector_out"], HIDDEN)


@torch.no_grad()
@pytest.mark.parametrize(("case", "images"), [("img", [0, 1, 2]), ("mixed", [0, 2])])
def test_hidden_states_and_logits(
    model: InternVLChatModel, golden: dict[str, Tensor], case: str, images: list[int]
) -> None:
    x, mask = splice(
        model.model.embed_tokens,
        golden[f"{case}.input_ids"],
        golden[f"{case}.attention_mask"],
        model.visual_embeds(golden["images"][images]),
    )
    length = x.shape[1]  # the published code keeps columns that are padding in every row
    visible = golden[f"{case}.new_attention_mask"]
    assert not visible[:, length:].any()
    visible = visible[:, :length]
    assert torch.equal(mask.bool(), visible)
    hidden, _ = model(x, torch.arange(length)[None], mask)
    for got, name, tolerance in (
        (x, "inputs_embeds", HIDDEN),
        (hidden, "last_hidden_state", HIDDEN),
        (model.lm_head(hidden), "logits", LOGITS),
    ):
        near(got[visible], golden[f"{case}.{name}"][:, :length][visible], tolerance)


def test_loss_and_gradients(golden: dict[str, Tensor]) -> None:
    model = load_chat(CHAT).requires_grad_(True)
    x, mask = splice(
        model.model.embed_tokens, golden["img.input_ids"], golden["img.attention_mask"],
        model.visual_embeds(golden["images"]),
    )  # fmt: skip
    hidden, _ = model(x, torch.arange(x.shape[1])[None], mask)
    logits = model.lm_head(hidden)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), golden["img.new_labels"][:, 1:].flatten())
    near(loss, golden["img.loss"], LOSS)
    loss.backward()  # type: ignore[no-untyped-call]
    by_name = {f"img.grad.{name}": p.grad for name, p in model.named_parameters()}
    names = [name for name in golden if name.startswith("img.grad.")]
    assert len(names) == 8
    for name in names:
        value = by_name[name]
        assert value is not None
        near(value, golden[name], GRADIENT)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_greedy_tokens_and_their_logits(
    model: InternVLChatModel, golden: dict[str, Tensor], row: int
) -> None:
    ids, image = golden[f"gen{row}.input_ids"], golden["images"][row : row + 1]
    expected = golden[f"gen{row}.new_tokens"]
    out = model.generate(image, ids, torch.ones_like(ids), max_new_tokens=10)
    assert out.tolist() == expected.tolist()
    with torch.no_grad():
        x, mask = splice(model.model.embed_tokens, ids, torch.ones_like(ids), model.visual_embeds(image))
        x = torch.cat([x, model.model.embed_tokens(expected[:, :-1])], 1)
        mask = torch.ones(x.shape[:2], dtype=torch.int64)
        hidden, _ = model(x, torch.arange(x.shape[1])[None], mask)
    near(model.lm_head(hidden[:, -10:]), golden[f"gen{row}.step_logits"], LOGITS)


@pytest.mark.parametrize("left", [False, True])
def test_prompts_of_different_lengths_in_one_batch(
    model: InternVLChatModel, golden: dict[str, Tensor], left: bool
) -> None:
    rows = [golden[f"gen{i}.input_ids"][0] for i in range(3)]
    longest = max(map(len, rows))

    def padded(values: Tensor) -> Tensor:
        missing = longest - len(values)
        return F.pad(values, (missing, 0) if left else (0, missing))

    ids = torch.stack([padded(row) for row in rows])
    mask = torch.stack([padded(torch.ones_like(row)) for row in rows])
    out = model.generate(golden["images"], ids, mask, max_new_tokens=10)
    assert out.tolist() == [golden[f"gen{i}.new_tokens"][0].tolist() for i in range(3)]
    best = model.generate(golden["images"], ids, mask, max_new_tokens=6, num_beams=3)
    for i, row in enumerate(rows):
        alone = model.generate(golden["images"][i : i + 1], row[None], max_new_tokens=6, num_beams=3)
        assert best[i].tolist() == alone[0].tolist()


def test_images_and_placeholders_must_agree(model: InternVLChatModel, golden: dict[str, Tensor]) -> None:
    ids = golden["gen0.input_ids"]
    with pytest.raises(InputError, match=r"1 image placeholders.*2 images"):
        model.generate(golden["images"][:2], ids, torch.ones_like(ids))


def test_published_sizes_and_names() -> None:
    want = {line.split("\t")[0]: json.loads(line.split("\t")[1]) for line in (CHAT / "keys.txt").open()}
    config = load_config(CHAT / "config.json")
    assert isinstance(config, ChatConfig)
    assert {k: list(s) for k, s in expected_shapes(config).items()} == want
    assert (config.vision_blocks, config.num_visual) == (3, 36)
    full = ChatConfig()
    assert (full.vision_blocks, full.num_visual) == (45, 576)
    assert replace(full, select_layer=-1, select_feature="cls_patch").vision_blocks == 48
    for decoder, parameters in ((VICUNA_7B, 6_738_415_616), (VICUNA_13B, 13_015_864_320)):
        shapes = expected_shapes(ChatConfig(decoder=decoder))
        sizes = {k: torch.Size(s).numel() for k, s in shapes.items()}
        of_llama = sum(n for k, n in sizes.items() if not k.startswith((CHAT_TOWER, "model.mm_projector")))
        assert of_llama == parameters
        assert sum(n for k, n in sizes.items() if k.startswith(CHAT_TOWER)) == 5_902_793_600
    for result in (config, full):
        assert ChatConfig.from_published(json.loads(json.dumps(result.to_published()))) == result


def test_module_reads_just_its_part_of_the_published_keys() -> None:
    config = ChatConfig()
    with torch.device("meta"):
        state = InternVLChatModel(config).state_dict()
    shapes = expected_shapes(config)
    assert {k: tuple(v.shape) for k, v in state.items()}.items() <= shapes.items()
    unread = {k.removeprefix(CHAT_TOWER).split(".")[2] for k in shapes if k not in state}
    assert unread == {"45", "46", "47"}


def test_weights_are_views_of_the_file_in_the_stored_type() -> None:
    checkpoint = open_checkpoint(CHAT)
    model = load_chat(checkpoint, dtype=None)
    key = "model.layers.1.mlp.up_proj.weight"
    assert model.state_dict()[key].data_ptr() == checkpoint.load(key).data_ptr()
    assert checkpoint.components == ("vision_chat", "decoder_embed", "decoder")


def test_each_loader_refuses_the_other_kind() -> None:
    with pytest.raises(CheckpointError, match=r"not an InternVL-C.*InternVL-Chat"):
        load_model(CHAT)
    with pytest.raises(CheckpointError, match="is not an InternVL-Chat"):
        load_chat(TINY)


def test_missing_unexpected_and_misshaped_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.mm_projector.0.bias"]
    tensors["model.mm_projector.1.bias"] = torch.zeros(3)
    tensors["lm_head.weight"] = torch.zeros(5, 72)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    for part in (
        "missing: 1 tensor: model.mm_projector.0.bias",
        "unexpected: 1 tensor: model.mm_projector.1.bias",
        "lm_head.weight [5, 72] instead of [180, 72]",
    ):
        assert part in str(error.value)


def split_tower(folder: Path, tower: Path) -> None:
    """Move the vision tower into a separate checkpoint, in the layout of InternViT alone."""
    tensors = load_file(folder / "model.safetensors")
    own = {k.removeprefix(CHAT_TOWER): v for k, v in tensors.items() if k.startswith(CHAT_TOWER)}
    tower.mkdir()
    (folder / "vision_tower_config.json").replace(tower / "config.json")
    torch.save({k: v for k, v in own.items() if "mlp" in k}, tower / "pytorch_model-00001-of-00002.bin")
    torch.save({k: v for k, v in own.items() if "mlp" not in k}, tower / "pytorch_model-00002-of-00002.bin")
    index = {k: f"pytorch_model-0000{1 if 'mlp' in k else 2}-of-00002.bin" for k in own}
    (tower / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith(CHAT_TOWER)}, folder / "model.safetensors"
    )


@pytest.mark.parametrize("inside", [True, False])
def test_vision_tower_in_a_folder_of_its_own(folder: Path, inside: bool, golden: dict[str, Tensor]) -> None:
    split_tower(folder, (folder if inside else folder.parent) / "intern_vit_6b_tiny")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.revision == open_checkpoint(CHAT).revision
    with torch.no_grad():
        near(load_chat(checkpoint).visual_embeds(golden["images"]), golden["projector_out"], HIDDEN)


def test_a_tower_that_is_nowhere_is_named(folder: Path) -> None:
    tower = folder / "intern_vit_6b_tiny"
    split_tower(folder, tower)
    (tower / "config.json").replace(folder / "vision_tower_config.json")
    with pytest.raises(CheckpointError, match=r"no weights of its vision tower.*intern_vit_6b_tiny"):
        open_checkpoint(folder)


def test_vision_tower_alone(folder: Path, golden: dict[str, Tensor]) -> None:
    tower = folder / "tower"
    split_tower(folder, tower)
    checkpoint = open_checkpoint(tower)
    config = checkpoint.model
    assert isinstance(config, InternViTConfig)
    assert checkpoint.components == ("vision",)
    assert InternViTConfig.from_published(config.to_published()) == config
    vit = load_model(tower).vision_model
    with torch.no_grad():
        near(torch.stack(vit.hidden_states(golden["images"])), golden["vit_hidden_states"], HIDDEN)
        near(load_model(tower).vision(golden["images"]), golden["vit_hidden_states"][-1], HIDDEN)
    with pytest.raises(CheckpointError, match="is not an InternVL-Chat"):
        load_chat(tower)
    shapes = expected_shapes(InternViTConfig())
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 5_902_793_600


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"mm_projector_type": "linear"}, CapabilityError, "linear"),
        (
            {"mm_projector_type": "two_mlp"},
            CheckpointError,
            "an InternViT.*two_mlp reads an InternVL",
        ),
        ({"mm_vision_select_layer": -9}, CheckpointError, "7 states"),
        ({"mm_vision_select_feature": "cls"}, CheckpointError, "mm_vision_select_feature"),
        ({"mm_hidden_size": 61}, CheckpointError, "does not fit its vision tower"),
        ({"tie_word_embeddings": True}, CheckpointError, "ties the word embeddings"),
        ({"num_key_value_heads": 2}, CheckpointError, "grouped-query"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "rope_scaling"),
        ({"hidden_size": "wide"}, CheckpointError, r"config\.json\.hidden_size is 'wide'.*whole number"),
    ],
)
def test_configs_that_are_not_this_model(
    folder: Path, change: dict[str, object], kind: type[Exception], message: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(kind, match=message):
        open_checkpoint(folder)


def test_image_size_comes_from_the_preprocessor(folder: Path) -> None:
    ImageSettings(112, mode="pad").save(folder / "preprocessor_config.json")
    config = load_config(folder / "config.json")
    assert isinstance(config, ChatConfig)
    assert (config.image_size, config.num_visual) == (112, 64)
    (folder / "preprocessor_config.json").unlink()
    config = load_config(folder / "config.json")
    assert isinstance(config, ChatConfig)
    assert config.image_size == 336
    with pytest.raises(CheckpointError, match="do not split into patches of 14"):
        ChatConfig(VisionConfig(), image_size=100)
