"""Batches of single requests: company, order, failure, cancellation."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_export.errors import UsageError
from ivl_export.runtime.serving.batching import Batcher, BatchResult


class Gate:
    """Doubles its items, once it is opened; remembers the batches."""

    def __init__(self, open: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.entered, self.opened = threading.Event(), threading.Event()
        if open:
            self.opened.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.entered.set()
        assert self.opened.wait(30)
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [2 * item for item in items]


def values(futures: Sequence[Future[BatchResult[int]]]) -> list[int]:
    return [future.result(30).value for future in futures]


@settings(max_examples=25, deadline=None)
@given(items=st.lists(st.integers(0, 99), min_size=1, max_size=40), max_batch=st.integers(1, 9))
def test_every_item_gets_its_own_result(items: list[int], max_batch: int) -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch=max_batch, max_delay=0.001)
    assert values([batcher.submit(item) for item in items]) == [2 * item for item in items]
    assert [item for batch in gate.batches for item in batch] == items
    assert all(1 <= len(batch) <= max_batch for batch in gate.batches)
    batcher.close()


def test_what_comes_while_a_batch_runs_is_the_next_batch() -> None:
    gate = Gate(open=False)
    batcher = Batcher(gate, max_batch=8, max_delay=0)
    first = batcher.submit(1)
    assert gate.entered.wait(30)
    rest = [batcher.submit(item) for item in (2, 3, 4)]
    gate.opened.set()
    assert values([first, *rest]) == [2, 4, 6, 8]
    assert gate.batches == [[1], [2, 3, 4]]
    assert rest[0].result().batch == 3
    assert rest[0].result().waited > 0
    batcher.close()


def test_only_announced_requests_are_waited_for() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch=8, max_delay=600)
    assert values([batcher.submit(1)]) == [2], "alone, at once"
    with batcher.coming():
        with batcher.coming():
            second = batcher.submit(2)
        assert not second.done()
        third = batcher.submit(3)
    assert values([second, third]) == [4, 6]
    with suppress(KeyError), batcher.coming():
        fourth = batcher.submit(4)
        raise KeyError  # who gives up is not waited for
    assert values([fourth]) == [8]
    assert gate.batches == [[1], [2, 3], [4]]
    batcher.close()


def test_who_is_coming_is_waited_for_so_long_and_no_longer() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch=8, max_delay=0.02)
    with batcher.coming():
        result = batcher.submit(1).result(30)
    assert result.waited >= 0.02
    batcher.close()


def test_a_full_batch_does_not_wait() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch=2, max_delay=600)
    with batcher.coming():
        assert values([batcher.submit(1), batcher.submit(2)]) == [2, 4]
    batcher.close()


def test_only_the_item_at_fault_fails() -> None:
    gate = Gate(open=False)
    batcher = Batcher(gate, max_batch=8, max_delay=0)
    first = batcher.submit(0)
    assert gate.entered.wait(30)
    good, bad, other = (batcher.submit(item) for item in (1, -1, 2))
    gate.opened.set()
    assert values([first, good, other]) == [0, 2, 4]
    with pytest.raises(ValueError, match="negative"):
        bad.result(30)
    assert gate.batches == [[0], [1, -1, 2], [1], [-1], [2]]
    batcher.close()


def test_a_cancelled_item_leaves_the_queue_at_once_and_is_never_run() -> None:
    gate = Gate(open=False)
    batcher = Batcher(gate, max_batch=8, max_delay=0)
    first = batcher.submit(1)
    assert gate.entered.wait(30)
    second, third = batcher.submit(2), batcher.submit(3)
    assert second.cancel()
    assert len(batcher) == 1
    assert not first.cancel(), "its batch has begun"
    gate.opened.set()
    assert values([first, third]) == [2, 6]
    assert gate.batches == [[1], [3]]
    batcher.close()


def test_closing_ends_what_runs_and_cancels_what_waits() -> None:
    gate = Gate(open=False)
    batcher = Batcher(gate, max_batch=1, max_delay=0)
    first = batcher.submit(1)
    assert gate.entered.wait(30)
    second = batcher.submit(2)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    cancelled = threading.Event()
    second.add_done_callback(lambda future: cancelled.set())
    assert cancelled.wait(30)
    gate.opened.set()
    closing.join(30)
    assert first.result(0).value == 2
    with pytest.raises(CancelledError):
        second.result(0)
    with pytest.raises(UsageError, match="closed"):
        batcher.submit(3)


def test_many_threads_at_once() -> None:
    batcher = Batcher(Gate(), max_batch=7, max_delay=0.001)
    by_name: dict[int, list[int]] = {}

    def ask(start: int) -> None:
        by_name[start] = values([batcher.submit(start + i) for i in range(50)])

    threads = [threading.Thread(target=ask, args=(1000 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert by_name == {1000 * i: [2 * (1000 * i + j) for j in range(50)] for i in range(8)}
    batcher.close()


def test_settings_that_cannot_be_right() -> None:
    with pytest.raises(UsageError, match="max_batch=0"):
        Batcher(Gate(), max_batch=0)
