"""``train qat`` from end to end: reproducible, resumed, shared, and bit-equal to a build's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ivl_export.calibration.accuracy import compare
from ivl_export.calibration.sources import open_calibration
from ivl_export.cli import main
from ivl_export.engines.base import open_engine
from ivl_export.export.weight_store import open_store
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.checkpoint import Checkpoint
from ivl_export.models.registry import component_spec
from ivl_export.models.storage import open_reader
from ivl_export.pipeline import qat
from ivl_export.pipeline.config import ORT, BuildConfig, QatConfig
from ivl_export.pipeline.graph_steps import LOW_STORE, graph_path
from ivl_export.pipeline.plan import plan_build
from ivl_export.pipeline.plots import training_curve
from ivl_export.pipeline.qat import plan_qat
from ivl_export.pipeline.run import build_steps
from ivl_export.pipeline.workspace import Step, StepResult, Workspace
from ivl_export.progress import Silent
from ivl_export.quantization.quantize import dequantise, quantise, stored_names
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.synthetic.captions import caption
from ivl_export.training.fake_quant import quantised_layers
from ivl_export.training.finetune import SampleBatches, SceneSamples, Tuning
from ivl_export.training.presets import Stage
from ivl_export.training.trainer import TrainingProgress

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with tokenizer and data."""
    folder = tmp_path_factory.mktemp("model")
    save_file({k: checkpoint.load(k) for k in checkpoint.tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text((checkpoint.path / "config.json").read_text())
    (folder / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"])
    ImageSettings(size=28).save(folder / "preprocessor_config.json")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images with captions, two of them the same."""
    from ivl_export.synthetic.batches import batch_scenes

    folder = tmp_path_factory.mktemp("data")
    scenes, languages = batch_scenes(0, 0, "train", 9)
    texts = [caption(s, lang) for s, lang in zip(scenes, languages, strict=True)]
    rng, rows = np.random.default_rng(0), []
    for i, text in enumerate([*texts, texts[0]]):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "caption": text}))
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder / "data.jsonl"


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def qat_config(model: Path, data: Path, tmp_path: Path) -> QatConfig:
    return QatConfig(
        tmp_path / "out", model, "w4a8", data=data, steps=6, batch=4, save_every=2, scale_lr=0.02, lr=1e-3
    )


def run(qat_config: QatConfig, processes: int = 1, stop: int = 0) -> dict[str, Any]:
    def report(progress: TrainingProgress) -> None:
        if progress.done == stop:
            raise KeyboardInterrupt

    outcome = qat.run(plan_qat(qat_config), processes, Silent(), report)
    assert outcome is not None
    return outcome.receipt


@pytest.mark.slow
def test_the_built_graph_is_what_was_trained(qat_config: QatConfig, tmp_path: Path) -> None:
    receipt = run(replace(qat_config, teacher=True))
    assert len(receipt["losses"]) == 6
    files = {p.name for p in qat_config.out.iterdir()} - {"curve.png"}
    assert files == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "qat.json",
        "recipe.yaml",
        "ranges.json",
        "tokenizer.model",
    }
    # What training simulated last: its state, before anything was written in another form.
    before = plan_qat(qat_config).build
    ranges = qat.measured_ranges(before, qat_config.work, Silent())
    trained = qat.student_of(before, ranges, True)
    trained.load_state_dict(torch.load(qat_config.work / "state.pt", weights_only=True)["model"])
    layers = dict(quantised_layers(trained))
    clips = [layer.clip.detach() for layer in layers.values() if layer.clip is not None]
    moved = [float((clip - 1).abs().max()) for clip in clips]
    assert max(moved) > 0.005

    plan = plan_build(
        BuildConfig(
            tmp_path / "bundle",
            qat_config.out,
            str(qat_config.out / "recipe.yaml"),
            calib=qat_config.data,
            ranges=qat_config.out / "ranges.json",
            components=("vision",),
            backend=(ORT,),
        )
    )
    assert plan.layers.quantised == before.layers.quantised
    with Workspace(plan.config.out, Silent()) as space:

        def made(step: Step, _: Path) -> StepResult:
            return step.run(space, lambda count: None)

        for step in build_steps(plan):
            if step.name == "verification":
                break
            space.step(step.name, step.inputs, partial(made, step), step.total, step.unit)
        store = open_store(space.staging_dir / LOW_STORE)
        loaded = open_reader(space.staging_dir / LOW_STORE)
        vision = [n for n in layers if n.startswith("vision_model.")]
        for name in vision:
            weight = layers[name].quantised_weight().detach()
            values, _, scale = stored_names(name, "w4a8", "bf16")
            _, exact = quantise(weight, "w4a8")
            assert torch.equal(loaded(store[scale].name), exact)
            assert torch.equal(dequantise(loaded(store[values].name), exact), weight), name
        spec = component_spec("vision", plan.checkpoint.config)
        engine = open_engine(ORT, spec, space.staging_dir / graph_path("vision", "fp32"))
        pixels = np.random.default_rng(0).normal(size=(3, 3, 28, 28)).astype(np.float32)
        try:
            got = engine.run({"pixel_values": pixels})
        finally:
            engine.close()
    result = ActivationRanges.load(qat_config.out / "ranges.json")
    for name, layer in layers.items():
        for component, expected in zip(layer.components, layer.input_scales().tolist(), strict=True):
            assert result.amax[component][name] == 127 * expected
    with torch.no_grad():
        written = qat.student_of(plan, result, False)  # norms and biases are in bf16 there
        tokens = written.vision(torch.from_numpy(pixels))
    assert compare(tokens.numpy(), got["tokens"]).sqnr_db > 60
    with torch.no_grad():
        last = trained.vision(torch.from_numpy(pixels))
    assert compare(last.numpy(), got["tokens"]).sqnr_db > 25


@pytest.mark.slow
def test_runs_repeat_and_go_on(qat_config: QatConfig, tmp_path: Path) -> None:
    first = run(qat_config)
    again = run(replace(qat_config, out=tmp_path / "again"))
    assert again["losses"] == first["losses"]
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        qat_config.out / "model.safetensors"
    ).read_bytes()
    other = run(replace(qat_config, out=tmp_path / "other", seed=1))
    assert other["losses"][0] != first["losses"][0]
    stopped = replace(qat_config, out=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, stop=5)
    assert not stopped.out.exists()
    assert torch.load(stopped.work / "state.pt", weights_only=True)["step"] == 4
    assert run(stopped)["losses"] == first["losses"]
    with pytest.raises(Exception, match="holds another run"):
        run(replace(stopped, lr=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "teacher"), [("ddp", True), ("fsdp", False)])
def test_two_processes_train_as_one_does(
    strategy: Any, teacher: bool, qat_config: QatConfig, tmp_path: Path
) -> None:
    qat_config = replace(qat_config, teacher=teacher, steps=2)
    alone = run(qat_config)["losses"]
    shared = run(replace(qat_config, out=tmp_path / "shared", strategy=strategy), 2)["losses"]
    assert shared[0] == pytest.approx(alone[0], rel=1e-4)
    assert shared[1] == pytest.approx(alone[1], rel=2e-2)


def test_data_is_a_function_of_the_seed(data: Path, settings: ImageSettings, tokenizer: Tokenizer) -> None:
    tuning = Tuning(Stage("stage2", "generative", 5, 4, 1e-3, 0.0, 1))
    chosen = open_calibration(data, 10)
    batches = SampleBatches(chosen, tuning, settings, tokenizer.files["tokenizer.model"], slice(None))
    seen = torch.cat([batches[i].pixel_values for i in range(5)])
    pixels = torch.cat([torch.from_numpy(s.pixels(settings)) for s in chosen.samples])
    order = [next(i for i, p in enumerate(pixels) if torch.equal(p, x)) for x in seen]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    captions = [chosen.samples[i].text for i in order]
    for i in range(5):
        ids, texts = batches[i].ids, captions[4 * i : 4 * i + 4]
        assert ids is not None
        assert all((ids[a] == ids[b]) == (texts[a] == texts[b]) for a in range(4) for b in range(4))
    for result in (batches, SceneSamples(tuning, settings, tokenizer.files["tokenizer.model"], slice(None))):
        whole = result[1]
        result.rows = slice(1, None, 2)
        part = result[1]
        assert torch.equal(part.pixel_values, whole.pixel_values[1::2])
        assert torch.equal(part.caption.input_ids, whole.caption.input_ids[1::2])
        assert part.ids is not None
        assert whole.ids is not None
        assert torch.equal(part.ids, whole.ids[1::2])


@pytest.mark.slow
def test_command_line(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = ["train", "qat", "--model", str(model), "--recipe", "int4-weight"]
    args += ["--data", str(data), "--out", str(out)]
    small = ["--steps", "2", "--batch", "4", "--stage", "1", "--freeze-scales", "--threads", "1"]
    assert main([*args, *small, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["learns from"] == "the losses of stage 1"
    assert set(plan["layers"]) == {"int4-weight"}
    assert not out.exists()
    assert main([*args, *small]) == 0
    printed = capsys.readouterr().out
    assert f"build --model {out} --precision {out / 'recipe.yaml'}" in printed.replace("\n", "")
    receipt = json.loads((out / "qat.json").read_text())
    assert [set(step) for step in receipt["losses"]] == [{"itc", "grad_norm"}] * 2
    assert main([*args, "--batch", "6", "--processes", "2", "--dry-run"]) == 2
    assert "multiple of 4" in capsys.readouterr().err
    assert main([*args, "--batch", "12", "--dry-run"]) == 3
    assert main(["train", "qat", "--recipe", "int8-smoothquant", "--dry-run"]) == 2
    assert "cannot be fine-tuned" in capsys.readouterr().err
    for line in data.read_text().splitlines()[:1]:
        (data.parent / "bare.jsonl").write_text(json.dumps({"image": json.loads(line)["image"]}))
    bare = [*args[:7], str(data.parent / "bare.jsonl"), "--batch", "2", "--dry-run"]
    assert main(bare) == 3
    assert "--teacher" in capsys.readouterr().err


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    score = {
        g: {t: {"accuracy": 0.5} for t in ("en", "classify", "text_to_image")}
        for g in ("caption", "InternVL-G")
    }
    receipt = {
        "recipe": "w4a4",
        "losses": [{"kl": 1.0, "grad_norm": 2.0}, {"kl": 0.0, "grad_norm": 1.0}],
        "scores": {"fp32": score, "ptq": score, "qat": score},
        "curve": [{"step": 1, "scores": score}],
    }
    training_curve(receipt, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 800
    training_curve({**receipt, "scores": None}, tmp_path / "losses.png")
    chat = {"chat": {"all": {"accuracy": 0.5}}, "settings": {"seed": 0}}
    training_curve(
        {**receipt, "scores": dict.fromkeys(("fp32", "ptq", "qat"), chat), "curve": []}, tmp_path / "chat.png"
    )
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
