"""Many requests at once on a real bundle: equal results, bounds, timeouts, cancellation, metrics."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_export.errors import BusyError, InputError, UsageError
from ivl_export.runtime import InternVL, Ranking, Service, ServiceLimits, matching
from ivl_export.runtime.serving.admission import Admission, Clock
from ivl_export.runtime.serving.batching import BatchResult
from ivl_export.sampling import Sampling

pytestmark = pytest.mark.numeric

TEXTS = ["a small red circle", "two large blue stars", "a ring", "a green square left of a ring"]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(tiny_bundle, threads=1) as loaded:
        yield loaded


def pictures(count: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (60, 50 + i, 3), dtype=np.uint8) for i in range(count)]


def test_requests_at_once_equal_calls_one_after_another(model: InternVL) -> None:
    images = pictures(9)

    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(model.aencode_image(image, mode) for image in images for mode in ("InternVL-C", "InternVL-G")),
            *(model.aencode_text(text) for text in TEXTS),
            *(model.acaption(image, prompt) for image in images[:3] for prompt in ("English caption:", "a")),
        )

    results = asyncio.run(ask())
    alone = [
        model.encode_image([image], mode)[0] for image in images for mode in ("InternVL-C", "InternVL-G")
    ]
    alone += list(model.encode_text(TEXTS))
    for got, want in zip(results, alone, strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    captions = [
        model.caption([image], prompt)[0] for image in images[:3] for prompt in ("English caption:", "a")
    ]
    assert results[len(alone) :] == captions
    assert asyncio.run(ask())[len(alone) :] == captions, "another event loop"


def test_invariant_embeddings_have_the_same_bits_in_every_company(model: InternVL) -> None:
    """Random companies of one to eight; without the setting a row alone has others."""
    images, limits = pictures(8), ServiceLimits(max_batch=8, max_delay=0.05, invariant=True)
    service, rng = Service(model, limits), np.random.default_rng(0)
    texts = [*TEXTS, "a ring " * 9, "two", "below", "a"]

    async def one(kind: int, place: int) -> Any:
        if kind == 2:
            return (await service.encode_text(texts[place])).value
        return (await service.encode_image(images[place], ("InternVL-C", "InternVL-G")[kind])).value

    async def ask() -> None:
        alone = {(kind, place): await one(kind, place) for kind in range(3) for place in range(8)}
        for _ in range(12):
            kinds, places = rng.integers(0, 3, 8).tolist(), rng.integers(0, 8, 8).tolist()
            company = list(zip(kinds, places, strict=True))[: int(rng.integers(1, 9))]
            rows = await asyncio.gather(*(one(*key) for key in company))
            for key, row in zip(company, rows, strict=True):
                np.testing.assert_array_equal(row, alone[key])

    asyncio.run(ask())
    service.close()


def test_zero_shot_answers_come_with_their_timings(model: InternVL) -> None:
    classes = model.class_embeddings(["circle", "star"])
    image = pictures(1)[0]

    async def ask() -> Any:
        return await model.requests.classify(image, classes)

    answer = asyncio.run(ask())
    np.testing.assert_allclose(answer.value, model.classify([image], classes)[0], rtol=1e-5)
    assert set(answer.timings) == {"admit", "read", "queue", "run", "total"}
    parts = sum(answer.timings[stage] for stage in ("admit", "read", "queue", "run"))
    assert 0 < parts <= answer.timings["total"]
    assert answer.batch == 1


def test_a_bad_image_fails_alone(model: InternVL) -> None:
    async def ask() -> list[Any]:
        images: list[Any] = [*pictures(3), b"no image"]
        return await asyncio.gather(*(model.aencode_image(i) for i in images), return_exceptions=True)

    results = asyncio.run(ask())
    assert all(isinstance(value, np.ndarray) for value in results[:3])
    assert isinstance(results[3], InputError)


class Slow:
    """The model, whose text encoder waits until it is let go."""

    def __init__(self, model: InternVL) -> None:
        self.model, self.go, self.texts = model, threading.Event(), list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_text(self, texts: list[str]) -> Any:
        assert self.go.wait(30)
        self.texts += texts
        return self.model.encode_text(texts)


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_matches_and_rerankings_share_batches_and_equal_the_calls(model: InternVL, max_batch: int) -> None:
    images = pictures(6)
    result = model.retrieve(TEXTS, images, top=3)
    rows = [Ranking(result.indices[i : i + 1], result.scores[i : i + 1]) for i in range(len(TEXTS))]
    nothing = Ranking(np.array([[-1, 2]]), np.array([[-np.inf, 0.3]], np.float32))
    service = Service(model, ServiceLimits(max_batch=max_batch, max_delay=0.5))

    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(service.match(image, text) for image, text in zip(images, TEXTS, strict=False)),
            *(service.rerank(text, images, row) for text, row in zip(TEXTS, rows, strict=True)),
            service.rerank(TEXTS[0], images, nothing),
        )

    answers = asyncio.run(ask())
    for answer, want in zip(answers, model.match(images[:4], TEXTS), strict=False):
        assert answer.value == pytest.approx(float(want), abs=1e-5)
    together = model.rerank(TEXTS, images, result)
    for i, answer in enumerate(answers[4:8]):
        assert answer.value.indices.tolist() == together.indices[i : i + 1].tolist()
        np.testing.assert_allclose(answer.value.scores, together.scores[i : i + 1], atol=1e-4)
    assert answers[8].value.indices.tolist() == [[2, -1]]
    assert max(answer.batch for answer in answers) == max_batch
    for answer in answers:
        assert set(answer.timings) == {"admit", "read", "queue", "run", "total"}
    service.close()

    async def of_the_model() -> tuple[float, Ranking]:
        return await model.amatch(images[0], TEXTS[0]), await model.arerank(TEXTS[0], images, rows[0])

    chance, ranking = asyncio.run(of_the_model())
    assert chance == pytest.approx(answers[0].value, abs=1e-5)
    assert ranking.indices.tolist() == answers[4].value.indices.tolist()


def test_a_match_that_cannot_be_made_fails_alone(model: InternVL) -> None:
    images = pictures(2)
    wrong = Ranking(np.array([[0, 2]]), np.zeros((1, 2), np.float32))

    async def ask() -> tuple[Any, ...]:
        return await asyncio.gather(
            model.amatch(images[0], TEXTS[0]),
            model.amatch(b"no image", TEXTS[0]),
            model.arerank(TEXTS[0], images, wrong),
            return_exceptions=True,
        )

    whole, unread, stranger = asyncio.run(ask())
    assert whole == pytest.approx(float(model.match(images[:1], TEXTS[:1])[0]), abs=1e-5)
    assert isinstance(unread, InputError)
    assert isinstance(stranger, UsageError)


def test_a_match_that_is_cancelled_or_out_of_time_frees_its_place(
    model: InternVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, go = Service(model, ServiceLimits(max_running=2, max_delay=0)), threading.Event()
    real, texts, begun = matching.log_odds, list[str](), threading.Event()

    def slow(own: Any, pixels: Any, batch: Sequence[str], *rest: Any) -> Any:
        begun.set()
        assert go.wait(30)
        texts.extend(batch)
        return real(own, pixels, batch, *rest)

    monkeypatch.setattr(matching, "log_odds", slow)
    image = pictures(1)[0]

    async def ask() -> None:
        first = asyncio.create_task(service.match(image, TEXTS[0]))
        await until(begun.is_set)
        with pytest.raises(BusyError, match="not done in time"):
            await service.match(image, TEXTS[1], timeout=0.05)
        await until(lambda: len(service._pairs) == 0)
        second = asyncio.create_task(service.match(image, TEXTS[2]))
        await until(lambda: len(service._pairs) == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert (service.counts.running, len(service._pairs)) == (1, 0)
        go.set()
        await first

    asyncio.run(ask())
    assert texts == [TEXTS[0]]
    assert (service.counts.done, service.counts.expired, service.counts.cancelled) == (1, 1, 1)
    service.close()


async def until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


def slow_service(model: InternVL, **limits: Any) -> tuple[Slow, Service]:
    slow = Slow(model)
    return slow, Service(slow, ServiceLimits(max_delay=0, **limits))  # type: ignore[arg-type]


def test_requests_beyond_the_limits_are_refused_and_the_others_served(model: InternVL) -> None:
    slow, service = slow_service(model, max_running=2, max_queued=1)

    async def ask() -> list[Any]:
        tasks = [asyncio.create_task(service.encode_text(text)) for text in TEXTS[:3]]
        await until(lambda: service.counts.running == 2 and service.counts.waiting == 1)
        with pytest.raises(BusyError, match=r"2 are running and 1 wait"):
            await service.encode_text("one more")
        slow.go.set()
        return [(await task).value for task in tasks]

    np.testing.assert_allclose(asyncio.run(ask()), model.encode_text(TEXTS[:3]), rtol=1e-4, atol=1e-5)
    assert (service.counts.done, service.counts.refused, service.counts.running) == (3, 1, 0)
    service.close()


def test_a_request_out_of_time_or_cancelled_frees_its_place(model: InternVL) -> None:
    slow, service = slow_service(model, max_running=2)

    async def ask() -> None:
        first = asyncio.create_task(service.encode_text(TEXTS[0]))
        await until(lambda: service.counts.running == 1 and not len(service._texts))
        with pytest.raises(BusyError, match=r"It had 0\.05 s"):
            await service.encode_text(TEXTS[1], timeout=0.05)
        assert service.counts.running == 1
        second = asyncio.create_task(service.encode_text(TEXTS[2]))
        await until(lambda: len(service._texts) == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert len(service._texts) == 0
        assert service.counts.running == 1
        third = asyncio.create_task(service.encode_text(TEXTS[3]))
        slow.go.set()
        await asyncio.gather(first, third)

    asyncio.run(ask())
    assert slow.texts == [TEXTS[0], TEXTS[3]]
    counts = service.counts
    assert (counts.done, counts.expired, counts.cancelled, counts.running, counts.waiting) == (2, 1, 1, 0, 0)
    service.close()


def test_prometheus_reads_stages_and_requests(model: InternVL) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    from ivl_export.runtime.metrics import exposition

    service = Service(model)
    asyncio.run(asyncio.wait_for(service.encode_text("a ring"), 60))
    page = exposition(service).decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert samples["ivl_export_requests_total", "done"] == 1
    assert samples["ivl_export_requests_now", "running"] == 0
    assert samples["ivl_export_stage_seconds_count", "qllama_text"] >= 1
    assert samples["ivl_export_stage_seconds_sum", "qllama_text"] > 0
    service.close()


@pytest.mark.slow
def test_each_stage_is_a_span(model: InternVL) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    stored = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(stored))
    trace.set_tracer_provider(provider)
    time.sleep(1.1)  # whether there is one is looked for once a second
    with trace.get_tracer("test").start_as_current_span("request"):
        model.encode_text(["a ring"])
    spans = {span.name: span for span in stored.get_finished_spans()}
    assert {"ivl_export.tokenize", "ivl_export.qllama_text", "request"} <= set(spans)
    parent = spans["ivl_export.qllama_text"].parent
    assert parent is not None
    assert parent.span_id == spans["request"].context.span_id


def test_captions_of_all_kinds_at_once_equal_calls_one_after_another(model: InternVL) -> None:
    images = pictures(6)
    questions: list[dict[str, Any]] = [
        {"prompt": "a", "max_new_tokens": 12, "min_new_tokens": 12},
        {"prompt": "two large", "max_new_tokens": 3},
        {"prompt": "a ring", "sampling": Sampling(3.0, top_k=30, seed=1)},
        {"prompt": "a", "num_beams": 3, "max_new_tokens": 6},
        {"prompt": "a ring", "sampling": Sampling(3.0, seed=2), "min_new_tokens": 5},
        {"prompt": "a red"},
    ]

    async def ask() -> list[Any]:
        service = model.requests
        pairs = zip(images, questions, strict=True)
        return await asyncio.gather(*(service.caption(image, **how) for image, how in pairs))

    answers = asyncio.run(ask())
    alone = [model.caption([image], **how)[0] for image, how in zip(images, questions, strict=True)]
    assert [answer.value for answer in answers] == alone
    assert max(answer.batch for answer in answers) > 1
    for answer in answers:
        parts = sum(answer.timings[stage] for stage in ("admit", "read", "queue", "run"))
        assert 0 < parts <= answer.timings["total"]


def test_streamed_captions_come_in_pieces_and_together(model: InternVL) -> None:
    images = pictures(3)
    came: list[int] = []

    async def listen(number: int) -> str:
        text = ""
        async for piece in model.requests.stream_caption(images[number], "a", 12, 12):
            came.append(number)
            text += piece
        return text.strip()

    async def ask() -> list[str]:
        return await asyncio.gather(*(listen(number) for number in range(3)))

    assert asyncio.run(ask()) == model.caption(images, "a", max_new_tokens=12, min_new_tokens=12)
    assert came != sorted(came), "no request waits for another's end"


def test_a_cancelled_stream_frees_its_slot(model: InternVL) -> None:
    service = Service(model, ServiceLimits(max_batch=1))

    async def ask() -> str:
        first = service.stream_caption(pictures(1)[0], "a", 100, 100)
        await anext(first)
        second = asyncio.create_task(service.caption(pictures(2)[1], "a", timeout=60))
        await until(lambda: len(service._scheduler) == 2)
        await first.aclose()
        return (await second).value

    assert asyncio.run(ask()) == model.caption(pictures(2)[1:], "a")[0]
    assert len(service._scheduler) == 0
    assert (service.counts.done, service.counts.cancelled, service.counts.running) == (1, 1, 0)
    service.close()


def test_a_caption_out_of_time_frees_the_slot_and_a_full_service_refuses(
    model: InternVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.requests  # noqa: B018 - open the engines first
    model.caption(pictures(1), "a")
    real, go = model.components.run_device, threading.Event()
    go.set()

    def run(name: str, inputs: Any, *rest: Any) -> Any:
        if name == "qllama_step" and inputs["input_ids"].shape[1] == 1:  # not the prompt
            assert go.wait(30)
        return real(name, inputs, *rest)

    monkeypatch.setattr(model.components, "run_device", run)
    service = Service(model, ServiceLimits(max_running=1, max_queued=0))

    async def ask() -> None:
        stream = service.stream_caption(pictures(1)[0], "a", 100, 100, timeout=30)
        await anext(stream)
        with pytest.raises(BusyError, match="takes no more"):
            await service.caption(pictures(1)[0], "a")
        await stream.aclose()
        await until(lambda: service.counts.running == 0)
        go.clear()
        with pytest.raises(BusyError, match="not done in time"):
            async for _ in service.stream_caption(pictures(1)[0], "a", 100, 100, timeout=0.3):
                pass
        assert service.counts.running == 0
        go.set()
        await until(lambda: len(service._scheduler) == 0)

    asyncio.run(ask())
    assert (service.counts.refused, service.counts.expired) == (1, 1)
    service.close()


def test_captions_that_cannot_be_made_fail_alone(model: InternVL) -> None:
    async def ask() -> list[Any]:
        images: list[Any] = [*pictures(2), b"no image"]
        questions = [model.acaption(image, "a") for image in images]
        questions.append(model.requests.caption(pictures(1)[0], "a", max_new_tokens=10_000))  # type: ignore[arg-type]
        questions.append(model.acaption(pictures(1)[0], "a", 3, Sampling(1.0)))
        return await asyncio.gather(*questions, return_exceptions=True)

    *whole, unread, long, unsampled = asyncio.run(ask())
    assert whole == model.caption(pictures(2), "a")
    assert isinstance(unread, InputError)
    assert isinstance(long, InputError)
    assert isinstance(unsampled, UsageError)


@pytest.mark.slow
def test_memory_is_returned_when_idle(model: InternVL) -> None:
    rests: list[int] = []

    async def work() -> None:
        admission = Admission(ServiceLimits(idle_seconds=0.1), lambda: rests.append(admission.counts.done))

        async def answer(clock: Clock) -> BatchResult[int]:
            await asyncio.sleep(0.15)
            return BatchResult(1, 0, 0, 1)

        for _ in range(3):  # never idle for long enough
            await asyncio.gather(*(admission.request(answer, None) for _ in range(4)))
            await asyncio.sleep(0.01)
        assert rests == []
        await asyncio.sleep(0.3)
        assert rests == [12], "once, after the last"
        never = Admission(ServiceLimits(idle_seconds=math.inf), lambda: rests.append(-1))
        await never.request(answer, None)

    asyncio.run(work())
    assert rests == [12]


def test_a_closed_service_says_so(model: InternVL) -> None:
    service = Service(model)
    service.close()
    with pytest.raises(UsageError, match="closed"):
        asyncio.run(service.encode_text("a ring"))
    assert service.counts.running == service.counts.done == 0
