"""A build of InternVL 1.1 to 3.5: what it is calibrated on, its receipt, its bundle, and its traps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivl_export.bundle import Bundle
from ivl_export.calibration.calibrate import calibrate
from ivl_export.calibration.folding import fed_by, fold
from ivl_export.errors import CheckpointError
from ivl_export.inputs.chat_template import ChatFormat
from ivl_export.models import load_chat
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.pipeline.config import ORT, BuildConfig
from ivl_export.pipeline.plan import BuildPlan, plan_build

FAMILY = Path(__file__).parents[1] / "goldens" / "family"
MINI = FAMILY / "tokenizers" / "qwen2_mini"
VOCABULARY = 440


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up model of a golden's form with the mini tokenizer of Qwen 2, and four drawn scenes."""
    from ivl_export.benchmarks.fullsize.make_checkpoint import make_checkpoint

    folder = tmp_path_factory.mktemp("tiles")
    sizes: Any = open_checkpoint(FAMILY / "chat_qwen2_300m").model
    decoder = replace(sizes.decoder, vocab_size=VOCABULARY, eos_token_ids=(420,))
    make_checkpoint(folder, replace(sizes, decoder=decoder, max_tiles=6, image_token_id=425), depth=3)
    (folder / "tokenizer.model").unlink()
    for path in MINI.iterdir():
        if path.name != "expected.json":
            shutil.copyfile(path, folder / path.name)
    return folder


def plan(checkpoint: Path, out: Path, precision: str = "int8", **options: Any) -> BuildPlan:
    return plan_build(BuildConfig(out=out, model=checkpoint, precision=precision, backend=(ORT,), **options))


def test_calibration_sees_a_part_and_the_whole_image(checkpoint: Path, tmp_path: Path) -> None:
    result = plan(checkpoint, tmp_path / "out")
    assert result.settings.tiling is not None
    (batch,) = result.calibration.batches(result.settings, result.tokenizer)
    assert batch.pixel_values.shape == (2 * len(result.calibration), 3, 56, 56)
    dialogue = batch.dialogues[0]
    special = result.tokenizer.special
    assert dialogue.before[0] == special("<|im_start|>")
    assert (dialogue.before[-1], dialogue.after[0]) == (special("<img>"), special("</img>"))
    assert special("<|im_end|>") not in dialogue.answer
    ranges = calibrate(
        result.checkpoint, result.components, result.calibration, result.settings, result.tokenizer
    )
    model: Any = load_chat(checkpoint)
    seen: list[float] = []
    layer = model.vision_model.encoder.layers[0].attn.qkv
    layer.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    with torch.no_grad():
        model.vision(torch.from_numpy(batch.pixel_values))
    name = "vision_model.encoder.layers.0.attn.qkv"
    assert ranges.amax["vision_chat"][name] == pytest.approx(seen[0], rel=1e-5)


@pytest.mark.slow
def test_a_build_says_how_many_tokens_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    import ivl_export

    pytest.importorskip("onnxscript")
    bundle: Bundle = ivl_export.build(checkpoint, tmp_path / "out", precision="int8", backend=ORT)
    for view in ("teacher_forced", "chained"):
        tokens = bundle.receipt("accuracy")[view]["decoder"]["logits"]["tokens"]
        assert tokens["positions"] > 3
        assert 0 <= tokens["same"] <= 1
        assert 0 < tokens["kl"] <= tokens["worst_kl"]
    chat = ChatFormat.from_json(bundle.manifest.model.chat, "manifest")
    assert (chat.template.name, chat.images.context, chat.images.per_tile) == ("internvl2_5", 425, 4)
    preprocess = {path.name for path in (bundle.root / "preprocess").iterdir()}
    assert {"preprocessor_config.json", "added_tokens.json", "tokenizer_config.json"} < preprocess
    with ivl_export.load(bundle, threads=1) as model:
        answer = model.chat([np.zeros((56, 112, 3), np.uint8)]).ask("what?", 4)
        assert isinstance(answer, str)


def test_factors_fold_into_layer_norms_and_the_decoder(checkpoint: Path) -> None:
    opened, generator = open_checkpoint(checkpoint), torch.Generator().manual_seed(0)
    sources = [f"vision_model.encoder.layers.1.{name}" for name in ("norm1", "attn.qkv", "norm2")]
    block = "language_model.model.layers.1."
    sources += [block + name for name in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj")]
    widths = {s: opened.tensors[f"{fed_by(s)[0]}.weight"].shape[1] for s in sources}
    # Powers of two, as they are searched: nothing is lost in 16 bits.
    powers = {s: torch.randint(-2, 3, (width,), generator=generator) for s, width in widths.items()}
    divisors = {s: 2.0**power for s, power in powers.items()}
    pixels, ids = torch.randn(2, 3, 56, 56, generator=generator), torch.tensor([[5, *[425] * 8, 7, 9]])
    with torch.no_grad():
        want, got = (load_chat(c).logits(ids, pixels) for c in (opened, fold(opened, divisors)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def changed(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def nested(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    del data["llm_config"]["architectures"]
    (folder / "config.json").write_text(json.dumps(data))


def other_tokenizer(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    for path in (FAMILY / "tokenizers" / "internlm2_mini").iterdir():
        shutil.copyfile(path, folder / path.name)


def without_marks(folder: Path) -> None:
    changed(folder, image_token_id=None, template="phi3-chat")


@pytest.mark.parametrize(
    ("trap", "message"),
    [
        (lambda folder: changed(folder, image_token_id=424), "disagree.*424.*<IMG_CONTEXT> is 425"),
        (nested, "llm_config has no architectures"),
        (other_tokenizer, "of another model|is another model's|disagree"),
        (without_marks, r"no special token '<\|system\|>'.*of another model"),
        (lambda folder: changed(folder, template="own"), "template 'own' of config.json is not known"),
        (lambda folder: changed(folder, max_dynamic_patch=41), "tiling.*41"),
    ],
)
def test_traps_are_named(
    trap: Callable[[Path], None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    trap(folder)
    with pytest.raises(CheckpointError, match=message):
        plan(folder, tmp_path / "out")


def test_without_a_tokenizer_ids_are_taken(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    for path in MINI.iterdir():
        (folder / path.name).unlink(missing_ok=True)
    result = plan(folder, tmp_path / "out")
    assert any("the bundle takes token ids" in notice for notice in result.notices)
    (batch,) = result.calibration.batches(result.settings, result.tokenizer)
    assert all(0 <= token < VOCABULARY for d in batch.dialogues for token in (*d.before, *d.answer))
