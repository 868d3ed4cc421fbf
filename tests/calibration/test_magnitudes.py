"""Magnitudes in fp32, and refusals of 16-bit types."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ivl_export.bundle import Bundle
from ivl_export.calibration.magnitudes import (
    RANGES,
    Faint,
    MagnitudeObserver,
    Magnitudes,
    Peak,
    check_magnitudes,
    notes,
)
from ivl_export.cli import main
from ivl_export.errors import BuildError, CapabilityError, CheckpointError
from ivl_export.models.layers import CoreAttention, RMSNorm
from ivl_export.runtime.torch_tower import VisionTower

pytestmark = pytest.mark.numeric

BLOCK = "vision_model.encoder.layers.1."
Tensors = dict[str, torch.Tensor]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": RMSNorm(8, 1e-6)})])
        self.core = CoreAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layers[0]
        x = x + F.gelu(layer["fc"](layer["norm"](x)))
        heads = x.view(1, -1, 2, 4).transpose(1, 2)
        out: torch.Tensor = self.core(heads, heads, heads)
        return out


def observed(model: nn.Module, *inputs: torch.Tensor) -> dict[str, Peak]:
    observer = MagnitudeObserver({"m": model})
    with torch.inference_mode():
        for x in inputs:
            with observer.watch("m"):
                model(x)
    observer.close()
    return {peak.place: peak for peak in observer.result(len(inputs)).largest}


def test_every_result_is_seen_by_channel() -> None:
    torch.manual_seed(0)
    model, inputs = Model(), [torch.randn(1, n, 8) * n for n in (3, 5)]
    with torch.no_grad():
        model.layers[0]["fc"].bias[6] = 90000.0  # type: ignore[index]
    peaks = observed(model, *inputs)
    want: dict[str, list[torch.Tensor]] = {}
    layer: Any = model.layers[0]
    with torch.inference_mode():
        for x in inputs:
            normed = layer["norm"](x)
            linear = layer["fc"](normed)
            heads = (x + F.gelu(linear)).view(1, -1, 2, 4).transpose(1, 2)
            for place, value in {
                "block 0, fc": linear,
                "block 0, norm (rms_norm)": normed,
                "block 0, norm sum of squares": x.square().sum(-1, keepdim=True),
                "the model (gelu)": F.gelu(linear),
                "the model (add)": x + F.gelu(linear),
                "core attention scores": (heads @ heads.transpose(-1, -2) / 2).abs().amax((-1, -2)),
            }.items():
                want.setdefault(place, []).append(value.abs().reshape(-1, value.shape[-1]).amax(0))
    for place, values in want.items():
        channels = torch.stack(values).amax(0)
        assert peaks[place].value == pytest.approx(float(channels.max()), rel=1e-5), place
        assert peaks[place].channel == int(channels.argmax()), place
        assert peaks[place].channels == len(channels)
    assert (peaks["block 0, fc"].channel, peaks["block 0, fc"].beyond) == (6, 1)
    assert peaks["block 0, norm sum of squares"].accumulated


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_in_fp32_is_named(value: float) -> None:
    model = Model()
    with torch.no_grad():
        model.layers[0]["fc"].bias[3] = value  # type: ignore[index]
    with pytest.raises(BuildError, match=r"NaN or infinity.*block 0, fc, channel 3"):
        observed(model, torch.ones(1, 2, 8))


@given(value=st.floats(1e-9, 1e39), accumulated=st.booleans())
def test_a_type_is_refused_where_it_ends(value: float, accumulated: bool) -> None:
    peak = Peak("vision", "block 3 (add)", value, 5, 64, 1, accumulated)
    result = Magnitudes(4, (peak,), ())
    assert Magnitudes.from_json(json.loads(json.dumps(result.to_json()))) == result
    for dtype, (_, end) in RANGES.items():
        over = value > (RANGES["fp32"][1] if accumulated else end)
        if not over:
            check_magnitudes(result, dtype, {})
            continue
        with pytest.raises(BuildError, match=rf"overflows {dtype}.*block 3 .add. reaches .* in channel 5"):
            check_magnitudes(result, dtype, {})


def test_inputs_seen_in_calibration_count_too() -> None:
    ranges = {"vision": {BLOCK + "mlp.fc2": 70000.0}}
    with pytest.raises(BuildError, match=r"vision, block 1, mlp\.fc2 reads 7e\+04; fp16 ends at 65504"):
        check_magnitudes(Magnitudes(1, (), ()), "fp16", ranges)
    check_magnitudes(Magnitudes(1, (), ()), "bf16", ranges)


def test_what_is_near_the_end_or_denormal_is_noted() -> None:
    near = Magnitudes(9, (Peak("vision", "block 3 (add)", 40000.0, 5, 64, 0),), ())
    assert "61% of what fp16 holds" in notes(near, "fp16")[0]
    assert notes(near, "bf16") == []
    faint = Faint("vision", "block 3, fc1", "fp16", 1e-6, 5, 3, 1, 64)
    tiny = Magnitudes(9, (), (faint,))
    assert Magnitudes.from_json(json.loads(json.dumps(tiny.to_json()))) == tiny
    (note,) = notes(tiny, "fp16")
    assert "block 3, fc1: 3 of 64 channels, 1 of them zero; channel 5 stays under 1e-06" in note
    assert notes(tiny, "bf16") == []


def test_channels_that_are_denormal_are_named_for_each_type() -> None:
    """A channel far below the others, which the largest value of the result hides."""
    torch.manual_seed(0)
    model = Model()
    layer: Any = model.layers[0]
    with torch.no_grad():
        layer["fc"].weight[:4] = 0
        layer["fc"].bias[:4] = torch.tensor([3e-5, 1e-8, 0.0, 2e-39])
    observer = MagnitudeObserver({"m": model})
    with torch.inference_mode(), observer.watch("m"):
        model(torch.randn(1, 5, 8))
    observer.close()
    by_name = {(f.place, f.dtype): f for f in observer.result(1).smallest}
    fp16, bf16 = by_name["block 0, fc", "fp16"], by_name["block 0, fc", "bf16"]
    assert (fp16.count, fp16.zeros, fp16.channel, fp16.channels) == (3, 2, 3, 8)  # 0 itself loses nothing
    assert (bf16.count, bf16.zeros, bf16.channel) == (1, 0, 3)
    assert bf16.value == pytest.approx(2e-39, rel=1e-3)
    # what torch's own conversion makes of them
    values = torch.tensor([3e-5, 1e-8, 2e-39])
    assert [float(v) != 0 for v in values.half()] == [True, False, False]
    assert all(float(v) != 0 for v in values.bfloat16())


def hidden_unit(t: Tensors) -> None:
    """One hidden unit of block 1 that is huge, and that next to nothing depends on."""
    t[BLOCK + "mlp.fc1.weight"][7] = 0
    t[BLOCK + "mlp.fc1.weight"][7, 0], t[BLOCK + "mlp.fc1.bias"][7] = 2e4, 6e4
    t[BLOCK + "mlp.fc2.weight"][:, 7] = 1e-6


def residual(t: Tensors) -> None:
    """A channel of the residual stream at 3e5: in fp32 norms hide it."""
    t["vision_model.embeddings.position_embedding"][..., 5] = 3e4
    t[BLOCK + "ls1"][5], t[BLOCK + "attn.proj.bias"][5] = 10.0, 3e4


def scores(t: Tensors) -> None:
    """Queries and keys that fit, their products do not."""
    t[BLOCK + "attn.q_norm.weight"][:], t[BLOCK + "attn.k_norm.weight"][:] = 500.0, 500.0


def faint(t: Tensors) -> None:
    """LayerScale and a row that fp16 does not hold well; bf16 does."""
    t[BLOCK + "ls1"][5] = 1e-8
    t[BLOCK + "ls1"][6] = 2e-5
    t[BLOCK + "mlp.fc1.weight"][7] *= 1e-7
    t[BLOCK + "mlp.fc1.bias"][3] = 1e-7  # added: nothing is lost


def gate(t: Tensors) -> None:
    """gate * up of QLLaMA's layer 1 overflows, neither factor does."""
    layer = "qllama.model.layers.1."
    t[layer + "mlp.gate_proj.weight"][3] *= 3e3
    t[layer + "mlp.up_proj.weight"][3] *= 3e3
    t[layer + "mlp.down_proj.weight"][:, 3] = 0


@pytest.fixture
def build(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    (tmp_path / "photos").mkdir()
    for shade in range(8):
        Image.new("RGB", (20, 20), (30 * shade, 40, 200)).save(tmp_path / "photos" / f"{shade}.png")

    def run(
        change: Callable[[Tensors], None], precision: str, component: str, backend: str = "onnxruntime"
    ) -> tuple[int, Any]:
        folder = tmp_path / "model"
        if not folder.exists():
            shutil.copytree(tiny_model, folder)
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        args = [
            "build",
            "--model",
            str(folder),
            "--precision",
            precision,
            "--components",
            component,
            "--json",
        ]
        args += ["--calib", str(tmp_path / "photos"), "--backend", backend]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code = main([*args, "--out", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return code, json.loads(captured.err.splitlines()[-1] if code else captured.out)

    return run


@pytest.mark.parametrize(
    ("change", "component", "names"),
    [
        (hidden_unit, "vision", r"block 1, mlp\.fc1 reaches .*e\+04 in channel 7"),
        (residual, "vision", r"block 1 \(add\) reaches .*e\+05 in channel 5"),
        (scores, "vision", r"block 1, attn\.core attention scores reaches"),
        (gate, "qllama_text", r"block 1, mlp \(mul\) reaches .* in channel 3"),
    ],
)
@pytest.mark.slow
def test_fp16_is_refused_for_what_runs_over(
    build: Callable[..., tuple[int, Any]], change: Callable[[Tensors], None], component: str, names: str
) -> None:
    code, error = build(change, "fp16", component)
    assert code == BuildError.exit_code, error
    assert re.search(names, error["why"]), error
    assert "fp16 ends at 65504" in error["why"]
    assert "bf16" in error["fix"]


@pytest.mark.slow
def test_int8_on_fp16_is_refused_and_bf16_says_what_it_holds(
    build: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    recipe = tmp_path / "narrow.yaml"
    rule = "{pattern: '*encoder.layers.*.attn.qkv', scheme: int8}"
    recipe.write_text(f"name: narrow\nsummary: On fp16.\nbase: fp16\nattention: base\nrules: [{rule}]\n")
    code, error = build(hidden_unit, str(recipe), "vision")
    assert code == BuildError.exit_code, error
    assert "mlp.fc1 reaches" in error["why"]

    code, report = build(hidden_unit, "bf16", "vision")
    assert code == 0, report
    largest = report["largest"]
    assert (largest["place"], largest["channel"], largest["type"]) == ("block 1, mlp.fc1", 7, "bf16")
    assert largest["value"] > 65504
    with pytest.raises(CapabilityError, match=r"vision cannot be computed in fp16.*mlp\.fc1 reaches"):
        VisionTower.load(tmp_path / "out", dtype="fp16")
    tower = VisionTower.load(tmp_path / "out", dtype="bf16")
    assert bool(tower(torch.zeros(1, 3, 56, 56)).isfinite().all())
    assert Bundle.open(tmp_path / "out").receipt("accuracy")["magnitudes"]["samples"] > 0


@pytest.mark.slow
def test_weights_that_are_denormal_are_named(build: Callable[..., tuple[int, Any]], tmp_path: Path) -> None:
    code, report = build(faint, "fp16", "vision")
    assert code == 0, report
    (note,) = (n for n in report["notices"] if "weights are denormal in fp16" in n)
    assert "3 channels of 2 weights" in note
    assert "1 of them become zero" in note
    assert f"{BLOCK}ls1 channel 5 (1e-08)" in note
    assert f"{BLOCK}mlp.fc1.weight channel 7" in note
    step = Bundle.open(tmp_path / "out").receipt("build")["finite"]
    assert [w["name"] for w in step["data"]["denormal"]] == [f"{BLOCK}ls1", f"{BLOCK}mlp.fc1.weight"]

    code, report = build(faint, "bf16", "vision")
    assert code == 0, report
    assert not any("denormal" in n for n in report["notices"])


def test_a_type_that_runs_over_fails_before_engines_are_built(
    build: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    code, error = build(hidden_unit, "fp16", "vision", "tensorrt-rtx")
    assert code == BuildError.exit_code, error
    assert "mlp.fc1 reaches" in error["why"]
    steps = [path.stem for path in (tmp_path / ".out.build" / "steps").iterdir()]
    assert "graph-vision" in steps
    assert not any(step.startswith("engine") for step in steps)


def test_a_value_that_no_component_reads_is_looked_at(build: Callable[..., tuple[int, Any]]) -> None:
    """The manifest has it: it would fail there, after all engines, and be blamed on the disk."""

    def change(t: Tensors) -> None:
        t["logit_scale"].fill_(math.nan)

    code, error = build(change, "bf16", "vision")
    assert code == CheckpointError.exit_code, error
    assert "logit_scale is NaN" in error["why"]
