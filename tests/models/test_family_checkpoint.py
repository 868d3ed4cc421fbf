"""Checkpoints of InternVL 1.1 to 3.5: weights under other names and joined, prefixes, ties, refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ivl_export.errors import CapabilityError, CheckpointError
from ivl_export.models import load_chat, load_model
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.registry import (
    component_module,
    components_of,
    config_from_published,
    expected_shapes,
    family_of,
    sliced,
)
from ivl_export.models.storage import Rows, TensorRef, View, read_header
from ivl_export.models.tiles_config import TilesConfig
from ivl_export.models.tiles_layout import published_shapes
from ivl_export.models.tiles_published import PUBLISHED

FAMILY = Path(__file__).parent.parent / "goldens" / "family"
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def copied(folder: str, to: Path) -> Path:
    shutil.copytree(FAMILY / folder, to, ignore=shutil.ignore_patterns("inputs*", "outputs*"))
    return to


def configured(folder: Path, section: str = "", **values: Any) -> Path:
    """``folder`` with keys of its config changed, or removed by None."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    part = data[section] if section else data
    part.update(values)
    for key in [k for k, v in values.items() if v is None]:
        del part[key]
    path.write_text(json.dumps(data))
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """``folder`` with other tensors."""
    file = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, file)
    return folder


def logits(folder: Path) -> Tensor:
    """The decoder's results for a prompt with text only."""
    with torch.no_grad():
        return load_chat(folder).logits(torch.arange(3, 12)[None], None)  # type: ignore[arg-type]


# Fused weights, against a plain LLaMA that has the same ones apart


def as_llama(folder: Path) -> dict[str, Tensor]:
    return {key: open_checkpoint(folder).load(key) for key in open_checkpoint(folder).tensors}


@pytest.mark.parametrize("kind", ["internlm2", "phi3"])
def test_fused_weights_split_into_those_of_a_llama(kind: str, tmp_path: Path) -> None:
    """Written apart and under LLaMA's names, they make the same model."""
    folder = copied({"internlm2": "chat_internlm2_6b", "phi3": "chat_phi3_300m"}[kind], tmp_path / "fused")
    configured(folder, "llm_config", rope_scaling=None)
    apart = tmp_path / "apart"
    shutil.copytree(folder, apart)
    save_file(as_llama(folder), apart / "model.safetensors")
    configured(apart, "llm_config", architectures=["LlamaForCausalLM"])
    assert torch.equal(logits(folder), logits(apart))
    assert set(open_checkpoint(apart).tensors) == set(open_checkpoint(folder).tensors)


def test_rows_of_wqkv_are_groups_of_a_key_head(tmp_path: Path) -> None:
    """With biases too, which no golden has: packed here head by head, as the published layout says."""
    folder = copied("chat_internlm2_6b", tmp_path / "c")
    generator = torch.Generator().manual_seed(0)
    parts = {p: torch.randn(heads, 8, 48, generator=generator) for p, heads in (("q", 6), ("k", 2), ("v", 2))}
    biases = {p: torch.randn(w.shape[0] * 8, generator=generator) for p, w in parts.items()}

    def packed(pieces: dict[str, Tensor]) -> Tensor:
        rows = []
        for head in range(2):
            rows += [*pieces["q"][3 * head : 3 * head + 3], pieces["k"][head], pieces["v"][head]]
        return torch.cat(rows)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        block = "language_model.model.layers.1.attention."
        tensors[f"{block}wqkv.weight"] = packed(parts)
        for i in range(3):
            name = f"language_model.model.layers.{i}.attention."
            tensors[f"{name}wqkv.bias"] = packed({p: b.view(-1, 8) for p, b in biases.items()})
            tensors[f"{name}wo.bias"] = torch.randn(48, generator=generator)
        return tensors

    checkpoint = open_checkpoint(rewritten(configured(folder, "llm_config", bias=True), change))
    for p, weight in parts.items():
        key = f"language_model.model.layers.1.self_attn.{p}_proj"
        assert torch.equal(checkpoint.load(f"{key}.weight"), weight.flatten(0, 1))
        assert torch.equal(checkpoint.load(f"{key}.bias"), biases[p])


def test_stacked_experts_equal_single_ones(tmp_path: Path) -> None:
    """transformers 5 holds them stacked, of each its gates and then its ups."""
    single = copied("native_qwen3moe_300m", tmp_path / "single")
    stacked = copied("native_qwen3moe_300m", tmp_path / "stacked")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for i in range(3):
            name = f"model.language_model.layers.{i}.mlp.experts."
            gates, ups, downs = (
                [tensors.pop(f"{name}{e}.{p}_proj.weight") for e in range(8)] for p in ("gate", "up", "down")
            )
            tensors[f"{name}gate_up_proj"] = torch.stack(
                [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
            )
            tensors[f"{name}down_proj"] = torch.stack(downs)
        return tensors

    checkpoint = open_checkpoint(rewritten(stacked, change))
    assert torch.equal(logits(single), logits(stacked))
    assert checkpoint.revision == open_checkpoint(single).revision
    key = "language_model.model.layers.2.mlp.experts.5.up_proj.weight"
    ref = checkpoint.tensors[key]
    assert ref.offset is not None
    stored = (tmp_path / "stacked" / "model.safetensors").read_bytes()[ref.offset : ref.offset + ref.nbytes]
    assert stored == bytes(checkpoint.file_bytes(key)), "one run of rows has a place in the file"


def test_gates_and_ups_of_gpt_oss_alternate() -> None:
    folder = FAMILY / "native_gptoss_300m"
    stored, checkpoint = load_file(folder / "model.safetensors"), open_checkpoint(folder)
    theirs = "model.language_model.layers.2.mlp.experts."
    ours = "language_model.model.layers.2.mlp.experts.3."
    for name, columns in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
        weight = stored[f"{theirs}gate_up_proj"][3][:, columns].T
        assert torch.equal(checkpoint.load(f"{ours}{name}_proj.weight"), weight)
        bias = stored[f"{theirs}gate_up_proj_bias"][3][columns]
        assert torch.equal(checkpoint.load(f"{ours}{name}_proj.bias"), bias)
    assert torch.equal(checkpoint.load(f"{ours}down_proj.weight"), stored[f"{theirs}down_proj"][3].T)
    router = "language_model.model.layers.2.mlp.gate.bias"
    assert torch.equal(checkpoint.load(router), stored["model.language_model.layers.2.mlp.router.bias"])


@given(data=st.data())
@pytest.mark.slow
def test_any_view_reads_what_it_says(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("views") / "w.safetensors"
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    stored = torch.arange(float(2 * rows * width)).reshape(2, rows, width)
    save_file({"w": stored}, path)
    ref = read_header(path)["w"]
    run = st.integers(0, 2 * rows - 1).flatmap(
        lambda first: st.tuples(st.just(first), st.integers(1, 2 * rows - first))
    )
    runs = tuple(data.draw(st.lists(run, min_size=1, max_size=3)))
    first = data.draw(st.integers(0, width - 1))
    columns, turned = (first, data.draw(st.integers(1, 3))), data.draw(st.booleans())
    want = torch.cat([stored.reshape(-1, width)[a : a + n] for a, n in runs])[:, columns[0] :: columns[1]]
    want = want.T if turned else want
    view = View((Rows(ref, runs),), columns, turned).ref(tuple(want.shape))
    assert view.view is not None
    got = view.view.read(view.shape, lambda ref: stored)
    assert torch.equal(got, want)
    assert view.nbytes == want.numel() * 4
    if view.offset is not None:
        raw = path.read_bytes()[view.offset : view.offset + view.nbytes]
        assert raw == want.contiguous().numpy().tobytes()


def test_parts_of_one_tensor_have_one_type(tmp_path: Path) -> None:
    folder = copied("native_qwen3_6b", tmp_path / "c")
    name = "model.vision_tower.encoder.layer.0.attention.k_proj.weight"
    rewritten(folder, lambda tensors: {**tensors, name: tensors[name].bfloat16()})
    with pytest.raises(
        CheckpointError, match=r"parts of one tensor in different types.*k_proj.weight bfloat16"
    ):
        open_checkpoint(folder)


# Both styles of prefixes, and standalone towers


def older_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the conversions of 2025 have."""
    out = {}
    for name, t in tensors.items():
        if name.startswith("model.language_model."):
            name = "language_model.model." + name.removeprefix("model.language_model.")
        elif name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        out[name.removeprefix("model.")] = t
    return out


@pytest.mark.parametrize("folder", ["native_qwen3_6b", "native_gptoss_300m", "native_qwen3moe_300m"])
def test_both_styles_of_prefixes_are_one_model(folder: str, tmp_path: Path) -> None:
    older = rewritten(copied(folder, tmp_path / "older"), older_prefixes)
    assert torch.equal(logits(older), logits(FAMILY / folder))
    assert open_checkpoint(older).revision == open_checkpoint(FAMILY / folder).revision


@pytest.mark.parametrize("folder", ["chat_internlm2_6b", "chat_phi3_300m"])
def test_a_tower_published_alone(folder: str, tmp_path: Path) -> None:
    """InternViT-6B-448px and InternViT-300M-448px: the config of the section, keys without a prefix."""
    data = json.loads((FAMILY / folder / "config.json").read_text())["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    tensors = load_file(FAMILY / folder / "model.safetensors")
    own = {k.removeprefix("vision_model."): t for k, t in tensors.items() if k.startswith("vision_model.")}
    save_file(own, tmp_path / "model.safetensors")
    tower = load_model(tmp_path)
    pixels = load_file(FAMILY / folder / "inputs.safetensors")
    expected = load_file(FAMILY / folder / "outputs.safetensors")
    with torch.no_grad():
        for name, want in (
            ("pixel_values", expected["vit_hidden_states"][-1]),
            ("rect_pixel_values", expected["rect_vit_last_hidden_state"]),
        ):
            got = tower.vision(pixels[name])
            assert float((got - want).abs().max() / want.abs().max()) < 2e-5
    assert open_checkpoint(tmp_path).model.unknown_keys == ()


def test_a_tower_of_448_pixels_under_tiles_of_another_size(tmp_path: Path) -> None:
    """``force_image_size`` says the tiles, ``image_size`` of the tower the stored grid."""
    folder = configured(copied("chat_qwen2_300m", tmp_path / "c"), force_image_size=84)
    chat = load_chat(folder)
    config: Any = chat.config
    assert (config.image_size, config.vision.image_size, config.num_visual) == (84, 56, 9)
    pixels = torch.randn(1, 3, 84, 84)
    with torch.no_grad():
        assert chat.visual_embeds(pixels).shape == (1, 9, 56)
    plain = configured(copied("chat_qwen2_300m", tmp_path / "d"), force_image_size=None)
    assert load_chat(plain).config.image_size == 56


# The tie rule


def test_a_stored_lm_head_wins_and_an_absent_one_is_tied(tmp_path: Path) -> None:
    says = configured(copied("chat_qwen2_300m", tmp_path / "a"), "llm_config", tie_word_embeddings=True)
    assert torch.equal(logits(says), logits(FAMILY / "chat_qwen2_300m")), (
        "as InternVL2-1B, which says so wrongly"
    )

    def headless(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in tensors.items() if name != HEAD}

    tied: Any = load_chat(rewritten(says, headless))
    assert tied.language_model.lm_head.weight is tied.language_model.model.embed_tokens.weight
    silent = copied("chat_qwen2_300m", tmp_path / "b")
    load_chat(rewritten(configured(silent, "llm_config", tie_word_embeddings=None), headless))
    untied = rewritten(copied("chat_qwen2_300m", tmp_path / "c"), headless)
    with pytest.raises(CheckpointError, match=rf"missing: 1 tensor: {HEAD}"):
        open_checkpoint(untied)
    load_chat(configured(untied, tie_word_embeddings=True))


def test_what_is_missing_or_too_much_is_named_as_it_is_stored(tmp_path: Path) -> None:
    folder = copied("chat_internlm2_6b", tmp_path / "c")
    name = "language_model.model.layers.1.attention.wqkv.weight"

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["language_model.model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["mlp1.7.bias"] = torch.ones(2)
        tensors[name] = tensors[name][:64]
        del tensors["mlp1.3.bias"]
        return tensors

    with pytest.raises(CheckpointError) as error:
        open_checkpoint(rewritten(folder, change))
    for part in ("missing: 1 tensor: mlp1.3.bias", "unexpected: 1 tensor: mlp1.7.bias",
                 f"{name} [64, 48] instead of [80, 48]"):  # fmt: skip
        assert part in str(error.value)


# Checkpoints of other kinds


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("pooling_before_gating.attn1.weight", "gating.fc.weight", "mlp2.0.weight"), "InternVL3.5-Flash"),
        (("model.mlp2.dense1.weight",), r"InternVL3.5-Flash.*256 or 64 tokens.*without -Flash"),
        (("language_model.model.layers.0.mlp.up_proj.qweight",), r"an AWQ checkpoint.*bf16"),
        (
            ("language_model.model.layers.0.mlp.up_proj.qweight", "language_model.x.g_idx"),
            "a GPTQ checkpoint",
        ),
    ],
)
def test_weights_of_another_kind_say_what_they_are(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    folder = copied("chat_qwen2_300m", tmp_path / "c")
    rewritten(folder, lambda tensors: {**tensors, **{name: torch.ones(2) for name in names}})
    with pytest.raises(CapabilityError, match=message):
        open_checkpoint(folder)


def test_adapters_are_not_merged_here(tmp_path: Path) -> None:
    folder = copied("chat_qwen2_300m", tmp_path / "c")
    name = "language_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    rewritten(folder, lambda tensors: {**tensors, name: torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"LoRA adapters.*merge_lora"):
        open_checkpoint(folder)


def test_each_loader_refuses_the_other_kind() -> None:
    with pytest.raises(CheckpointError, match=r"not an InternVL-C.*an InternVL of 1.1 to 3.5.*load_chat"):
        load_model(FAMILY / "chat_qwen2_300m")


# Components


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in FAMILY.glob("*/model.safetensors")))
def test_components_share_out_the_weights(folder: str) -> None:
    config = open_checkpoint(FAMILY / folder).model
    assert isinstance(config, TilesConfig)
    shapes, parts = expected_shapes(config), dict[str, tuple[int, ...]]()
    for component in components_of(config):
        with torch.device("meta"):
            state = component_module(component.name, config).state_dict()
        assert {key: tuple(t.shape) for key, t in state.items()} == component.shapes(config)
        assert not parts.keys() & state.keys(), "nothing twice"
        parts.update(component.shapes(config))
    unread = {key for key in shapes if key not in parts}
    assert parts.items() <= shapes.items()
    blocks = {int(key.split(".")[3]) for key in unread}
    assert blocks == set(range(config.vision_blocks, config.vision.num_hidden_layers))


def test_references_stay_small() -> None:
    """One for each run of rows, so that thousands of experts cost nothing."""
    ref = open_checkpoint(FAMILY / "chat_internlm2_6b").tensors[
        "language_model.model.layers.0.self_attn.q_proj.weight"
    ]
    assert isinstance(ref, TensorRef)
    assert ref.view is not None
    assert [rows.runs for rows in ref.view.rows] == [((0, 24), (40, 24))]
    assert ref.offset is None


# Published sizes


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in FAMILY.glob("*/model.safetensors")))
def test_published_names_and_shapes_are_the_files(folder: str) -> None:
    config: Any = open_checkpoint(FAMILY / folder).model
    stored = {name: ref.shape for name, ref in read_header(FAMILY / folder / "model.safetensors").items()}
    assert published_shapes(config) == stored
    tied = replace(config, decoder=replace(config.decoder, tied=True))
    assert len(published_shapes(tied)) == len(stored) - 1


@pytest.mark.parametrize(
    ("name", "tower", "decoder", "total"),
    [
        ("internvl2-1b", 304.0, 629.7, 938.2),
        ("internvl2.5-8b", 304.0, 7737.8, 8075.4),
        ("internvl3-14b", 304.0, 14766.0, 15117.3),
        ("internvl3-38b", 5536.5, 32759.9, 38388.2),
        ("internvl3.5-30b-a3b", 304.0, 30532.1, 30848.7),
    ],
)
def test_published_parameters(name: str, tower: float, decoder: float, total: float) -> None:
    config = PUBLISHED[name]
    assert config_from_published(json.loads(json.dumps(config.to_published()))) == config
    sizes = {key: math.prod(shape) / 1e6 for key, shape in published_shapes(config).items()}
    parts = [
        sum(n for key, n in sizes.items() if key.startswith(part)) for part in ("vision_", "language_", "")
    ]
    assert parts == pytest.approx([tower, decoder, total], abs=0.06)
    assert (config.num_visual, config.num_tokens) == (256, 1025)


@pytest.mark.parametrize("kind", ["internlm2", "phi3", "gpt_oss", "qwen3_moe"])
def test_made_up_checkpoints_are_in_the_published_layout(kind: str, tmp_path: Path) -> None:
    from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint

    folder = next(
        f
        for f in FAMILY.iterdir()
        if (f / "config.json").is_file() and kind in (f / "config.json").read_text()
    )
    config: Any = open_checkpoint(folder).model
    decoder = replace(config.decoder, vocab_size=512)
    config = replace(config, decoder=decoder, image_token_id=511, layout="opengvlab")  # of the tokenizer made
    make_checkpoint(tmp_path, config, shard_bytes=200_000)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.model == config
    chat: Any = load_chat(checkpoint)
    with torch.no_grad():
        values = chat.logits(torch.arange(3, 40)[None], None)
    assert torch.isfinite(values).all()
    assert 0.1 < float(values.std()) < 10
    assert family_of(config).depths(config) == (config.vision_blocks, config.decoder.num_hidden_layers)
    shallow = sliced(config, 1, 2)
    assert family_of(config).depths(shallow) == (1, 2)
    assert set(expected_shapes(shallow)) < set(expected_shapes(config))
