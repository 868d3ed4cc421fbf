"""The store that conversations share: it returns stored values, in bounds, from many threads."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.arrays import Array
from ivl_export.errors import UsageError
from ivl_export.runtime.kv_cache import BLOCK, PrefixCache

NBYTES = 2 * 3 * BLOCK * 4
"""Of a block of :func:`data`."""


def keys(blocks: str, rest: int = 0) -> list[Hashable]:
    """Positions of blocks named by letters, and ``rest`` that fill none."""
    return [*((letter, i) for letter in blocks for i in range(BLOCK)), *(("", i) for i in range(rest))]


def data(blocks: str, rest: int = 0) -> Array:
    """Keys and values [2, 3, 1, 1, positions, 1]; each position's follow from all positions up to it."""
    letters = [ord(letter) for letter in blocks for _ in range(BLOCK)] + [1] * rest
    running = (np.cumsum(letters) % 1009).astype(np.float32)
    whole: Array = np.broadcast_to(running[:, None], (2, 3, 1, 1, len(running), 1)).copy()
    return whole


def check(stored: Sequence[Array], blocks: str) -> None:
    """The blocks found are the stored ones of ``blocks``."""
    if stored:
        whole = np.concatenate(stored, 4)
        np.testing.assert_array_equal(whole, data(blocks)[..., : whole.shape[4], :])


def test_what_begins_alike_is_shared() -> None:
    store = PrefixCache()
    assert store.find(keys("ab")) == []
    store.store(keys("abc", 5), data("abc", 5))
    assert store.nbytes == 3 * NBYTES, "positions that fill no block are left out"
    for question, count in (("abc", 3), ("abcd", 3), ("abd", 2), ("a", 1), ("ba", 0), ("bc", 0), ("", 0)):
        result = store.find(keys(question, 3))
        assert len(result) == count
        check(result, question)
    store.store(keys("abd"), data("abd"))
    assert store.nbytes == 4 * NBYTES
    assert len(store.find(keys("abc"))) == len(store.find(keys("abd"))) == 3


def test_values_are_copies() -> None:
    store, values, embeds = PrefixCache(), data("a"), np.ones((2, 3), np.float32)
    store.store(keys("a"), values)
    store.store_image(b"one", embeds)
    values[:] = -1
    embeds[:] = -1
    check(store.find(keys("a")), "a")
    np.testing.assert_array_equal(store.image(b"one"), np.ones((2, 3)))
    assert store.image(b"other") is None


def test_what_was_used_last_stays() -> None:
    store = PrefixCache(4 * NBYTES)
    store.store(keys("ab"), data("ab"))
    store.store(keys("cd"), data("cd"))
    store.find(keys("a"))
    store.store(keys("ef"), data("ef"))
    assert [len(store.find(keys(questions))) for questions in ("ab", "cd", "ef")] == [1, 1, 2], (
        "ends go first"
    )
    store.store(keys("vwxyz"), data("vwxyz"))
    assert len(store.find(keys("vwxyz"))) == 4, "as much of the beginning as fits"
    store.store_image(b"one", np.zeros(NBYTES // 4, np.float32))
    assert len(store.find(keys("vwxyz"))) == 3
    store.store_image(b"large", np.zeros(2 * NBYTES, np.float32))
    assert store.image(b"large") is None
    assert store.image(b"one") is not None


def test_nothing_kept() -> None:
    store = PrefixCache(0)
    store.store(keys("ab"), data("ab"))
    store.store_image(b"one", np.ones(1, np.float32))
    assert store.nbytes == 0
    assert store.find(keys("ab")) == []
    with pytest.raises(UsageError, match="negative size"):
        PrefixCache(-1)


PREFIX = st.text("abc", max_size=6)
STEP = st.one_of(
    st.tuples(st.just("keep"), PREFIX),
    st.tuples(st.just("find"), PREFIX),
    st.tuples(st.just("image"), st.text("xyz", min_size=1, max_size=1)),
)


@given(limit=st.integers(0, 9), steps=st.lists(STEP, max_size=40))
def test_any_use_keeps_its_promises(limit: int, steps: list[tuple[str, str]]) -> None:
    store = PrefixCache(limit * NBYTES + NBYTES // 2)
    for act, name in steps:
        if act == "image":
            store.store_image(name.encode(), np.full(NBYTES // 8, ord(name), np.float32))
            result = store.image(name.encode())
            assert result is None or (result == ord(name)).all()
        elif act == "keep":
            store.store(keys(name), data(name))
            assert len(store.find(keys(name))) == min(len(name), limit), "the newest entry is there"
        else:
            check(store.find(keys(name)), name)
        blocks = {key: stored for key, stored in store._entries.items() if isinstance(key, tuple)}
        assert store.nbytes == sum(stored.nbytes for stored in store._entries.values()) <= store.limit
        reached = {stored.number for stored in blocks.values()} | {-1}
        assert all(parent in reached for parent, _ in blocks), "no block without the blocks before it"


def test_threads() -> None:
    store = PrefixCache(6 * NBYTES)
    failed: list[BaseException] = []

    def use(seed: int) -> None:
        draw = np.random.default_rng(seed)
        try:
            for _ in range(300):
                name = "".join(draw.choice(list("abc"), draw.integers(1, 6)))
                check(store.find(keys(name)), name)
                store.store(keys(name), data(name))
                store.store_image(name.encode(), np.zeros(30, np.float32))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert 0 < store.nbytes <= store.limit
