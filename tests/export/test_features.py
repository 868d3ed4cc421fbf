"""Blocks of the vision tower whose outputs a bundle gives: chosen, traced, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ivl_export.bundle import Bundle
from ivl_export.calibration.recording import Recording
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.errors import CapabilityError, CheckpointError, UsageError
from ivl_export.export.features import with_features
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.config import InternVLConfig
from ivl_export.models.registry import component_spec
from ivl_export.runtime.model import outputs_of
from ivl_export.tests.numbers import HIDDEN, near

pytestmark = pytest.mark.numeric

TINY = Path(__file__).parents[1] / "goldens" / "tiny"
CHAT = TINY.with_name("chat")


def test_blocks_are_chosen_from_either_end_and_the_last_is_there_anyway() -> None:
    plain = open_checkpoint(TINY)
    stored = with_features(plain, (-2, 1, 3, -1))
    assert stored.config.vision.feature_blocks == (1, 2)
    names = [tensor.name for tensor in component_spec("vision", stored.model).outputs]
    assert names == ["tokens", "image_embed", "features.1", "features.2"]
    assert with_features(plain, (3, -1)) == plain
    assert stored.revision == plain.revision  # scales that were measured before still fit
    assert "feature_blocks" not in json.dumps(plain.model.to_published())
    assert InternVLConfig.from_published(json.loads(json.dumps(stored.model.to_published()))) == stored.model


@pytest.mark.parametrize("block", [0, 4, -4])
def test_blocks_that_are_not_there_are_refused(block: int) -> None:
    with pytest.raises(UsageError, match=f"no block {block}"):
        with_features(open_checkpoint(TINY), (block,))


def test_a_chat_model_gives_none() -> None:
    with pytest.raises(CapabilityError, match="InternVL-Chat gives no features"):
        with_features(open_checkpoint(CHAT), (1,))


@pytest.mark.parametrize("blocks", [[3], [2, 1], [1, 1], [0]])
def test_a_manifest_cannot_ask_for_others(blocks: list[int]) -> None:
    data = InternVLConfig.load(TINY / "config.json").to_published()
    data["vision_config"]["feature_blocks"] = blocks
    with pytest.raises(CheckpointError, match="feature_blocks"):
        InternVLConfig.from_published(data)


def test_a_block_that_was_not_kept_says_how_to_have_it(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec = bundle.spec("vision")
    less = replace(spec, outputs=tuple(t for t in spec.outputs if t.name != "features.2"))
    with pytest.raises(CapabilityError) as caught:
        outputs_of(bundle.manifest, less, [1, 2])
    assert "block 2" in caught.value.what
    assert "1, 3" in caught.value.why
    assert caught.value.fix.endswith("build --model tests/goldens/tiny --precision fp32 --features 1,2")


def test_the_streamed_model_gives_them_too(tiny_model: Path, tmp_path: Path) -> None:
    chosen = scenes_calibration(3)
    checkpoint = with_features(open_checkpoint(tiny_model), (1, 2))
    settings = ImageSettings.load(tiny_model / "preprocessor_config.json")
    tokenizer = SentencePieceTokenizer(tiny_model / "tokenizer.model")
    recording = Recording(checkpoint, ["vision"], chosen, settings, tokenizer, tmp_path, batch_size=2)
    from ivl_export.models import load_model

    model = load_model(TINY, dtype=torch.float32, device="cpu")
    for batch, (step,) in recording:
        states = model.vision_model.hidden_states(torch.from_numpy(batch.pixel_values))
        for block in (1, 2):
            want = states[block].detach().numpy()
            np.testing.assert_allclose(step.outputs[f"features.{block}"], want, atol=1e-5)


def test_the_tower_equals_the_goldens() -> None:
    golden = load_file(TINY / "vision.safetensors")
    from ivl_export.models.load import load_model

    model = load_model(with_features(open_checkpoint(TINY), (1,)), torch.float32)
    with torch.no_grad():
        last, (first,) = model.vision_model.features(golden["pixel_values"])
    near(last, golden["last_hidden_state"], HIDDEN)
    near(first, golden["hidden_states"][1], HIDDEN)
