"""A started server's conversations, whole and streamed, with the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ivl_export.inputs.chat_template import IMAGE, Turn
from ivl_export.runtime import InternVLChat

from .conftest import KEY, Server, data_url, picture

QUESTION = "two small squares"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def model(chat_bundle: Path) -> Iterator[InternVLChat]:
    with InternVLChat.load(chat_bundle, threads=1) as one:
        yield one


def shown(*seeds: int, text: str = QUESTION) -> Any:
    images = [{"type": "image_url", "image_url": {"url": data_url(picture(seed))}} for seed in seeds]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def said(client: openai.OpenAI, *messages: Any, **more: Any) -> Any:
    return client.chat.completions.create(model="chat", messages=list(messages), max_tokens=12, **more)


def test_the_answer_is_the_model_s_own(client: openai.OpenAI, model: InternVLChat) -> None:
    answer = said(client, shown(0))
    assert answer.choices[0].message.content == model.chat([picture()]).ask(QUESTION, 12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"


def test_history_and_an_image_in_a_later_turn(client: openai.OpenAI, model: InternVLChat) -> None:
    system = {"role": "system", "content": "above"}
    earlier = [shown(0), {"role": "assistant", "content": "a red ring"}]
    later = {"role": "user", "content": [{"type": "text", "text": "left of"}, *shown(1)["content"]]}
    turns = [Turn(QUESTION, "a red ring", 1), Turn(("left of", IMAGE, QUESTION), None, 1)]
    cache = model.cache(*model.encode_images([picture(0), picture(1)]))
    template = model.chat_format.template.with_system("above")
    prompt = len(cache._keys(_with(model, template, turns)))
    answer = said(client, system, *earlier, later)
    assert answer.usage.prompt_tokens == prompt
    again = said(client, system, *earlier, later)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > answer.usage.prompt_tokens_details.cached_tokens


def _with(model: InternVLChat, template: Any, turns: list[Turn]) -> list[int]:
    from dataclasses import replace

    return replace(model.chat_format, template=template).encode(turns, model.tokenizer).ids


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = said(client, shown(0, 1))
    stream = said(client, shown(0, 1), stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({c.id for c in chunks}) == 1


def test_the_reasons_for_an_end(client: openai.OpenAI) -> None:
    long = said(client, shown(0))
    assert long.choices[0].finish_reason == "length"
    assert long.usage.completion_tokens == 12
    text = long.choices[0].message.content
    middle = text[len(text) // 2 : len(text) // 2 + 3]
    before = text[: text.index(middle)].rstrip()
    for stream in (False, True):
        short: Any = said(client, shown(0), stop=["never said", middle], stream=stream)
        if stream:
            chunks = list(short)
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == before
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            assert short.choices[0].message.content == before
            assert short.choices[0].finish_reason == "stop"
            assert short.usage.completion_tokens < 12


def test_draws_follow_the_seed(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> str:
        return str(said(client, shown(0), temperature=3.0, seed=seed).choices[0].message.content)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_many_streams_at_once(server: Server, client: openai.OpenAI) -> None:
    want = [said(client, shown(seed)).choices[0].message.content for seed in range(4)]

    async def stream(client: openai.AsyncOpenAI, seed: int) -> str:
        answer: Any = await client.chat.completions.create(
            model="chat", messages=[shown(seed)], max_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key=KEY) as one:
            return await asyncio.gather(*(stream(one, seed) for seed in range(4)))

    assert asyncio.run(all_of_them()) == want


def _damaged() -> Any:
    parts = [{"url": data_url(picture())}, {"url": data_url(picture()[:300])}]
    return {"role": "user", "content": [{"type": "image_url", "image_url": part} for part in parts]}


BAD: dict[str, tuple[list[Any], dict[str, Any], str | None]] = {
    "no message": ([], {}, "messages"),
    "no question": ([{"role": "assistant", "content": "a"}], {}, "messages[0]"),
    "an answer at the end": ([shown(), {"role": "assistant", "content": "a"}], {}, "messages"),
    "an unknown role": ([{"role": "tool", "content": "a"}], {}, "messages[0].role"),
    "a late system message": ([shown(), {"role": "system", "content": "a"}], {}, "messages[1]"),
    "a damaged image": (
        [shown(0), {"role": "assistant", "content": "a"}, _damaged()],
        {},
        "messages[2].content[1].image_url",
    ),
    "a path": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}],
        {},
        "messages[0].content[0].image_url",
    ),
    "too long": ([shown(text=QUESTION * 3000)], {}, "messages"),
    "a negative temperature": ([shown()], {"temperature": -1}, "temperature"),
    "no share": ([shown()], {"top_p": 0}, "top_p"),
    "several answers": ([shown()], {"n": 2}, "n"),
    "tools": ([shown()], {"extra_body": {"tools": [{}]}}, "tools"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(client: openai.OpenAI, case: str, stream: bool) -> None:
    messages, more, param = BAD[case]
    with pytest.raises(openai.BadRequestError) as caught:
        said(client, *messages, stream=stream, **more)
    assert caught.value.param == param, caught.value.message
    body: Any = caught.value.body
    assert "\n" not in body["message"]
    assert body["code"] == ("context_length_exceeded" if case == "too long" else body["code"])
