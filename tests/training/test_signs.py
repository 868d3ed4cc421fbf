"""Training of internvl-nano-tiles: its tokens, its losses, exact resume, and the files it writes."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.cli import main
from ivl_export.errors import InputError
from ivl_export.inputs.chat_template import IGNORE
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import check_vocabulary, load_tokenizer
from ivl_export.models import load_chat
from ivl_export.models.registry import load_config
from ivl_export.synthetic.glyphs import LETTERS, chinese
from ivl_export.synthetic.signs import COLORS, LONGEST, SHAPES, classes
from ivl_export.training import signs as training
from ivl_export.training.muon import Muon, orthogonal
from ivl_export.training.presets import NANO_TILES
from ivl_export.training.tiles_model import completed, image_settings, initialised, sign_tokenizer
from ivl_export.training.tokenizer import SPECIALS, byte_level_tokenizer
from ivl_export.training.trainer import Options, TrainingProgress

pytestmark = pytest.mark.numeric

SMALL = training.shortened(NANO_TILES, 2, 3)


def test_every_character_is_one_token_and_words_in_capitals_are_letters() -> None:
    tokens = sign_tokenizer()
    check_vocabulary(tokens, NANO_TILES.model.decoder.vocab_size)
    assert NANO_TILES.model.decoder.vocab_size % 16 == 0
    for letter in (*LETTERS, *chinese()):
        assert len(tokens.encode_parts([letter])) == 1
    pieces = [tokens.piece(i) for i in tokens.encode_parts(["Which image has the word KITE?"])]
    assert pieces == [b"Which", b" image", b" has", b" the", b" word", b" ", *map(str.encode, "KITE?")]


@given(st.text(max_size=30))
def test_any_text_comes_back(text: str) -> None:
    tokens = sign_tokenizer()
    ids = tokens.encode_parts([text])
    special = {tokens.special(name) for name in SPECIALS}
    assert not special & set(ids)
    assert b"".join(map(tokens.piece, ids)).decode() == unicodedata.normalize("NFC", text)


def test_the_tokenizer_is_the_same_every_time() -> None:
    assert byte_level_tokenizer(["ab", "abc"]) == byte_level_tokenizer(["ab", "abc"])
    data = json.loads(byte_level_tokenizer(["ab", "abc", "ad"]))
    assert data["model"]["merges"] == [["a", "b"], ["ab", "c"], ["a", "d"]]


def test_muon_moves_all_directions_alike() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 40) * torch.logspace(0, -2, 16)[:, None]
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert torch.allclose(orthogonal(matrices.mT), orthogonal(matrices).mT, atol=1e-5)


def test_muon_is_torchs_in_fp32() -> None:
    """To what bf16 rounds away."""
    torch.manual_seed(0)
    start, gradients = torch.randn(32, 16), torch.randn(4, 32, 16)
    ends = []
    for kind in (Muon, torch.optim.Muon):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.02, momentum=0.95, weight_decay=0.05)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        ends.append(p.detach() - start)
    assert torch.nn.functional.cosine_similarity(ends[0].flatten(), ends[1].flatten(), dim=0) > 0.999
    assert abs(ends[0].norm() / ends[1].norm() - 1) < 0.02


def test_pages_are_labelled_by_visual_token() -> None:
    """The place of rows 16t and half-columns 2u, 2u + 1 is visual token 4t + u."""
    batch = training.PageBatches(SMALL)[1]
    assert batch.pixel_values.shape == (3, 3, 64, 64)
    assert batch.classes.shape == (3, NANO_TILES.model.num_visual, 2, 3)
    again = training.PageBatches(SMALL)[1]
    assert torch.equal(batch.classes, again.classes)
    assert torch.equal(batch.pixel_values, again.pixel_values)
    learner = training.Learner(initialised(SMALL))
    kinds, orders, colors = learner.named(batch.pixel_values)
    assert kinds.shape == (*batch.classes.shape[:3], len(classes()))
    assert orders.shape == (*batch.classes.shape[:3], 1 + LONGEST)
    assert colors.shape == (*batch.classes.shape[:3], len(COLORS))


def test_places_of_thumbnails_are_empty() -> None:
    batch = training.PageBatches(training.shortened(NANO_TILES, 2, 16))[0]
    shown = batch.classes.flatten(1).any(1)
    assert shown.tolist() == [True] * 14 + [False] * 2


def test_a_shape_is_named_by_the_words_of_questions() -> None:
    """By the mean of the rows of lm_head for ' circle' and ' circles'; a color by the row of ' red'."""
    learner, tokens = training.Learner(initialised(SMALL)), sign_tokenizer()
    pieces = [[tokens.piece(i).decode() for i in pair] for pair in learner.names.tolist()]
    assert pieces[-len(SHAPES) :] == [
        [" circle", " circles"], [" square", " squares"], [" triangle", " triangles"], [" cross", " crosses"],
    ]  # fmt: skip
    assert [names[0] for names in pieces[: -len(SHAPES)]] == list(classes()[1 : -len(SHAPES)])
    assert [tokens.piece(i).decode() for i in learner.colors.tolist()] == [f" {name}" for name in COLORS]


def test_every_third_batch_of_albums_has_several_small_pictures() -> None:
    data = training.AlbumBatches(SMALL)
    counts = [(data[index].input_ids == sign_tokenizer().special("<img>")).sum(1) for index in range(3)]
    assert [int(count.max()) for count in counts[:2]] == [2, 2]
    assert 2 <= int(counts[2].min()) <= int(counts[2].max()) <= 6


def test_visual_tokens_learn_the_number_of_their_picture() -> None:
    """Of rows with several pictures only; nothing is learnt from one."""
    learner = training.Learner(initialised(SMALL))
    several = training.AlbumBatches(SMALL)[2]
    answers, both = training.answers_loss(learner, several), training.albums_loss(learner, several)
    assert 0.5 < (both - answers) / training._NUMBERS < 5
    single = training.DialogueBatches(replace(SMALL, answers=replace(SMALL.answers, batch=1)))[0]
    assert training.albums_loss(learner, single) == training.answers_loss(learner, single)


def test_dialogues_become_batches_of_tiles_and_answers() -> None:
    batch = training.DialogueBatches(replace(SMALL, single=1 / 3))[0]
    config = completed(NANO_TILES.model)
    assert len(batch.pixel_values) == 2 + 2 * 1  # the first fifth: pictures of one tile
    batch = training.DialogueBatches(replace(SMALL, single=1 / 3))[1]
    image = torch.eq(batch.input_ids, config.image_token_id or 0)
    assert int(image.sum()) == len(batch.pixel_values) * config.num_visual
    assert int(image[2].sum()) == 2 * config.num_visual  # two pictures of one tile each
    learnt = batch.labels != IGNORE
    assert torch.equal(batch.labels[learnt], batch.input_ids[learnt])
    ends = batch.labels == config.decoder.eos_token_id
    assert all(1 <= int(row.sum()) <= NANO_TILES.turns for row in ends)


def test_answers_train_the_decoder_alone() -> None:
    learner = training.Learner(initialised(SMALL))
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    own = training._optimizers(learner, SMALL.answers, 0.05)
    batch = training.DialogueBatches(SMALL)[0]
    training._step(learner, own, SMALL, SMALL.answers, 1, lambda: training.answers_loss(learner, batch))
    moved = {
        name.split(".")[1] for name, value in learner.state_dict().items() if not value.equal(before[name])
    }
    assert moved == {"mlp1", "language_model"}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("last", [1, 3, 6])
@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_weights(last: int, tmp_path: Path) -> None:
    def stop(progress: TrainingProgress) -> None:
        if progress.done == last + 1:
            raise Stopped

    def ignore(progress: TrainingProgress) -> None:
        pass

    whole, _ = training.train(SMALL, Options(tmp_path / "whole", 1, 0), ignore)
    with pytest.raises(Stopped):
        training.train(SMALL, Options(tmp_path / "parts", 1, 0), stop)
    resumed, _ = training.train(SMALL, Options(tmp_path / "parts", 1, 0), ignore)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(InputError, match="another run"):
        training.train(replace(SMALL, seed=1), Options(tmp_path / "parts", 1, 0), ignore)


@pytest.mark.slow
def test_the_verb_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "m"
    args = ["train", "--preset", "nano-tiles", "--steps", "2", "--batch", "3", "-O", "threads=1", "--json"]
    assert main([*args, "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "evaluation.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = completed(NANO_TILES.model)
    assert load_config(out / "config.json") == config
    assert ImageSettings.load(out / "preprocessor_config.json") == image_settings(config)
    assert len(load_tokenizer(out)) == len(sign_tokenizer())
    assert load_tokenizer(out).eos == config.decoder.eos_token_id
    assert sum(p.stat().st_size for p in out.iterdir()) < 8_000_000
    assert {p.dtype for p in load_chat(out, dtype=None).parameters()} == {torch.bfloat16}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| two images |" in card
    assert "SIL Open Font License" in card
