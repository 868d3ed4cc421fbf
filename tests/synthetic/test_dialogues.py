"""Dialogues about scenes: right answers, questions that refer back, and files in LLaVA's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivl_export.errors import InputError
from ivl_export.inputs.chat_template import Turn
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.models.shipped import nano_chat_folder
from ivl_export.synthetic.captions import caption
from ivl_export.synthetic.dialogues import KINDS, conversation, dialogue, two_turns
from ivl_export.synthetic.scenes import Obj, Scene, sample_scene
from ivl_export.training.conversations import ChatBatches, SceneDialogues, read_llava
from ivl_export.training.presets import Stage

PAIR = Scene((Obj("ring", "red", "small"), Obj("cross", "blue", "small")), "above", "noise", 1)
TOKENIZER = (nano_chat_folder() / "tokenizer.model").read_bytes()


def answers(scene: Scene) -> dict[str, set[str]]:
    """Every question that many dialogues ask, and its answers."""
    by_name: dict[str, set[str]] = {}
    for seed in range(200):
        for question in dialogue(np.random.default_rng(seed), scene, 4):
            if question.kind != "refers back":
                by_name.setdefault(question.question, set()).add(question.answer)
    return by_name


def test_answers_follow_from_the_scene() -> None:
    request = answers(PAIR)
    assert request["How many shapes are there?"] == {"two"}
    assert request["What color is the shape in the middle?"] == {"blue"}
    assert request["What is the outer shape?"] == {"ring"}
    assert request["Where is the ring?"] == {"above the cross"}
    assert request["Where is the cross?"] == {"in the middle"}
    assert request["What color is the ring?"] == {"red"}
    assert request["Is there a red ring?"] == {"yes"}
    assert request["Is the red ring above the blue cross?"] == {"yes"}
    assert request["Is the red ring below the blue cross?"] == {"no"}
    assert request["Describe the image."] == {caption(PAIR)}
    assert all(len(result) == 1 for result in request.values())
    there = [q for q in request if q.startswith("Is there a")]
    assert {q for q in there if request[q] == {"yes"}} == {"Is there a red ring?", "Is there a blue cross?"}
    assert len(there) > 10


def test_the_second_turn_needs_the_first() -> None:
    """The same words have different answers after different questions."""
    by_name: dict[str, set[str]] = {}
    for seed in range(200):
        first, second = two_turns(np.random.default_rng(seed), PAIR)
        assert first.about is not None
        assert second.kind == "refers back"
        by_name.setdefault(second.question, set()).add(second.answer)
    assert by_name["And what color is it?"] == {"red", "blue"}
    assert by_name["And the other one?"] == {"red", "blue", "ring", "cross"}


@given(seed=st.integers(0, 2**32 - 1), turns=st.integers(1, 6))
def test_dialogues(seed: int, turns: int) -> None:
    rng = np.random.default_rng(seed)
    request = dialogue(rng, sample_scene(rng, "train"), turns)
    assert 1 <= len(request) <= turns
    assert {a.kind for a in request} <= set(KINDS)
    fresh = [a.question for a in request if a.kind != "refers back"]
    assert len(set(fresh)) == len(fresh)
    assert [t.images for t in conversation(request)] == [1] + [0] * (len(request) - 1)


def test_scene_batches_follow_from_their_number() -> None:
    stage = Stage("s", "answers", 4, 3, 1e-3, 0.0, 1)
    data = ChatBatches(SceneDialogues(1, 56), stage, ImageSettings(size=56), TOKENIZER, 400)
    one, again, other = data[2], data[2], data[3]
    assert one.pixel_values.shape == (3, 3, 56, 56)
    for name in ("pixel_values", "input_ids", "labels", "mask"):
        assert getattr(one, name).equal(getattr(again, name))
    assert not one.pixel_values.equal(other.pixel_values)
    short = ChatBatches(SceneDialogues(1, 56), stage, ImageSettings(size=56), TOKENIZER, 20)[2]
    assert short.input_ids.shape[1] == 20
    assert len(short.pixel_values) == 0  # the images come after the cut


def write(folder: Path, rows: Any, name: str = "data.json") -> Path:
    for image in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), (255, 0, 0)).save(folder / image)
    path = folder / name
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    path.write_text(text)
    return path


def entry(image: Any = "a.png", first: str = "<image>\nWhat?", **more: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": first}, {"from": "gpt", "value": "red"}]
    return {"id": "1", "image": image, "conversations": said, **more}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_files(tmp_path: Path, name: str) -> None:
    two = entry(["a.png", "b.png"], "What\n<image> and <image>?")
    text = {"conversations": entry(first="hi")["conversations"] * 2}
    data = read_llava(write(tmp_path, [entry(), two, text], name))
    assert data.samples[0] == ((tmp_path.resolve() / "a.png",), (Turn("What?", "red", 1),))
    assert data.samples[1][1][0].images == 2
    assert data.samples[2] == ((), (Turn("hi", "red", 0), Turn("hi", "red", 0)))
    epoch = [row for batch in range(3) for row in data(batch, 1)]
    assert sorted(len(images) for images, _ in epoch) == [0, 1, 2]
    assert data(0, 3) == data(0, 3) == epoch
    orders = {tuple(len(images) for images, _ in data(batch, 3)) for batch in range(12)}
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "holds no conversations"),
        ([{"image": "a.png"}], "entry 0 is not a conversation"),
        ([entry(), entry("../data.json")], "entry 1: no image data.json"),
        ([entry("/etc/passwd")], "no image passwd"),
        ([entry(3)], "'image' is not a file name"),
        ([entry(first="What?")], "0 placeholders <image> and 1 images"),
        ([entry(conversations=[{"from": "gpt", "value": "a"}] * 2)], "message 1 is not from human"),
        ([entry(conversations=[{"from": "human", "value": 1}, {"from": "gpt", "value": ""}])], "has no text"),
    ],
)
def test_broken_llava_files(tmp_path: Path, rows: Any, why: str) -> None:
    with pytest.raises(InputError, match=why):
        read_llava(write(tmp_path, rows))
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(InputError, match="Cannot read"):
        read_llava(tmp_path / "no.json")
