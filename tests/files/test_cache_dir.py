"""The user's cache: sizes, ages, pruning; engines kept under all they follow from, and verified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ivl_export.engines.tensorrt.engine_cache import EngineKey, keep_engine, take_engine
from ivl_export.errors import UsageError
from ivl_export.files import cache_dir as cache
from ivl_export.files.cache_dir import Entry, entries, parse_size, prune

KEY = EngineKey(
    "g" * 64, ("w" * 64,), {"name": "fp8"}, ({"batch": (1, 8, 128)},), {}, "tensorrt-rtx", "1.7", "sm89"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IVL_EXPORT_CACHE_SIZE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "x.engine"
    path.write_bytes(os.urandom(3000))
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("20G", 20 << 30), ("1.5 GiB", 3 << 29), ("512mb", 512 << 20), ("0", 0)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["", "G", "20X", "-1", "1.2.3G", "many"])
def test_what_is_no_size_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVL_EXPORT_CACHE_SIZE", text)
    with pytest.raises(UsageError, match="IVL_EXPORT_CACHE_SIZE"):
        cache.cache_limit()


def test_an_engine_comes_back_as_it_was(engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "y.engine"
    assert take_engine(KEY, out) is None
    assert not out.exists()
    assert keep_engine(KEY, engine, {"release": "1.7"})
    assert take_engine(KEY, out) == {"release": "1.7"}
    assert out.read_bytes() == engine.read_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["y.engine"]
    assert not keep_engine(KEY, engine, {"release": "1.7"}), "it is there already"
    assert [e.kind for e in entries()] == ["engines"]


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "h" * 64},
        {"weights": ("w" * 64, "v" * 64)},
        {"recipe": {"name": "int8"}},
        {"profiles": ({"batch": (1, 1, 8)},)},
        {"options": {"refit": True}},
        {"backend": "tensorrt"},
        {"release": "1.8"},
        {"target": "sm120"},
    ],
)
def test_anything_else_is_another_engine(engine: Path, tmp_path: Path, change: dict[str, object]) -> None:
    keep_engine(KEY, engine, {})
    assert take_engine(replace(KEY, **change), tmp_path / "y") is None  # type: ignore[arg-type]


def test_our_own_code_is_part_of_the_key() -> None:
    assert len(KEY.code) == 64
    assert replace(KEY, code="changed").digest != KEY.digest


@pytest.mark.parametrize("harm", ["engine", "entry", "cut"])
def test_a_damaged_engine_is_deleted_not_used(engine: Path, tmp_path: Path, folder: Path, harm: str) -> None:
    keep_engine(KEY, engine, {})
    stored = folder / "engines" / KEY.digest
    if harm == "engine":
        data = bytearray((stored / "engine").read_bytes())
        data[7] ^= 1
        (stored / "engine").write_bytes(data)
    elif harm == "entry":
        (stored / "entry.json").write_text('{"sha256": 5}')
    else:
        (stored / "engine").write_bytes(b"")
    assert take_engine(KEY, tmp_path / "y") is None
    assert not (tmp_path / "y").exists()
    assert not list((folder / "engines").iterdir())


def test_engines_longest_unused_make_room(engine: Path, tmp_path: Path, folder: Path) -> None:
    keys = [replace(KEY, target=f"sm{i}") for i in range(3)]
    for age, key in enumerate(keys):
        assert keep_engine(key, engine, {}, limit=10_000)
        os.utime(folder / "engines" / key.digest, (1000 + age, 1000 + age))
    assert take_engine(keys[0], tmp_path / "y") is not None, "used now: the second is the oldest"
    assert keep_engine(KEY, engine, {}, limit=10_000)
    left = {e.name for e in entries(("engines",))}
    assert left == {keys[0].digest, keys[2].digest, KEY.digest}
    assert not keep_engine(replace(KEY, target="big"), engine, {}, limit=2_000), (
        "larger than all there may be"
    )
    assert len(entries()) == 3


def test_pruning_by_age_size_and_all(folder: Path) -> None:
    for age, kind in enumerate(("engines", "timing", "evaluations")):
        path = folder / kind / f"{kind}.x"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 100)
        now = path.stat().st_mtime
        os.utime(path, (now - 1000 * age, now - 1000 * age))
        (folder / kind / "x.lock").touch()
    assert [e.kind for e in entries()] == ["engines", "timing", "evaluations"]
    assert [e.kind for e in prune(older_than=1500)] == ["evaluations"]
    assert [e.kind for e in prune(limit=150)] == ["timing"]
    assert [e.name for e in prune()] == ["engines"]
    assert entries() == []


def test_a_cache_that_cannot_be_written_is_none(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(engine))  # a file
    assert not keep_engine(KEY, engine, {})
    assert take_engine(KEY, tmp_path / "y") is None
    assert entries() == []
    cache.remove(tmp_path / "absent")
    cache.touch(tmp_path / "absent")
    assert isinstance(Entry("engines", "x", engine, 1, 0.0), Entry)


HOMELESS = """
import os, pwd, sys
for name in ("HOME", "XDG_CACHE_HOME", "IVL_EXPORT_CACHE"):
    os.environ.pop(name, None)
def no_entry(uid):
    raise KeyError(uid)
pwd.getpwuid = no_entry
from ivl_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", [["ls", "--json"], ["prune", "--all", "--json"]])
@pytest.mark.slow
def test_without_a_home_the_cache_is_below_the_temporary_folder(command: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HOMELESS, "doctor", "cache", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=True,
    )
    folder = Path(json.loads(run.stdout)["folder"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home that is a file, where nothing can be made; its temporary folder."""
    monkeypatch.delenv("IVL_EXPORT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.write_text("")
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    cache._temporary_cache.cache_clear()
    yield temporary
    cache._temporary_cache.cache_clear()


def test_an_impossible_home_is_as_good_as_none(homeless: Path, engine: Path, tmp_path: Path) -> None:
    assert cache.cache_folder().parent == homeless
    assert keep_engine(KEY, engine, {"release": "1.7"})
    assert take_engine(KEY, tmp_path / "y") == {"release": "1.7"}


@pytest.mark.parametrize("kind", ["open to all", "link", "file"])
def test_a_temporary_cache_that_others_can_change_is_not_used(
    homeless: Path, tmp_path: Path, kind: str
) -> None:
    usual = homeless / f"ivl-export-{os.getuid()}"
    if kind == "open to all":
        usual.mkdir()
        usual.chmod(0o777)
    elif kind == "link":
        usual.symlink_to(tmp_path)
    else:
        usual.touch()
    folder = cache.cache_folder()
    assert folder != usual
    assert folder.parent == homeless
    assert folder.stat().st_mode & 0o077 == 0
    assert cache.cache_folder() == folder


def test_where_nothing_can_be_written_nothing_is_kept(homeless: Path, engine: Path) -> None:
    homeless.rmdir()
    assert entries() == []
    assert not keep_engine(KEY, engine, {})


def test_a_home_that_is_still_to_be_made_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IVL_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    assert cache.cache_folder() == tmp_path / "new" / "cache" / "ivl-export"


def test_a_tilde_is_the_home_and_relative_xdg_folders_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IVL_EXPORT_CACHE", "~/own")
    assert cache.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("IVL_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == tmp_path / ".cache" / "ivl-export"
