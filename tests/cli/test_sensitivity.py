"""``ivl-export sensitivity`` and the search of ``--precision mixed`` on internvl-nano."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ivl_export.calibration.simulate import rounding_hook
from ivl_export.cli import main
from ivl_export.errors import UsageError
from ivl_export.models import load_chat
from ivl_export.models.config import ChatConfig, InternVLConfig
from ivl_export.models.layout import CHAT_TOWER
from ivl_export.models.shipped import NANO_CHAT
from ivl_export.pipeline import search_steps
from ivl_export.pipeline.config import ORT, BuildConfig
from ivl_export.pipeline.graph_steps import GraphSource
from ivl_export.pipeline.plan import BuildPlan, plan_build
from ivl_export.pipeline.sensitivity_steps import LayerTasks, sensitivity
from ivl_export.pipeline.workspace import Workspace
from ivl_export.profiles.cost.gpus import find_gpu
from ivl_export.profiles.cost.layer_costs import gpu_of, layer_times
from ivl_export.quantization.quantize import dequantise, quantise
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.quantization.recipe import Recipe
from ivl_export.synthetic import chat_tasks
from ivl_export.tests.calibration.reference import reference_modules
from ivl_export.training.chat_model import TorchChat

pytestmark = pytest.mark.numeric


class Heard:
    """Hears which steps ran."""

    def __init__(self) -> None:
        self.ran: dict[str, bool] = {}

    def started(self, step: str, total: int | None, unit: str = "") -> None: ...

    def advanced(self, done: int, total: int | None = None, detail: str = "") -> None: ...

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        self.ran[step] = not reused


@pytest.mark.parametrize(
    ("model", "component", "blocks"), [(None, "vision", 5), ("nano-chat", "vision_chat", 4)]
)
@pytest.mark.slow
def test_the_verb(
    model: str | None, component: str, blocks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    options = ["--components", component, "--schemes", "int8,fp8-attention", "--calib-samples", "8"]
    options += ["--model", model] if model else []
    assert main(["sensitivity", "--out", str(out), *options, "--questions", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "sensitivity.json").read_text(encoding="utf-8"))
    assert len(printed["losses"]) == blocks * 4 + blocks
    assert printed["held_out"]["samples"] > 0
    assert (out / "sensitivity.png").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"found"}, "nothing else is left"
    assert (
        main(["sensitivity", "--out", str(out), "--schemes", "int8-smooth", "--json"]) == UsageError.exit_code
    )


@pytest.mark.slow
def test_tasks_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = BuildConfig(tmp_path, precision="int8", calib_samples=8, components=("vision",), backend=(ORT,))
    events: list[str] = []
    real = LayerTasks.lost

    def lost(self: LayerTasks, layer: str, scheme: str) -> dict[str, float]:
        if len(events) == 1:
            events.append("stopped")
            raise KeyboardInterrupt
        events.append(layer)
        return real(self, layer, scheme) if len(events) < 3 else {"C classify": 0.0}

    monkeypatch.setattr(LayerTasks, "lost", lost)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(plan_build(request), ["int4-weight"], tmp_path / "out", Heard(), questions=8)
    result = sensitivity(plan_build(request), ["int4-weight"], tmp_path / "out", Heard(), questions=8)
    assert len(events) == 20 + 1, "each layer once, and the one that was stopped again"
    assert len(set(events)) == 21
    assert set(result.losses[0].tasks) == {
        "C classify", "C text to image R@1", "G classify", "G text to image R@1", "caption exact"
    }  # fmt: skip


@pytest.mark.slow
def test_each_pass_has_its_own_ranges(tmp_path: Path) -> None:
    """The whole model with one layer quantised equals the component with that layer quantised."""
    plan = plan_build(BuildConfig(tmp_path, precision="int8", calib_samples=8, backend=(ORT,)))
    amax = {"vision": 9.0, "qllama_query": 0.5, "qllama_text": 4.0, "qllama_step": 0.25}
    layer = "qllama.model.layers.1.mlp.gate_proj"
    ranges = ActivationRanges(
        {c: {layer: top} for c, top in amax.items()}, "max", 8, "", True, 0, "", 0, {}, {}
    )
    tasks = LayerTasks(plan, ranges, questions=2)
    model: Any = tasks.model
    ids = torch.tensor([plan.tokenizer.encode_contrastive(["a red circle"])[0][0].tolist()])
    ids = ids[:, : int((ids > 0).sum())]
    module = reference_modules(plan.checkpoint, ["qllama_text"])["qllama_text"]
    plain = module(ids, torch.tensor([ids.shape[1]]))[0]
    linear = module.get_submodule(layer)
    assert isinstance(linear, torch.nn.Linear)
    linear.weight = torch.nn.Parameter(dequantise(*quantise(linear.weight.detach(), "int8")), False)
    linear.register_forward_pre_hook(rounding_hook(amax["qllama_text"], "int8", "bf16"))
    with torch.no_grad(), tasks._quantised(layer, "int8"):
        got = model.encode_text(ids)
    assert torch.allclose(got, module(ids, torch.tensor([ids.shape[1]]))[0], atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model.encode_text(ids), plain, atol=1e-5), "it is taken back"


@pytest.mark.slow
def test_a_layer_of_a_chat_model(tmp_path: Path) -> None:
    """Quantised in its component's range, in the vision tower and in the decoder; then taken back."""
    plan = plan_build(BuildConfig(tmp_path, NANO_CHAT, "int8", calib_samples=8, backend=(ORT,)))
    layers = {
        "vision_chat": f"{CHAT_TOWER}encoder.layers.1.mlp.fc1",
        "decoder": "model.layers.1.mlp.gate_proj",
    }
    amax = {component: {layer: 3.0} for component, layer in layers.items()}
    tasks = LayerTasks(plan, ActivationRanges(amax, "max", 8, "", True, 0, "", 0, {}, {}), questions=2)
    assert tasks.reference.keys() == {"chat exact"}

    def logits(model: torch.nn.Module) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        with model.get_submodule("lm_head").register_forward_hook(lambda m, given, out: seen.append(out)):
            chat_tasks.evaluate(TorchChat(cast(Any, model), plan.tokenizer, plan.settings), 2)
        return seen

    plain = logits(tasks.model)
    for layer in layers.values():
        other = load_chat(plan.checkpoint)
        linear = other.get_submodule(layer)
        assert isinstance(linear, torch.nn.Linear)
        linear.weight = torch.nn.Parameter(dequantise(*quantise(linear.weight.detach(), "int8")), False)
        linear.register_forward_pre_hook(rounding_hook(3.0, "int8", "bf16"))
        with tasks._quantised(layer, "int8"):
            got = logits(tasks.model)
        assert all(map(torch.equal, got, logits(other)))
        assert not torch.equal(got[0], plain[0])
    assert all(map(torch.equal, logits(tasks.model), plain))
    assert tasks.lost(layers["decoder"], "int8").keys() == {"chat exact"}


def test_modelled_times_of_a_conversation() -> None:
    """Steps of an answer read weights, so storing fewer bits saves; a prompt multiplies."""
    times = layer_times(
        ChatConfig(), ["vision_chat", "decoder"], ["fp8", "int4-weight"], "bf16", find_gpu("l40s")
    )
    vision, decoder = (times[f"{CHAT_TOWER}encoder.layers.0.mlp.fc1"], times["model.layers.0.mlp.up_proj"])
    assert vision["int4-weight"] == pytest.approx(vision["bf16"])
    assert vision["fp8"] < vision["bf16"]
    assert decoder["int4-weight"] < decoder["fp8"] < decoder["bf16"]


def test_modelled_times() -> None:
    gpu = find_gpu("l40s")
    assert gpu_of("sm89") is not None
    times = layer_times(InternVLConfig(), ["vision", "qllama_text"], ["fp8", "int4-weight"], "bf16", gpu)
    fc1 = times["vision_model.encoder.layers.0.mlp.fc1"]
    assert fc1["fp8"] < fc1["bf16"], "products bound it"
    assert fc1["int4-weight"] == pytest.approx(fc1["bf16"])
    assert times["vision_model.encoder.layers.47.mlp.fc1"] == fc1
    assert "qllama.model.layers.0.cross_attn.q_proj" not in times, "of another component"


@pytest.mark.parametrize(("model", "component"), [(None, "vision"), (NANO_CHAT, "vision_chat")])
@pytest.mark.slow
def test_a_search_is_made_once(model: Path | None, component: str, tmp_path: Path) -> None:
    measured: list[Recipe] = []

    def lost(plan: BuildPlan, made: GraphSource, space: Workspace, preprocess: object) -> float:
        measured.append(made.recipe)
        return 0.05 * len(made.layers.quantised)

    request = BuildConfig(
        tmp_path / "out",
        model,
        precision="mixed",
        calib_samples=8,
        components=(component,),
        backend=(ORT,),
        budget=0.5,
    )
    first = Heard()
    plan = search_steps.plan_mixed(request, first, lost)
    assert first.ran["search"]
    assert plan.recipe.name == "mixed"
    assert 0 < len(plan.layers.quantised) <= 10
    count, again = len(measured), Heard()
    assert 1 < count < 10
    assert search_steps.plan_mixed(request, again, lost).recipe == plan.recipe
    assert (len(measured), again.ran["search"]) == (count, False)
    receipt = json.loads((tmp_path / ".out.build/bundle/receipts/mixed.json").read_text(encoding="utf-8"))
    assert receipt["speedup"] > 1
    assert len(receipt["tried"]) == count
    assert all(choice["reason"] for choice in receipt["choices"])


def test_what_a_search_cannot_take(tmp_path: Path) -> None:
    request = BuildConfig(tmp_path, precision="mixed", algorithm="mse", backend=(ORT,))
    with pytest.raises(UsageError, match="measures ranges itself"):
        search_steps.plan_mixed(request, Heard())
    out = ["--out", str(tmp_path / "x")]
    assert main(["build", "--precision", "mixed", "--dry-run", *out, "--json"]) == UsageError.exit_code
