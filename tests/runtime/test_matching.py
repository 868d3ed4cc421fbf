"""Image-text matching: the component equals the published losses, re-ranking equals its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from ivl_export.calibration.component_chain import run_chain
from ivl_export.calibration.dataset import Batch
from ivl_export.calibration.recording import Recording
from ivl_export.calibration.sources import scenes_calibration
from ivl_export.errors import CapabilityError, InputError, UsageError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer
from ivl_export.models.checkpoint import load_state, open_checkpoint
from ivl_export.models.registry import component_module, component_spec
from ivl_export.runtime import InternVL, Ranking
from ivl_export.tests.calibration.reference import torch_runner
from ivl_export.training.losses import IGNORE, Stage2Batch, Text, matching_texts

pytestmark = pytest.mark.numeric

TINY = Path(__file__).parents[1] / "goldens" / "tiny"
TEXTS = ["a small red circle", "two large blue stars on a noisy ground", "a ring"]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(tiny_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def match() -> torch.nn.Module:
    with torch.device("meta"):
        module = component_module("qllama_itm", open_checkpoint(TINY).model)
    load_state(module, open_checkpoint(TINY), torch.float32)
    return module


def pictures(count: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (50, 60, 3), dtype=np.uint8) for _ in range(count)]


def golden_texts(golden: dict[str, torch.Tensor], retrieval: bool) -> tuple[Text, torch.Tensor]:
    """Texts and labels of the matching rows: half wrong, half right; of retrieval right ones, then wrong."""
    right, wrong = (
        Text(golden[f"in.{kind}_input_ids"], golden[f"in.{kind}_attention_mask"])
        for kind in ("positive", "negative")
    )
    if retrieval:
        text = Text(torch.cat([right.input_ids, wrong.input_ids]), torch.cat([right.mask, wrong.mask]))
        return text, (torch.arange(len(text.mask)) < len(right.mask)).long()

    pixels, labels = golden["in.pixel_values"], golden["in.labels"]
    return matching_texts(Stage2Batch(pixels, right, wrong, right, right, labels))


@pytest.mark.parametrize("name", ["train_b4", "train_b5_ignore", "train_retrieval_b3", "train_retrieval_b4"])
def test_the_component_gives_the_published_losses(model: InternVL, name: str) -> None:
    golden = load_file(TINY / f"{name}.safetensors")
    text, labels = golden_texts(golden, "retrieval" in name)
    tokens = model.dense(golden["in.pixel_values"].numpy())
    feeds = {
        "tokens": np.concatenate([tokens] * (len(labels) // len(tokens))),
        "input_ids": text.input_ids.numpy(),
        "lengths": text.lengths().numpy(),
    }
    logits = model.components.run("qllama_itm", feeds)["itm_logits"]
    loss = F.cross_entropy(torch.from_numpy(logits), labels, ignore_index=IGNORE)
    assert float(loss) == pytest.approx(float(golden["out.loss_itm"]), abs=1e-5)


@given(length=st.integers(1, 12), padding=st.integers(0, 9), seed=st.integers(0, 99))
@pytest.mark.slow
def test_padding_changes_nothing(match: torch.nn.Module, length: int, padding: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 17, 60, generator=draw)
    ids = torch.randint(3, 200, (2, length + padding), generator=draw)
    lengths = torch.tensor([length, length])
    with torch.no_grad():
        (padded,), (plain,) = match(tokens, ids, lengths), match(tokens, ids[:, :length], lengths)
    assert padded.shape == (2, 2)
    torch.testing.assert_close(padded, plain, atol=2e-5, rtol=0)


def test_a_probability_is_the_softmax_of_the_two_logits(model: InternVL, match: torch.nn.Module) -> None:
    images = pictures(3)
    got = model.match(images, TEXTS)
    tokens = torch.from_numpy(model.dense(images))
    for row, text in enumerate(TEXTS):
        ids, lengths = model.tokenizer.encode_contrastive([text], prefix="")
        with torch.no_grad():
            (logits,) = match(tokens[row : row + 1], torch.from_numpy(ids), torch.from_numpy(lengths))
        assert got[row] == pytest.approx(float(logits.softmax(-1)[0, 1]), abs=1e-5)
    assert model.match([], []).shape == (0,)
    with pytest.raises(InputError, match="2 texts for 1 images"):
        model.match(images[:1], TEXTS[:2])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_reranking_adds_the_log_odds_to_the_scaled_cosines(tiny_bundle: Path, batch: int) -> None:
    images = pictures(5)
    with InternVL.load(tiny_bundle, threads=1, batch=batch) as model:
        ranking = model.retrieve(TEXTS, images, top=3, mode="InternVL-G")
        before = model.timings["vision"].calls
        again = model.rerank(TEXTS, images, ranking)
        shown = len(np.unique(ranking.indices))
        assert model.timings["vision"].calls - before == -(-shown // batch), "each image is encoded once"
        scale = np.exp(model.bundle.manifest.model.logit_scale)
        for row, text in enumerate(TEXTS):
            chance = model.match([images[i] for i in ranking.indices[row]], [text] * 3).astype(np.float64)
            score = np.log(chance / (1 - chance)) + scale * ranking.scores[row]
            order = np.argsort(-score)
            assert again.indices[row].tolist() == ranking.indices[row][order].tolist()
            np.testing.assert_allclose(again.scores[row], score[order], atol=1e-4)


def test_places_where_nothing_was_found_stay_last(model: InternVL) -> None:
    ranking = Ranking(np.array([[-1, 1, 0]]), np.array([[-np.inf, 0.1, 0.2]], np.float32))
    again = model.rerank(TEXTS[:1], pictures(2), ranking)
    assert again.indices[0, 2] == -1
    assert np.isneginf(again.scores[0, 2])
    assert sorted(again.indices[0, :2]) == [0, 1]


def test_what_cannot_be_matched_says_so(model: InternVL, tiny_bundle: Path) -> None:
    ranking = model.retrieve(TEXTS, pictures(4), top=2)
    for queries, images in ((TEXTS[:2], pictures(4)), (TEXTS, pictures(1))):
        with pytest.raises(UsageError, match="not of these queries"):
            model.rerank(queries, images, ranking)
    older = open_checkpoint(TINY)
    with pytest.raises(CapabilityError, match="InternVL-C"):
        component_module("qllama_itm", replace(older.config, contrastive_only=True))
    with InternVL.load(tiny_bundle, threads=1) as other:
        del other.bundle.manifest.components["qllama_itm"]
        with pytest.raises(CapabilityError, match="--itm"):
            other.match(pictures(1), TEXTS[:1])


def test_the_streamed_model_matches_the_chained_one(tiny_model: Path, tmp_path: Path) -> None:
    """Half of the calibration pairs are wrong ones, and all are measured as they run in the component."""
    checkpoint, chosen = open_checkpoint(tiny_model), scenes_calibration(5)
    settings = ImageSettings.load(tiny_model / "preprocessor_config.json")
    tokenizer = SentencePieceTokenizer(tiny_model / "tokenizer.model")
    names = ["vision", "qllama_itm"]
    recording = Recording(checkpoint, names, chosen, settings, tokenizer, tmp_path, batch_size=4)
    runners = {}
    for name in names:
        with torch.device("meta"):
            module = component_module(name, checkpoint.model)
        load_state(module, checkpoint, torch.float32)
        runners[name] = torch_runner(module, component_spec(name, checkpoint.model))
    said = [sample.text for sample in chosen.samples]
    pairs: list[str] = []
    for batch, steps in recording:
        assert isinstance(batch, Batch)
        chained = list(run_chain(runners, batch, checkpoint.model))
        assert [step.component for step in steps] == [step.component for step in chained]
        for want, got in zip(chained, steps, strict=True):
            assert set(want.inputs) == set(got.inputs)
            for name, array in want.outputs.items():
                np.testing.assert_allclose(got.outputs[name], array, atol=2e-5)
        pairs += [tokenizer.decode(row.tolist()) for row in batch.texts.match_ids]
    ids, _ = tokenizer.encode_contrastive([said[i] for i in (0, 2, 2, 0, 4)], prefix="")
    assert pairs == [tokenizer.decode(row.tolist()) for row in ids]
