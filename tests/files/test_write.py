"""Files are there whole, or as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivl_export.errors import BuildError
from ivl_export.files.write import atomic, write_text


@pytest.mark.parametrize("options", [{}, {"durable": True}, {"exclusive": True}])
def test_a_file_is_new_or_old_and_nothing_else_stays(tmp_path: Path, options: dict[str, bool]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic(path, **options) as partial:
            partial.write_text("half")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}
    with atomic(path, **options) as partial:
        partial.write_text("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "new"}


def test_what_a_killed_writer_left_is_overwritten_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writer = atomic(path, exclusive=True)
    writer.__enter__().write_text("half of a large file")
    with atomic(path, exclusive=True) as partial:
        partial.write_text("whole")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "whole"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"Cannot write .*x\.html\. No such file or directory\."):
        write_text("text", tmp_path / "no" / "x.html")
