"""Hashes of files, sources and plain data."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.files.hashing import (
    copy_with_sha256,
    sha256_file,
    sha256_file_once,
    sha256_json,
    sha256_sources,
)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_a_file_and_its_copy_have_the_hash_of_their_bytes(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_file(source) == sha256_file_once(source) == copy_with_sha256(source, target) == expected
    assert target.read_bytes() == data


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"one")
    first = sha256_file_once(path)
    path.write_bytes(b"three")
    assert sha256_file_once(path) == hashlib.sha256(b"three").hexdigest() != first


@given(st.dictionaries(st.text(max_size=4), st.integers() | st.lists(st.booleans(), max_size=3), max_size=6))
def test_the_order_of_keys_is_no_matter(value: dict[str, object]) -> None:
    assert sha256_json(value) == sha256_json(dict(reversed(value.items())))
    assert sha256_json(value) != sha256_json({**value, "another": None})


def test_sources_are_distinguished_by_name_and_content(tmp_path: Path) -> None:
    for name, text in (("a.py", "one"), ("b.py", "one")):
        (tmp_path / name).write_text(text)
    first = sha256_sources(tmp_path, ["a.py"])
    assert sha256_sources(tmp_path, ["b.py"]) != first
    (tmp_path / "a.py").write_text("two")
    assert sha256_sources(tmp_path, ["a.py"]) != first
