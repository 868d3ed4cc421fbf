from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.files.hashing import sha256_file
from ivl_export.files.seals import damaged, write_seal


@pytest.fixture
def seal(tmp_path: Path) -> Path:
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    path = tmp_path / "x.seal"
    write_seal(path, {name: sha256_file(tmp_path / name) for name in ("a.bin", "b.bin")})
    return path


def test_what_was_sealed_is_sound(seal: Path) -> None:
    assert damaged(seal) == frozenset()


def test_sealed_files_are_not_read(seal: Path) -> None:
    (seal.parent / "a.bin").chmod(0)  # changes a note: the file is looked at, which root may do
    (seal.parent / "a.bin").chmod(0o644)
    assert damaged(seal) == frozenset()
    before = seal.stat().st_mtime_ns
    assert damaged(seal) == frozenset()
    assert seal.stat().st_mtime_ns == before


def test_damage_is_seen_whatever_the_times_say(seal: Path) -> None:
    path = seal.parent / "b.bin"
    state = path.stat()
    path.write_bytes(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert damaged(seal) == frozenset({"b.bin"})
    assert damaged(seal) == frozenset({"b.bin"})  # a seal is not renewed over damage
    path.unlink()
    (seal.parent / "a.bin").write_bytes(b"")
    assert damaged(seal) == frozenset({"a.bin", "b.bin"})


def test_a_copy_is_sealed_again(seal: Path, tmp_path: Path) -> None:
    shutil.copytree(seal.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / seal.name
    before = copy.read_bytes()
    assert damaged(copy) == frozenset()
    assert copy.read_bytes() != before


@given(text=st.one_of(st.text(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(json.dumps)))  # fmt: skip
@pytest.mark.slow
def test_any_text_is_a_seal_or_none(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("seal") / "x.seal"
    path.write_text(text, "utf-8", errors="surrogatepass")
    result = damaged(path)
    assert result is None or result == frozenset(json.loads(text)["files"])


def test_no_seal(tmp_path: Path) -> None:
    assert damaged(tmp_path / "x.seal") is None
