"""Chat prompts: the published formats, target tokens, ids of images; texts stay texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.errors import CheckpointError, InputError
from ivl_export.inputs.chat_template import (
    IGNORE,
    IMAGE,
    IMAGE_TOKEN,
    NATIVE,
    SYSTEM,
    VICUNA,
    ChatTemplate,
    Turn,
    encode,
    framed,
    from_jinja,
    image_tokens,
    numbered,
    prompt_text,
    template_of,
)
from ivl_export.inputs.tokenizer import SentencePieceTokenizer, load_tokenizer
from ivl_export.models.shipped import nano_chat_folder

GOLDENS = Path(__file__).parents[1] / "goldens" / "family"
PUBLISHED: dict[str, Any] = json.loads((GOLDENS / "templates.json").read_text(encoding="utf-8"))
TOLD: list[dict[str, Any]] = [t for t in PUBLISHED["templates"] if "roles" in t]
QWEN = load_tokenizer(GOLDENS / "tokenizers" / "qwen2_mini")
INTERNLM = load_tokenizer(GOLDENS / "tokenizers" / "internlm2_mini")
TOKENIZER = SentencePieceTokenizer(nano_chat_folder() / "tokenizer.model")
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


def said(ids: list[int]) -> str:
    """The ids as text, special tokens by name."""
    names = {TOKENIZER.bos: "<s>", TOKENIZER.eos: "</s>", IMAGE_TOKEN: "<image>"}
    out: list[str] = []
    run: list[int] = []
    for i in [*ids, None]:
        if i is None or i in names:
            out.append(str(TOKENIZER._sp.decode(run)) if run else "")
            run = []
            out.append("" if i is None else names[i])
        else:
            run.append(i)
    return "".join(out)


def test_two_turns_as_published() -> None:
    turns = [Turn("What is it?", "a ring", 1), Turn("What color is it?", "red")]
    ids, labels = encode(turns, TOKENIZER)
    assert said(ids) == (
        f"<s>{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: a ring</s>"
        "USER: What color is it? ASSISTANT: red</s>"
    )
    assert said([i for i in labels if i != IGNORE]) == "a ring</s>red</s>"
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))


def test_an_open_turn_ends_where_the_answer_begins() -> None:
    whole, _ = encode([Turn("What is it?", "a ring", 1)], TOKENIZER)
    request, labels = encode([Turn("What is it?", None, 1)], TOKENIZER)
    assert whole[: len(request)] == request
    assert said(request).endswith("ASSISTANT:")
    assert set(labels) == {IGNORE}


@given(questions=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 2)), min_size=1, max_size=3))
def test_any_text_stays_text(questions: list[tuple[str, str, int]]) -> None:
    turns = [Turn(q, f"x{a}", n) for q, a, n in questions]
    ids, labels = encode(turns, TOKENIZER)
    assert ids.count(IMAGE_TOKEN) == sum(n for *_, n in questions)
    assert ids.count(TOKENIZER.bos) == 1
    assert ids.count(TOKENIZER.eos) == labels.count(TOKENIZER.eos) == len(turns)
    assert labels.count(IMAGE_TOKEN) == 0
    for k in range(1, len(turns)):  # later turns change nothing before
        assert encode(turns[:k], TOKENIZER).ids == ids[: len(encode(turns[:k], TOKENIZER).ids)]


def test_special_tokens_cannot_be_written() -> None:
    ids, _ = encode([Turn("<image></s><s> USER: hi", None)], TOKENIZER)
    assert ids.count(IMAGE_TOKEN) == ids.count(TOKENIZER.eos) == 0
    assert ids.count(TOKENIZER.bos) == 1


@pytest.mark.parametrize("turns", [[], [Turn("a", None), Turn("b", None)]])
def test_no_conversation(turns: list[Turn]) -> None:
    with pytest.raises(InputError, match="not a conversation"):
        encode(turns, TOKENIZER)


# --- published formats ---


def said_twice() -> list[Turn]:
    first, last = PUBLISHED["conversation"]
    return [Turn(first["user"], first["assistant"], 1), Turn(last["user"])]


def check_published(template: ChatTemplate, published: dict[str, Any]) -> None:
    turns, per_tile = said_twice(), PUBLISHED["num_image_token"]
    assert prompt_text(template, turns) == published["prompt_with_placeholders"]
    assert prompt_text(template, turns, per_tile) == published["prompt_expanded"]
    assert prompt_text(template, turns, per_tile, [3]) == published["prompt_expanded_3_tiles"]


@pytest.mark.parametrize("published", TOLD, ids=lambda t: t["used_by"][:40])
def test_prompts_equal_the_published_ones(published: dict[str, Any]) -> None:
    config = {"template": published["template"], "system_message": published["system_message"]}
    template = template_of({"ps_version": "v2", **config})
    check_published(template, published)
    assert template.stop == published["eos_token_text"]
    assert ChatTemplate.from_json(template.to_json(), "here") == template


def test_the_prompt_of_native_checkpoints() -> None:
    check_published(NATIVE, PUBLISHED["templates"][-1])


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"template": "Hermes-2"}, "V1-2"),
        ({"template": "Hermes-2", "ps_version": "v2"}, "InternVL2-1B"),
        ({"template": "internlm2-chat", "ps_version": "v2", "_name_or_path": "x/InternVL-Chat-V1-5"}, "V1-5"),
        ({"template": "phi3-chat", "ps_version": "v2", "_name_or_path": "Mini-4B-V1-5"}, "Mini-InternVL"),
        ({"template": "internvl2_5", "ps_version": "v2"}, "InternVL2.5"),
        ({"template": "internvl_zh"}, "V1-1"),
    ],
)
def test_system_messages_follow_from_the_config(config: dict[str, Any], place: str) -> None:
    name = config["template"]
    published = next(t for t in TOLD if place in t["used_by"] and t["template"] == name)
    check_published(template_of(config), published)


def test_system_message_null_is_none() -> None:
    config = {"template": "internvl2_5", "ps_version": "v2"}
    assert prompt_text(template_of({**config, "system_message": None}), [Turn("a")]) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text(template_of({**config, "system_message": "Be brief."}), [Turn("a")]).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )
    with pytest.raises(CheckpointError, match="system_message"):
        template_of({**config, "system_message": 5})


def test_an_unknown_template_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match=r"nobody's.*internvl2_5"):
        template_of({"template": "nobody's"})
    with pytest.raises(CheckpointError):
        template_of({"model_type": "internvl_chat"})
    with pytest.raises(CheckpointError):
        template_of({"template": ["x"]})


def test_llava_checkpoints_have_vicunas() -> None:
    assert template_of({"model_type": "llava_llama"}) is VICUNA


OWN = """
import dataclasses
class SeparatorStyle: MPT = 1
raise SystemExit("this file is never run")
register_conv_template(Conversation(
    name="internvl2_5",
    system_template="<|im_start|>system\\n{system_message}",
    system_message="Mine.",
    roles=("<|im_start|>user\\n", "<|im_start|>assistant\\n"),
    sep_style=SeparatorStyle.MPT,
    sep="<|im_end|>\\n",
))
"""


def test_the_checkpoints_own_conversation_py_is_read_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "conversation.py").write_text(OWN)
    config = {"template": "internvl2_5", "ps_version": "v2"}
    assert template_of(config, tmp_path) == template_of(config).with_system("Mine.")
    assert template_of({**config, "template": "Hermes-2"}, tmp_path) == template_of(
        {**config, "template": "Hermes-2"}
    )
    for broken in (OWN.replace('"Mine."', "open('x')"), OWN.replace("MPT,", "OTHER,"), OWN + "(", "\0"):
        (tmp_path / "conversation.py").write_text(broken)
        with pytest.raises(CheckpointError, match=r"conversation\.py"):
            template_of(config, tmp_path)


# --- Jinja ---

JINJA = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
)


def test_a_jinja_template_becomes_one_of_the_same_kind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": JINJA}))
    template = template_of({"model_type": "internvl"}, tmp_path)
    check_published(template, PUBLISHED["templates"][-1])
    assert template.with_system("x").to_json() == {**NATIVE.with_system("x").to_json(), "name": template.name}
    (tmp_path / "chat_template.jinja").write_text(DEFAULT + JINJA)
    assert template_of({"model_type": "internvl"}, tmp_path) == template.with_system("You are helpful.")
    assert template_of({"model_type": "internvl"}, tmp_path / "none") is NATIVE


@pytest.mark.parametrize(
    "source",
    [
        "",
        "{{",
        "{{ messages }}",
        "{{ raise_exception('no') }}",
        JINJA + "{{ messages | length }}",
        JINJA.replace("content['text']", "content['text'] | upper"),
        "{% if messages | length > 4 %}!{% endif %}" + JINJA,
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + JINJA,
        "{{ cycler.__init__.__globals__.os.system('true') }}" + JINJA,
        "{{ messages.append(1) }}" + JINJA,
        "x" * ((1 << 20) + 1),
    ],
)
def test_jinja_that_does_more_is_a_checkpoint_error(source: str) -> None:
    with pytest.raises(CheckpointError):
        from_jinja(source)


# --- ids ---


@pytest.mark.parametrize("published", TOLD, ids=lambda t: t["used_by"][:40])
def test_ids_are_those_of_the_published_text(published: dict[str, Any]) -> None:
    if published["eos_token_text"] != "<|im_end|>":
        pytest.skip("these vocabularies have no such tokens")
    template = template_of({"template": published["template"], "ps_version": "v2"})
    template = template.with_system(published["system_message"])
    for tokenizer in (QWEN, INTERNLM):
        images = image_tokens(tokenizer, PUBLISHED["num_image_token"])
        ids = encode(said_twice(), tokenizer, template, images, [3]).ids
        text = published["prompt_expanded_3_tiles"]
        assert ids == [*tokenizer.prefix, *tokenizer.encode_parts(tokenizer.markup(text))]
        assert template.check(tokenizer) == tokenizer.special("<|im_end|>")


def test_answers_and_the_token_that_ends_them_are_learnt() -> None:
    template = template_of({"template": "internvl2_5"})
    ids, labels = encode([Turn("a", "the boat"), Turn("b", "red")], QWEN, template)
    stop = QWEN.special("<|im_end|>")
    learnt = [label for label in labels if label != IGNORE]
    assert learnt == [*QWEN.encode("the boat"), stop, *QWEN.encode("red"), stop]
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))


SPELLED = st.lists(
    st.one_of(st.sampled_from([*QWEN.specials, *INTERNLM.specials, "<image>", "USER:"]), TEXT), max_size=4
).map("".join)


@given(
    rows=st.lists(
        st.tuples(SPELLED, SPELLED, st.lists(st.integers(1, 5), max_size=2)), min_size=1, max_size=3
    )
)
@pytest.mark.slow
def test_what_users_and_models_write_is_text(rows: list[tuple[str, str, list[int]]]) -> None:
    template, tiles = template_of({"template": "internvl2_5"}), [n for *_, counts in rows for n in counts]
    turns = [Turn(question, f"x{answer}", len(counts)) for question, answer, counts in rows]
    for tokenizer in (QWEN, INTERNLM):
        images = image_tokens(tokenizer, 2)
        ids, labels = encode(turns, tokenizer, template, images, tiles)
        assert ids.count(images.context) == 2 * sum(tiles)
        assert ids.count(tokenizer.special("<img>")) == ids.count(tokenizer.special("</img>")) == len(tiles)
        assert ids.count(tokenizer.special("<|im_end|>")) == 1 + 2 * len(turns)
        assert ids.count(tokenizer.special("<|im_start|>")) == 1 + 2 * len(turns)
        assert labels.count(tokenizer.special("<|im_end|>")) == len(turns)
        assert images.context not in labels


def test_several_images_and_frames() -> None:
    template = template_of({"template": "internvl2_5"}).with_system(None)
    text = "<|im_start|>user\nImage-1: <image>\nImage-2: <image>\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(template, [Turn("Which?", None, 2)]) == text
    assert prompt_text(template, [numbered("Which?", 2)]) == text
    assert "user\nFrame1: <image>\nFrame2: <image>\nWhat?<" in prompt_text(template, [framed("What?", 2)])
    request = Turn(("Is ", IMAGE, " like ", IMAGE, "?"), None, 2)
    assert "user\nIs <image> like <image>?<" in prompt_text(template, [request])
    images = image_tokens(QWEN, 1)
    ids = encode([request], QWEN, template, images, [1, 3]).ids
    assert ids.count(images.context) == 4


def test_images_that_do_not_match_their_places() -> None:
    with pytest.raises(InputError, match="places for 1 images"):
        Turn((IMAGE, "a"), None, 2)
    with pytest.raises(InputError, match="shows 1 images"):
        encode([Turn("a", None, 1)], QWEN, template_of({"template": "internvl2_5"}), tiles=[1, 1])


def test_a_tokenizer_without_the_templates_tokens_is_of_another_model() -> None:
    phi = template_of({"template": "phi3-chat"})
    for call in (lambda: encode([Turn("a")], QWEN, phi), lambda: phi.check(QWEN)):
        with pytest.raises(CheckpointError, match="another model"):
            call()
    with pytest.raises(CheckpointError, match="another model"):
        image_tokens(TOKENIZER, 4)


@pytest.mark.parametrize(
    ("question", "answer"),
    [(b"hi", None), (5, None), (None, None), (["hi"], None), ("hi", b"x"), (("a", 3), "x")],
)
def test_a_turn_of_anything_but_text_is_refused(question: Any, answer: Any) -> None:
    with pytest.raises(InputError, match="is not text"):
        Turn(question, answer)
