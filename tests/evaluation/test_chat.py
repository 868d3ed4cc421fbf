"""``eval --task questions``: a chat bundle's answers about a user's images, and about drawn scenes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from ivl_export.cli import main
from ivl_export.errors import InputError, UsageError
from ivl_export.evaluation import chat, datasets
from ivl_export.evaluation.tasks import evaluate
from ivl_export.inputs.chat_template import Turn
from ivl_export.runtime import InternVLChat
from ivl_export.synthetic import chat_tasks

TOKENS = 6


@pytest.fixture(scope="module")
def model(chat_bundle: Path) -> Iterator[InternVLChat]:
    with InternVLChat.load(chat_bundle, threads=1) as loaded:
        yield loaded


def picture(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)


def ask(model: InternVLChat, image: int, *questions: str) -> str:
    talk = model.chat([picture(image)])
    return [talk.ask(question, TOKENS) for question in questions][-1]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    for i in range(3):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return file


def test_answers_are_those_given_alone(model: InternVLChat) -> None:
    """More conversations than are decoded together, of one and of two turns; a loop runs already."""
    requests = [("a red ring", "small"), ("above",)] * 5
    want = [ask(model, i % 3, *questions) for i, questions in enumerate(requests)]
    turns = []
    for i, questions in enumerate(requests):
        said = [Turn(q, ask(model, i % 3, q), int(j == 0)) for j, q in enumerate(questions[:-1])]
        turns.append([*said, Turn(questions[-1], None, int(not said))])

    async def inside() -> list[str]:
        return chat.EngineChat(model, TOKENS)((picture(i % 3) for i in range(len(requests))), turns)

    assert asyncio.run(inside()) == want


def test_questions_of_a_file(
    model: InternVLChat, chat_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, shouted = ask(model, 0, "Is it small?"), ask(model, 1, "Is it red?").upper() + "."
    assert right.strip()
    file = write(
        tmp_path,
        {"image": "0.png", "question": "Is it small?", "answers": ["nothing like it", right]},
        {"image": "1.png", "question": "Is it red?", "answer": shouted},
        {"image": "2.png", "question": "Is it blue?", "answer": "nothing like it"},
    )
    line = [
        "eval",
        str(chat_bundle),
        "--task",
        "questions",
        "--threads",
        "1",
        "--max-new-tokens",
        str(TOKENS),
    ]
    assert main([*line, "--data", str(tmp_path), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    by_name = {m["name"]: m for m in out["measures"]}
    assert (by_name["exact, normalised"]["value"], by_name["exact, normalised"]["samples"]) == (
        pytest.approx(200 / 3), 3,
    )  # fmt: skip
    assert by_name["exact, word for word"]["value"] == pytest.approx(100 / 3)
    assert by_name["exact, normalised"]["low"] < 200 / 3 < by_name["exact, normalised"]["high"]
    assert (out["task"], out["mode"], out["samples"], out["available"]) == ("questions", chat.MODE, 3, 3)
    assert out["settings"] == {"data": tmp_path.name, "prompt": "{}", "max_new_tokens": TOKENS}
    assert out["recipe"] == "fp32"

    part = chat.evaluate(model, file, 2, max_new_tokens=TOKENS)
    assert (part.samples, part.available, part.whole) == (2, 3, False)
    assert (
        part.questions == chat.evaluate(model, file, 2, max_new_tokens=TOKENS).questions != out["questions"]
    )
    (tmp_path / "2.png").unlink()
    assert main([*line, "--data", str(file)]) == 3, "one of three cannot be read"
    assert "1 of 3 samples" in capsys.readouterr().err


def test_a_prompt_around_the_questions(model: InternVLChat, tmp_path: Path) -> None:
    prompt = "{} Answer with one word."
    want = ask(model, 0, "Is it {}? Answer with one word.")
    file = write(tmp_path, {"image": "0.png", "question": "Is it {}?", "answer": want})
    (same, word) = chat.evaluate(model, file, prompt=prompt, max_new_tokens=TOKENS).measures
    assert (same.value, word.value) == (100, 100)
    for wrong, data in (("Answer.", file), (prompt, None)):
        with pytest.raises(UsageError, match="is not usable"):
            chat.evaluate(model, data, prompt=wrong)


def test_drawn_scenes(chat_bundle: Path, model: InternVLChat, capsys: pytest.CaptureFixture[str]) -> None:
    """The measure of stage 3 and of builds, by another way."""
    line = ["eval", str(chat_bundle), "--task", "questions", "--limit", "4", "--threads", "1"]
    assert main(line) == 0
    printed = capsys.readouterr()
    assert "4 of 1000 samples" in printed.out
    assert "paper:" not in printed.out
    assert "done scenes" in printed.err
    assert main([*line, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)

    def one_by_one(images: Any, conversations: Any) -> list[str]:
        return [
            model.chat([image], history).ask(last.question, chat_tasks.LONGEST_ANSWER)
            for image, (*history, last) in zip(images, conversations, strict=True)
        ]

    want = chat_tasks.evaluate(one_by_one, 4)["chat"]
    by_name = {m["name"]: m for m in out["measures"]}
    assert by_name["exact, all"]["samples"] == want["all"]["total"] == 6, "two scenes get two questions"
    for kind, score in want.items():
        if score["total"]:
            assert by_name[f"exact, {kind}"]["value"] == pytest.approx(100 * score["accuracy"])


def test_bundles_of_the_other_kind(
    chat_bundle: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_bundle), "--task", "questions"]) == 5
    assert "no decoder" in capsys.readouterr().err
    assert main(["eval", str(chat_bundle), "--task", "xtd", "--data", str(chat_bundle)]) == 5
    assert "--task questions" in capsys.readouterr().err
    assert main(["eval", str(tiny_bundle), "--task", "xtd"]) == 2
    assert "needs a data set" in capsys.readouterr().err
    with pytest.raises(UsageError, match="chat bundle"):
        evaluate(None, "questions", chat_bundle)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        '{"image": "0.png", "question": "What?"}',
        '{"image": "0.png", "question": " ", "answer": "a"}',
        '{"image": "0.png", "question": "What?", "answers": []}',
        '{"image": "0.png", "question": "What?", "answers": ["a", 1]}',
        '{"image": "../0.png", "question": "What?", "answer": "a"}',
        '{"image": "/etc/passwd", "question": "What?", "answer": "a"}',
    ],
)
def test_lines_that_ask_nothing(tmp_path: Path, line: str) -> None:
    good = '{"image": "0.png", "question": "What?", "answer": "a"}\n'
    (tmp_path / "own.jsonl").write_text(good + line, encoding="utf-8")
    with pytest.raises(InputError, match="line 2"):
        datasets.questions(tmp_path / "own.jsonl")
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no questions"):
        datasets.questions(tmp_path / "own.jsonl")
    with pytest.raises(InputError, match=r"questions\.jsonl is missing"):
        datasets.questions(tmp_path)


@given(st.text())
@example("ß\u0301")
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = chat.normalised(text)
    assert chat.normalised(once) == once


def test_what_normalising_forgives() -> None:
    assert chat.normalised(" Two  Red\tRings. ") == chat.normalised("two red rings") == "two red rings"
    assert chat.normalised("Ｎｏ") == "no"
    assert chat.normalised("3.5") != chat.normalised("35")
