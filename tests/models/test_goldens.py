"""Every module of the model against the numbers of the published implementation (tests/goldens/README)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ivl_export.errors import CheckpointError, UsageError
from ivl_export.models import InternVLConfig, QLlamaConfig, VisionConfig, load_model
from ivl_export.models.internvl import InternVLModel, Mode
from ivl_export.models.vit import resize_positions
from ivl_export.tests.numbers import FEATURES, HIDDEN, LOGITS, near

pytestmark = pytest.mark.numeric

GOLDENS = Path(__file__).parents[1] / "goldens" / "tiny"


@pytest.fixture(scope="module")
def model() -> InternVLModel:
    return load_model(GOLDENS)


@pytest.fixture(scope="module")
def vision() -> dict[str, Tensor]:
    return load_file(GOLDENS / "vision.safetensors")


@pytest.fixture(scope="module")
def contrastive() -> dict[str, Tensor]:
    return load_file(GOLDENS / "contrastive.safetensors")


@pytest.fixture(scope="module")
def generated() -> dict[str, Tensor]:
    return load_file(GOLDENS / "generate.safetensors")


@torch.no_grad()
def test_vision_hidden_states(model: InternVLModel, vision: dict[str, Tensor]) -> None:
    pixels = vision["pixel_values"]
    near(torch.stack(model.vision_model.hidden_states(pixels)), vision["hidden_states"], HIDDEN)
    near(model.vision(pixels), vision["last_hidden_state"], HIDDEN)
    near(model.clip_projector(model.vision(pixels)), vision["clip_projector_out"], HIDDEN)


@torch.no_grad()
@pytest.mark.parametrize("grid", ["down", "odd", "up"])
def test_position_embedding_resize(model: InternVLModel, vision: dict[str, Tensor], grid: str) -> None:
    pixels = vision[f"resize_{grid}_pixel_values"]
    side = pixels.shape[-1] // model.config.vision.patch_size
    positions = resize_positions(model.vision_model.embeddings.position_embedding, (side, side))
    near(positions, vision[f"resize_{grid}_position_embedding"], HIDDEN)
    near(model.vision(pixels), vision[f"resize_{grid}_last_hidden_state"], HIDDEN)


@torch.no_grad()
def test_queries_and_text(model: InternVLModel, contrastive: dict[str, Tensor]) -> None:
    queries, _ = model.query_pass(model.vision(contrastive["pixel_values"]))
    near(queries, contrastive["get_image_features_queries"], FEATURES)
    near(model.text_features(contrastive["input_ids"]), contrastive["text_features"], FEATURES)
    mask = contrastive["left_attention_mask"]
    left = model.text_features(contrastive["left_input_ids"], mask)
    near(left[mask.bool()], contrastive["left_text_features"][mask.bool()], FEATURES)
    assert torch.isfinite(left).all(), "rows that see nothing must stay finite"


@torch.no_grad()
@pytest.mark.parametrize(("head", "mode"), [("C", "InternVL-C"), ("G", "InternVL-G")])
def test_embeddings_and_logits(
    model: InternVLModel, contrastive: dict[str, Tensor], head: str, mode: Mode
) -> None:
    pixels, ids = contrastive["pixel_values"], contrastive["input_ids"]
    near(model.encode_image(pixels, mode), contrastive[f"{head}_image_embeds"], FEATURES)
    near(model.encode_text(ids), contrastive[f"{head}_text_embeds"], FEATURES)
    near(model.logits(pixels, ids, mode), contrastive[f"{head}_logits_per_image"], LOGITS)
    near(model.logits(pixels, ids, mode).t(), contrastive[f"{head}_logits_per_text"], LOGITS)


@pytest.mark.parametrize("padding", ["nopad", "leftpad", "rightpad"])
def test_greedy_tokens(model: InternVLModel, generated: dict[str, Tensor], padding: str) -> None:
    expected = json.loads((GOLDENS / "generate.json").read_text())[padding]["new_tokens"]
    prompt = generated[f"{padding}_input_ids"], generated[f"{padding}_attention_mask"]
    out = model.generate(generated["pixel_values"], *prompt, max_new_tokens=10)
    assert out.tolist() == expected


def test_greedy_and_beam_with_min_length(model: InternVLModel, generated: dict[str, Tensor]) -> None:
    expected = json.loads((GOLDENS / "generate.json").read_text())
    call = generated["pixel_values"], generated["nopad_input_ids"], generated["nopad_attention_mask"]
    assert model.generate(*call, 30, 1, 8).tolist() == expected["greedy_min8_max30_new_tokens"]
    assert model.generate(*call, 30, 5, 8).tolist() == expected["beam5_min8_max30_batch3_new_tokens"]
    for row, golden in enumerate(expected["beam5_min8_max30"]):
        pixels, ids, mask = (x[row : row + 1] for x in call)
        one = model.generate(pixels, ids, mask, 30, 5, 8)
        assert one[0].tolist() == golden["new_tokens"]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision_stays_as_close_as_the_published_code(
    contrastive: dict[str, Tensor], dtype: torch.dtype, limit: float
) -> None:
    golden = load_file(GOLDENS / f"half_{str(dtype).removeprefix('torch.')}.safetensors")
    half = load_model(GOLDENS, dtype=dtype)
    pixels, ids = golden["pixel_values"], golden["input_ids"]
    got = {
        "C_img": half.encode_image(pixels),
        "G_img": half.encode_image(pixels, "InternVL-G"),
        "txt": half.encode_text(ids),
    }
    names = {"C_img": "C_image_embeds", "G_img": "G_image_embeds", "txt": "C_text_embeds"}
    for key, value in got.items():
        assert value.dtype == dtype
        exact = contrastive[names[key]]
        assert float((value.float() - exact).norm() / exact.norm()) < limit, key


def test_every_published_name_and_shape_at_full_size() -> None:
    folder = GOLDENS.parent / "full"
    data = json.loads((folder / "config_assumed.json").read_text())
    assert data["tie_word_embeddings"], "the upstream class's default, which would overwrite the embeddings"
    with pytest.raises(CheckpointError, match="ties the word embeddings"):
        InternVLConfig.from_published(data)
    config = InternVLConfig.from_published({**data, "tie_word_embeddings": False})
    with torch.device("meta"):
        full = InternVLModel(config)
    state = full.state_dict()
    expected = {}
    for line in (folder / "keys_InternVL-14B-224px.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, shape = line.split("\t")[:2]
        expected[name] = json.loads(shape)
    assert len(expected) == 1048
    assert {k: list(v.shape) for k, v in state.items()} == expected
    counts = json.loads((folder / "param_counts.json").read_text())
    assert sum(v.numel() for v in state.values()) == counts["TOTAL"]


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([4, 8]),
    layers=st.integers(1, 3),
    frequency=st.integers(1, 3),
    queries=st.integers(1, 5),
    qkv_bias=st.booleans(),
    qk_norm=st.booleans(),
    grid=st.integers(1, 3),
    eps=st.sampled_from([1e-6, 1e-3]),
)
def test_other_sizes_work(
    heads: int,
    head_dim: int,
    layers: int,
    frequency: int,
    queries: int,
    qkv_bias: bool,
    qk_norm: bool,
    grid: int,
    eps: float,
) -> None:
    width = heads * head_dim
    config = InternVLConfig(
        VisionConfig(width, layers, heads, 2 * width, 7 * grid, 7, qkv_bias, qk_norm, eps),
        QLlamaConfig(2 * width, layers, heads, 3 * width, vocab_size=11, rms_norm_eps=eps),
        clip_embed_dim=6,
        attn_pool_num_heads=1,
        num_query_token=queries,
        cross_attention_frequency=frequency,
    )
    assert InternVLConfig.from_published(config.to_published()) == config
    torch.manual_seed(0)
    model = InternVLModel(config).eval()
    names = model.state_dict().keys()
    crossing = {int(k.split(".")[3]) for k in names if "qllama" in k and "cross_attn" in k}
    assert crossing == set(range(0, layers, frequency))
    assert any(k.endswith("qkv.bias") for k in names) == qkv_bias
    assert any("q_norm" in k for k in names) == qk_norm
    pixels, ids = torch.randn(2, 3, 7 * grid, 7 * grid), torch.tensor([[1, 5, 2], [1, 2, 0]])
    assert model.vision(pixels).shape == (2, grid * grid + 1, width)
    for mode in ("InternVL-C", "InternVL-G"):
        assert torch.isfinite(model.logits(pixels, ids, mode)).all()
    out = model.generate(pixels, ids, (ids > 0).long(), max_new_tokens=3)
    assert out.shape[0] == 2
    assert out.shape[1] <= 3


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 10), st.integers(0, 6))
def test_padding_never_changes_a_text_embedding(seed: int, length: int, padding: int) -> None:
    model = load_model(GOLDENS)
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(3, 200, (1, length)))
    padded = torch.nn.functional.pad(ids, (0, padding))
    near(model.encode_text(padded), model.encode_text(ids), FEATURES)


def test_unknown_mode_is_a_usage_error(model: InternVLModel) -> None:
    with pytest.raises(UsageError, match="InternVL-X"):
        model.encode_image(torch.zeros(1, 3, 56, 56), mode="InternVL-X")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": True}, "ties the word embeddings"),
        ({"qllama_config": None}, "qllama_config"),
        ({"attn_pool_num_heads": 7}, "does not split"),
    ],
)
def test_configs_that_are_not_this_model(change: dict[str, object], message: str) -> None:
    data = {**replace(InternVLConfig.load(GOLDENS / "config.json")).to_published(), **change}
    with pytest.raises(CheckpointError, match=message):
        InternVLConfig.from_published(data)
