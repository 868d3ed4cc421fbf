"""Sequences that come and go in one batch give the tokens that each gives alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_export.bundle.spec import ComponentSpec
from ivl_export.errors import InputError, UsageError
from ivl_export.runtime import InternVL, captions
from ivl_export.runtime.kv_cache import BatchedKVCache
from ivl_export.runtime.serving.scheduler import Scheduler, Started
from ivl_export.sampling import Sampling, StopCriteria

EOS = 2
PROMPTS = ["a", "two large blue stars", "a ring left of"]


@dataclass(frozen=True)
class Request:
    """A request; it starts after so many tokens of all, is cancelled after so many of its own (0: never)."""

    picture: int
    prompt: int
    stop: StopCriteria
    sampling: Sampling | None
    after: int
    cancel: int


def requests() -> st.SearchStrategy[list[Request]]:
    def bounded(new: int, least: int) -> StopCriteria:
        return StopCriteria(EOS, 0, new, min(new, least))

    stop = st.builds(bounded, st.integers(1, 12), st.integers(0, 6))
    sampling = st.none() | st.builds(Sampling, st.just(2.0), st.just(40), st.just(0.9), st.integers(0, 5))
    pictures, prompts = st.integers(0, 2), st.integers(0, len(PROMPTS) - 1)
    one = st.builds(Request, pictures, prompts, stop, sampling, st.integers(0, 40), st.integers(0, 12))
    return st.lists(one, min_size=1, max_size=10)


class Alone:
    """A model, and each request's prompt and answer when it runs alone."""

    def __init__(self, model: InternVL) -> None:
        self.model = model
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (60, 60, 3), dtype=np.uint8) for _ in range(3)]
        self.pixels = model.pixel_values(images, "square")
        self.started: dict[tuple[int, int], Started] = {}
        self.answers: dict[Any, list[int]] = {}

    def start(self, request: Request) -> Started:
        key = request.picture, request.prompt
        if key not in self.started:
            questions = [(self.pixels[request.picture], PROMPTS[request.prompt])]
            self.started[key] = captions.start(self.model, questions)[0]
        return self.started[key]

    def answer(self, request: Request) -> list[int]:
        key = request.picture, request.prompt, request.stop, request.sampling
        if key not in self.answers:
            ids = np.array([self.model.tokenizer.encode_prompt(PROMPTS[request.prompt])])
            pixels = self.pixels[request.picture : request.picture + 1]
            out = captions.generate(self.model, pixels, ids, None, request.stop, sampling=request.sampling)
            self.answers[key] = out[0].tolist()
        return self.answers[key]


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Iterator[Alone]:
    with InternVL.load(tiny_bundle, threads=1) as model:
        yield Alone(model)


def step(model: InternVL) -> tuple[Callable[[dict[str, Any]], Mapping[str, Any]], ComponentSpec]:
    """The step engine and its contract, as a scheduler takes them."""
    return partial(model.components.run_device, "qllama_step"), model.components.spec("qllama_step")


class Crowd:
    """Submits requests as their time comes, from the scheduler's own thread, and cancels them."""

    def __init__(self, scheduler: Scheduler, alone: Alone, crowd_of: list[Request]) -> None:
        self.scheduler, self.alone, self.heard = scheduler, alone, 0
        self.left = sorted(enumerate(crowd_of), key=lambda entry: entry[1].after)
        self.futures: dict[int, Future[Any]] = {}
        self.tokens: dict[int, list[int]] = {i: [] for i in range(len(crowd_of))}
        self.lock = threading.RLock()
        self.submit()

    def submit(self) -> None:
        with self.lock:
            while self.left and (self.left[0][1].after <= self.heard or not len(self.scheduler)):
                number, request = self.left.pop(0)
                started = self.alone.start(request)
                on_token = self.listen(number, request)
                self.futures[number] = self.scheduler.submit(
                    started, request.stop, request.sampling, on_token
                )

    def listen(self, number: int, request: Request) -> Any:
        def on_token(token: int) -> None:
            with self.lock:
                self.heard += 1
                self.tokens[number].append(token)
                if len(self.tokens[number]) == request.cancel:
                    assert self.futures[number].cancel()
                self.submit()

        return on_token


@settings(max_examples=40)
@given(crowd_of=requests(), slots=st.integers(1, 4))
@pytest.mark.slow
def test_a_crowd_answers_as_each_alone(alone: Alone, crowd_of: list[Request], slots: int) -> None:
    scheduler = captions.scheduler(alone.model, slots)
    crowd = Crowd(scheduler, alone, crowd_of)
    for number, request in enumerate(crowd_of):
        while number not in crowd.futures:
            crowd.submit()
        want = alone.answer(request)
        if 0 < request.cancel <= len(want):
            with pytest.raises(CancelledError):
                crowd.futures[number].result(30)
            want = want[: request.cancel]
        else:
            result = crowd.futures[number].result(30)
            assert result.value == want
            assert 1 <= result.batch <= slots
        assert crowd.tokens[number] == want
    scheduler.close()
    assert len(scheduler) == 0
    assert not scheduler._cache.lengths.any(), "every slot is free again"


def test_contents_of_free_slots_are_not_read(alone: Alone) -> None:
    stop = StopCriteria(EOS, 0, 10, 10)
    questions = [Request(i, 0, stop, None, 0, 0) for i in range(3)]
    scheduler = captions.scheduler(alone.model, 4)

    def spoil(token: int) -> None:
        slots = scheduler._cache
        slots._data[:, :, np.flatnonzero(slots.lengths == 0)] = 1e30
        for slot, length in enumerate(slots.lengths):
            slots._data[:, :, slot, :, length:] = 1e30

    futures = [scheduler.submit(alone.start(request), stop, None, spoil) for request in questions]
    futures[1].cancel()
    assert [futures[i].result(30).value for i in (0, 2)] == [alone.answer(questions[i]) for i in (0, 2)]
    scheduler.close()


def test_a_cancelled_sequence_frees_its_slot_before_the_next_step(alone: Alone) -> None:
    stop = StopCriteria(EOS, 0, 12, 12)
    first, second = (Request(i, 0, stop, None, 0, 0) for i in range(2))
    steps: list[str] = []

    def on_token(token: int) -> None:
        steps.append("first")
        if len(steps) == 3:
            futures[0].cancel()

    futures: list[Future[Any]] = []
    go = threading.Event()
    run, spec = step(alone.model)
    scheduler = Scheduler(lambda feeds: (go.wait(30), run(feeds))[1], spec, 1)
    futures.append(scheduler.submit(alone.start(first), stop, None, on_token))
    waiting = scheduler.submit(alone.start(second), stop, None, lambda token: steps.append("second"))
    go.set()
    assert waiting.result(30).value == alone.answer(second)
    assert steps == ["first"] * 3 + ["second"] * 12
    assert waiting.result().waited > 0
    scheduler.close()


def test_a_failed_step_fails_those_in_it_and_no_later_one(alone: Alone) -> None:
    stop = StopCriteria(EOS, 0, 5, 5)
    request = Request(0, 0, stop, None, 0, 0)
    run, spec = step(alone.model)
    errors = [RuntimeError("no memory")]

    def first_fails(feeds: Any) -> Any:
        if errors:
            raise errors.pop()
        return run(feeds)

    scheduler = Scheduler(first_fails, spec, 2)
    with pytest.raises(RuntimeError, match="no memory"):
        scheduler.submit(alone.start(request), stop).result(30)
    assert scheduler.submit(alone.start(request), stop).result(30).value == alone.answer(request)

    def deaf(token: int) -> None:
        raise RuntimeError("the listener failed")

    pair = [scheduler.submit(alone.start(request), stop, None, on_token) for on_token in (deaf, None)]
    with pytest.raises(RuntimeError, match="the listener failed"):
        pair[0].result(30)
    assert pair[1].result(30).value == alone.answer(request)
    scheduler.close()


def test_what_cannot_be_done_is_refused(alone: Alone) -> None:
    started = alone.start(Request(0, 0, StopCriteria(EOS), None, 0, 0))
    scheduler = captions.scheduler(alone.model, 2)
    with pytest.raises(InputError, match="too long for this bundle"):
        scheduler.submit(started, StopCriteria(EOS, 0, 10_000))
    with pytest.raises(UsageError, match="0 sequences"):
        captions.scheduler(alone.model, 0)
    scheduler.close()
    with pytest.raises(UsageError, match="closed"):
        scheduler.submit(started, StopCriteria(EOS))


def test_closing_finishes_what_runs_and_cancels_what_waits(alone: Alone) -> None:
    stop = StopCriteria(EOS, 0, 8, 8)
    request = Request(0, 1, stop, None, 0, 0)
    scheduler = captions.scheduler(alone.model, 1)
    begun = threading.Event()
    running = scheduler.submit(alone.start(request), stop, None, lambda token: begun.set())
    waiting = scheduler.submit(alone.start(request), stop)
    assert begun.wait(30)
    scheduler.close()
    assert running.result(0).value == alone.answer(request)
    assert waiting.cancelled()


def test_a_cache_grows_with_its_longest_sequence_and_shrinks_again(alone: Alone) -> None:
    spec = alone.model.components.spec("qllama_step")
    slots = BatchedKVCache(spec, 3)
    rng = np.random.default_rng(0)
    long, short = (rng.standard_normal((2, 4, 4, n, 16)).astype(np.float32) for n in (100, 9))
    first, second = slots.insert(long), slots.insert(short)
    assert (first, second, slots.rows) == (0, 1, 2)
    feeds = slots.feeds()
    assert feeds["past_key.0"].shape == (2, 4, 128, 16)
    assert feeds["past_value.3"].flags.c_contiguous
    np.testing.assert_array_equal(feeds["past_value.3"][1, :, :9], short[1, 3])
    assert feeds["positions"].tolist() == [[100], [9]]
    assert feeds["attention_mask"].sum(1).tolist() == [101, 10]
    slots.release(first)
    feeds = slots.feeds()
    assert feeds["past_key.0"].shape == (2, 4, 32, 16)
    assert feeds["attention_mask"].sum(1).tolist() == [1, 10]
    new = {
        f"{kind}.{i}": rng.standard_normal((2, 4, 1, 16)).astype(np.float32)
        for kind in ("key", "value")
        for i in range(4)
    }
    slots.append(new)
    assert slots.lengths.tolist() == [0, 10, 0]
    np.testing.assert_array_equal(slots.feeds()["past_key.2"][1, :, 9], new["key.2"][1, :, 0])
    assert slots.insert(short) == 0, "the lowest free one"
