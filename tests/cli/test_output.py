"""Tables: as wide as the terminal, and broken between words only."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from ivl_export.cli.output import layout, show

PATH = "/home/someone/models/InternVL-14B-224px/bundles/internvl-14b-int8-smoothquant/engines/vision.engine"
WORDS = st.text("abc/-.,0123456789", min_size=1, max_size=30)
CELLS = st.one_of(
    st.lists(WORDS, max_size=12).map(" ".join), st.integers(0, 10**9), st.floats(-1e3, 1e3), st.none()
)


def words(text: str) -> Counter[str]:
    return Counter(text.split())


@given(st.data(), st.integers(1, 8), st.sampled_from([40, 80, 100]))
def test_no_word_is_broken_and_no_line_is_too_wide(data: st.DataObject, count: int, width: int) -> None:
    columns = data.draw(st.lists(st.lists(WORDS, max_size=3).map(" ".join), min_size=count, max_size=count))
    rows = data.draw(st.lists(st.lists(CELLS, min_size=count, max_size=count), max_size=5))
    head, body = layout("", columns, rows, width)
    assert head == []
    shown = words(" ".join(body))
    expected = words(" ".join(show(cell) for row in rows for cell in row))
    assert not expected - shown
    assert all(len(line) <= width or len(line.split()) == 1 for line in body)


def test_a_path_stays_whole_at_every_width() -> None:
    rows = [("vision", PATH, 3), ("qllama_text", "photos/a.jpg", 12)]
    for width in (40, 80, 100, 200):
        _, body = layout("Files", ("component", "file", "count"), rows, width)
        assert any(PATH in line for line in body), width
    _, wide = layout("Files", ("component", "file", "count"), rows, 200)
    assert wide[0].split() == ["component", "file", "count"]
    _, narrow = layout("Files", ("component", "file", "count"), rows, 80)
    assert narrow == [
        "component  vision", "file", f"  {PATH}", "count      3", "",
        "component  qllama_text", "file       photos/a.jpg", "count      12",
    ]  # fmt: skip


def test_numbers_stand_right_and_long_cells_wrap_between_words() -> None:
    rows = [("a", 1, "one two three four"), ("b", 12.5, "five")]
    _, body = layout("", ("x", "ms", "why"), rows, 20)
    assert body == ["x    ms  why", "─" * 20, "a     1  one two", "         three four", "b  12.5  five"]


def test_titles_wrap_too() -> None:
    head, _ = layout(f"Written to {PATH}", ("", ""), [], 60)
    assert head == ["Written to", PATH]


@pytest.mark.parametrize("width", [12, 20])
def test_texts_without_spaces_break_at_characters(width: int) -> None:
    caption = "一个红色的圆形在一个蓝色的方形的左边"
    _, body = layout("", ("", ""), [("a.png", caption)], width)
    assert "".join(line[7:] for line in body) == caption
    assert all(cell_len(line) <= width for line in body)


def test_columns_that_do_not_fit_go_below_with_what_tells_the_rows_apart() -> None:
    columns = ("call", "batch", *(f"p{n}" for n in (50, 90, 95, 99)))
    rows = [("vision", 1, 10.25, 11.25, 12.25, 13.25), ("vision", 8, 20.25, 21.25, 22.25, 23.25)]
    _, body = layout("", columns, rows, 28)
    assert body == [
        "call    batch    p50    p90",
        "─" * 27,
        "vision      1  10.25  11.25",
        "vision      8  20.25  21.25",
        "",
        "call    batch    p95    p99",
        "─" * 27,
        "vision      1  12.25  13.25",
        "vision      8  22.25  23.25",
    ]
