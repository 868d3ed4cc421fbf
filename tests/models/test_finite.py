from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ivl_export.cli import main
from ivl_export.errors import CheckpointError
from ivl_export.export.weights import write_store
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.finite import BLOCK_BYTES, FiniteCheck, check_finite, non_finite

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY, CHAT = GOLDENS / "tiny", GOLDENS / "chat"
EMBED, FC1 = "qllama.model.embed_tokens.weight", "vision_model.encoder.layers.1.mlp.fc1.weight"
TYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


def changed(
    folder: Path, changes: dict[str, torch.Tensor], source: Path = TINY, as_bin: bool = False
) -> Path:
    """A copy of a golden checkpoint with some tensors replaced."""
    folder.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, folder)
    tensors = {**load_file(source / "model.safetensors"), **changes}
    if as_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def with_value(
    key: str, index: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    tensor = load_file(TINY / "model.safetensors")[key].to(dtype)
    tensor[index] = value
    return tensor


@pytest.mark.parametrize("dtype", TYPES)
@given(data=st.data())
def test_what_is_reported_is_what_numpy_finds(dtype: str, data: st.DataObject) -> None:
    raw = data.draw(st.binary(max_size=96))
    values = np.frombuffer(raw[: len(raw) // 8 * 8], TYPES[dtype])
    check = FiniteCheck("w", dtype, values.shape)
    cut = data.draw(st.integers(0, len(values))) * values.itemsize
    pieces = [(0, memoryview(values.tobytes())[:cut]), (cut, memoryview(values.tobytes())[cut:])]
    for begin, piece in data.draw(st.permutations(pieces)):
        check.look(piece, begin)
    with np.errstate(invalid="ignore"):  # of the cast of a signalling NaN
        places = np.flatnonzero(~np.isfinite(values.astype(np.float64)))
    report = check.result()
    assert (report is None) == (len(places) == 0)
    if report is not None:
        assert (report.index, report.count) == ((int(places[0]),), len(places))
        first = float(values[places[0]])
        assert report.value == ("NaN" if math.isnan(first) else "inf" if first > 0 else "-inf")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@given(data=st.data())
def test_channels_are_those_that_numpy_sees(dtype: str, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(3, 4), (4,), (1, 6), (2, 2, 3), ()]))
    count = math.prod(shape)
    exponents = data.draw(st.lists(st.integers(-12, 2), min_size=count, max_size=count))
    signs = data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=count, max_size=count))
    values = np.array([s * 10.0**e for s, e in zip(signs, exponents, strict=True)]).astype(TYPES[dtype])
    check = FiniteCheck("norm.weight", dtype, shape, by_channel=True)
    cut = data.draw(st.integers(0, count)) * values.itemsize
    pieces = [(0, memoryview(values.tobytes())[:cut]), (cut, memoryview(values.tobytes())[cut:])]
    for begin, piece in data.draw(st.permutations(pieces)):
        check.look(piece, begin)
    rows = shape[0] if shape else 1
    largest = np.abs(values.astype(np.float64)).reshape(rows, -1).max(1)
    small = (largest > 0) & (largest < 2.0**-14)
    report = check.faint(2.0**-14, 2.0**-25)
    assert (report is None) == (not small.any())
    if report is not None:
        assert (report.count, report.channels) == (int(small.sum()), len(largest))
        assert report.zeros == int((small & (largest <= 2.0**-25)).sum())
        assert report.value == largest[small].min() == largest[report.channel]


def test_a_bias_is_one_channel() -> None:
    values = np.array([1e-7, 0.5], np.float32)
    for name, denormal in (("mlp.fc1.bias", False), ("attn.q_bias", False), ("norm1.weight", True)):
        check = FiniteCheck(name, "float32", (2,), by_channel=True)
        check.look(memoryview(values.tobytes()), 0)
        assert (check.faint(2.0**-14, 2.0**-25) is not None) is denormal


def test_a_row_that_spans_blocks_is_one_channel() -> None:
    values = np.full((3, BLOCK_BYTES // 8), 1e-6, np.float32)
    values[1, 5] = 1.0
    check = FiniteCheck("w", "float32", values.shape, by_channel=True)
    check.look(memoryview(values.tobytes()), 0)
    report = check.faint(2.0**-14, 2.0**-25)
    assert report is not None
    assert (report.count, report.channel, report.zeros) == (2, 0, 0)


def test_a_value_is_found_after_the_first_block() -> None:
    values = np.zeros((3, BLOCK_BYTES // 4), np.float32)
    values[2, 17] = np.inf
    check = FiniteCheck("w", "float32", values.shape)
    check.look(values.reshape(-1).view(np.uint8).data, 0)
    assert str(check.result()) == "w[2, 17] is inf"


def test_integers_are_never_wrong() -> None:
    check = FiniteCheck("w", "I8", (4,))
    check.look(memoryview(b"\xff" * 4), 0)
    assert check.result() is None


@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_is_looked_at(dtype: torch.dtype, bin_file: bool, tmp_path: Path) -> None:
    changes = {
        EMBED: with_value(EMBED, (7,), math.nan, dtype),
        FC1: with_value(FC1, (3, 2), -math.inf, dtype),
        "logit_scale": torch.tensor(math.inf),
    }
    checkpoint = open_checkpoint(changed(tmp_path / "c", changes, as_bin=bin_file))
    reports = {r.name: r for r in non_finite(checkpoint, checkpoint.tensors)}
    width = changes[EMBED].shape[1]
    assert set(reports) == set(changes)
    assert (reports[EMBED].index, reports[EMBED].value, reports[EMBED].count) == ((7, 0), "NaN", width)
    assert str(reports[FC1]) == f"{FC1}[3, 2] is -inf"
    assert str(reports["logit_scale"]) == "logit_scale is inf"
    with pytest.raises(
        CheckpointError, match=r"not finite.*embed_tokens\.weight\[7, 0\] is NaN, and 63 more"
    ):
        check_finite(checkpoint, [EMBED])
    seen: list[int] = []
    check_finite(checkpoint, [k for k in checkpoint.tensors if k not in changes], seen.append)
    assert seen[-1] == sum(r.nbytes for k, r in checkpoint.tensors.items() if k not in changes)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_a_store_takes_no_nan(stored: torch.dtype, dtype: str | None, tmp_path: Path) -> None:
    folder = changed(tmp_path / "c", {EMBED: with_value(EMBED, (5, 1), math.nan, stored)})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight\[5, 1\] is NaN"):
        write_store(open_checkpoint(folder), [EMBED], tmp_path / "store.safetensors", dtype)
    assert not (tmp_path / "store.safetensors").exists()


def test_a_store_takes_no_value_beyond_bfloat16(tmp_path: Path) -> None:
    folder = changed(tmp_path / "c", {FC1: with_value(FC1, (4, 4), 3.4e38)})
    with pytest.raises(
        CheckpointError, match=r"fc1\.weight holds values too large for bfloat16.*\[4, 4\] is 3\.4e\+38"
    ):
        write_store(open_checkpoint(folder), [FC1], tmp_path / "store.safetensors", "bfloat16")


@pytest.mark.parametrize("options", [[], ["--zero-copy"], ["--dtype", "fp32"]])
def test_export_names_the_tensor(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "model.embed_tokens.weight"
    embed = load_file(CHAT / "model.safetensors")[key]
    embed[9, 3] = math.nan
    folder = changed(tmp_path / "c", {key: embed}, CHAT)
    out = [] if options == ["--zero-copy"] else ["--out", str(tmp_path / "out")]
    args = ["export", "--model", str(folder), "--components", "decoder_embed", *options, *out, "--json"]
    assert main(args) == CheckpointError.exit_code
    said = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert f"{key}[9, 3] is NaN" in said["why"]
    assert not (tmp_path / "out").exists()
    assert not list(folder.glob("*.onnx"))


@pytest.mark.parametrize("verb", ["build", "calibrate", "sensitivity"])
@pytest.mark.parametrize(("key", "index"), [(FC1, (0, 0)), (EMBED, (3,))])
def test_a_build_names_the_tensor_before_it_measures_anything(
    verb: str,
    key: str,
    index: tuple[int, ...],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = changed(tmp_path / "c", {key: with_value(key, index, math.nan)})
    for name in ("tokenizer.model", "preprocessor_config.json"):
        shutil.copy(tiny_model / name, folder)
    assert main(["train", "scenes", str(tmp_path / "photos"), "--count", "8"]) == 0
    capsys.readouterr()
    args = [
        verb,
        "--model",
        str(folder),
        "--calib",
        str(tmp_path / "photos"),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    args += ["--backend", "onnxruntime"] if verb == "build" else []
    args += ["--components", "vision,qllama_text"]
    assert main(args) == CheckpointError.exit_code
    said = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert f"{key}[{', '.join(map(str, (*index, 0)[:2]))}] is NaN" in said["why"]
