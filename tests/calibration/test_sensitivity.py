from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl_export.calibration.accuracy import compare
from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.calibration.sensitivity import Sensitivity, measure
from ivl_export.errors import BuildError, CapabilityError, UsageError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.checkpoint import Checkpoint, open_checkpoint
from ivl_export.quantization.attention import FP8_ATTENTION
from ivl_export.quantization.quantize import activation_scale, dequantise, quantise, quantise_values
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.tests.calibration.reference import reference_modules

pytestmark = pytest.mark.numeric

Sets = tuple[CalibrationSet, CalibrationSet]
ALL = ("vision", "qllama_query", "qllama_text", "qllama_step")
SCHEMES = ("fp8", "int8", "int8-weight", FP8_ATTENTION)
FC1 = "vision_model.encoder.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def ranges(
    checkpoint: Checkpoint, scenes: Sets, settings: ImageSettings, tokenizer: Tokenizer
) -> ActivationRanges:
    return calibrate(checkpoint, ALL, scenes[0], settings, tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def sensitivity(
    checkpoint: Checkpoint,
    ranges: ActivationRanges,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Sensitivity:
    folder = tmp_path_factory.mktemp("losses")
    return measure(checkpoint, ALL, SCHEMES, ranges, scenes[1], settings, tokenizer, folder, batch_size=2)


@pytest.mark.slow
def test_it_equals_a_block_that_is_quantised_by_hand(
    sensitivity: Sensitivity,
    checkpoint: Checkpoint,
    ranges: ActivationRanges,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
) -> None:
    vision: Any = reference_modules(checkpoint, ["vision"])["vision"].vision_model
    batch = next(scenes[1].batches(settings, tokenizer, 4))
    with torch.no_grad():
        x = vision.hidden_states(torch.from_numpy(batch.pixel_values))[1]
        block, linear = vision.encoder.layers[1], vision.get_submodule("encoder.layers.1.mlp.fc1")
        want = block(x) - x
        linear.weight = torch.nn.Parameter(dequantise(*quantise(linear.weight, "int8")))
        scale = torch.tensor(activation_scale(ranges.amax["vision"][FC1], "int8", "bf16"))
        linear.register_forward_pre_hook(lambda _, a: (quantise_values(a[0], scale, "int8").float() * scale,))
        expected = compare(want.numpy(), (block(x) - x).numpy())
    (loss,) = [x for x in sensitivity.losses if (x.layer, x.scheme) == (FC1, "int8")]
    assert loss.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.05)
    assert loss.cosine == pytest.approx(expected.cosine, abs=1e-6)
    assert loss.samples == 4


def test_every_layer_of_the_blocks_in_every_scheme(sensitivity: Sensitivity, checkpoint: Checkpoint) -> None:
    tried = {(x.component, x.layer, x.scheme) for x in sensitivity.losses}
    assert len(tried) == len(sensitivity.losses)
    linears, attentions = (
        {"vision": 4 * 2, "qllama_text": 7 * 2, "qllama_query": 7 * 2 + 4},
        {"qllama_query": 3},
    )
    for component, count in linears.items():
        for scheme in SCHEMES[:3]:
            assert len([t for t in tried if (t[0], t[2]) == (component, scheme)]) == count
        fused = [t for t in tried if (t[0], t[2]) == (component, FP8_ATTENTION)]
        assert len(fused) == attentions.get(component, 2)
    worst = sensitivity.worst()
    for (layer, scheme), loss in worst.items():
        assert loss.noise == max(
            x.noise for x in sensitivity.losses if (x.layer, x.scheme) == (layer, scheme)
        )
        weight = worst.get((layer, "int8-weight"))
        if scheme == "int8" and weight is not None:
            assert loss.noise > weight.noise, "rounding the input as well loses more"
    assert Sensitivity.from_json(sensitivity.to_json()) == sensitivity


@pytest.mark.slow
def test_a_stopped_run_goes_on(
    sensitivity: Sensitivity,
    checkpoint: Checkpoint,
    ranges: ActivationRanges,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    heard: list[int] = []

    def stop(count: int) -> None:
        heard.append(count)
        if count > 4 * 5:  # in the second part of QLLaMA
            raise KeyboardInterrupt

    inputs = (checkpoint, ALL, SCHEMES, ranges, scenes[1], settings, tokenizer, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        measure(*inputs, batch_size=2, progress=stop)
    first = len(heard)
    assert measure(*inputs, batch_size=2, progress=heard.append) == sensitivity
    assert min(heard[first:]) >= 4 * 4, "finished segments are not run again"


def odd(checkpoint: Checkpoint, folder: Path, key: str, channel: int, value: float) -> Checkpoint:
    state = load_file(checkpoint.path / "model.safetensors")
    state[key] = state[key].clone()
    state[key][..., channel] = value
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
    return open_checkpoint(folder)


@pytest.mark.parametrize(("value", "kind"), [(0.0, "dead"), (300.0, "huge")])
def test_odd_channels_are_named(
    value: float,
    kind: str,
    checkpoint: Checkpoint,
    ranges: ActivationRanges,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    strange = odd(checkpoint, tmp_path, "vision_model.encoder.layers.0.norm2.weight", 5, value)
    inputs = (["vision"], ["int8-weight"], ranges, scenes[1], settings, tokenizer, tmp_path / "spill")
    losses = measure(strange, *inputs)
    (finding,) = [f for f in losses.findings if f.layer == "vision_model.encoder.layers.0.mlp.fc1"]
    assert (finding.kind, finding.channels, finding.count) == (kind, (5,), 1)


def test_nan_is_refused_by_name(
    checkpoint: Checkpoint,
    ranges: ActivationRanges,
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    strange = odd(checkpoint, tmp_path, "vision_model.encoder.layers.0.norm2.weight", 7, float("nan"))
    inputs = (["vision"], ["int8-weight"], ranges, scenes[1], settings, tokenizer, tmp_path / "spill")
    with pytest.raises(BuildError, match=r"layers\.0\.mlp\.fc1 holds NaN.*channel 7 of 64"):
        measure(strange, *inputs)
    with pytest.raises(UsageError, match="int8-smooth"):
        measure(strange, ["vision"], ["int8-smooth"], *inputs[2:])


@pytest.mark.slow
def test_the_heat_map(sensitivity: Sensitivity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ivl_export.pipeline.plots import sensitivity_heatmap

    pytest.importorskip("matplotlib")
    sensitivity_heatmap(sensitivity, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(CapabilityError, match="matplotlib"):
        sensitivity_heatmap(sensitivity, tmp_path / "none.png")
