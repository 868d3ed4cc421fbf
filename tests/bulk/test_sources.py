"""Sources of bulk embeddings: what is listed, in which order, and what is refused."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.bulk.embed import cut
from ivl_export.bulk.plan import Plan, Work, make_plan
from ivl_export.bulk.sources import Choice, InputFile, Item, open_file
from ivl_export.errors import InputError, UsageError
from ivl_export.runtime.shards import Embedding
from ivl_export.tests.bulk.conftest import picture, write_lines, write_table, write_tar

EMBEDDING = Embedding(
    "0" * 64, "m", "fp32", "onnxruntime", "", 8, "float32", "", True, False, "", 0, 8, False
)
ALL = Choice(("image", "video", "text"))


def planned(*sources: Path, choice: Choice = ALL, shard_items: int = 3) -> Plan:
    return make_plan(EMBEDDING, Work(choice, shard_items), sources, Path("/nowhere/out"), {})


def items(plan: Plan) -> list[Item]:
    return [item for shard in range(plan.shards) for item in plan.items_of(plan.numbers(shard))]


def test_a_folder_is_listed_in_order(photos: Path, tmp_path: Path) -> None:
    (photos / "metadata.jsonl").write_text('{"file_name": "01.png"}\n')
    (photos / "t.txt").write_text("a text")
    keys = [item.key for item in items(planned(photos))]
    assert keys == sorted(keys)
    assert keys[:2] == ["01.png", "02.png"]
    assert len(keys) == 21 + 1
    assert planned(photos).digest == planned(photos).digest
    assert planned(photos).digest != planned(photos, shard_items=4).digest
    moved = tmp_path / "moved"
    photos.rename(moved)
    assert planned(moved).digest == planned(moved.parent / "moved").digest


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    shard_items=st.integers(1, 12),
)
def test_shards_hold_every_item_once(counts: list[int], shard_items: int) -> None:
    files = tuple(InputFile(0, f"{i}.png", 1, 1, n) for i, n in enumerate(counts))
    plan = Plan(EMBEDDING, Work(ALL, shard_items), ("/x",), files)
    numbers = [number for shard in range(plan.shards) for number in plan.numbers(shard)]
    assert numbers == list(range(sum(counts)))
    assert all(0 < len(plan.numbers(shard)) <= shard_items for shard in range(plan.shards))
    assert all(len(plan.numbers(shard)) == shard_items for shard in range(plan.shards - 1))


@given(kinds=st.lists(st.sampled_from(["image", "video", "text"]), max_size=40), size=st.integers(1, 8))
def test_groups_hold_every_item_once(kinds: list[str], size: int) -> None:
    every = [Item(str(i), kind, b"") for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    costs = {"image": 1.0, "video": 8.0, "text": size / 256}
    parts = list(cut(0, every, costs, size))
    assert [item for part in parts for item in part.items] == every
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    for part in parts:
        assert sum(costs[item.kind] for item in part.items) <= size or len(part.items) == 1


@given(data=st.data())
def test_any_stretch_of_a_file_can_be_read(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "stretches"
    if not folder.exists():
        folder.mkdir()
        fields = [
            {"text": "a"},
            {"image": "b"},
            {"text": "c", "image": "d"},
            {"video": "e"},
            {"other": 1, "text": "f"},
        ]
        write_lines(folder / "a.jsonl", [fields[i % 5] for i in range(20)])
        write_tar(
            folder / "a.tar", {f"{i}.{s}": b"x" for i in range(12) for s in ("png", "txt")[: 1 + i % 2]}
        )
        write_table(
            folder / "a.parquet", {"image": [b"x"] * 150, "text": list(map(str, range(150)))}, rows=70
        )
    for name in ("a.jsonl", "a.tar", "a.parquet"):
        reader = open_file(folder / name, name, ALL)
        start = data.draw(st.integers(0, len(reader)))
        stop = data.draw(st.integers(start, len(reader)))
        every = list(reader.keys())[start:stop]
        assert [(item.key, item.kind) for item in reader.items(start, stop)] == every
        assert len(every) == stop - start


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json\n", "It is not JSON"),
        ("[1]\n", "It is a list"),
        ('{"id": 3}\n', "It has no image, video or text"),
        ('{"image": 7}\n', "Its image is not a text"),
        ('{"text": "\\ud800"}\n', "Its text is not a text"),
        ('{"text": "a", "text": "b"}\n', "given twice"),
        ('{"text": "a", "id": 1.5}\n', "neither a text nor a whole number"),
        ("[" * 100_000 + "\n", "nested too deep"),
    ],
)
def test_a_wrong_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, "\n", line])
    with pytest.raises(InputError, match=r"Line 3 of .*a\.jsonl") as caught:
        planned(path)
    assert said in caught.value.why


def test_what_cannot_be_a_source(tmp_path: Path, photos: Path) -> None:
    empty, unknown = tmp_path / "empty", tmp_path / "unknown"
    for folder in (empty, unknown):
        folder.mkdir()
    (unknown / "a.doc").write_text("x")
    table = write_table(tmp_path / "a.parquet", {"picture_bytes": [b"x"], "n": [1]})
    twice = write_lines(tmp_path / "twice.jsonl", [{"id": "a", "text": "1"}, {"id": "a", "text": "2"}])
    link = tmp_path / "link.tar"
    with tarfile.open(link, "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    (tmp_path / "cut.tar").write_bytes(
        write_tar(tmp_path / "b.tar", {"a.png": picture(0)}).read_bytes()[:600]
    )
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for source, choice, said in (
        (empty, ALL, "It is empty"),
        (unknown, ALL, r"None of its 1 files ends with"),
        (unknown / "a.doc", ALL, "of no known kind"),
        (tmp_path / "missing", ALL, "There is no source"),
        (Path("https://host/a.tar"), ALL, "is not read"),
        (table, ALL, r"It has picture_bytes \(binary\), n \(int64\)"),
        (table, Choice(("image",), "images"), "no column 'images'"),
        (table, Choice(("image",), "picture_bytes", None, "id"), "no column 'id'"),
        (twice, ALL, "The key 'a' of a text is given twice"),
        (twice, Choice(("image",)), "have no image"),
        (link, ALL, "not a regular file"),
        (tmp_path / "cut.tar", ALL, "cannot be read as a shard"),
        (tmp_path / "bad.parquet", ALL, "cannot be read"),
    ):
        with pytest.raises(InputError, match=said):
            planned(source, choice=choice)
    pair = [write_lines(tmp_path / f"{name}.jsonl", [{"id": "same", "text": name}]) for name in ("a", "b")]
    with pytest.raises(InputError, match=r"in a\.jsonl and in b\.jsonl"):
        planned(*pair)
    with pytest.raises(UsageError, match="Two sources are called"):
        planned(photos, photos)
    with pytest.raises(UsageError, match="No source"):
        planned()


def test_names_in_a_list_stay_in_its_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(0))
    (inner / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["../secret.png", "/etc/passwd", "link.png", "https://host/a.png", "data:text/plain,x", "a\0b"]
    path = write_lines(inner / "a.jsonl", [{"image": name} for name in names])
    for item in items(planned(path)):
        with pytest.raises(InputError):
            item.read()
