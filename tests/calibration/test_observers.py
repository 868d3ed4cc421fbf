from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl_export.calibration.calibrate import calibrate, calibration_units
from ivl_export.calibration.component_chain import run_chain
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.calibration.observers import observers
from ivl_export.errors import BuildError, InputError, UsageError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.checkpoint import Checkpoint, open_checkpoint
from ivl_export.models.load import load_model
from ivl_export.models.registry import component_spec
from ivl_export.quantization.algorithms import algorithm_name
from ivl_export.quantization.attention import core_attentions, operand_names
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.tests.calibration.reference import reference_runners

pytestmark = pytest.mark.numeric

Sets = tuple[CalibrationSet, CalibrationSet]
ALL = ("vision", "qllama_query", "qllama_text", "qllama_step")


@pytest.fixture(scope="module")
def ranges(
    checkpoint: Checkpoint, scenes: Sets, settings: ImageSettings, tokenizer: Tokenizer
) -> ActivationRanges:
    return calibrate(checkpoint, ALL, scenes[0], settings, tokenizer, batch_size=4)


def test_every_linear_of_the_graphs_has_a_range_of_its_own(ranges: ActivationRanges) -> None:
    parts = {c: {n.split(".")[-1] for n in layers} for c, layers in ranges.amax.items()}
    llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    operands = {"q", "k", "v"}  # of attentions, and of the vision head's linears
    assert parts["vision"] == {"qkv", "proj", "fc1", "fc2"} | operands
    assert parts["qllama_query"] == llama | {"proj"} | operands
    assert parts["qllama_text"] == llama | operands
    assert parts["qllama_step"] == llama | {"lm_head"} | operands
    cross = {n for n in ranges.amax["qllama_query"] if n.endswith("_proj") and "cross_attn" in n}
    assert cross == {f"qllama.model.layers.0.cross_attn.{p}_proj" for p in "qkvo"}
    name = "qllama.model.layers.0.mlp.down_proj"
    assert len({ranges.amax[c][name] for c in ALL[1:]}) == 3
    q, k, v = (ranges.amax["qllama_text"][f"qllama.model.layers.1.self_attn.{p}_proj"] for p in "qkv")
    assert q == k == v


def test_ranges_equal_hooks_on_the_whole_model(
    checkpoint: Checkpoint,
    ranges: ActivationRanges,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
) -> None:
    """The model's own methods, one unpadded sample at a time, decoding one token at a time."""
    from ivl_export.models.generate import extend, text_step

    model = load_model(checkpoint)
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, a, n=name: seen.__setitem__(n, max(seen.get(n, 0.0), float(a[0].abs().max())))
            )
    for name, core in core_attentions(model).items():

        def see(_: object, args: tuple[torch.Tensor, ...], names: tuple[str, ...]) -> None:
            for n, x in zip(names, (args[0] * args[0].shape[-1] ** -0.5, *args[1:3]), strict=True):
                seen[n] = max(seen.get(n, 0.0), float(x.abs().max()))

        core.register_forward_pre_hook(partial(see, names=operand_names(name)))
    by_name = {}
    batches = list(scenes[0].batches(settings, tokenizer, 1))
    queries = model.config.num_query_token
    with torch.no_grad():
        for batch in batches:
            model.pool_image(model.vision(torch.from_numpy(batch.pixel_values)), None)
        by_name["vision"] = dict(seen)
        seen.clear()
        for batch in batches:
            model.encode_text(torch.from_numpy(batch.texts.input_ids[:, : batch.texts.lengths[0]]))
        by_name["qllama_text"] = dict(seen)
        seen.clear()
        for batch in batches:
            past = model.query_pass(model.vision(torch.from_numpy(batch.pixel_values)))[1]
            seen_before = dict(seen)
            for i, token in enumerate(batch.texts.caption_ids[0]):
                ids, position = torch.tensor([[token]]), torch.tensor([[queries + i]])
                if i == 0:
                    seen.clear()
                    seen.update(by_name.get("qllama_step", {}))
                _, new = text_step(model, ids, position, torch.ones(1, queries + i + 1), past)
                past = extend(past, new)
            by_name["qllama_step"] = dict(seen)
            seen.clear()
            seen.update(seen_before)
    for component, layers in by_name.items():
        assert set(layers) == set(ranges.amax[component])
        for layer, value in layers.items():
            if layer == "qllama.lm_head":  # teacher forcing shows it the last position only
                assert ranges.amax[component][layer] <= value * (1 + 1e-4)
                continue
            assert ranges.amax[component][layer] == pytest.approx(value, rel=1e-4), (component, layer)


def test_only_the_requested_components_and_their_inputs_run(
    checkpoint: Checkpoint, scenes: Sets, settings: ImageSettings, tokenizer: Tokenizer
) -> None:
    steps: list[int] = []
    one = replace(scenes[0], samples=scenes[0].samples[:3])
    result = calibrate(
        checkpoint, ["qllama_query"], one, settings, tokenizer, batch_size=2, progress=steps.append
    )
    assert list(result.amax) == ["vision", "qllama_query"]
    assert steps == sorted(set(steps))
    assert steps[:3] == [2, 3, 5]
    assert steps[-1] == calibration_units(checkpoint.config, ["qllama_query"], 3) == 3 * (2 * (2 + 2))
    assert (result.samples, result.synthetic, result.set_hash) == (3, True, one.hash)
    assert result.model == checkpoint.revision


def test_chain_equals_the_models_own_methods(
    checkpoint: Checkpoint, scenes: Sets, settings: ImageSettings, tokenizer: Tokenizer
) -> None:
    runners = reference_runners(checkpoint, ALL)
    model = load_model(checkpoint)
    batch = next(scenes[0].batches(settings, tokenizer, 5))
    steps = list(run_chain(runners, batch, checkpoint.model))
    pixels = torch.from_numpy(batch.pixel_values)
    with torch.no_grad():
        image = model.encode_image(pixels).numpy()
        text = model.encode_text(torch.from_numpy(batch.texts.input_ids)).numpy()
    np.testing.assert_allclose(steps[0].outputs["image_embed"], image, atol=1e-5)
    got = np.concatenate([s.outputs["text_embed"] for s in steps if s.component == "qllama_text"])
    rows = np.argsort(batch.texts.lengths, kind="stable")
    np.testing.assert_allclose(got, text[rows], atol=1e-5)
    for step in steps:
        component_spec(step.component, checkpoint.config).check(step.inputs)


def test_percentile_cuts_outliers(
    checkpoint: Checkpoint,
    ranges: ActivationRanges,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
) -> None:
    result = calibrate(checkpoint, ["vision"], scenes[0], settings, tokenizer, algorithm="percentile-99")
    assert result.algorithm == "percentile-99"
    for layer, value in result.amax["vision"].items():
        assert 0 < value < ranges.amax["vision"][layer]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.ls1", float("nan"), "input of vision_model.encoder.layers.0.mlp.fc1"),
        (
            "1.norm1.weight",
            0.0,
            "no range for vision_model.encoder.layers.1.attn.qkv",
        ),
        (
            "1.norm2.weight",
            float("inf"),
            "layers.1.mlp.fc1 holds NaN or infinity",
        ),
    ],
)
def test_dead_and_broken_inputs_are_named(
    name: str,
    value: float,
    message: str,
    checkpoint: Checkpoint,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    weights = load_file(checkpoint.path / "model.safetensors")
    weights[f"vision_model.encoder.layers.{name}"].fill_(value)
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copyfile(checkpoint.path / "config.json", tmp_path / "config.json")
    with pytest.raises(BuildError, match=message):
        calibrate(open_checkpoint(tmp_path), ["vision"], scenes[0], settings, tokenizer, batch_size=2)


def test_algorithms_by_name() -> None:
    names = {"max": "max", "percentile": "percentile-99.99", "percentile-99.90": "percentile-99.9"}
    assert {name: algorithm_name(name) for name in names} == names
    for bad in ("magic", "max-3", "", "mse-8"):
        with pytest.raises(UsageError, match="Unknown calibration algorithm"):
            observers(bad)
    for bad in ("percentile-3", "percentile-x", "percentile-", "percentile-101", "percentile-nan"):
        with pytest.raises(UsageError, match="out of range"):
            observers(bad)


def test_ranges_round_trip_and_are_checked(
    ranges: ActivationRanges, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "ranges.json"
    ranges.save(path)
    assert ActivationRanges.load(path) == ranges
    assert [p.name for p in tmp_path.iterdir()] == ["ranges.json"]
    shapes = {n.removesuffix(".weight"): r.shape for n, r in checkpoint.tensors.items() if len(r.shape) == 2}
    expected = {component: dict.fromkeys(layers, "int8") for component, layers in ranges.amax.items()}
    revision, qkv = checkpoint.revision, "vision_model.encoder.layers.0.attn.qkv"
    ranges.check(shapes, expected, revision)
    with pytest.raises(InputError, match=r"1 layers it does not have, .*0\.attn\.qkv"):
        ranges.check({n: s for n, s in shapes.items() if n != qkv}, expected, revision)
    with pytest.raises(InputError, match=r"0\.attn\.qkv the shape \[192, 64\], it is \[64, 64\]"):
        ranges.check({**shapes, qkv: (64, 64)}, expected, revision)
    with pytest.raises(InputError, match="nothing about vision_chat"):
        ranges.check(shapes, {"vision_chat": {}}, revision)
    with pytest.raises(InputError, match=r"1 layers of qllama_text .* have no range"):
        ranges.check(shapes, {"qllama_text": {qkv: "int8"}}, revision)
    with pytest.raises(InputError, match="other weights"):
        ranges.check(shapes, expected, "0" * 64)
    by_type = replace(ranges, algorithm="mse", kinds={qkv: "fp8"})
    by_type.check(shapes, {"vision": {qkv: "fp8"}}, revision)
    with pytest.raises(InputError, match="qkv for fp8, not int8"):
        by_type.check(shapes, expected, revision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"amax": {"vision": {"a": 0}}}, r"amax\.vision\.a.*over 0"),
        ({"amax": {"vision": {"a": True}}}, r"amax\.vision\.a"),
        ({"amax": {"vision": {"a": 1e999}}}, "not valid JSON"),
        ({"amax": {"vision": [1]}}, r"amax\.vision.*not an object"),
        ({"version": 1}, "no ranges of version 2"),
        ({"kinds": {"a": 3}}, r"kinds\.a"),
        ({"shapes": {"a": [3, 0]}}, r"shapes\.a\[1\]"),
        ({"samples": "3"}, "samples"),
        ({"extra": 1}, "unknown entry 'extra'"),
    ],
)
def test_bad_ranges_files(
    change: dict[str, object], message: str, ranges: ActivationRanges, tmp_path: Path
) -> None:
    path = tmp_path / "ranges.json"
    ranges.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        ActivationRanges.load(path)


def test_missing_ranges_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        ActivationRanges.load(tmp_path / "none.json")
