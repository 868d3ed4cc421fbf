"""``train qat`` of chat models of both forms: what is trained is what is built, and bad input is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ivl_export.calibration.accuracy import compare
from ivl_export.calibration.sources import open_calibration
from ivl_export.cli import main
from ivl_export.engines.base import open_engine
from ivl_export.errors import InputError, IvlError, UsageError
from ivl_export.export.weight_store import open_store
from ivl_export.models import load_chat
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.registry import component_spec
from ivl_export.models.storage import open_reader
from ivl_export.pipeline import qat
from ivl_export.pipeline.config import ORT, BuildConfig, QatConfig
from ivl_export.pipeline.graph_steps import LOW_STORE, graph_path
from ivl_export.pipeline.plan import BuildPlan, plan_build
from ivl_export.pipeline.qat import plan_qat
from ivl_export.pipeline.run import build_steps
from ivl_export.pipeline.workspace import Step, StepResult, Workspace
from ivl_export.progress import Silent
from ivl_export.quantization.quantize import dequantise, quantise, stored_names
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.quantization.recipe import Recipe, Rule
from ivl_export.training.chat_model import write_as_stored
from ivl_export.training.fake_quant import quantised_layers
from ivl_export.training.finetune import chat_losses
from ivl_export.training.trainer import TrainingProgress

from ..conftest import CHAT, small_tokenizer

pytestmark = pytest.mark.numeric

FAMILY = CHAT.parent / "family"
FOLDERS = sorted(path.parent.name for path in FAMILY.glob("*/model.safetensors"))
FORMS = ("llava", "tiles")
COLORS = ("red", "blue", "green", "black")
TOWER = {"llava": "model.vision_tower.", "tiles": "vision_model."}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden chat model, and a made-up InternVL 1.5 (its q, k and v stored joined), with tokenizers."""
    from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint

    llava, tiles = tmp_path_factory.mktemp("llava"), tmp_path_factory.mktemp("tiles")
    for file in CHAT.iterdir():
        if file.name != "chat.safetensors":
            (llava / file.name).write_bytes(file.read_bytes())
    (llava / "tokenizer.model").write_bytes(small_tokenizer(170))
    sizes: Any = open_checkpoint(FAMILY / "chat_internlm2_6b").model
    decoder = replace(sizes.decoder, vocab_size=600, eos_token_ids=(2,))
    sizes = replace(sizes, decoder=decoder, max_tiles=4, image_token_id=590, template="internvl2_5")
    make_checkpoint(tiles, sizes, depth=3)
    shutil.rmtree(tiles / "calibration")
    return {"llava": llava, "tiles": tiles}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations: of one image, of two turns, of none, and of two images."""
    folder = tmp_path_factory.mktemp("data")
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        names = [f"{i}{mark}.png" for mark in ("" if i == 6 else "ab" if i == 7 else "a")]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (60, 100, 3), np.uint8)).save(folder / name)
        said = [{"from": "human", "value": "<image>\n" * len(names) + "What is this?"}]
        said += [{"from": "gpt", "value": f"{COLORS[i % 4]} ring"}]
        if i % 2:
            said += [{"from": "human", "value": "and its color?"}, {"from": "gpt", "value": "blue"}]
        rows.append({"image": names, "conversations": said})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.jsonl"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(model: Path, data: Path, out: Path, **more: Any) -> QatConfig:
    settings: dict[str, Any] = {"steps": 4, "batch": 4, "save_every": 2, "scale_lr": 0.02, "lr": 1e-3}
    return QatConfig(out, model, data=data, **{"recipe": "int8", **settings, **more})


def run(config: QatConfig, processes: int = 1, stop: int = 0) -> dict[str, Any]:
    def report(progress: TrainingProgress) -> None:
        if progress.done == stop:
            raise KeyboardInterrupt

    outcome = qat.run(plan_qat(config), processes, Silent(), report)
    assert outcome is not None
    return outcome.receipt


def simulated(config: QatConfig) -> tuple[BuildPlan, Any]:
    """What training simulated last: its state, before anything was written in another form."""
    plan = plan_qat(config).build
    model = qat.student_of(plan, qat.measured_ranges(plan, config.work, Silent()), True)
    model.load_state_dict(torch.load(config.work / "state.pt", weights_only=True)["model"])
    return plan, model


@pytest.mark.slow
@pytest.mark.parametrize(("form", "teacher"), [("llava", False), ("tiles", True)])
def test_the_built_graphs_are_what_was_trained(
    form: str, teacher: bool, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    settings = config(models[form], data, tmp_path / "out", teacher=teacher)
    receipt = run(settings)
    assert [set(step) for step in receipt["losses"]] == [{"kl" if teacher else "answers", "grad_norm"}] * 4
    before, trained = simulated(settings)
    layers = dict(quantised_layers(trained))
    moved = [
        float((layer.clip.detach() - 1).abs().max()) for layer in layers.values() if layer.clip is not None
    ]
    assert max(moved) > 0.005
    assert any(name.startswith(TOWER[form]) for name in layers)
    components = ("vision_chat", "decoder")
    out = settings.out
    plan = plan_build(
        BuildConfig(
            tmp_path / "bundle", out, str(out / "recipe.yaml"), calib=data, ranges=out / "ranges.json",
            components=components, backend=(ORT,),
        )
    )  # fmt: skip
    assert plan.layers.quantised == before.layers.quantised
    ranges = ActivationRanges.load(out / "ranges.json")
    written = qat.student_of(plan, ranges, False)
    rng = np.random.default_rng(0)
    size = plan.settings.size
    pixels = rng.normal(size=(2, 3, size, size)).astype(np.float32)
    with Workspace(plan.config.out, Silent()) as space:

        def made(step: Step, _: Path) -> StepResult:
            return step.run(space, lambda count: None)

        for step in build_steps(plan):
            if step.name == "accuracy":
                break
            space.step(step.name, step.inputs, partial(made, step), step.total, step.unit)
        store, stored = open_store(space.staging_dir / LOW_STORE), open_reader(space.staging_dir / LOW_STORE)
        for name, layer in layers.items():
            weight = layer.quantised_weight().detach()
            values, _, scale = stored_names(name, layer.scheme, "bf16")
            exact = quantise(weight, layer.scheme)[1]
            assert torch.equal(stored(store[scale].name), exact)
            assert torch.equal(dequantise(stored(store[values].name), exact), weight), name
            for component, expected in zip(layer.components, layer.input_scales().tolist(), strict=True):
                assert ranges.amax[component][name] == 127 * expected
        got: dict[str, Any] = {}
        decoder = written.config.decoder
        inputs = {
            "input_embeds": rng.normal(size=(2, 7, decoder.hidden_size)).astype(np.float32) / 10,
            "positions": np.tile(np.arange(7), (2, 1)),
            "attention_mask": np.array([[0] + [1] * 7] * 2),
        }
        spec = component_spec("decoder", plan.checkpoint.model)
        sizes = {"batch": 2, "past": 1}
        for tensor in spec.inputs[3:]:
            inputs[tensor.name] = np.zeros(
                [n if isinstance(n, int) else sizes[n] for n in tensor.shape], np.float32
            )
        for component, feeds in zip(components, ({"pixel_values": pixels}, inputs), strict=True):
            own = component_spec(component, plan.checkpoint.model)
            engine = open_engine(ORT, own, space.staging_dir / graph_path(component, "fp32"))
            try:
                got |= engine.run(feeds)
            finally:
                engine.close()
    embeds, positions = (torch.from_numpy(inputs[name]) for name in ("input_embeds", "positions"))
    with torch.no_grad():
        for model, least in ((written, 60), (trained, 20)):  # norms and biases are 16-bit there
            visual = model.visual_embeds(torch.from_numpy(pixels))
            logits, _ = model.step(embeds, positions, torch.ones(2, 7, dtype=torch.int64))
            assert compare(visual.numpy(), got["visual_embeds"]).sqnr_db > least
            assert compare(logits.numpy(), got["logits"]).sqnr_db > least


@pytest.mark.parametrize("name", FOLDERS)
def test_exact_weights_are_written_as_they_are(name: str, tmp_path: Path) -> None:
    """Joined, apart, stacked or interleaved: quantised weights in fp32, the rest as it was stored."""
    opened = open_checkpoint(FAMILY / name)
    model: Any = load_chat(opened)
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    state = model.state_dict()
    for layer in layers:
        state[f"{layer}.weight"] = dequantise(*quantise(state[f"{layer}.weight"], "int8"))
    exact = {f"{layer}.weight" for layer in layers}
    assert write_as_stored(state, opened, tmp_path, dict.fromkeys(exact, torch.float32))
    written = open_checkpoint(tmp_path)
    for key in opened.tensors:
        want = state[key] if key in exact else opened.load(key)
        assert torch.equal(written.load(key), want.to(written.load(key).dtype)), key
    assert all(written.tensors[key].dtype == "float32" for key in exact)


@pytest.mark.slow
def test_a_stopped_run_ends_the_same(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    whole = config(models["tiles"], data, tmp_path / "whole")
    losses = run(whole)["losses"]
    stopped = replace(whole, out=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, stop=3)
    assert not stopped.out.exists()
    assert run(stopped)["losses"] == losses
    for name in ("model.safetensors", "ranges.json"):
        assert (stopped.out / name).read_bytes() == (whole.out / name).read_bytes()
    with pytest.raises(InputError, match="holds another run"):
        run(replace(stopped, trains="decoder"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_frozen_parts_stay_and_the_loss_falls(
    form: str, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    settings = config(
        models[form], data.with_suffix(".json"), tmp_path / "out", trains="decoder", steps=12,
        batch=8,
    )  # fmt: skip
    losses = [step["answers"] for step in run(settings)["losses"]]
    assert losses[-1] < 0.9 * losses[0]
    before, after = open_checkpoint(models[form]), open_checkpoint(settings.out)
    tower = [key for key in before.tensors if key.startswith(TOWER[form])]
    assert tower
    quantised = {f"{name}.weight" for name in plan_qat(settings).build.layers.quantised}
    for key in tower:
        stored, written = before.load(key), after.load(key)
        assert torch.equal(written, stored.to(written.dtype)), key
        assert key not in quantised or written.dtype == stored.dtype
    learnt = [key for key in before.tensors if "layers.0." in key and key not in tower]
    assert all(not torch.equal(before.load(key).float(), after.load(key).float()) for key in learnt)
    _, trained = simulated(settings)
    for name, layer in quantised_layers(trained):
        if name.startswith(TOWER[form]):
            assert layer.clip is not None
            assert bool((layer.clip == 1).all())
    files = {"recipe.yaml", "ranges.json", "qat.json", "tokenizer.model", "config.json"}
    assert files <= {path.name for path in settings.out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "strategy", "teacher"), [("llava", "ddp", True), ("tiles", "fsdp", False)])
def test_two_processes_train_as_one_does(
    form: str, strategy: str, teacher: bool, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    settings = config(models[form], data, tmp_path / "one", teacher=teacher, steps=2, strategy=strategy)
    alone = run(settings)["losses"]
    shared = run(replace(settings, out=tmp_path / "two"), 2)["losses"]
    assert shared[0] == pytest.approx(alone[0], rel=1e-4)
    (loss,) = alone[1].keys() - {"grad_norm"}
    assert shared[1][loss] == pytest.approx(alone[1][loss], rel=5e-2)  # some values round the other way


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_is_learnt(form: str, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """A student without quantisers is as the teacher; with them it is not, and rows without answers count
    nothing."""
    plan = plan_qat(config(models[form], data, tmp_path / "out"))
    batch = qat._batches(plan, slice(None))[0]
    teacher: Any = load_chat(models[form])
    with torch.no_grad():
        assert float(chat_losses(teacher, batch, teacher)["kl"]) == pytest.approx(0, abs=1e-6)
        nothing = replace(batch, labels=torch.full_like(batch.labels, -100))
        assert float(chat_losses(teacher, nothing, None)["answers"]) == 0
        ranges = qat.measured_ranges(plan.build, tmp_path, Silent())
        student = qat.student_of(plan.build, ranges, True)
        assert float(chat_losses(student, batch, teacher)["kl"]) > 1e-6


def tied(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    del tensors["language_model.output.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    data = json.loads((folder / "config.json").read_text())
    data["llm_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps({**data, "tie_word_embeddings": True}))


def test_bad_input_is_named(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    def fault(model: Path, **more: Any) -> IvlError:
        with pytest.raises((UsageError, InputError)) as caught:
            plan_qat(replace(config(model, data, tmp_path / "out"), **more))
        return caught.value

    llava, tiles = models["llava"], models["tiles"]
    for model in models.values():
        assert "no losses of stage 2" in fault(model, stage=2).what
        assert "nothing to train on" in fault(model, data=None, calib=data).what
        (tmp_path / "no.jsonl").write_text('{"image": "a.png", "conversations": [1]}')
        assert "entry 0 is not a conversation" in fault(model, data=tmp_path / "no.jsonl").what
    (tmp_path / "text.jsonl").write_text(
        json.dumps({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]})
    )
    assert "no conversation to calibrate on" in fault(llava, data=tmp_path / "text.jsonl").what
    assert "cannot be fine-tuned with int8-smooth" in fault(tiles, recipe="int8-smoothquant").what
    shared = shutil.copytree(tiles, tmp_path / "shared")
    tied(shared)
    (tmp_path / "head.yaml").write_text(
        Recipe("head", (Rule("language_model.lm_head", "int8-weight"),)).to_yaml()
    )
    error = fault(shared, recipe=str(tmp_path / "head.yaml"))
    assert "language_model.lm_head cannot be fine-tuned" in error.what
    assert "embed_tokens" in error.why
    bare = shutil.copytree(tiles, tmp_path / "bare")
    for name in ("tokenizer.model", "added_tokens.json"):
        (bare / name).unlink()
    assert "No tokenizer" in fault(bare).what


def test_images_longer_than_the_context(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models["tiles"], tmp_path / "short")
    settings = json.loads((folder / "config.json").read_text())
    settings["llm_config"]["max_position_embeddings"] = 16
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="images take over 16 positions"):
        run(config(folder, data, tmp_path / "out", recipe="int8-weight"))


def test_conversations_are_calibrated_on(models: dict[str, Path], data: Path) -> None:
    """Those of one image, from the first question on; their own turns, not a caption's."""
    chosen = open_calibration(data)
    assert len(chosen) == 6
    assert chosen.without_caption == 0
    assert {len(sample.turns) for sample in chosen.samples} == {1, 2}
    (same,) = {chosen.hash, open_calibration(data.with_suffix(".json")).hash}
    changed = replace(chosen.samples[0], turns=())
    assert replace(chosen, samples=(changed, *chosen.samples[1:])).hash != same
    tokenizer = plan_build(BuildConfig(Path("x"), models["llava"], "bf16", backend=(ORT,))).tokenizer
    for batch in chosen.sample_batches(tokenizer, 1):
        (dialogue,) = batch.dialogues
        turns = batch.samples[0].turns
        assert tokenizer.decode(list(dialogue.answer)).strip() == turns[-1].answer
        prompt = tokenizer.decode(list(dialogue.after))
        assert len(turns) == 1 or str(turns[0].answer) in prompt


@pytest.mark.slow
def test_the_command_trains_a_chat_model(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ["train", "qat", "--model", str(models["tiles"]), "--recipe", "w4a4", "--data", str(data)]
    args += ["--out", str(out), "--steps", "2", "--batch", "2", "-O", "trains=projector", "-O", "threads=1"]
    assert main([*args, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["learns from"], plan["trains"]) == ("the losses of stage 3", "projector")
    assert main([*args, "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["settings"]["stage"] == 3
    build = ["build", "--model", str(out), "--precision", str(out / "recipe.yaml")]
    build += ["--ranges", str(out / "ranges.json"), "--calib", str(data), "--backend", "onnxruntime"]
    assert main([*build, "--out", str(tmp_path / "bundle"), "--dry-run"]) == 0
    assert main([*args[:8], "-O", "stage=1", "--dry-run"]) == 2
    assert main(["train", "qat", "-O", "stage=3", "--dry-run"]) == 2
    assert "a chat model's" in capsys.readouterr().err
