"""Arguments of a build are checked before anything runs, each refusal with its own exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivl_export.engines.gpu import Gpu
from ivl_export.engines.tensorrt import library as trt
from ivl_export.engines.tensorrt.options import BuildOptions
from ivl_export.errors import CapabilityError, CheckpointError, InputError, IvlError, UsageError
from ivl_export.models import shipped
from ivl_export.models.checkpoint import Checkpoint, open_checkpoint
from ivl_export.pipeline import plan as plan_module
from ivl_export.pipeline.config import ORT, RTX, TENSORRT, BuildConfig
from ivl_export.pipeline.plan import OWN_CALIBRATION, BuildPlan, plan_build
from ivl_export.pipeline.run import build_steps
from ivl_export.training.tokenizer import train_tokenizer

Ask = Callable[..., BuildPlan]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images with captions."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo number {i}")
    return folder


@pytest.fixture
def ask(tmp_path: Path, tiny_model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """``ask(precision=...)`` opens the tiny model's plan; TensorRT-RTX passes for installed."""
    pretend(monkeypatch, RTX)

    def make(**options: Any) -> BuildPlan:
        progress = options.pop("progress", None)
        requests = {"out": tmp_path / "out", "model": tiny_model, "calib": photos, **options}
        return plan_build(BuildConfig(**requests), progress)

    return make


def pretend(monkeypatch: pytest.MonkeyPatch, *releases: str, gpu: bool = False) -> None:
    """Which TensorRT builders are installed, and whether there is a GPU."""
    result = dict.fromkeys(releases, "11.4")
    monkeypatch.setattr(trt, "installed_release", result.get)
    monkeypatch.setattr(plan_module, "gpus", lambda: (Gpu("NVIDIA H100", "sm90"),) if gpu else ())


def copied(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def test_a_plan_has_the_arguments(ask: Ask, tmp_path: Path) -> None:
    plan = ask(targets="sm89,sm120", components=("qllama_text", "vision"))
    assert plan.backends == (ORT, RTX)
    assert plan.targets == ("sm89", "sm120")
    assert plan.components == ("vision", "qllama_text")
    assert (len(plan.calibration), len(plan.held_out)) == (15, 5)
    assert not {s.name for s in plan.calibration.samples} & {s.name for s in plan.held_out.samples}
    assert plan.settings.size == 56
    names = [step.name for step in build_steps(plan)]
    assert "engine-vision-sm120" in names
    assert "tasks" not in names
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"precision": "fp4"}, UsageError, r"Unknown precision 'fp4'.*bf16, fp16, fp32, fp8, .*int8"),
        ({"precision": "none.yaml"}, UsageError, r"none\.yaml cannot be read"),
        ({"targets": "sm90"}, UsageError, r"(?s)sm90.*sm89"),
        ({"targets": ""}, UsageError, "sm89"),
        ({"targets": "sm86"}, CapabilityError, r"no FP8.*sm89"),
        ({"targets": "sm89,sm80"}, CapabilityError, r"sm80.*FP8|FP8.*sm80"),
        ({"precision": "bf16", "targets": "sm75"}, CapabilityError, "no BF16"),
        ({"backend": ("openvino",)}, UsageError, "Unknown backend 'openvino'.*onnxruntime, tensorrt-rtx"),
        ({"components": ("vision", "decoder")}, UsageError, "Unknown component 'decoder'.*qllama_step"),
        ({"calib": None}, InputError, "fp8 needs calibration data.*--calib"),
        ({"calib": None, "precision": "int8"}, InputError, "int8 needs calibration data"),
        ({"calib": Path("nowhere")}, InputError, "No calibration data at nowhere"),
        ({"model": Path("nowhere")}, CheckpointError, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused(
    ask: Ask, options: dict[str, Any], error: type[IvlError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says) as caught:
        ask(**options)
    assert type(caught.value) is error
    exit_codes = {UsageError: 2, InputError: 3, CheckpointError: 4, CapabilityError: 5}
    assert caught.value.exit_code == exit_codes[error]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OWN_CALIBRATION)
def test_a_checkpoint_may_bring_its_calibration_set(
    name: str, ask: Ask, tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    model = copied(tiny_model, tmp_path / "model")
    shutil.copytree(photos, model / "calibration")
    if name.endswith(".jsonl"):
        line = json.dumps({"image": "calibration/7.png", "caption": "seven"})
        (model / name).write_text(line + "\n")
    plan = ask(model=model, calib=None)
    assert len(plan.calibration) == (1 if name.endswith(".jsonl") else 15)
    assert not plan.calibration.synthetic
    assert ask(model=model).calibration.source == str(photos)  # the argument comes first


def test_a_recipe_cannot_pass_for_the_reference(ask: Ask, tmp_path: Path) -> None:
    rule = '{"pattern": "*.mlp.fc1", "scheme": "int8"}'
    (tmp_path / "own.json").write_text(f'{{"name": "own", "rules": [{rule}]}}')
    assert set(ask(precision=str(tmp_path / "own.json")).layers.quantised.values()) == {"int8"}
    (tmp_path / "fp32.json").write_text(f'{{"name": "fp32", "rules": [{rule}]}}')
    with pytest.raises(UsageError, match="fp32 is the name of the unquantised model"):
        ask(precision=str(tmp_path / "fp32.json"))


def test_the_cpu_takes_any_precision(ask: Ask) -> None:
    """Targets are those of TensorRT-RTX: a build for ONNX Runtime alone does not ask them."""
    plan = ask(backend=(ORT,), targets="sm86")
    assert plan.backends == (ORT,)
    assert not [s.name for s in build_steps(plan) if s.name.startswith("engine-")]


def test_components_that_the_checkpoint_lacks(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an InternVL-C file of the older layout, which has no query pass and no captions."""

    def narrow(path: Path) -> Checkpoint:
        checkpoint = open_checkpoint(path)
        return replace(checkpoint, model=replace(checkpoint.config, contrastive_only=True))

    monkeypatch.setattr(plan_module, "open_checkpoint", narrow)
    with pytest.raises(CapabilityError, match=r"no weights for qllama_step\. It has vision, qllama_text"):
        ask(components=("vision", "qllama_step"))
    assert ask(components=("vision",)).components == ("vision",)


def test_sixteen_bits_need_no_calibration_data(ask: Ask) -> None:
    plan = ask(calib=None, precision="bf16")
    assert plan.notices == ()
    assert "calibrate" not in [step.name for step in build_steps(plan)]
    assert len(plan.held_out) > 0


def test_a_model_trained_on_scenes_is_calibrated_and_evaluated_on_them(
    ask: Ask, tiny_model: Path, tmp_path: Path
) -> None:
    model = copied(tiny_model, tmp_path / "scenes")
    (model / "evaluation.json").write_text('{"tasks": "scenes"}')
    plan = ask(model=model, calib=None, calib_samples=40)
    assert plan.calibration.synthetic
    assert (len(plan.calibration), len(plan.held_out)) == (40, 18)
    assert any("synthetic" in notice for notice in plan.notices)
    assert build_steps(plan)[-1].name == "tasks"
    # a part of the model cannot do the tasks
    assert "tasks" not in [s.name for s in build_steps(ask(model=model, calib=None, components=("vision",)))]
    for text in ("{", "[]", "{}", '{"tasks": "imagenet"}', '{"tasks": ["scenes"]}'):
        (model / "evaluation.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"evaluation\.json|imagenet"):
            ask(model=model)


def test_an_empty_folder(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="It has no image") as caught:
        ask(calib=tmp_path / "empty")
    assert caught.value.exit_code == 3
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="It has no line"):
        ask(calib=tmp_path / "empty.jsonl")


@pytest.mark.parametrize(("corrupt", "fails"), [(1, False), (2, False), (3, True), (20, True)])
def test_corrupt_images_are_skipped_up_to_a_tenth(
    ask: Ask, photos: Path, tmp_path: Path, corrupt: int, fails: bool
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(photos, folder)
    for i in range(corrupt):
        whole = (folder / f"{i}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(whole[: len(whole) // 2])
    counted: list[tuple[int, int]] = []
    if fails:
        with pytest.raises(InputError, match=f"{corrupt} of 20 calibration images.* over 10%") as caught:
            ask(calib=folder)
        assert caught.value.exit_code == 3
        assert ".png: " in caught.value.why
        return
    plan = ask(calib=folder, progress=lambda count, total: counted.append((count, total)))
    assert len(plan.calibration) + len(plan.held_out) == 20 - corrupt
    assert len(plan.calibration.skipped) == corrupt
    assert any(f"{corrupt} files were skipped, the first: " in notice for notice in plan.notices)
    assert counted[-1] == (20 - corrupt, 20)


@pytest.mark.parametrize("name", ["tokenizer.model", "preprocessor_config.json", "config.json"])
def test_files_next_to_the_weights_must_exist(ask: Ask, tiny_model: Path, tmp_path: Path, name: str) -> None:
    model = copied(tiny_model, tmp_path / "model")
    (model / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        ask(model=model)
    assert caught.value.exit_code == 4


def test_a_tokenizer_that_is_none_or_of_another_model(ask: Ask, tiny_model: Path, tmp_path: Path) -> None:
    model = copied(tiny_model, tmp_path / "model")
    (model / "tokenizer.model").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"Cannot read .*tokenizer\.model\. It is not a Sent"):
        ask(model=model)
    (model / "tokenizer.model").write_bytes(train_tokenizer())
    with pytest.raises(CheckpointError, match=r"not of this model\. It has 512 pieces, the model knows 200"):
        ask(model=model)


def test_truncated_weights(ask: Ask, tiny_model: Path, tmp_path: Path) -> None:
    model = copied(tiny_model, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ask(model=model)


def test_a_missing_nano_is_named(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "shipped_folder", lambda name: tmp_path / "nano")
    with pytest.raises(CheckpointError, match="nano"):
        ask(model=None)


def test_tensorrt_rtx_that_is_not_installed(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(CapabilityError, match=r"tensorrt-rtx is not installed.*pip install") as caught:
        ask(backend=(RTX,))
    assert caught.value.exit_code == 5
    plan = ask(targets="sm86")  # says nothing of targets that are not built for
    assert plan.backends == (ORT,)
    assert "tensorrt-rtx is not installed: no GPU engines" in plan.notices[0]
    assert not [s.name for s in build_steps(plan) if s.name.startswith("engine-")]


def test_tensorrt_builds_for_the_gpu_that_is_here(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapabilityError, match=r"tensorrt is not installed.*ivl-export\[gpu\]"):
        ask(backend=(TENSORRT,))
    pretend(monkeypatch, RTX, TENSORRT)
    with pytest.raises(CapabilityError, match="no driver"):
        ask(backend=(TENSORRT,))
    assert ask().backends == (ORT, RTX), "not requested: backends that cannot be built are left out"
    pretend(monkeypatch, RTX, TENSORRT, gpu=True)
    assert ask().backends == (ORT, RTX, TENSORRT)
    plan = ask(backend=(TENSORRT,))
    assert plan.engines == ((TENSORRT, "native"),)
    (step,) = [s for s in build_steps(plan) if s.name == "engine-vision-native"]
    assert step.inputs["gpu"] == "NVIDIA H100 (sm90)"
    assert step.inputs["backend"] == TENSORRT


@pytest.mark.parametrize("release", ["10.14.1.48", "10.3.0", "8.6.1"])
def test_a_tensorrt_that_cannot_parse_the_graphs_is_refused_first(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    pretend(monkeypatch, TENSORRT, gpu=True)
    monkeypatch.setattr(trt, "installed_release", {TENSORRT: release}.get)
    with pytest.raises(CapabilityError, match=rf"tensorrt {release} is too old.*RMSNormalization") as caught:
        ask(backend=(TENSORRT,))
    assert caught.value.fix == "pip install 'tensorrt>=10.15'"
    plan = ask()
    assert plan.backends == (ORT,)
    assert f"tensorrt {release} is too old" in plan.notices[0]


@pytest.mark.slow
def test_shapes_and_options_decide_engines_and_nothing_else(ask: Ask) -> None:
    pytest.importorskip("tensorrt_rtx")
    plain = {s.name: s.digest for s in build_steps(ask())}
    for changed in (
        {"preset": "latency"},
        {"shapes": ("vision.batch=1:2:4",)},
        {"engine_options": BuildOptions(weight_streaming=True)},
    ):
        digests = {s.name: s.digest for s in build_steps(ask(**changed))}
        differ = {name for name, digest in digests.items() if plain[name] != digest}
        assert "engine-vision-sm89" in differ
        assert all(name.startswith("engine-") or name == "verification" for name in differ)
    assert {s.name: s.digest for s in build_steps(ask(no_cache=True))} == plain
    edge = ask(preset="edge")
    assert edge.engine_options.workspace_bytes == 256 << 20
    own = BuildOptions(workspace_bytes=1 << 30)
    assert ask(preset="edge", engine_options=own).engine_options == own
    for refused in ({"preset": "fast"}, {"shapes": ("batch=0:1:2",)}, {"shapes": ("width=1:2:3",)}):
        with pytest.raises(UsageError):
            ask(**refused)


def test_layers_without_fp8_kernels_stay_in_sixteen_bits_and_are_named(ask: Ask) -> None:
    """The tiny vision tower is 60 wide, which is not a multiple of 16; QLLaMA's 64 is one."""
    plan = ask()
    quantised = plan.layers.quantised
    assert not [name for name in quantised if name.startswith("vision_model.")]
    assert "qllama.model.layers.0.self_attn.q_proj" in quantised
    assert "qllama.model.layers.0.cross_attn.q_proj" in quantised
    assert "qllama.model.layers.0.cross_attn.k_proj" not in quantised  # takes vision tokens
    stay = [notice for notice in plan.notices if " stays bf16: " in notice]
    assert len(stay) == 3 * 4 + 2 * 2
    assert any("vision_model.encoder.layers.2.mlp.fc2" in n and "multiples of 16" in n for n in stay)
    int8 = ask(precision="int8")
    assert len(int8.layers.quantised) == len(quantised) + len(stay)
    assert not [notice for notice in int8.notices if "stays" in notice]


def digests(plan: BuildPlan) -> dict[str, str]:
    return {step.name: step.digest for step in build_steps(plan)}


@pytest.mark.slow
def test_steps_depend_on_what_they_read(ask: Ask, tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    base = digests(ask())
    assert digests(ask()) == base

    def changed(**options: Any) -> set[str]:
        return {name for name, digest in digests(ask(**options)).items() if base.get(name) != digest}

    graphs = {f"graph-{c}" for c in ("vision", "qllama_query", "qllama_text", "qllama_step")}
    after_scales = graphs | {n for n in base if n.startswith("engine-")} | {"verification", "accuracy"}
    engines = {name.replace("graph", "engine") + "-sm120" for name in graphs}
    assert changed(targets="sm120") == {*engines, "verification"}
    assert changed(calib_samples=5) == {"calibrate", *after_scales}
    assert changed(precision="int8") == {"finite", "weights", "quantise", *after_scales}  # more is quantised

    settings = copied(tiny_model, tmp_path / "settings")
    data = json.loads((settings / "preprocessor_config.json").read_text())
    data["image_mean"] = [0.5, 0.5, 0.5]
    (settings / "preprocessor_config.json").write_text(json.dumps(data))
    assert changed(model=settings) == {"preprocess", "calibrate", *after_scales}

    words = copied(tiny_model, tmp_path / "words")  # the same pieces, another training text
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc def ghi jkl"] * 50), model_writer=model, model_type="char",
        pad_id=-1, vocab_size=15, minloglevel=2,
    )  # fmt: skip
    (words / "tokenizer.model").write_bytes(model.getvalue())
    assert changed(model=words) == {"preprocess", "calibrate", *after_scales}


def test_optional_components_and_features(ask: Ask) -> None:
    usual = ask()
    assert "qllama_itm" not in usual.components
    more = ask(itm=True, features=(-2, 1))
    assert more.components == (*usual.components, "qllama_itm")
    assert more.checkpoint.config.vision.feature_blocks == (1, 2)  # of three
    assert ask(components=("qllama_itm", "vision")).components == ("vision", "qllama_itm")
    assert ask(components=("vision",), itm=True).components == ("vision", "qllama_itm")
    with pytest.raises(UsageError, match="no block 9"):
        ask(features=(9,))
    with pytest.raises(UsageError, match="no image-text matching"):
        ask(model=shipped.NANO_CHAT, itm=True)
