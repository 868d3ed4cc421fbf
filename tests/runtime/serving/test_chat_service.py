"""Many conversations at once: their answers are those they give alone, within bounds of number and time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_export.errors import BusyError, InputError, UsageError
from ivl_export.runtime import Chat, ChatService, InternVLChat, ServiceLimits
from ivl_export.runtime.kv_cache import BLOCK, PrefixCache
from ivl_export.sampling import Sampling, StopCriteria

QUESTIONS = ("a red ring", "two small squares", "above", "and", "a blue", "small", "is it", "left of")


@pytest.fixture(scope="module")
def model(chat_bundle: Path) -> Iterator[InternVLChat]:
    with InternVLChat.load(chat_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture
def service(model: InternVLChat) -> Iterator[ChatService]:
    result = ChatService(model)
    yield result
    result.close()


def picture(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)


def settings(i: int) -> Sampling | None:
    return Sampling(3.0, top_k=30, seed=i) if i % 2 else None


def alone(model: InternVLChat, i: int, questions: Sequence[str]) -> list[str]:
    chat = model.chat([picture(i % 3)])
    return [chat.ask(question, 10, settings(i)) for question in questions]


def test_the_answers_are_those_given_alone(model: InternVLChat, service: ChatService) -> None:
    turns = [(QUESTIONS[i], QUESTIONS[-1 - i]) for i in range(len(QUESTIONS))]
    want = [alone(model, i, questions) for i, questions in enumerate(turns)]
    company: list[int] = []

    async def talk(i: int) -> list[str]:
        chat = await service.chat([picture(i % 3)])
        said = []
        for question in turns[i]:
            answer = await service.ask(chat, question, 10, settings(i))
            said.append(answer.value)
            company.append(answer.batch)
            assert {"admit", "read", "queue", "run", "total"} <= answer.timings.keys()
        assert [turn.answer for turn in chat.history] == said
        return said

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*map(talk, range(len(turns))))

    assert asyncio.run(all_of_them()) == want
    assert max(company) > 1, "they were decoded together"
    assert service.counts.done == 3 * len(turns)
    assert service.counts.running == service.counts.waiting == 0


class Prompts:
    """How many positions the decoder is fed of each prompt that is read: not of the steps of answers."""

    def __init__(self, model: InternVLChat, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed: list[int] = []
        real = model.components.run_device

        def run(name: str, inputs: Any, outputs: Any = None) -> Any:
            if name == "decoder" and inputs["input_embeds"].shape[1] > 1:
                self.fed.append(inputs["input_embeds"].shape[1])
            return real(name, inputs, outputs)

        monkeypatch.setattr(model.components, "run_device", run)

    def take(self) -> list[int]:
        fed, self.fed = self.fed, []
        return fed


def test_a_further_question_reads_only_itself(
    model: InternVLChat, service: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "prefixes", PrefixCache(0))  # nothing comes from others
    prompts = Prompts(model, monkeypatch)
    tokens = 6
    both = [model.chat([picture(i)]) for i in range(2)]

    async def ask(question: str) -> list[int]:
        """Positions of both conversations up to the answers."""
        lengths = [len(chat.cache._keys(chat.prompt(question)[1])) for chat in both]
        await asyncio.gather(*(service.ask(chat, question, tokens) for chat in both))
        return lengths

    first = asyncio.run(ask("above"))  # the text of both answers is the tokens they were decoded from
    assert sorted(prompts.take()) == sorted(first)
    second = asyncio.run(ask("and"))
    contents = [length + tokens - 1 for length in first]  # the last token of an answer was not read yet
    assert sorted(prompts.take()) == sorted(b - a for a, b in zip(contents, second, strict=True))
    for i, chat in enumerate(both):
        alone = model.chat([picture(i)])
        assert [alone.ask(question, tokens) for question in ("above", "and")] == [
            turn.answer for turn in chat.history
        ]
        chat.cache.settle()
        assert chat.cache._contents == alone.cache._contents


def test_what_was_heard_of_an_answer_is_not_read_again(
    model: InternVLChat, service: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "prefixes", PrefixCache(0))

    async def leave() -> tuple[Chat, int]:
        chat = await service.chat([picture()])
        stream = service.stream(chat, "a red ring", 60, min_new_tokens=60)
        for _ in range(3):
            await anext(stream)
        prompt = chat.cache.length
        await stream.aclose()
        while service.counts.running or len(service._scheduler):
            await asyncio.sleep(0.01)
        chat.cache.settle()
        return chat, prompt

    chat, prompt = asyncio.run(leave())
    other = model.chat([picture()])
    want = list(other.cache.tokens(other.prompt("a red ring")[1], other.stop_criteria(60, 60), Sampling()))
    heard = chat.cache._contents[prompt:]
    assert len(heard) >= 2
    assert heard == want[: len(heard)]
    same = model.chat([picture()], chat.history)
    assert chat.ask("and", 6) == same.ask("and", 6)


def test_others_have_an_answer_when_it_ends(
    model: InternVLChat, service: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "prefixes", PrefixCache())

    async def talk() -> None:
        chat = await service.chat([picture()])
        prompt = len(chat.cache._keys(chat.prompt("a red ring")[1]))
        await service.ask(chat, "a red ring", 40, min_new_tokens=40)
        while len(model.prefixes.find(chat.cache._contents)) <= prompt // BLOCK:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(talk(), 30))


def test_an_answer_that_ends_after_the_next_prompt_was_read_is_dropped(model: InternVLChat) -> None:
    chat, stop = model.chat([picture()]), StopCriteria(2, 0, 4)
    first, second = (chat.prompt(question)[1] for question in ("a red ring", "and"))
    late = chat.cache.started(first, stop)
    chat.cache.started(second, stop)
    before = list(chat.cache._contents)
    assert late.leave is not None
    late.leave([5, 6], late.data[..., :2, :])
    chat.cache.settle()
    assert chat.cache._contents == before
    assert chat.ask("and", 4) == model.chat([picture()]).ask("and", 4)


def test_streams(model: InternVLChat) -> None:
    want = model.chat([picture()]).ask("a red ring", 12)

    async def listen() -> tuple[list[str], str]:
        chat = await model.achat([picture()])
        pieces = [piece async for piece in chat.astream("a red ring", 12)]
        return pieces, await chat.aask("and", 6)

    pieces, second = asyncio.run(listen())
    assert "".join(pieces).strip() == want
    assert len(pieces) > 1
    chat = model.chat([picture()])
    assert [chat.ask("a red ring", 12), chat.ask("and", 6)] == [want, second]


def test_a_cancelled_request_frees_its_place(service: ChatService) -> None:
    async def leave() -> tuple[str, Any]:
        chat = await service.chat([picture()])
        stream = service.stream(chat, "a red ring", 40, min_new_tokens=40)
        heard = await anext(stream)
        with pytest.raises(UsageError, match="answering already"):
            await service.ask(chat, "and", 2)
        await stream.aclose()
        while service.counts.running:
            await asyncio.sleep(0.01)
        await service.ask(chat, "and", 2)
        return heard, chat.history

    heard, history = asyncio.run(leave())
    assert [turn.question for turn in history] == ["a red ring", "and"]
    assert history[0].answer == heard.strip()
    assert service.counts.cancelled == 1


def test_what_fails_leaves_the_conversation_as_it_was(
    service: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        chat = await service.chat([picture()])
        with pytest.raises(InputError, match="too long for this bundle"):
            await service.ask(chat, "a", 5000)
        with pytest.raises(UsageError, match="generation settings"):
            await service.ask(chat, "a", 0)
        gate = threading.Event()
        real = chat.cache.started

        def slow(*arguments: Any) -> Any:
            gate.wait()
            return real(*arguments)

        monkeypatch.setattr(chat.cache, "started", slow)
        with pytest.raises(BusyError, match="not done in time"):
            await service.ask(chat, "a", 4, timeout=0.05)
        question = asyncio.create_task(service.ask(chat, "a", 4))
        await asyncio.sleep(0.05)
        question.cancel()
        with pytest.raises(asyncio.CancelledError):
            await question
        assert chat.history == ()
        gate.set()
        assert (await service.ask(chat, "a", 4)).value == service.model.chat([picture()]).ask("a", 4)

    asyncio.run(ask())
    assert (service.counts.failed, service.counts.expired, service.counts.cancelled) == (1, 1, 1)


def test_no_more_than_the_limits_say(model: InternVLChat, monkeypatch: pytest.MonkeyPatch) -> None:
    service = ChatService(model, ServiceLimits(max_running=1, max_queued=1, max_batch=1))
    gate = threading.Event()

    async def crowd() -> None:
        chats = [await service.chat([picture(i)]) for i in range(3)]
        for chat in chats:
            real = chat.cache.started
            monkeypatch.setattr(
                chat.cache, "started", lambda *arguments, real=real: (gate.wait(), real(*arguments))[1]
            )
        tasks = [asyncio.create_task(service.ask(chat, "a", 4)) for chat in chats[:2]]
        await asyncio.sleep(0.02)
        assert (service.counts.running, service.counts.waiting) == (1, 1)
        with pytest.raises(BusyError, match="no more requests"):
            await service.ask(chats[2], "a", 4)
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(crowd())
    assert service.counts.refused == 1
    service.close()


def test_an_answer_on_its_way_survives_the_closing(
    model: InternVLChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = ChatService(model)
    heard = threading.Event()

    async def ask() -> str:
        chat = await service.chat([picture()])
        submit = service._scheduler.submit

        def heard_by(*arguments: Any) -> Any:
            started, stop, sampling, _ = arguments
            return submit(started, stop, sampling, lambda token: heard.set())

        monkeypatch.setattr(service._scheduler, "submit", heard_by)
        task = asyncio.create_task(service.ask(chat, "a", 40, min_new_tokens=40))
        while not heard.is_set():
            await asyncio.sleep(0.001)
        service.close()  # as an application does: from the loop, which gets the answer afterwards
        return (await task).value

    assert asyncio.run(ask()) == model.chat([picture()]).ask("a", 40, min_new_tokens=40)
    assert service.counts.failed == 0


def test_a_closed_service_says_so(model: InternVLChat) -> None:
    service = ChatService(model)
    chat = model.chat([picture()])
    service.close()
    for request in (service.chat, lambda: service.ask(chat, "a red ring")):
        with pytest.raises(UsageError, match="closed"):
            asyncio.run(request())
    assert not chat.history
