"""Stage-2 and retrieval losses, masks and gradients against the published implementation's numbers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ivl_export.models.config import InternVLConfig
from ivl_export.models.internvl import InternVLModel
from ivl_export.training import losses
from ivl_export.training.losses import Stage2Batch, Text

pytestmark = pytest.mark.numeric

GOLDENS = Path(__file__).parents[1] / "goldens" / "tiny"


def tiny_model() -> InternVLModel:
    model = InternVLModel(InternVLConfig.load(GOLDENS / "config.json"))
    model.load_state_dict(load_file(GOLDENS / "model.safetensors"))
    return model


def golden_batch(golden: dict[str, Tensor], prefix: str = "in.") -> Stage2Batch:
    def text(kind: str) -> Text:
        return Text(golden[f"{prefix}{kind}input_ids"], golden[f"{prefix}{kind}attention_mask"])

    ids = golden.get(f"{prefix}image_ids")
    return Stage2Batch(
        golden[f"{prefix}pixel_values"],
        text("positive_"),
        text("negative_"),
        text("summarize_"),
        text(""),
        golden[f"{prefix}labels"],
        None if ids is None else ids.flatten(),
    )


def close(value: Tensor, golden: Tensor, tolerance: float) -> bool:
    return bool((value - golden).abs().max() <= tolerance)


@pytest.mark.parametrize("name", ["train_b4", "train_b5_ignore"])
def test_stage2_losses_mask_and_gradients(name: str) -> None:
    golden = load_file(GOLDENS / f"{name}.safetensors")
    model, batch = tiny_model(), golden_batch(golden)
    result = losses.stage2_losses(model, batch)
    assert result.itg is not None
    assert close(result.itc, golden["out.loss_itc"], 1e-5)
    assert close(result.itm, golden["out.loss_itm"], 1e-5)
    assert close(result.itg, golden["out.loss_itg"], 1e-5)
    assert close(result.total, golden["out.loss"], 2e-5)

    text, _ = losses.matching_texts(batch)
    mask = losses.stage2_mask(
        text.mask, batch.summarize.mask, batch.caption.mask, model.config.num_query_token
    )
    assert torch.equal(mask.to(torch.uint8), golden["mask_visible"])

    torch.autograd.backward(result.total)
    facts = json.loads((GOLDENS / f"{name}.json").read_text())
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.grad is None} == set(facts["grad_is_None"])
    norms = torch.stack([parameters[n].grad.norm() for n in facts["gradnorm_names"]])  # type: ignore[union-attr]
    assert close(norms, golden["gradnorm_all"], 5e-5 * float(golden["gradnorm_all"].max()))
    saved = {k[5:]: v for k, v in golden.items() if k.startswith("grad.")}
    largest = max(float(v.abs().max()) for v in saved.values())
    for key, value in saved.items():
        gradient = parameters[key].grad
        assert gradient is not None
        assert close(gradient, value, 5e-5 * largest), key


def test_stage2_hidden_states() -> None:
    golden = load_file(GOLDENS / "train_b4.safetensors")
    expected = load_file(GOLDENS / "train_b4_qllama_out.safetensors")["last_hidden_state"]
    model, batch = tiny_model(), golden_batch(golden)
    with torch.no_grad():
        hidden, _ = losses.stage2_hidden(model, batch, model.vision(batch.pixel_values))
    assert close(hidden, expected, 2e-5)


@pytest.mark.parametrize("name", ["train_retrieval_b3", "train_retrieval_b4"])
def test_retrieval_losses(name: str) -> None:
    golden = load_file(GOLDENS / f"{name}.safetensors")
    with torch.no_grad():
        result = losses.retrieval_losses(tiny_model(), golden_batch(golden))
    assert close(result.itc, golden["out.loss_itc"], 1e-5)
    assert close(result.itm, golden["out.loss_itm"], 1e-5)
    assert close(result.total, golden["out.loss"], 2e-5)


def test_equal_ids_share_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)
    scale = torch.tensor(10.0)
    distinct = losses.contrastive_loss(image, text, scale, ids=torch.tensor([1, 2, 3, 4]))
    assert close(distinct, losses.contrastive_loss(image, text, scale), 1e-6)
    shared = losses.contrastive_loss(image, text, scale, ids=torch.tensor([1, 2, 1, 4]))
    assert not close(shared, distinct, 1e-3)


def _rank(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    golden = load_file(GOLDENS / "train_ws2.safetensors")
    model = tiny_model()
    result = losses.stage2_losses(model, golden_batch(golden, f"in.rank{rank}."), losses.across_ranks)
    torch.autograd.backward(result.total)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.save({"losses": torch.stack([result.itc, result.itm, result.total]), **gradients}, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    golden = load_file(GOLDENS / "train_ws2.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ranks are separate processes: this file runs as a script, once a rank.
    command = [sys.executable, __file__, str(port), str(tmp_path / "out")]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    ranks = [torch.load(f"{tmp_path / 'out'}.{r}", weights_only=True) for r in range(2)]
    for r, result in enumerate(ranks):
        expected = torch.stack([golden[f"out.rank{r}.loss{part}"] for part in ("_itc", "_itm", "")])
        assert close(result["losses"], expected, 2e-5)
    for kind in ("grad_mean", "grad_local"):
        for key, value in golden.items():
            if not key.startswith(kind):
                continue
            if kind == "grad_mean":
                got = (ranks[0][key[10:]] + ranks[1][key[10:]]) / 2
            else:
                got = ranks[int(key[15])][key[17:]]
            assert close(got, value, 1e-4 * float(golden_max(golden, kind))), key


def golden_max(golden: dict[str, Tensor], kind: str) -> float:
    return max(float(v.abs().max()) for k, v in golden.items() if k.startswith(kind))


if __name__ == "__main__":
    _rank(int(sys.argv[3]), int(sys.argv[1]), sys.argv[2])
