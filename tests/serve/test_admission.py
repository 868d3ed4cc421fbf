"""Room for items is given to all of a request or none, and the time to wait follows the measured rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.serve.admission import Admission, HeldBytes
from ivl_export.serve.errors import HttpError


@given(st.lists(st.integers(1, 9), max_size=20))
def test_no_more_than_the_capacity_is_held(requests: list[int]) -> None:
    room, held = Admission(8), []
    for items in requests:
        before, place = room.held, room.place(items, "input")
        if before + items > 8:
            with pytest.raises(HttpError) as caught:
                place.__enter__()
            assert caught.value.status == (413 if items > 8 else 429)
            assert room.held == before, "none of its items is held"
            continue
        place.__enter__()
        held.append((place, items))
        assert room.held == sum(count for _, count in held) <= 8
    for place, _ in held:
        place.__exit__(None, None, None)
    assert room.held == 0


def test_the_time_to_wait_is_that_of_the_items_that_must_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten items took four seconds of work each second; idle time does not count."""
    now = [0.0]
    monkeypatch.setattr("ivl_export.serve.admission.time.monotonic", lambda: now[0])
    room = Admission(10)
    for _ in range(3):
        with room.place(10, "input"):
            now[0] += 4
        now[0] += 1000
    with room.place(9, "input"):
        for items, seconds in ((2, 1), (6, 2), (10, 4)):
            with pytest.raises(HttpError) as caught, room.place(items, "input"):
                pass
            assert caught.value.retry_after == max(1, math.ceil(0.4 * (items - 1))) == seconds


def test_a_server_that_never_finished_anything_says_a_second() -> None:
    room = Admission(1)
    with room.place(1, "input"), pytest.raises(HttpError) as caught, room.place(1, "input"):
        pass
    assert caught.value.retry_after == 1


def test_bytes_are_bounded() -> None:
    bodies = HeldBytes(10)
    bodies.take(6)
    with pytest.raises(HttpError) as caught:
        bodies.take(5)
    assert caught.value.status == 429
    bodies.give_back(6)
    bodies.take(10)
