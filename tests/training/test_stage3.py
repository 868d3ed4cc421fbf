"""Stage 3 against the published loss and gradients, what learns, LoRA, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ivl_export.cli import main
from ivl_export.errors import CheckpointError, InputError, UsageError
from ivl_export.inputs.chat_template import IGNORE
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer
from ivl_export.models import load_chat, load_model
from ivl_export.models.chat import InternVLChatModel
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.tests.numbers import FEATURES, HIDDEN, near
from ivl_export.training import lora
from ivl_export.training.conversations import ChatBatch, ChatBatches, SceneDialogues
from ivl_export.training.presets import Stage
from ivl_export.training.stage3 import TRAINS, Stage3, Trains, answer_loss, fine_tune
from ivl_export.training.trainer import Options, TrainingProgress

from ..conftest import small_tokenizer

pytestmark = pytest.mark.numeric

CHAT = Path(__file__).parents[1] / "goldens" / "chat"
TINY = CHAT.parent / "tiny"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(CHAT / "chat.safetensors")


@pytest.fixture
def model() -> InternVLChatModel:
    return load_chat(CHAT).requires_grad_(True)


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return small_tokenizer(170)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Path:
    """The golden checkpoint with a tokenizer."""
    out = tmp_path_factory.mktemp("chat")
    for file in CHAT.iterdir():
        if file.name != "chat.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    (out / "tokenizer.model").write_bytes(tokenizer)
    return out


def batch_of(golden: dict[str, Tensor]) -> ChatBatch:
    """The golden batch; labels of the prompt as the published code has them before images are put in."""
    ids, mask = golden["img.input_ids"], golden["img.attention_mask"].long()
    return ChatBatch(golden["images"], ids, golden["img.labels"], mask)


@torch.no_grad()
def loss_of(model: InternVLChatModel, batch: ChatBatch) -> Tensor:
    return answer_loss(model, batch)


def data_of(stage: Stage, tokenizer: bytes) -> ChatBatches:
    settings = ImageSettings(size=84, mode="pad")
    return ChatBatches(SceneDialogues(0, 84, turns=2), stage, settings, tokenizer, 900)


def run(
    model: InternVLChatModel,
    tokenizer: bytes,
    work: Path,
    trains: Trains = "decoder",
    adapters: lora.Lora | None = None,
    steps: int = 4,
    stop: int | None = None,
) -> list[float]:
    stage = Stage("stage3", "answers", steps, 2, 1e-3, 0.0, 1, trainable=TRAINS[trains])
    losses: list[float] = []

    def report(p: TrainingProgress) -> None:
        losses.append(p.losses["answers"])
        if p.step == stop:
            raise KeyboardInterrupt

    options = Options(work, save_every=1, workers=0, bf16=False)
    fine_tune(model, Stage3(stage, adapters), data_of(stage, tokenizer), {"a": 1}, options, report)
    return losses


def test_loss_and_gradients_are_the_published_ones(
    model: InternVLChatModel, golden: dict[str, Tensor]
) -> None:
    loss = answer_loss(model, batch_of(golden))
    torch.testing.assert_close(loss, golden["img.loss"], rtol=0, atol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if (want := golden.get(f"img.grad.{name}")) is not None:
            atol = 5e-5 * float(want.abs().max())
            torch.testing.assert_close(parameter.grad, want, rtol=0, atol=atol)


def test_only_answers_are_learnt(model: InternVLChatModel, golden: dict[str, Tensor]) -> None:
    """Another prompt token changes the prediction, but no prompt token is a target."""
    batch = batch_of(golden)
    hidden = batch.labels.clone()
    hidden[:, -1] = IGNORE
    assert not torch.equal(answer_loss(model, batch), answer_loss(model, ChatBatch(
        batch.pixel_values, batch.input_ids, hidden, batch.mask
    )))  # fmt: skip
    none = torch.full_like(batch.labels, IGNORE)
    lost = answer_loss(model, ChatBatch(batch.pixel_values, batch.input_ids, none, batch.mask))
    assert lost.isnan()


@pytest.mark.parametrize("trains", ["projector", "decoder", "all", "lora"])
def test_what_learns(model: InternVLChatModel, tokenizer: bytes, tmp_path: Path, trains: Trains) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapters = lora.Lora(4, 8) if trains == "lora" else None
    run(model, tokenizer, tmp_path, trains, adapters)
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    tower = {k for k in before if "vision_tower" in k}
    projector = {k for k in before if "mm_projector" in k}
    want = {"projector": projector, "decoder": before.keys() - tower, "lora": set()}.get(trains)
    assert changed == want if trains != "all" else changed & tower and before.keys() - tower <= changed
    added = set(after) - set(before)
    assert bool(added) == (trains == "lora")
    assert all(k.endswith((".lora_a", ".lora_b")) for k in added)
    if trains == "lora":  # the frozen base has no gradients
        learning = {n for n, p in model.named_parameters() if p.grad is not None}
        assert learning == added


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_weights(tokenizer: bytes, tmp_path: Path) -> None:
    whole, stopped = load_chat(CHAT), load_chat(CHAT)
    losses = run(whole, tokenizer, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tokenizer, tmp_path / "stopped", stop=3)
    again = load_chat(CHAT)
    assert run(again, tokenizer, tmp_path / "stopped") == losses[2:]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    with pytest.raises(InputError, match="another run"):
        run(load_chat(CHAT), tokenizer, tmp_path / "stopped", "projector")


def test_merged_adapters_compute_the_same(
    model: InternVLChatModel, golden: dict[str, Tensor], tmp_path: Path
) -> None:
    batch, what = batch_of(golden), lora.Lora(4, 8)
    before = float(loss_of(model, batch))
    names = lora.add(model, what)
    assert len(names) == 3 * 7
    assert float(loss_of(model, batch)) == before, "B is zero"
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    unmerged = float(loss_of(model, batch))
    assert abs(unmerged - before) > 1e-3
    lora.save(model, what, tmp_path)
    other = load_chat(CHAT)
    assert lora.load(other, tmp_path) == what
    assert float(loss_of(other, batch)) == unmerged
    lora.merge(model, what)
    assert float(loss_of(model, batch)) == pytest.approx(unmerged, abs=2e-5)
    assert set(model.state_dict()) == set(load_chat(CHAT).state_dict())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )


@torch.no_grad()
def test_adapters_compute_what_the_peft_library_does(tmp_path: Path) -> None:
    """Its numbers for the tiny InternVL, with adapters (r 4, alpha 8) on both towers; apart and merged."""
    golden, tiny = load_file(TINY / "lora.safetensors"), load_model(TINY)
    by_name = {}
    for tower in ("vision_model", "qllama"):
        folder, prefix = tmp_path / tower, f"sd.{tower}."
        folder.mkdir()
        own = {k.removeprefix(prefix).replace(".default", ""): v for k, v in golden.items() if prefix in k}
        save_file({k: v for k, v in own.items() if ".lora_" in k}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
        by_name[tower] = lora.load(tiny.get_submodule(tower), folder)
        assert by_name[tower] == lora.Lora(4, 8)
    for merged in (False, True):
        for tower, what in by_name.items() if merged else ():
            lora.merge(tiny.get_submodule(tower), what)
        tokens = tiny.vision(golden["pixel_values"])
        near(tokens, golden["backbone"], HIDDEN)
        near(tiny.query_pass(tokens)[0], golden["queries"], FEATURES)


def test_adapters_of_another_model(tmp_path: Path, model: InternVLChatModel) -> None:
    with pytest.raises(CheckpointError, match="no LoRA adapters"):
        lora.load(model, tmp_path)
    with pytest.raises(UsageError, match="nothing to adapt"):
        lora.add(model, lora.Lora(pattern="nowhere.*"))
    lora.add(model, lora.Lora(2))
    lora.save(model, lora.Lora(2), tmp_path)
    small = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        lora.load(small, tmp_path)


@pytest.mark.slow
def test_the_verb_trains_a_checkpoint_on_a_users_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "a.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a ring"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"image": "a.png", "conversations": said}]))
    out = tmp_path / "out"
    inputs = {"stage": 3, "model": folder, "data": data, "out": out, "steps": 2, "batch": 2, "threads": 1}
    inputs |= {"lora-rank": 2, "adapters": tmp_path / "lora"}
    args = [text for key, value in inputs.items() for text in (f"--{key}", str(value))]
    assert main(["train", *args, "--json"]) == 0
    receipt: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert receipt["steps"] == 2
    tuned, base = load_chat(out), load_chat(folder)
    changed = {k for k, v in base.state_dict().items() if not torch.equal(v, tuned.state_dict()[k])}
    assert changed
    assert all(k.endswith("_proj.weight") for k in changed)
    adapted = load_chat(folder)
    lora.merge(adapted, lora.load(adapted, tmp_path / "lora"))
    for key, value in adapted.state_dict().items():
        torch.testing.assert_close(value, tuned.state_dict()[key])
    assert SentencePieceTokenizer(out / "tokenizer.model").model == (folder / "tokenizer.model").read_bytes()


@pytest.mark.slow
def test_the_projectors_of_a_model_with_queries_are_trained(
    query_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both of them, on drawn scenes; all other tensors, also unused ones, are written as read."""
    inputs = {"stage": 3, "model": query_chat, "out": tmp_path / "out", "steps": 2, "batch": 2, "threads": 1}
    args = [text for key, value in inputs.items() for text in (f"--{key}", str(value))]
    assert main(["train", *args, "--trains", "projector", "--json"]) == 0
    base, tuned = open_checkpoint(query_chat), open_checkpoint(tmp_path / "out")
    assert tuned.model == base.model
    changed = {key for key in base.tensors if not torch.equal(base.load(key), tuned.load(key))}
    assert {key.rpartition(".")[0] for key in changed} == {
        f"model.mm_projector.mlp{n}.{i}" for n in (1, 2) for i in (0, 2)
    }


@pytest.mark.parametrize("args", [["--stage", "2", "--model", "x"], ["--stage", "3"]])
def test_wrong_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *args]) == 2
    assert "--model CHAT, without --stage" in capsys.readouterr().err
