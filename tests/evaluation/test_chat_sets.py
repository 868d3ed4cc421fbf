"""``eval --task vqa | choices | captions``: files of these, and how answers are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivl_export.errors import InputError, UsageError
from ivl_export.evaluation import chat, chat_sets
from ivl_export.evaluation.chat_sets import choice_of, read_items, vqa_accuracy, vqa_normalised
from ivl_export.inputs.chat_template import Turn
from ivl_export.runtime import InternVLChat


def write(folder: Path, task: str, *rows: dict[str, Any]) -> Path:
    for name in {name for row in rows for name in np.atleast_1d(row.get("image", []))}:
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / str(name))
    path = folder / f"{task}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_layouts_of_choices(tmp_path: Path) -> None:
    base = {"image": "1.png", "question": "What is it?"}
    rows: list[dict[str, Any]] = [
        {**base, "choices": ["a ring", "a star"], "answer": "B"},
        {**base, "options": ["a ring", "a star"], "answer": 1},
        {**base, "A": "a ring", "B": "a star", "C": None, "answer": "b.", "hint": "Look."},
        {**base, "choices": ["a ring", "a star"], "answer": "a star", "image": ["1.png", "2.png"]},
    ]
    items = read_items("choices", write(tmp_path, "choices", *rows))
    assert [item.right for item in items] == [1, 1, 1, 1]
    assert items[0].question == "What is it?\nA. a ring\nB. a star"
    assert items[2].question.startswith("Look.\nWhat")
    assert [len(item.files) for item in items] == [1, 1, 1, 2]
    assert read_items("choices", tmp_path) == items, "the file of a folder"


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("choices", {"image": "1.png", "question": "?", "choices": ["a"], "answer": "A"}),
        ("choices", {"image": "1.png", "question": "?", "choices": ["a", "b"], "answer": "C"}),
        ("choices", {"image": "1.png", "question": "?", "choices": ["a", "b"], "answer": True}),
        ("choices", {"image": "1.png", "question": "?", "answer": "A"}),
        ("vqa", {"image": "1.png", "question": "", "answer": "a"}),
        ("vqa", {"image": "1.png", "question": "?", "answers": []}),
        ("vqa", {"question": "?", "answer": "a"}),
        ("captions", {"image": "1.png", "captions": "a"}),
        ("captions", {"image": "../1.png", "caption": "a"}),
    ],
)
def test_lines_that_are_not_of_the_task_are_named(task: str, row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "own.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"line 1"):
        read_items(task, path)


def test_accuracy_of_vqa() -> None:
    """As its authors' code: averaged over the nine others of each of ten answers."""
    given_ = ["ring"] * 2 + ["star"] * 8
    assert vqa_accuracy("A ring.", given_) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("star", given_) == 1.0
    assert vqa_accuracy("square", given_) == 0.0
    assert vqa_accuracy("Two", ["2"]) == 1.0
    assert vqa_normalised("The 1,000 men, two!") == "1000 men 2"
    assert vqa_normalised("3.5") == "3.5"


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("B", 1), ("b.", 1), ("(B) a star", 1), ("The answer is B", 1), ("a star", 1), ("A star", 1),
        ("It is a star.", 1), ("A", 0), ("Apples", None), ("a ring or a star", None), ("", None), ("D", None),
    ],
)  # fmt: skip
def test_the_choice_that_is_named(said: str, choice: int | None) -> None:
    assert choice_of(said, ("a ring", "a star", "a square")) == choice


@given(st.text(max_size=40), st.lists(st.text(max_size=10), min_size=2, max_size=5))
def test_any_text_names_one_choice_or_none(said: str, choices: list[str]) -> None:
    chosen = choice_of(said, choices)
    assert chosen is None or 0 <= chosen < len(choices)
    assert 0 <= vqa_accuracy(said, choices) <= 1


@pytest.mark.slow
def test_a_bundle_is_asked(chat_bundle: Path, tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "question": "what?", "answers": ["ring"] * 10} for i in range(3)]
    two = {"image": ["0.png", "1.png"], "question": "same?", "choices": ["yes", "no"], "answer": "A"}
    with InternVLChat.load(chat_bundle, threads=1) as model:
        path = write(tmp_path, "vqa", *rows)
        result = chat.evaluate(model, path, None, max_new_tokens=3, task="vqa")
        assert (result.task, result.samples, result.measures[0].name) == ("vqa", 3, "VQA accuracy")
        assert result.settings["prompt"] == chat_sets.PROMPTS["vqa"]
        want = chat.EngineChat(model, 3)([model.read_images([tmp_path / "0.png"])], [[
            Turn("what?\nAnswer the question using a single word or phrase.", None, 1)
        ]])  # fmt: skip
        assert result.measures[0].value == 100 * vqa_accuracy(want[0], ["ring"] * 10)
        result = chat.evaluate(model, write(tmp_path, "choices", two), max_new_tokens=3, task="choices")
        assert [m.name for m in result.measures] == ["right choice", "a choice was named"]
        with pytest.raises(UsageError, match="needs a data set"):
            chat.evaluate(model, None, task="vqa")
