"""Bulk embedding: every kind of source, the same bytes however a run went, quarantine, refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq
import pytest

from ivl_export.bulk.config import EmbedConfig, open_run
from ivl_export.bulk.embed import embed_shard, run
from ivl_export.bulk.plan import INPUTS, PLAN, QUARANTINE, load_plan
from ivl_export.errors import BuildError, CapabilityError, InputError, UsageError
from ivl_export.files import write
from ivl_export.runtime import InternVL, InternVLChat
from ivl_export.runtime.shards import open_shard, read_receipt
from ivl_export.runtime.zero_shot import l2
from ivl_export.tests.bulk.conftest import (
    Embed,
    animation,
    contents,
    picture,
    write_lines,
    write_table,
    write_tar,
)

pytestmark = pytest.mark.numeric


def rows(out: Path) -> list[dict[str, Any]]:
    """All rows of all shards, read by pyarrow alone."""
    return [row for path in sorted(out.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]


def vectors(out: Path) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    return {(row["key"], row["kind"]): np.array(row["vector"], np.float32) for row in rows(out)}


def test_a_folder_becomes_shards(embed: Embed, photos: Path, config: EmbedConfig, tiny: InternVL) -> None:
    result = embed(photos)
    assert (result.items, result.rows, result.quarantined, result.shards, result.reused) == (21, 20, 1, 4, 0)
    assert sorted(contents(config.out)) == [
        INPUTS, PLAN, QUARANTINE, *(f"shard-{i:06}.parquet" for i in range(4))
    ]  # fmt: skip
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("[!.]*.png"))
    assert [row["key"] for row in rows(config.out)] == files
    want = l2(tiny.encode_image([photos / name for name in files]))
    np.testing.assert_allclose([row["vector"] for row in rows(config.out)], want, atol=1e-6)
    line = json.loads((config.out / QUARANTINE).read_text())
    assert (line["key"], line["kind"]) == ("more/broken.jpg", "image")
    assert "more/broken.jpg" in line["reason"]
    assert str(photos) not in line["reason"]
    again = embed(photos)
    assert (again.reused, again.embedded, again.rows) == (4, 0, 20)


def test_vectors_are_mapped_from_the_file(embed: Embed, photos: Path, config: EmbedConfig) -> None:
    for dtype in ("float32", "float16"):
        embed(photos, dtype=dtype, force=True)
        for path in config.out.glob("shard-*.parquet"):
            shard = open_shard(path)
            (block,) = shard.blocks
            assert isinstance(block, np.memmap)
            assert block.flags.aligned
            assert block.offset % 64 == 0
            assert np.array_equal(block, np.array(pq.read_table(path)["vector"].to_pylist(), dtype))
            assert shard.names() == pq.read_table(path)["key"].to_pylist()


def test_lists_archives_and_tables(
    embed: Embed, photos: Path, tmp_path: Path, config: EmbedConfig, tiny: InternVL
) -> None:
    """The same pictures and texts out of every kind of source have the same vectors."""
    pictures, texts = [picture(i) for i in range(3)], ["a red ring", "two stars", "a ring"]
    lists = tmp_path / "lists"
    lists.mkdir()
    for i, data in enumerate(pictures):
        (lists / f"{i}.png").write_bytes(data)
    (lists / "moving.png").write_bytes(animation(7))
    lines = [{"id": i, "image": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    sources = {
        "jsonl": write_lines(
            lists / "a.jsonl", [*lines, "\n", {"video": "moving.png"}, {"image": "gone.png"}]
        ),
        "tar": write_tar(
            tmp_path / "a.tar",
            {f"{i}{s}": d for i in range(3) for s, d in ((".png", pictures[i]), (".txt", texts[i].encode()))},
        ),
        "parquet": write_table(
            tmp_path / "a.parquet",
            {"id": [0, 1, 2], "image": [{"bytes": p, "path": None} for p in pictures], "caption": texts},
            rows=2,
        ),
    }
    keys = {
        "jsonl": ["0", "1", "2"],
        "tar": ["a.tar/0", "a.tar/1", "a.tar/2"],
        "parquet": ["0", "1", "2"],
    }
    want = {"image": l2(tiny.encode_image(pictures)), "text": l2(tiny.encode_text(texts))}
    for name, source in sources.items():
        column = "id" if name == "parquet" else None
        out = tmp_path / f"out-{name}"
        embed(source, kinds=("image", "video", "text"), key_column=column, out=out, shard_items=4)
        found = vectors(out)
        for kind, expected in want.items():
            own = [found.pop((key, kind)) for key in keys[name]]
            np.testing.assert_allclose(own, expected, atol=1e-6)
        if name == "jsonl":
            assert list(found) == [("a.jsonl#5", "video")]
            video = l2(tiny.encode_video(lists / "moving.png")[None])[0]
            np.testing.assert_allclose(found["a.jsonl#5", "video"], video, atol=1e-6)
            assert "no such file" in (out / QUARANTINE).read_text()
        else:
            assert not found
    out = tmp_path / "only"
    assert embed(sources["jsonl"], kinds=("text",), out=out).rows == 3
    assert {kind for _, kind in vectors(out)} == {"text"}


def test_several_sources_and_raw_vectors(
    embed: Embed, photos: Path, tmp_path: Path, config: EmbedConfig, tiny: InternVL
) -> None:
    for i in range(2):
        write_tar(tmp_path / f"t-{i}.tar", {"a.png": picture(i)})
    result = embed(photos / "01.png", tmp_path / "t-{0..1}.tar", unit=False, mode="InternVL-G")
    found = vectors(config.out)
    assert list(found) == [
        ("01.png/01.png", "image"), ("t-{0..1}.tar/t-0.tar/a", "image"), ("t-{0..1}.tar/t-1.tar/a", "image")
    ]  # fmt: skip
    want = tiny.encode_image([photos / "01.png", picture(0), picture(1)], "InternVL-G")
    np.testing.assert_allclose(list(found.values()), want, atol=1e-6)
    assert result.rows == 3


def test_tiles_of_a_chat_model(embed: Embed, photos: Path, config: EmbedConfig, chat_bundle: Path) -> None:
    embed(photos, bundle=chat_bundle)
    with InternVLChat.load(chat_bundle, threads=1) as chat:
        files = [photos / row["key"] for row in rows(config.out)]
        want = l2(chat.encode_image(files))
        np.testing.assert_allclose([row["vector"] for row in rows(config.out)], want, atol=1e-5)
        embed(photos, bundle=chat_bundle, tiles=True, force=True)
        tiles = chat.encode_tiles(files)
        assert [row["tile"] for row in rows(config.out)] == [t for own in tiles for t in range(len(own))]
        np.testing.assert_allclose(
            [row["vector"] for row in rows(config.out)], l2(np.concatenate(tiles)), atol=1e-5
        )
    assert open_shard(config.out / "shard-000000.parquet").names()[0] == f"{rows(config.out)[0]['key']}#0"
    with pytest.raises(CapabilityError, match="not aligned"):
        embed(photos, bundle=chat_bundle, kinds=("text",), force=True)
    with pytest.raises(CapabilityError, match="does not cut images into tiles"):
        embed(photos, tiles=True, force=True)


# --- however a run went ---


def test_a_shard_does_not_depend_on_the_run(embed: Embed, photos: Path, config: EmbedConfig) -> None:
    """Shards are units of work: in any order, in company of others, with any number of readers."""
    embed(photos)
    before = contents(config.out)
    model, plan = open_run(replace(config, sources=(photos,)))
    with model:
        for shard, threads in ((3, 1), (1, 4)):
            content = embed_shard(model, plan, shard, threads)
            stored = open_shard(config.out / f"shard-{shard:06}.parquet")
            assert np.array_equal(np.concatenate(list(content.rows.values())), stored.blocks[0])
            assert content.inputs == stored.receipt.inputs
        for missing in (["shard-000002.parquet"], [QUARANTINE], ["shard-000000.parquet", QUARANTINE]):
            for name in missing:
                (config.out / name).unlink()
            run(model, plan, config.out, readers=3)
            assert contents(config.out) == before
        (config.out / "shard-000001.parquet").write_bytes(before["shard-000001.parquet"][:-100])
        run(model, plan, config.out)
        assert contents(config.out) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bytes(kills: int, photos: Path, config: EmbedConfig) -> None:
    """SIGKILL at random moments of a forked run, then a run to the end."""
    model, plan = open_run(replace(config, sources=(photos,), shard_items=2))
    with model:
        run(model, plan, config.out, readers=1)
        want = contents(config.out)
        out, rng, moments = config.out.with_name("killed"), random.Random(kills), []
        began = time.perf_counter()
        assert os.waitpid(_forked(model, plan, out), 0)[1] == 0
        seconds = time.perf_counter() - began
        assert contents(out) == want
        for _ in range(kills):
            shutil.rmtree(out)
            child = _forked(model, plan, out)
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            moments.append(len(list(out.glob("shard-*"))) if out.exists() else -1)
            run(model, plan, out, readers=1)
            assert contents(out) == want
    assert kills < 10 or len(set(moments)) > 2, "the moments are in different places of the run"


def _forked(model: Any, plan: Any, out: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            run(model, plan, out, readers=1)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def test_a_full_disk_at_every_write(
    photos: Path, config: EmbedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes one write more in each attempt, until a run comes through; the next run goes on."""
    model, plan = open_run(replace(config, sources=(photos,), shard_items=30))
    with model:
        run(model, plan, config.out)
        want, out = contents(config.out), config.out.with_name("full")
        room, failures = 0, list[BuildError]()

        class Full:
            """A file on a disk that takes ``left`` writes."""

            def __init__(self, file: BinaryIO) -> None:
                self.file = file

            def write(self, data: Any) -> int:
                nonlocal room
                room -= 1
                if room < 0:
                    raise OSError(28, "No space left on device", self.file.name)
                return self.file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *exc: object) -> None:
                self.file.close()

        opened = write.open_binary
        monkeypatch.setattr(write, "open_binary", lambda path: Full(opened(path)))
        for attempt in range(200):
            room = attempt
            try:
                run(model, plan, out)
            except BuildError as error:
                failures.append(error)
            else:
                break
            assert not list(out.glob(".*"))
            assert all(data == want[name] for name, data in contents(out).items())
            room = 1 << 30
            run(model, plan, out)
            assert contents(out) == want
            shutil.rmtree(out)
        assert all("No space left" in error.why for error in failures)
        assert len({error.what for error in failures}) == 4, "inputs, plan, shard, quarantine"
        assert contents(out) == want


def test_what_changed_is_refused(embed: Embed, photos: Path, config: EmbedConfig, chat_bundle: Path) -> None:
    embed(photos)
    before = contents(config.out)
    for changes, said in (
        ({"mode": "InternVL-G"}, "mode was 'InternVL-C', is 'InternVL-G'"),
        ({"shard_items": 7}, "shard_items was 6, is 7"),
        ({"dtype": "float16"}, "dtype was"),
        ({"bundle": chat_bundle}, "It was begun with tiny"),
    ):
        with pytest.raises(UsageError, match=said):
            embed(photos, **changes)
    (photos / "new.png").write_bytes(picture(50))
    with pytest.raises(UsageError, match=r"1 new \(new.png\)"):
        embed(photos)
    (photos / "new.png").unlink()
    data = (photos / "01.png").read_bytes()
    (photos / "01.png").write_bytes(data + b"x")
    with pytest.raises(UsageError, match=r"1 of another size \(01.png\)"):
        embed(photos)
    (photos / "01.png").write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"Contents of shard 0 .* 01.png was touched"):
        embed(photos)
    (photos / "01.png").write_bytes(data)
    assert embed(photos).embedded == 0, "touched, with the same content"
    changed = contents(config.out)
    assert {k: v for k, v in changed.items() if k != INPUTS} == {
        k: v for k, v in before.items() if k != INPUTS
    }
    assert embed(photos, mode="InternVL-G", force=True).reused == 0
    assert read_receipt(config.out / "shard-000000.parquet").embedding.mode == "InternVL-G"


def test_a_damaged_plan_and_foreign_folders(embed: Embed, photos: Path, config: EmbedConfig) -> None:
    from ivl_export.errors import IntegrityError

    embed(photos)
    plan = config.out / PLAN
    text = plan.read_text()
    plan.write_text(text.replace('"shard_items": 6', '"shard_items": 5'))
    with pytest.raises(IntegrityError, match="hashes do not fit"):
        embed(photos)
    plan.write_text("{}")
    with pytest.raises(IntegrityError, match="--force"):
        embed(photos)
    assert embed(photos, force=True).rows == 20
    assert load_plan(config.out) is not None
    other = config.out.with_name("other")
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match="other files"):
            embed(photos, out=other, force=force)
    assert contents(other) == {"letter.txt": b"mine"}
    with pytest.raises(UsageError, match="inside the source"):
        embed(photos, out=photos / "vectors")


def test_a_disk_that_fails_is_no_bad_input(
    embed: Embed, photos: Path, config: EmbedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be read today may be readable tomorrow; what is not there is in quarantine."""
    from ivl_export.bulk import sources
    from ivl_export.files.read import read_bytes

    def failing(error: OSError) -> Any:
        def read(path: Path) -> bytes:
            if path.name == "05.png":
                raise InputError(f"Cannot read {path}.") from error
            return read_bytes(path)

        return read

    monkeypatch.setattr(sources, "read_bytes", failing(OSError(5, "Input/output error")))
    with pytest.raises(InputError, match=r"Cannot read .*05\.png"):
        embed(photos)
    monkeypatch.setattr(sources, "read_bytes", failing(PermissionError(13, "Permission denied")))
    assert embed(photos).quarantined == 2
    assert "Cannot read 05.png." in (config.out / QUARANTINE).read_text()


def test_nothing_that_can_be_embedded(embed: Embed, tmp_path: Path, config: EmbedConfig) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="No input could be embedded"):
        embed(folder)
    assert "It is empty" in (config.out / QUARANTINE).read_text()
