from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ivl_export.errors import CheckpointError
from ivl_export.models import InternVLConfig, load_model
from ivl_export.models.checkpoint import Checkpoint, load_state, open_checkpoint
from ivl_export.models.layout import infer_config, published_key
from ivl_export.models.registry import expected_shapes
from ivl_export.models.storage import read_header

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = GOLDENS / "tiny"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny() -> Tensors:
    return load_file(TINY / "model.safetensors")


def keys_file(path: Path) -> dict[str, tuple[int, ...]]:
    rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    return {row[0]: tuple(json.loads(row[1])) for row in rows}


def older_name(key: str) -> str:
    key = key.replace("vision_model.embeddings.class_embedding", "cls_token")
    key = key.replace("vision_model.embeddings.position_embedding", "pos_embed")
    key = key.replace("vision_model.embeddings.patch_embedding.", "patch_embed.proj.")
    key = key.replace("vision_model.encoder.layers.", "blocks.").replace("qllama.model.", "transformer.")
    return re.sub(r"(blocks\.\d+\.ls[12])$", r"\1.gamma", key)


def contrastive(tensors: Tensors) -> Tensors:
    config = InternVLConfig.load(TINY / "config.json")
    return {k: tensors[k] for k in expected_shapes(replace(config, contrastive_only=True))}


def halves(tensors: Tensors) -> list[Tensors]:
    keys = sorted(tensors)
    middle = len(keys) // 2
    return [{k: tensors[k] for k in part} for part in (keys[:middle], keys[middle:])]


def save_bin(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path)


def write_sharded(folder: Path, tensors: Tensors, stem: str, suffix: str, save: Callable[..., None]) -> None:
    weight_map = {}
    for i, part in enumerate(halves(tensors), 1):
        name = f"{stem}-{i:05d}-of-00002{suffix}"
        save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def write_layout(folder: Path, tensors: Tensors, layout: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TINY / "config.json", folder / "config.json")
    if layout == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif layout == "bin":
        save_bin(tensors, folder / "pytorch_model.bin")
    elif layout == "safetensors-sharded":
        write_sharded(folder, tensors, "model", ".safetensors", save_file)
    elif layout == "bin-sharded":
        write_sharded(folder, tensors, "pytorch_model", ".bin", save_bin)
    else:
        older = {older_name(k): t for k, t in contrastive(tensors).items()}
        torch.save(older, folder / "internvl_c.pth")
        return folder / "internvl_c.pth"
    return folder


LAYOUTS = ("safetensors", "bin", "safetensors-sharded", "bin-sharded", "older")


def test_full_size_names_and_shapes() -> None:
    want = keys_file(GOLDENS / "full" / "keys_InternVL-14B-224px.txt")
    assert len(want) == 1048
    assert expected_shapes(InternVLConfig()) == want


def test_tiny_names_and_shapes() -> None:
    config = InternVLConfig.load(TINY / "config.json")
    assert expected_shapes(config) == keys_file(TINY / "keys.txt")


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 4),
    frequency=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 5),
    bias=st.booleans(),
    norm=st.booleans(),
    only_c=st.booleans(),
)
def test_expected_shapes_are_the_models(
    layers: int, frequency: int, heads: int, queries: int, bias: bool, norm: bool, only_c: bool
) -> None:
    from ivl_export.models.config import QLlamaConfig, VisionConfig
    from ivl_export.models.internvl import InternVLModel

    config = InternVLConfig(
        VisionConfig(24, layers, heads, 20, 28, 14, qkv_bias=bias, qk_normalization=norm),
        QLlamaConfig(16, layers, heads, 40, 50),
        clip_embed_dim=12,
        attn_pool_num_heads=2,
        num_query_token=queries,
        cross_attention_frequency=frequency,
        contrastive_only=only_c,
    )
    with torch.device("meta"):
        model = InternVLModel(config)
    assert {k: tuple(t.shape) for k, t in model.state_dict().items()} == expected_shapes(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_back_equal(layout: str, tiny: Tensors, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_layout(tmp_path, tiny, layout))
    want = contrastive(tiny) if layout == "older" else tiny
    assert set(checkpoint.tensors) == set(want)
    for key, tensor in want.items():
        assert torch.equal(checkpoint.load(key), tensor), key
        assert bytes(checkpoint.file_bytes(key)) == tensor.numpy().tobytes(), key
    assert checkpoint.load("logit_scale", torch.bfloat16).dtype == torch.bfloat16
    model = load_model(checkpoint)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[key]), key
    assert not any(p.is_meta for p in model.parameters())
    assert checkpoint.has("vision")
    assert checkpoint.has("qllama_query") == (layout != "older")
    assert checkpoint.config.contrastive_only == (layout == "older")


def test_offsets_point_at_the_bytes(tiny: Tensors) -> None:
    checkpoint = open_checkpoint(TINY)
    for key, ref in checkpoint.tensors.items():
        assert ref.offset is not None
        with ref.file.open("rb") as file:
            file.seek(ref.offset)
            assert file.read(ref.nbytes) == tiny[key].numpy().tobytes()


def test_parameters_are_views_of_the_file_and_never_reach_it(tiny: Tensors, tmp_path: Path) -> None:
    model = load_model(write_layout(tmp_path, tiny, "safetensors"))
    weight = model.qllama.lm_head.weight
    start = weight.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    homes = [
        row[5]
        for row in maps
        if len(row) > 5 and int(row[0].split("-")[0], 16) <= start < int(row[0].split("-")[1], 16)
    ]
    assert homes == [str(tmp_path / "model.safetensors")]
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["qllama.lm_head.weight"], tiny["qllama.lm_head.weight"]
    )


def test_part_of_a_model_can_be_filled(tiny: Tensors) -> None:
    from ivl_export.models.heads import AttentionPool

    holder = torch.nn.Module()
    with torch.device("meta"):
        holder.clip_projector = AttentionPool(60, 4, 48)
    load_state(holder, open_checkpoint(TINY), torch.float64)
    got = holder.state_dict()["clip_projector.cross_attn.k.weight"]
    assert got.dtype == torch.float64
    assert torch.equal(got.float(), tiny["clip_projector.cross_attn.k.weight"])


def test_revision_follows_content_not_layout(tiny: Tensors, tmp_path: Path) -> None:
    revisions = {open_checkpoint(write_layout(tmp_path / x, tiny, x)).revision for x in LAYOUTS[:-1]}
    assert revisions == {open_checkpoint(TINY).revision}
    changed = dict(tiny, logit_scale=tiny["logit_scale"] + 1)
    assert open_checkpoint(write_layout(tmp_path / "c", changed, "bin")).revision not in revisions


def test_sampled_revision_sees_another_training_run(
    tiny: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivl_export.models.checkpoint.FULL_HASH_BYTES", 0)
    monkeypatch.setattr("ivl_export.models.checkpoint.SAMPLE_BYTES", 64)
    first = open_checkpoint(TINY).revision
    weight = "qllama.model.layers.3.mlp.up_proj.weight"
    changed = dict(tiny) | {weight: tiny[weight] * 1.0001}
    assert open_checkpoint(write_layout(tmp_path, changed, "safetensors")).revision != first


def test_older_names_map_back(tiny: Tensors) -> None:
    for key in contrastive(tiny):
        assert published_key(older_name(key)) == key


def test_older_file_without_config_gets_its_sizes_from_shapes() -> None:
    full = InternVLConfig()
    inferred = infer_config(expected_shapes(replace(full, contrastive_only=True)), "x.pth")
    assert inferred == full


def test_older_file_without_config_and_other_heads_is_refused(tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "older")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"number of vision attention heads is unknown.*config\.json"):
        open_checkpoint(path)


@pytest.mark.parametrize("layout", ["safetensors", "older"])
def test_rotary_buffers_are_ignored_and_nothing_else(layout: str, tiny: Tensors, tmp_path: Path) -> None:
    base = "transformer" if layout == "older" else "qllama.model"
    extra = {f"{base}.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    path = write_layout(tmp_path, tiny, layout)
    file = path if path.is_file() else path / "model.safetensors"
    save = torch.save if layout == "older" else save_file
    stored = torch.load(file) if layout == "older" else load_file(file)
    save({**stored, **extra}, file)
    assert not any("rotary" in k for k in open_checkpoint(path).tensors)
    surplus = {f"{base}.layers.0.self_attn.rotary.inv_freq": torch.ones(8)}
    save({**stored, **surplus}, file)
    with pytest.raises(CheckpointError, match=r"unexpected: 1 tensor: .*rotary\.inv_freq"):
        open_checkpoint(path)


def refused(path: Path, message: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    return caught.value


def test_missing_unexpected_and_wrong_shapes_are_named_together(tiny: Tensors, tmp_path: Path) -> None:
    broken = {k: t for k, t in tiny.items() if ".0.mlp." not in k}
    broken["vision_model.extra"] = torch.ones(2)
    broken["itm_head.bias"] = torch.ones(3)
    broken["query_tokens"] = broken["query_tokens"].double()
    error = refused(write_layout(tmp_path, broken, "safetensors"), "does not fit its config")
    assert "missing: 7 tensors: vision_model.encoder.layers.0.mlp.fc1.weight" in error.why
    assert "and 2 more" in error.why
    assert "unexpected: 1 tensor: vision_model.extra." in error.why
    assert "wrong shape: 1 tensor: itm_head.bias [3] instead of [2]." in error.why
    assert "unsupported type: 1 tensor: query_tokens float64." in error.why
    assert error.exit_code == 4


def test_tied_embeddings_are_refused(tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    refused(path, "ties the word embeddings")


@pytest.mark.parametrize("size", ["many", 4.5, True])
def test_sizes_that_are_no_whole_numbers_are_named(size: object, tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "safetensors")
    config = json.loads((path / "config.json").read_text())
    config["qllama_config"]["hidden_size"] = size
    (path / "config.json").write_text(json.dumps(config))
    refused(path, f"hidden_size is {size!r}.*whole number")


def test_absent_things(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "No checkpoint at")
    refused(tmp_path, r"No config\.json")
    shutil.copyfile(TINY / "config.json", tmp_path / "config.json")
    refused(tmp_path, "No weights in")
    shutil.copyfile(TINY / "model.safetensors", tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "is one file of a checkpoint")


@pytest.mark.parametrize("layout", ["safetensors-sharded", "bin-sharded"])
def test_missing_shard(layout: str, tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, layout)
    next(path.glob("*-00002-of-00002.*")).unlink()
    error = refused(path, "lacks 1 of the 2 shards")
    assert "-00002-of-00002" in error.why
    assert "tensors: " in error.why


@pytest.mark.parametrize("layout", ["safetensors", "bin", "safetensors-sharded", "bin-sharded", "older"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(layout: str, keep: float, tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, layout)
    suffix = {"older": ".pth"}.get(layout, "." + layout.split("-")[0])
    file = max(tmp_path.glob(f"*{suffix}"))
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    assert file.name in str(refused(path, "damaged"))


def test_surplus_bytes_are_damage(tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "safetensors")
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    refused(path, "truncated or damaged")


def test_zip_without_its_pickle(tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "bin")
    with zipfile.ZipFile(path / "pytorch_model.bin", "w") as file:
        file.writestr("x/version", "3")
    refused(path, "cannot be read as plain weights")


def test_pickles_do_not_run(tiny: Tensors, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
            return Path.touch, (marker,)  # type: ignore[return-value]

    path = write_layout(tmp_path, tiny, "bin")
    torch.save({**tiny, "logit_scale": Evil()}, path / "pytorch_model.bin")
    error = refused(path, "cannot be read as plain weights")
    assert "holds more than weights" in error.what
    assert "a Python object, getattr, too; loading one runs code" in error.why
    assert "Where you trust it" in error.fix
    assert not marker.exists()


def test_no_tensors_in_a_torch_file(tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "bin")
    torch.save([torch.ones(1)], path / "pytorch_model.bin")
    refused(path, "no table of tensors")
    torch.save({**tiny, "epoch": 3}, path / "pytorch_model.bin")
    assert "epoch" in refused(path, "not dense tensors").why


def test_tensor_in_two_shards(tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "safetensors-sharded")
    first, second = sorted(path.glob("model-*"))
    save_file(
        {**load_file(second), "clip_projector.norm1_k.bias": tiny["clip_projector.norm1_k.bias"]}, second
    )
    assert "clip_projector.norm1_k.bias" in load_file(first)
    assert "clip_projector.norm1_k.bias" in refused(path, "two shards").why


@pytest.mark.parametrize(
    "shard", ["../m.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 7, None]
)
def test_index_that_leaves_the_folder(shard: object, tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "safetensors-sharded")
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["logit_scale"] = shard
    index.write_text(json.dumps(data))
    assert "logit_scale" in refused(path, "not a plain file name").why


def test_index_that_does_not_fit(tiny: Tensors, tmp_path: Path) -> None:
    path = write_layout(tmp_path, tiny, "safetensors-sharded")
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    moved = {**data["weight_map"], "logit_scale": data["weight_map"]["text_projection"]}
    assert moved != data["weight_map"]
    index.write_text(json.dumps({"weight_map": moved}))
    assert "logit_scale" in refused(path, "does not fit its shards").why
    less = {k: v for k, v in data["weight_map"].items() if k != "logit_scale"}
    index.write_text(json.dumps({"weight_map": less}))
    assert "not in the index: 1 tensor: logit_scale" in refused(path, "does not fit its shards").why
    for text in ("{}", "[]", "no json", '{"weight_map": 3}'):
        index.write_text(text)
        refused(path, "has no weight_map")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(-3, 3))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(max(0, len(data) + length).to_bytes(8, "little") + b"!" + data)
    with pytest.raises(CheckpointError, match=r"fuzz\.safetensors is truncated or damaged"):
        read_header(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": 3, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_headers_that_lie(entry: object, tmp_path: Path) -> None:
    raw = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is truncated or damaged"):
        read_header(path)


def test_asking_for_what_is_not_there(tiny: Tensors, tmp_path: Path) -> None:
    older: Checkpoint = open_checkpoint(write_layout(tmp_path, tiny, "older"))
    with pytest.raises(CheckpointError, match="no tensor query_tokens"):
        older.load("query_tokens")
    holder = torch.nn.Module()
    holder.logit_scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match="logit_scale has the wrong shape"):
        load_state(holder, open_checkpoint(TINY))
