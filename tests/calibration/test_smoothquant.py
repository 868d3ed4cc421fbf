"""SmoothQuant: folded weights compute the same, and quantise better with outlier channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from ivl_export.calibration.accuracy import compare
from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.dataset import CalibrationSet
from ivl_export.calibration.folding import fold, groups
from ivl_export.calibration.smoothquant import channel_ranges, factors
from ivl_export.errors import UsageError
from ivl_export.export.weight_store import open_store
from ivl_export.export.weights import write_store
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.registry import component_spec
from ivl_export.quantization.quantize import activation_scale, dequantise, quantise, quantise_values
from ivl_export.quantization.recipe import load_recipe, schemes
from ivl_export.quantization.schemes import folded_layers
from ivl_export.tests.calibration.reference import reference_modules

pytestmark = pytest.mark.numeric

Sets = tuple[CalibrationSet, CalibrationSet]
COMPONENTS = ("vision", "qllama_query", "qllama_text", "qllama_step")
VIT, LLAMA = "vision_model.encoder.layers.0.", "qllama.model.layers.0."


@pytest.fixture(scope="module")
def layers(shallow: Checkpoint) -> list[str]:
    names = [k.removesuffix(".weight") for k, r in shallow.tensors.items() if len(r.shape) == 2]
    return folded_layers(schemes(load_recipe("int8-smoothquant"), names))


@pytest.fixture(scope="module")
def ranges(
    shallow: Checkpoint,
    layers: list[str],
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("spill")
    return channel_ranges(shallow, COMPONENTS, layers, scenes[0], settings, tokenizer, folder, batch_size=4)


def test_the_recipe_smooths_what_norms_feed(layers: list[str]) -> None:
    assert groups(layers) == {
        f"{VIT}norm1": (f"{VIT}attn.qkv",),
        f"{VIT}norm2": (f"{VIT}mlp.fc1",),
        f"{LLAMA}input_layernorm": tuple(f"{LLAMA}self_attn.{p}_proj" for p in "qkv"),
        f"{LLAMA}post_attention_layernorm": (f"{LLAMA}mlp.gate_proj", f"{LLAMA}mlp.up_proj"),
    }
    with pytest.raises(UsageError, match=r"mlp\.fc2 cannot be smoothed"):
        groups([f"{VIT}mlp.fc2"])


def test_channel_ranges_are_those_of_calibration(
    shallow: Checkpoint,
    ranges: dict[str, torch.Tensor],
    layers: list[str],
    scenes: Sets,
    settings: ImageSettings,
    tokenizer: Tokenizer,
) -> None:
    amax = calibrate(shallow, COMPONENTS, scenes[0], settings, tokenizer, batch_size=4).amax
    assert sorted(ranges) == sorted(layers)
    for layer, channels in ranges.items():
        assert float(channels.max()) == max(result[layer] for result in amax.values() if layer in result)


def test_the_folded_model_computes_the_same(
    shallow: Checkpoint, ranges: dict[str, torch.Tensor], layers: list[str], tmp_path: Path
) -> None:
    # Random weights make even channels: here they are spread.
    uneven = {layer: r * 4.0 ** (torch.arange(len(r)) % 5) for layer, r in ranges.items()}
    divisors = factors(shallow, uneven, layers)
    assert all(float(d.max()) != float(d.min()) for d in divisors.values())
    folded = fold(shallow, divisors)
    assert folded.revision == shallow.revision
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32))
    names = [t.name for t in component_spec("vision", shallow.config).outputs]
    with torch.no_grad():
        plain, same = (reference_modules(c, ["vision"])["vision"](pixels) for c in (shallow, folded))
        tokens = plain[names.index("tokens")]
        query = [reference_modules(c, ["qllama_query"])["qllama_query"](tokens) for c in (shallow, folded)]
    for a, b in (*zip(plain, same, strict=True), *zip(*map(_flat, query), strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    # The folded weights are stored exactly in 16 bits.
    norm = f"{VIT}norm1.weight"
    write_store(folded, [norm], tmp_path / "base.safetensors", "bf16")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "base.safetensors")[norm]
    assert open_store(tmp_path / "base.safetensors")[norm].shape == tuple(stored.shape)
    assert torch.equal(stored.float() * divisors[norm.removesuffix(".weight")], shallow.load(norm).float())


def _flat(outputs: object) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [t for part in cast(tuple[object, ...], outputs) for t in _flat(part)]


def test_smoothing_helps_with_an_outlier_channel(shallow: Checkpoint) -> None:
    layer = f"{VIT}attn.qkv"
    weight = shallow.load(f"{layer}.weight").float()
    inputs = torch.randn(200, weight.shape[1], generator=torch.Generator().manual_seed(0))
    inputs[:, 3] *= 100
    divisor = factors(shallow, {layer: inputs.abs().amax(0)}, [layer])[f"{VIT}norm1"]
    assert float(divisor[3]) == float(divisor.max())
    assert torch.equal(divisor.log2(), divisor.log2().round())

    def loss(x: torch.Tensor, w: torch.Tensor) -> float:
        scale = torch.tensor(activation_scale(float(x.abs().max()), "int8", "bf16"))
        product = quantise_values(x, scale, "int8").float() * scale @ dequantise(*quantise(w, "int8")).T
        return compare((inputs @ weight.T).numpy(), product.numpy()).sqnr_db or 999

    assert loss(inputs / divisor, weight * divisor) > loss(inputs, weight) + 3


def test_dead_channels_stay(shallow: Checkpoint) -> None:
    layer = f"{VIT}attn.qkv"
    ranges = torch.ones(shallow.tensors[f"{layer}.weight"].shape[1])
    ranges[0] = 0
    assert float(factors(shallow, {layer: ranges}, [layer])[f"{VIT}norm1"][0]) == 1
    assert factors(shallow, {}, [layer]) == {}
    assert replace(shallow).revision == fold(shallow, {}).revision
