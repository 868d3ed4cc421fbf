"""Signs: what is drawn is where it is said to be, and answers follow from it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl_export.inputs.tiles import Tiling, tiles_of
from ivl_export.synthetic.glyphs import DIGITS, LETTERS, chinese, glyphs
from ivl_export.synthetic.sign_questions import (
    ALBUM,
    GRIDS,
    MOST,
    PAIR_GRIDS,
    TASKS,
    SignDialogue,
    albums,
    dialogues,
    lines,
)
from ivl_export.synthetic.sign_tasks import evaluate
from ivl_export.synthetic.signs import COLORS, SHAPE, TILE, Sign, classes, draw, held_out, page, places, words

SEEDS = st.integers(0, 1 << 20)
SPLITS = st.sampled_from(["train", "heldout"])


def texts(sign: Sign) -> list[str]:
    return [item.content for item in sign.items if item.kind != "shape"]


def test_glyphs_are_those_of_the_font() -> None:
    assert set(glyphs()) == {*DIGITS, *LETTERS, *chinese()}
    assert len(chinese()) == 320
    rows = ["".join(".#"[bit] for bit in row) for row in glyphs()["T"][4:8].astype(int)]
    assert rows == [".#######", "....#...", "....#...", "....#..."]
    assert len({mask.tobytes() + bytes(mask.shape) for mask in glyphs().values()}) == len(glyphs())


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from(TASKS))
def test_items_neither_overlap_nor_cross_tiles(seed: int, task: str) -> None:
    for dialogue in dialogues(seed, TASKS.index(task), 3, "train", 1):
        for sign in dialogue.signs:
            frames = np.zeros((sign.rows * TILE, sign.columns * TILE), int)
            for item in sign.items:
                height, width = item.mask().shape
                assert item.x // TILE == (item.x + width - 1) // TILE
                assert item.y // TILE == (item.y + height - 1) // TILE
                frames[item.y : item.y + height, item.x : item.x + width] += 1
            assert frames.max(initial=0) <= 1


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_a_picture_has_the_pixels_of_its_tiles(seed: int) -> None:
    """Preprocessing cuts it and changes no pixel; the thumbnail is one more."""
    assert {*GRIDS, *PAIR_GRIDS} >= {(3, 1), (1, 4)}
    for sign in dialogues(seed, 0, 1, "heldout", 1)[0].signs:
        picture = draw(sign)
        tiles = tiles_of(Image.fromarray(picture), TILE, Tiling(6))
        assert len(tiles) == sign.columns * sign.rows + 1
        first = tiles[sign.columns * sign.rows - 1]
        assert np.array_equal(np.asarray(first), picture[-TILE:, -TILE:])
        assert np.array_equal(picture, draw(sign))


@given(SEEDS, SPLITS)
@settings(deadline=None, max_examples=20)
def test_training_draws_no_text_of_the_task(seed: int, split: str) -> None:
    for dialogue in dialogues(seed, 1, 6, split, 6):  # type: ignore[arg-type]
        for sign in dialogue.signs:
            assert all(held_out(text) == (split == "heldout") for text in texts(sign))
    rng = np.random.default_rng(seed)
    assert not any(held_out(text) for text in texts(page(rng)))


def test_an_eighth_of_the_words_is_held_out() -> None:
    share = np.mean([held_out(word) for word in words()])
    assert 0.08 < share < 0.17
    assert len(words()) == len(set(words())) > 400


@settings(deadline=None, max_examples=30)
@given(SEEDS, SPLITS, st.booleans())
def test_answers_follow_from_the_pictures(seed: int, split: str, by_text: bool) -> None:
    rows = dialogues(seed, 2, 6, split, 6, by_text=by_text)  # type: ignore[arg-type]
    for row, dialogue in enumerate(rows):
        assert dialogue.questions[0].task == TASKS[row % 3]
        assert len({question.question for question in dialogue.questions}) == len(dialogue.questions) <= 6
        for question in dialogue.questions:
            assert question.answer == _answer(dialogue, question.question), question


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_answers_follow_from_albums(seed: int) -> None:
    rows = albums(seed, 3, 4, 12)
    assert rows == albums(seed, 3, 4, 12)
    for dialogue in rows:
        assert 2 <= len(dialogue.signs) <= ALBUM
        assert 1 <= len(dialogue.questions) <= 12
        assert {sign.columns * sign.rows for sign in dialogue.signs} <= (
            {1, 2} if len(dialogue.signs) < 4 else {1}
        )
        for question in dialogue.questions:
            assert question.answer == _answer(dialogue, question.question), question


def _answer(dialogue: SignDialogue, question: str) -> str:
    """The answer, read from the pictures' items another way."""
    kinds = {"number": "number", "数字": "number", "word": "word", "英文": "word"}
    kinds |= {"characters": "chinese", "汉字": "chinese"}
    if question.startswith("How many"):
        shapes = [item for item in dialogue.signs[0].items if item.kind == "shape"]
        name = question.split(" ")[2]
        return str(sum(name in ("shapes", s.color, s.content + "s", s.content + "es") for s in shapes))
    if question.startswith("Which"):
        last = question.rstrip("?").split(" ")
        counts = []
        for sign in dialogue.signs:
            if last[-2] == "more":
                counts.append(sum(last[-1].startswith(item.content) for item in sign.items))
            elif last[-1] in kinds:
                counts.append(len(sign.texts(kinds[last[-1]])))
            elif " a " in question:
                counts.append(sum((i.color, i.content) == (last[-2], last[-1]) for i in sign.items))
            else:
                counts.append(texts(sign).count(last[-1]))
        assert counts.count(max(counts)) == 1
        return str(1 + counts.index(max(counts)))
    kind = next(kind for name, kind in kinds.items() if name in question)
    image = re.search(r"image (\d)", question)
    [text] = dialogue.signs[int(image[1]) - 1 if image else 0].texts(kind)
    return text


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_places_name_what_a_page_shows(seed: int) -> None:
    sign = page(np.random.default_rng(seed))
    [table] = places(sign)
    named = sorted(classes()[i] for i in table[..., 0].flatten() if i)
    shapes = [item.content for item in sign.items if item.kind == "shape"]
    assert named == sorted([*"".join(texts(sign)), *shapes])
    for item in sign.items:
        if item.kind == "shape":
            middle = (item.y + SHAPE // 2) // 16, (item.x + SHAPE // 2) // 8
            kind, number, color = table[middle]
            assert (classes()[kind], number) == (item.content, 0)
            assert tuple(COLORS)[color - 1] == item.color
            continue
        width = item.mask().shape[1] // len(item.content)
        across = [(item.x + i * width + width // 2) // 8 for i in range(len(item.content))]
        row = table[(item.y + 8) // 16, across]
        assert "".join(classes()[i] for i in row[:, 0]) == item.content
        assert row[:, 1].tolist() == list(range(1, len(item.content) + 1))
        assert not row[:, 2].any()


def test_counts_go_up_to_six_and_answers_vary() -> None:
    questions = [row.questions[0] for row in dialogues(0, 0, 900, "heldout", 1)]
    counts = [q.answer for q in questions if q.task == "count"]
    assert {*counts} == {str(n) for n in range(MOST + 1)}
    assert max(counts.count(str(n)) for n in range(MOST + 1)) < 0.4 * len(counts)
    which = [q.answer for q in questions if q.question.startswith("Which")]
    assert 0.4 < which.count("1") / len(which) < 0.6


def test_the_task_scores_answers() -> None:
    questions = dialogues(0, 0, 30, "heldout", 1)
    answers = iter(row.questions[0].answer for row in questions)
    scores = evaluate(lambda pictures, turns: [next(answers) for _ in turns], 30, batch=7)["signs"]
    assert scores["all"]["accuracy"] == 1
    assert {task: scores[task]["total"] for task in TASKS} == dict.fromkeys(TASKS, 10)
    wrong = evaluate(lambda pictures, turns: ["?"] * len(turns), 30)["signs"]
    assert wrong["all"]["correct"] == 0


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_batches_are_pure_functions_of_their_number(split: str) -> None:
    assert dialogues(3, 5, 6, split, 6) == dialogues(3, 5, 6, split, 6)  # type: ignore[arg-type]
    assert dialogues(3, 5, 6, split, 6) != dialogues(3, 6, 6, split, 6)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 6))
def test_lines_are_read_row_by_row(seed: int, most: int) -> None:
    for dialogue in lines(seed, 0, 4, most):
        [sign], [asked] = dialogue.signs, dialogue.questions
        assert (sign.columns, sign.rows) == (1, 1)
        assert 1 <= len(sign.items) <= most
        assert sorted(asked.answer.split(" ")) == sorted(texts(sign))
        places = {item.content: ((item.y + 8) // 16, item.x) for item in sign.items}
        assert [places[text] for text in asked.answer.split(" ")] == sorted(places.values())
