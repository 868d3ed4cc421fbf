"""Untrusted JSON: invalid JSON is refused, and entries that do not fit the class are named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.errors import InputError, IntegrityError, UsageError
from ivl_export.files.json import (
    MAX_JSON_BYTES,
    Count,
    Name,
    RelativePath,
    Sha256,
    decode,
    read_json,
    read_text_from_user,
)


@dataclass(frozen=True)
class Leaf:
    size: Count
    sha256: Sha256 = "0" * 64
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ValueError("13 is not a size")


@dataclass(frozen=True)
class Tree:
    name: Name
    ratio: float
    leaves: dict[RelativePath, Leaf] = field(default_factory=dict)
    pair: tuple[int, int] = (0, 0)
    shapes: tuple[tuple[Count | str, ...], ...] = ()
    maybe: Leaf | None = None
    free: dict[str, Any] = field(default_factory=dict)
    text: str = ""


GOOD: dict[str, Any] = {
    "name": "n",
    "ratio": 1,
    "leaves": {"a/b.c": {"size": 1}, "d": {"size": 2, "kind": "b"}},
    "pair": [1, 2],
    "shapes": [["batch", 3]],
    "maybe": {"size": 3},
    "free": {"\x1b": ["\n", None, 1e300]},
    "text": "it is",
}


def changed(*steps: str | int, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(GOOD))
    node = data
    for step in steps[:-1]:
        node = node[step]
    node[steps[-1]] = value
    return data  # type: ignore[no-any-return]


def test_plain_data_comes_back_as_it_was() -> None:
    tree = decode(Tree, GOOD, what="The tree")
    assert tree.leaves["d"] == Leaf(2, kind="b")
    assert tree.maybe == Leaf(3)
    assert isinstance(tree.ratio, float)
    assert decode(Tree, json.loads(json.dumps(asdict(tree))), what="The tree") == tree
    assert decode(dict[str, Leaf], {"x": {"size": 1}}, what="The leaves") == {"x": Leaf(1)}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "the top level. It is not an object"),
        ({"name": "n"}, "the top level. It has no 'ratio'"),
        (changed("name", value=3), "at name. It is not a text"),
        (changed("name", value="a b"), "at name. It is not a name"),
        (changed("name", value="n\n"), "at name. It is not a name"),
        (changed("ratio", value="1"), "at ratio. It is not a finite number"),
        (changed("ratio", value=True), "at ratio. It is not a finite number"),
        (changed("ratio", value=float("inf")), "at ratio. It is not a finite number"),
        (changed("ratio", value=10**400), "at ratio. It is"),
        (changed("pair", value=[1]), "at pair. It is not a list of length 2"),
        (changed("pair", 1, value=1.0), r"at pair[1]. It is not a whole number"),
        (changed("shapes", 0, 1, value=-1), r"at shapes[0][1]. It is"),
        (changed("shapes", 0, 0, value="a\x1b"), r"at shapes[0][0]. It is not a printable text"),
        (changed("leaves", "d", "size", value=True), "at leaves.d.size. It is not a whole number"),
        (changed("leaves", "d", "size", value=-1), "at leaves.d.size. It is not a whole number"),
        (changed("leaves", "d", "size", value=1 << 70), "at leaves.d.size. It is not a whole number"),
        (changed("leaves", "d", "size", value=13), "at leaves.d. It is refused: 13 is not a size"),
        (changed("leaves", "d", "kind", value="c"), "at leaves.d.kind. It is refused"),
        (changed("leaves", "a/b.c", "sha256", value="A" * 64), "at leaves.a/b.c.sha256. It is not a sha256"),
        (changed("leaves", "a/b.c", "more", value=1), "at leaves.a/b.c. It has unknown entry 'more'"),
        (changed("leaves", "../up", value={"size": 1}), "at leaves. It has the key '../up', which is not a"),
        (changed("leaves", value=[]), "at leaves. It is not an object"),
        (changed("maybe", value=3), "at maybe. It is not an object"),
        (changed("text", value="x" * 4097), "at text. It is not a printable text"),
        (changed("text", value="\u202e"), "at text. It is not a printable text"),
        (changed("extra", value=1), "the top level. It has unknown entry 'extra'"),
    ],
)
def test_what_does_not_fit_is_named(data: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode(Tree, data, what="The tree", fix="Plant it again.", error=UsageError)
    assert says in str(caught.value)
    assert caught.value.what.startswith("The tree is not valid at ")
    assert caught.value.fix == "Plant it again."


def test_unknown_entries_may_be_passed_over() -> None:
    data = changed("leaves", "d", "more", value=1)
    tree = decode(Tree, {**data, "extra": 1}, what="The tree", ignore_unknown=True)
    assert tree == decode(Tree, GOOD, what="The tree")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(GOOD)), JSON)
def test_any_entry_is_read_or_refused(key: str, value: Any) -> None:
    try:
        tree = decode(Tree, {**GOOD, key: value}, what="The tree")
    except IntegrityError:
        return
    assert decode(Tree, asdict(tree) | {"free": tree.free}, what="The tree", ignore_unknown=True) == tree


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "Expecting value"),
        (b"\xff", "utf-8"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 5000, "digits"),
        (b" " * (MAX_JSON_BYTES + 1), "larger than"),
    ],
    ids=["empty", "latin", "twice", "nan", "infinity", "deep", "digits", "large"],
)
def test_what_is_no_json_is_refused_with_its_path(raw: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"some\.json") as caught:
        read_json(path, fix="Again.")
    assert says in caught.value.why
    assert caught.value.fix == "Again."
    with pytest.raises(IntegrityError, match=r"some\.json"):
        decode(Tree, path, what="The tree")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


def test_texts_of_people_may_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + "чай".encode())
        assert read_text_from_user(path, "a list of captions") == "чай"
    path.write_bytes("чай".encode("cp1251"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_text_from_user(path, "a list of captions")
    with pytest.raises(InputError, match="Cannot read"):
        read_text_from_user(tmp_path / "absent", "a list of captions")
