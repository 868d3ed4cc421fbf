"""The staging folder: steps are reused exactly when their inputs did not change, after any kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_export.bundle import Bundle, seal
from ivl_export.bundle.manifest import Manifest, Model
from ivl_export.errors import BuildError, IntegrityError
from ivl_export.files.json import decode
from ivl_export.pipeline.workspace import RECEIPT, Record, Workspace, step_digest


@dataclass
class Heard:
    """A reporter that records its calls."""

    finished_steps: list[tuple[str, bool]] = field(default_factory=list)

    def started(self, step: str, total: int | None, unit: str = "") -> None:
        pass

    def advanced(self, done: int, total: int | None = None, detail: str = "") -> None:
        pass

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        self.finished_steps.append((step, reused))


def writes(files: dict[str, str], **data: Any) -> Callable[[Path], tuple[list[str], dict[str, Any]]]:
    """A step that writes ``files``."""

    def run(root: Path) -> tuple[list[str], dict[str, Any]]:
        for rel, text in files.items():
            (root / rel).parent.mkdir(parents=True, exist_ok=True)
            (root / rel).write_text(text)
        return list(files), data

    return run


def never(root: Path) -> tuple[list[str], dict[str, Any]]:
    raise AssertionError("this step must not run")


def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "out", Heard())


def seal_steps(work: Workspace) -> Bundle:
    work.finish()
    model = Model("m", "s", {}, {}, 0.0, 1)
    bundle = seal(
        work.staging_dir, Manifest(model, "bf16", "bf16", {}, None, {}, receipts=(RECEIPT,)), work.out
    )
    work.discard()
    return bundle


def sealed(tmp_path: Path, contents: dict[str, str]) -> Bundle:
    """A bundle of one file for each step; ``contents``: a step's name -> its input and its file's text."""
    with space(tmp_path) as work:
        for name, text in contents.items():
            work.step(name, {"text": text}, writes({f"{name}.txt": text}))
        return seal_steps(work)


def test_a_step_runs_once_and_again_when_its_inputs_change(tmp_path: Path) -> None:
    with space(tmp_path) as work:
        first = work.step("a", {"n": 1}, writes({"x/a.txt": "one"}, found=3))
        assert first.files == {"x/a.txt": 3}
        assert first.data == {"found": 3}
        assert work.step("a", {"n": 1}, never) == first
    with space(tmp_path) as work:
        assert work.known("a", {"n": 1})
        assert not work.known("a", {"n": 2})
        assert work.step("a", {"n": 1}, never) == first
        assert work.ran == []
        work.step("a", {"n": 2}, writes({"x/a.txt": "three"}))
        assert work.ran == ["a"]
        assert (work.staging_dir / "x/a.txt").read_text() == "three"
        assert isinstance(work.progress, Heard)
        assert work.progress.finished_steps == [("a", True), ("a", False)]


@pytest.mark.parametrize("change", ["remove", "shorten"])
def test_a_missing_or_cut_file_reruns_its_step_only(tmp_path: Path, change: str) -> None:
    with space(tmp_path) as work:
        work.step("a", {}, writes({"a.txt": "text", "b.txt": "text"}))
        work.step("c", {}, writes({"c.txt": "text"}))
        if change == "remove":
            (work.staging_dir / "b.txt").unlink()
        else:
            (work.staging_dir / "b.txt").write_text("t")
        work.step("a", {}, writes({"a.txt": "text", "b.txt": "text"}))
        work.step("c", {}, never)
        assert work.ran == ["a", "c", "a"]


def test_a_step_that_fails_half_way_leaves_no_record(tmp_path: Path) -> None:
    def half(root: Path) -> tuple[list[str], dict[str, Any]]:
        (root / "b.txt").write_text("half")
        raise RuntimeError("no")

    with space(tmp_path) as work:
        work.step("a", {}, writes({"a.txt": "a"}))
        with pytest.raises(RuntimeError, match="no"):
            work.step("b", {}, half)
    with space(tmp_path) as work:
        work.step("a", {}, never)
        assert not work.known("b", {})
        work.step("b", {}, writes({"b.txt": "whole"}))
        assert (work.staging_dir / "b.txt").read_text() == "whole"


def test_a_killed_rerun_does_not_pass_for_the_run_before(tmp_path: Path) -> None:
    """Inputs change, the new run is killed after it wrote a file of the same size, and inputs change back."""
    with space(tmp_path) as work:
        work.step("a", {"model": "one"}, writes({"a.txt": "one"}))

    def killed(root: Path) -> tuple[list[str], dict[str, Any]]:
        (root / "a.txt").write_text("two")
        raise KeyboardInterrupt

    with space(tmp_path) as work, pytest.raises(KeyboardInterrupt):
        work.step("a", {"model": "two"}, killed)
    with space(tmp_path) as work:
        work.step("a", {"model": "one"}, writes({"a.txt": "one"}))
        assert (work.staging_dir / "a.txt").read_text() == "one"


KILLED = """
import os, signal, sys
from pathlib import Path
from ivl_export.pipeline.workspace import Workspace
from ivl_export.progress import Silent
def write(name, text):
    def run(root):
        (root / name).write_text(text)
        if name == "b.txt":
            os.kill(os.getpid(), signal.SIGKILL)
        return [name], {}
    return run
with Workspace(Path(sys.argv[1]), Silent()) as work:
    work.step("a", {}, write("a.txt", "a"))
    work.step("b", {}, write("b.txt", "half"))
"""


def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "out").exists()
    with space(tmp_path) as work:  # the lock died with its process
        work.step("a", {}, never)
        work.step("b", {}, writes({"b.txt": "whole"}))
        assert work.ran == ["b"]


def test_finish_leaves_step_files_and_their_records_only(tmp_path: Path) -> None:
    with space(tmp_path) as work:
        work.step("old", {}, writes({"old/deep/old.txt": "old"}))
    with space(tmp_path) as work:
        work.step("a", {}, writes({"keep/a.txt": "a"}))
        (work.staging_dir / "keep" / ".a.txt.123.tmp").write_text("of a killed writer")
        (work.staging_dir / "empty").mkdir()
        work.finish()
        by_name = {p.relative_to(work.staging_dir).as_posix() for p in work.staging_dir.rglob("*")}
        assert by_name == {"keep", "keep/a.txt", "receipts", "receipts/build.json"}
        assert json.loads((work.staging_dir / "receipts/build.json").read_text()) == {
            "a": asdict(work.records["a"])
        }
        work.discard()
    assert not list(tmp_path.iterdir())


def test_unchanged_steps_come_from_the_bundle(tmp_path: Path) -> None:
    sealed(tmp_path, {"a": "one", "b": "two"})
    with space(tmp_path) as work:
        assert work.known("a", {"text": "one"})
        work.step("a", {"text": "one"}, never)
        work.step("b", {"text": "new"}, writes({"b.txt": "new"}))
        assert work.ran == ["b"]
        assert (work.staging_dir / "a.txt").read_text() == "one"
        # its own copy: onnx.checker refuses weights that have a second name
        assert (work.staging_dir / "a.txt").stat().st_nlink == 1
        (work.staging_dir / "a.txt").write_text("XXX")
    assert Bundle.open(tmp_path / "out", verify="hash").path("b.txt").read_text() == "two"


def test_a_damaged_file_of_the_bundle_is_made_again(tmp_path: Path) -> None:
    bundle = sealed(tmp_path, {"a": "one", "b": "two"})
    (bundle.root / "a.txt").write_text("0ne")  # of the same size: only its content differs
    with space(tmp_path) as work:
        work.step("a", {"text": "one"}, writes({"a.txt": "one"}))
        work.step("b", {"text": "two"}, never)
        assert work.ran == ["a"]


def test_a_bundle_whose_records_point_elsewhere_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / "sub").mkdir()
    where = tmp_path / "sub"
    sealed(where, {"a": "one"})
    for bad in ("../../../precious.txt", "/etc/passwd"):
        receipt = where / "out" / "receipts" / "build.json"
        text = receipt.read_text()
        receipt.write_text(text.replace("a.txt", bad))
        manifest = json.loads((where / "out" / "manifest.json").read_text())
        manifest["files"]["receipts/build.json"]["size"] = receipt.stat().st_size
        (where / "out" / "manifest.json").write_text(json.dumps(manifest))
        with space(where) as work:
            assert work.sealed == (None, {})
            work.step("a", {"text": "one"}, writes({"a.txt": "one"}))
            assert work.ran == ["a"]
            work.discard()
        receipt.write_text(text)
    assert (tmp_path / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize("text", ["", "[]", "null", '{"digest": 1}', "{", "[" * 100_000])
def test_a_damaged_record_reruns_its_step(tmp_path: Path, text: str) -> None:
    with space(tmp_path) as work:
        work.step("a", {}, writes({"a.txt": "a"}))
        (work.work_dir / "steps" / "a.json").write_text(text)
        work.step("a", {}, writes({"a.txt": "a"}))
        assert work.ran == ["a", "a"]


def test_two_builds_into_one_folder_are_kept_apart(tmp_path: Path) -> None:
    with space(tmp_path):
        with pytest.raises(BuildError, match=r"Another build into .* is running"), space(tmp_path):
            pass
        with Workspace(tmp_path / "other", Heard()):
            pass
    with space(tmp_path):
        pass


def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    def fill(root: Path) -> tuple[list[str], dict[str, Any]]:
        with Path("/dev/full").open("wb", buffering=0) as disk:
            disk.write(b"x")
        return [], {}

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with space(tmp_path) as work:
        with pytest.raises(BuildError, match="disk is full") as caught:
            work.step("a", {}, fill)
        assert caught.value.exit_code == 6
        assert "Free some space" in caught.value.fix
        assert "build' again continues" in caught.value.fix
        assert not work.known("a", {})
        work.step("a", {}, writes({"a.txt": "a"}))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")  # permissions would not stop a superuser
    with pytest.raises(BuildError, match="Cannot write to") as caught, Workspace(
        tmp_path / "file" / "out", Heard()
    ):  # fmt: skip
        pass
    assert str(tmp_path / "file") in caught.value.what
    assert "--out" in caught.value.fix


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_refused_before_any_step(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
    else:
        (tmp_path / "out").write_text("years of work")
    with pytest.raises(BuildError, match="is not replaced"):
        space(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.text(max_size=5), st.dictionaries(st.text(max_size=3), JSON, max_size=3), st.randoms())
@settings(deadline=None)
def test_digests_follow_content_not_order(name: str, inputs: dict[str, Any], random: Any) -> None:
    items = list(inputs.items())
    random.shuffle(items)
    assert step_digest(name, dict(items)) == step_digest(name, inputs)
    assert step_digest(name, {**inputs, "more": 1}) != step_digest(name, {**inputs, "more": 2})
    assert step_digest(f"{name}x", inputs) != step_digest(name, inputs)


def test_digests_follow_tools_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from ivl_export.pipeline import environment

    before = step_digest("a", {})
    monkeypatch.setattr(environment, "tool_versions", lambda: {"onnx": "0"})
    tools = step_digest("a", {})
    monkeypatch.setattr(environment, "code_digest", lambda: "other")
    assert len({before, tools, step_digest("a", {})}) == 3


@given(JSON)
@settings(deadline=None)
def test_records_are_read_strictly(data: Any) -> None:
    with pytest.raises(IntegrityError):
        decode(Record, data, what="The record")


HEX = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(HEX, st.dictionaries(st.sampled_from(["a", "b/c", "d.txt"]), st.integers(0, 99)), st.floats(0, 1e6))
@settings(deadline=None)
def test_records_round_trip(digest: str, files: dict[str, int], seconds: float) -> None:
    record = Record(digest, files, seconds, {"any": ["thing"]})
    assert decode(Record, json.loads(json.dumps(asdict(record))), what="The record") == record


@given(st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.slow
def test_any_history_ends_as_a_clean_build_would(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Builds of changing inputs, killed at any step or sealed: the files are always those of the inputs."""
    folder = tmp_path_factory.mktemp("history")
    names = ("a", "b", "c")
    for _ in range(data.draw(st.integers(1, 5))):
        expected = {n: data.draw(st.sampled_from(["one", "two"])) for n in names}
        kill_at = data.draw(st.sampled_from([None, None, *names]))
        with Workspace(folder / "out", Heard()) as work:
            for name, text in expected.items():

                def run(root: Path, name: str = name, text: str = text) -> tuple[list[str], dict[str, Any]]:
                    (root / f"{name}.txt").write_text(text)
                    if name == kill_at:  # noqa: B023
                        raise KeyboardInterrupt
                    return [f"{name}.txt"], {}

                try:
                    work.step(name, {"text": text}, run)
                except KeyboardInterrupt:
                    break
            else:
                for name, text in expected.items():
                    assert (work.staging_dir / f"{name}.txt").read_text() == text
                if data.draw(st.booleans()):
                    bundle = seal_steps(work)
                    bundle.check()
                    assert {n: bundle.path(f"{n}.txt").read_text() for n in names} == expected
