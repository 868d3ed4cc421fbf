"""Stage 3 of InternVL 1.1 to 3.5: the loss, batches of tiles, and checkpoints written as they were stored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ivl_export.cli import main
from ivl_export.errors import InputError
from ivl_export.inputs.chat_template import IGNORE, Turn
from ivl_export.inputs.sources import ImageInput
from ivl_export.models import load_chat
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.registry import family_of, image_settings
from ivl_export.training.chat_model import write_as_stored
from ivl_export.training.conversations import ChatBatch, ChatBatches
from ivl_export.training.presets import Stage
from ivl_export.training.stage3 import answer_loss

FAMILY = Path(__file__).parents[1] / "goldens" / "family"
FOLDERS = sorted(path.parent.name for path in FAMILY.glob("*/model.safetensors"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_is_written_as_it_was_stored(name: str, tmp_path: Path) -> None:
    """Joined, apart, stacked or interleaved: every tensor is there again, bit for bit."""
    opened = open_checkpoint(FAMILY / name)
    model = load_chat(opened)
    assert write_as_stored(model.state_dict(), opened, tmp_path)
    want, got = (load_file(folder / "model.safetensors") for folder in (FAMILY / name, tmp_path))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert (tmp_path / "config.json").read_bytes() == (FAMILY / name / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["chat_qwen2_300m", "native_gptoss_300m"])
def test_the_loss_is_that_of_the_answers(name: str) -> None:
    model: Any = load_chat(FAMILY / name)
    inputs = load_file(FAMILY / name / "inputs.safetensors")
    token = model.config.decoder.vocab_size - 4
    model.config = type(model.config)(**{**model.config.__dict__, "image_token_id": token})
    ids, pixels = inputs["input_ids_1"].long(), inputs["pixel_values"][1:]
    labels = torch.full_like(ids, IGNORE)
    labels[:, -3:] = ids[:, -3:]
    padded = [F.pad(t, (0, 4), value=v) for t, v in ((ids, 0), (labels, IGNORE), (torch.ones_like(ids), 0))]
    loss = answer_loss(model, ChatBatch(pixels, *padded))
    logits = model.logits(ids, pixels, token)[0, -4:-1]
    torch.testing.assert_close(loss, F.cross_entropy(logits, ids[0, -3:]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.mlp1.parameters())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dataclasses import replace

    from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint

    folder = tmp_path_factory.mktemp("tiles")
    sizes: Any = open_checkpoint(FAMILY / "native_qwen3moe_300m").model
    decoder = replace(sizes.decoder, vocab_size=600, eos_token_ids=(2,))
    sizes = replace(sizes, decoder=decoder, max_tiles=6, image_token_id=590)
    make_checkpoint(folder, replace(sizes, layout="opengvlab", template="internvl2_5"), depth=3)
    return folder


def drawn(batch: int, rows: int) -> list[tuple[list[ImageInput], list[Turn]]]:
    wide: ImageInput = np.full((56, 112, 3), 40 * batch, np.uint8)
    return [([wide, wide], [Turn("which?", "the first", 2)]), ([], [Turn("hello", "hi")])][:rows]


def test_batches_show_every_tile(checkpoint: Path) -> None:
    config: Any = open_checkpoint(checkpoint).model
    family = family_of(config)
    tokenizer = family.tokenizer(config, checkpoint)
    chat = family.chat_format(config, checkpoint, tokenizer)
    settings = image_settings(config, checkpoint)
    stage = Stage("stage3", "answers", 2, 2, 1e-3, 0.0, 1)
    batch = ChatBatches(drawn, stage, settings, tokenizer, 4096, chat)[1]
    assert batch.pixel_values.shape == (6, 3, 56, 56)
    assert int((batch.input_ids == 590).sum()) == 6 * 4
    learnt = batch.labels[0][batch.labels[0] != IGNORE].tolist()
    assert tokenizer.decode(learnt) == "the first"
    with pytest.raises(InputError, match="images take over 20 positions"):
        ChatBatches(drawn, stage, settings, tokenizer, 20, chat)[0]


@pytest.mark.slow
def test_low_rank_adapters_of_the_command(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["train", "--model", str(checkpoint), "--steps", "2", "--batch", "2", "--out", str(out)]
    assert main([*line, "-O", "lora-rank=2", "--json"]) == 0
    shutil.rmtree(out.with_name("out.work"), ignore_errors=True)
    want, got = (load_chat(folder).state_dict() for folder in (checkpoint, out))
    changed = {
        key.rpartition(".")[0].rpartition(".")[2] for key in want if not torch.equal(want[key], got[key])
    }
    assert changed <= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "q_proj" in changed
