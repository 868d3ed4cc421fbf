"""Weights of another kind: each is named, with a remedy."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl_export.errors import CapabilityError, CheckpointError, IvlError
from ivl_export.models.checkpoint import open_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY, CHAT = GOLDENS / "tiny", GOLDENS / "chat"
Tensors = dict[str, torch.Tensor]
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4554190\n"


def saved(
    folder: Path, change: Callable[[Tensors], object], source: Path = TINY, as_bin: bool = False
) -> Path:
    folder.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, folder)
    state = change(load_file(source / "model.safetensors"))
    if as_bin:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        assert isinstance(state, dict)
        save_file(state, folder / "model.safetensors")
    return folder


def renamed(to: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {to(name): tensor for name, tensor in tensors.items()}


def refused(folder: Path, *parts: str) -> IvlError:
    with pytest.raises((CheckpointError, CapabilityError)) as error:
        open_checkpoint(folder)
    for part in parts:
        assert part in str(error.value), str(error.value)
    return error.value


@pytest.mark.parametrize("source", [TINY, CHAT])
@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        ("module.", "DataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "peft"),
        ("_forward_module.", "DeepSpeed"),
        ("_fsdp_wrapped_module.", "FullyShardedDataParallel"),
    ],
)
def test_a_wrapper_is_named(source: Path, as_bin: bool, prefix: str, why: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", renamed(lambda name: prefix + name), source, as_bin)
    refused(folder, f"begin with {prefix}", why, f'replace("{prefix}", "")')


def test_wrappers_inside_names_and_of_each_other(tmp_path: Path) -> None:
    inside = renamed(lambda name: name.replace("encoder.", "encoder._orig_mod."))
    refused(saved(tmp_path / "a", inside), "hold _orig_mod.", "torch.compile")
    both = renamed(lambda name: "_orig_mod.module." + name)
    refused(saved(tmp_path / "b", both), "begin with _orig_mod.", "torch.compile")
    own = renamed(lambda name: "student.net." + name)
    refused(saved(tmp_path / "c", own), "All names begin with student.net.", 'replace("student.net.", "")')


@pytest.mark.slow
def test_the_remedy_works(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", renamed(lambda name: "module." + name))
    code = refused(folder).fix.partition("python -c '")[2].rpartition("'")[0]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    assert open_checkpoint(folder).tensors.keys() == load_file(TINY / "model.safetensors").keys()


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    name = "qllama.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    refused(saved(tmp_path / "a", lambda t: {**t, name: torch.ones(2)}), "LoRA adapters", name, "Merge")
    folder = saved(tmp_path / "b", lambda t: t)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    refused(folder, "adapter_config.json", "LoRA", "Merge it into its base model")
    (folder / "config.json").unlink()  # as peft leaves it
    refused(folder, "No config.json", "LoRA", "Merge it into its base model")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (("zero_to_fp32.py", "latest", "global_step100/"), ("ZeRO shards", "python zero_to_fp32.py .")),
        (("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",), ("ZeRO shards",)),
        (("__0_0.distcp", ".metadata"), ("FSDP", "dcp_to_torch")),
        (("model.safetensors.incomplete",), ("incomplete download", "Download it again")),
        (("model-00001-of-00002.safetensors",), ("no index", "model.safetensors.index.json")),
        (("checkpoint-100/", "checkpoint-200/"), ("folders of a training", ".../checkpoint-200")),
        (("model.gguf",), ("GGUF",)),
        (("mm_projector.bin",), ("LLaVA", "Merge")),
        (("tf_model.h5",), ("TensorFlow",)),
    ],
)
def test_a_folder_of_something_else_says_so(
    files: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    for name in files:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, "No weights in", *parts)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "No config.json", *parts)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda t: {**t, "logit_scale": t["logit_scale"].to(torch.float8_e4m3fn)}, "an FP8 checkpoint"),
        (lambda t: {**t, "logit_scale": t["logit_scale"].to(torch.float8_e5m2)}, "an FP8 checkpoint"),
        (lambda t: {**t, "logit_scale": t["logit_scale"].to(torch.int8)}, "int8 checkpoint"),
        (lambda t: {**t, "a.weight_scale_inv": torch.ones(1)}, "an FP8 checkpoint"),
        (lambda t: {**t, "a.qweight": torch.ones(1, dtype=torch.int32)}, "an AWQ checkpoint"),
        (lambda t: {**t, "a.g_idx": torch.ones(1), "a.qweight": torch.ones(1)}, "a GPTQ checkpoint"),
        (lambda t: {**t, "a.SCB": torch.ones(1)}, "a bitsandbytes checkpoint"),
    ],
)
def test_quantised_weights_say_their_format(
    change: Callable[[Tensors], Tensors], kind: str, tmp_path: Path
) -> None:
    assert kind in refused(saved(tmp_path / "c", change), "quantised already", "bf16").what


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_training_state_says_where_its_weights_are(key: str, tmp_path: Path) -> None:
    state = saved(tmp_path / "c", lambda t: {key: t, "epoch": 3, "optimizer": {"state": {}}}, as_bin=True)
    error = refused(state, f"tensors are under {key!r}", "epoch", "optimizer")
    assert f"[{key!r}]" in error.fix


def test_objects_next_to_weights_are_named_in_plain_text(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", lambda t: {"model": t, "args": argparse.Namespace(lr=1)}, as_bin=True)
    error = refused(folder, "holds more than weights", "argparse.Namespace", "weights_only=False")
    assert "\x1b" not in str(error)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"]
)
def test_git_lfs_pointers_are_recognised(name: str, tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / name).write_text(POINTER)
    refused(tmp_path, f"{name} is a Git LFS pointer", "git lfs pull", "hf download")


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    tensors = load_file(TINY / "model.safetensors")
    save_file(tensors, tmp_path / "model-1.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(tensors, "model-1.safetensors")})
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8-sig")
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text(), encoding="utf-8-sig")
    assert open_checkpoint(tmp_path).tensors.keys() == tensors.keys()
