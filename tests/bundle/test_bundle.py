"""The bundle: manifests round-trip, hostile ones are refused, seals survive a kill at every point."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivl_export.bundle import Bundle, seal
from ivl_export.bundle.manifest import (
    Calibration,
    Component,
    EngineFile,
    FileEntry,
    Manifest,
    Model,
    manifest_from_json,
)
from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.errors import BuildError, CapabilityError, IntegrityError
from ivl_export.files.json import MAX_JSON_BYTES, RelativePath, decode

SPEC = ComponentSpec(
    "vision",
    (TensorSpec("pixel_values", "float", ("batch", 3, 28, 28)),),
    (TensorSpec("tokens", "float", ("batch", 5, 8)),),
    (Axis("batch", 1, 2, 4),),
)
GRAPH = "onnx/vision.fp32.onnx"


def make_manifest(**changes: Any) -> Manifest:
    base: dict[str, Any] = {
        "model": Model("m", "folder", {"model.safetensors": "0" * 64}, {"vision_config": {}}, 2.5, 12),
        "recipe": "fp8",
        "compute_dtype": "bf16",
        "rules": {"linear": "fp8"},
        "calibration": Calibration("a" * 64, 8, 1, True),
        "components": {"vision": Component(SPEC, {"fp32": GRAPH})},
        "engines": (EngineFile("vision", "tensorrt-rtx", "sm89", "engines/x/vision.engine", "1.7.1.116"),),
        "receipts": ("accuracy",),
        "tools": {"onnx": "1.23"},
    }
    return Manifest(**{**base, **changes})


def stage(folder: Path, mark: str = "one") -> Path:
    for rel in (GRAPH, "engines/x/vision.engine", "receipts/accuracy.json"):
        (folder / rel).parent.mkdir(parents=True, exist_ok=True)
        (folder / rel).write_text(json.dumps({"mark": mark}))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return seal(stage(tmp_path / "staging"), make_manifest(), tmp_path / "out")


def rewrite(bundle: Bundle, change: Any) -> None:
    """Apply ``change`` to the manifest's plain data on disk."""
    path = bundle.root / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_seal_then_open(bundle: Bundle, tmp_path: Path) -> None:
    opened = Bundle.open(tmp_path / "out", verify="hash")
    assert opened.manifest == bundle.manifest
    assert set(opened.manifest.files) == {GRAPH, "engines/x/vision.engine", "receipts/accuracy.json"}
    assert opened.spec("vision") == SPEC
    assert opened.graph("vision", "fp32") == tmp_path / "out" / GRAPH
    assert opened.engines("vision", "tensorrt-rtx", "sm89")[0].release == "1.7.1.116"
    assert opened.engines("vision", "onnxruntime")[0].file == GRAPH
    assert opened.receipt("accuracy") == {"mark": "one"}
    assert not (tmp_path / "staging").exists()


def test_what_is_not_there_is_named(bundle: Bundle) -> None:
    for call in (
        lambda: bundle.spec("decoder"),
        lambda: bundle.graph("vision", "bf16"),
        lambda: bundle.engines("vision", "tensorrt-rtx", "sm120"),
    ):
        with pytest.raises(CapabilityError) as error:
            call()
        assert error.value.why
    with pytest.raises(IntegrityError, match=r"receipts/latency\.json"):
        bundle.receipt("latency")


TEXT = st.text(st.characters(categories=("L", "N", "P")), max_size=20)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    config=st.dictionaries(st.text(), JSON, max_size=4),
    rules=st.dictionaries(st.text(), JSON, max_size=4),
    texts=st.dictionaries(TEXT, TEXT, max_size=3),
    digest=HEX,
    scale=st.floats(-1e6, 1e6),
    count=st.integers(0, 1 << 61),
    calibrated=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_manifest_round_trip(
    config: Any, rules: Any, texts: Any, digest: str, scale: float, count: int, calibrated: bool
) -> None:
    manifest = make_manifest(
        model=Model("n", "s", dict.fromkeys(texts, digest), config, scale, count),
        rules=rules,
        calibration=Calibration(digest, count, 0, False) if calibrated else None,
        tools=texts,
        steps=texts,
    ).with_files(
        dict.fromkeys((GRAPH, "engines/x/vision.engine", "receipts/accuracy.json"), FileEntry(digest, count))
    )
    assert manifest_from_json(json.loads(manifest.dumps())) == manifest


@dataclass(frozen=True)
class Placed:
    path: RelativePath


PARTS = st.sampled_from(["..", ".", "", "a", "C:", "\\", "a\\b", "\x00", "\n", "~", "/", "\ud800", "\u202e"])


@given(st.lists(PARTS | st.text(max_size=4), min_size=1, max_size=5).map("/".join))
@settings(max_examples=300, deadline=None)
def test_accepted_paths_stay_inside(text: str) -> None:
    try:
        decode(Placed, {"path": text}, what="x")
    except IntegrityError:
        return
    root = Path("/bundle/root")
    assert os.path.normpath(root / text) == str(root / text)  # nothing to normalise: inside, and one spelling
    assert (root / text).is_relative_to(root)
    assert text.encode()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "C:/x", "a\\..\\b", "a/", "", "manifest.json"]
)
def test_hostile_paths_are_refused(bundle: Bundle, path: str) -> None:
    rewrite(bundle, lambda d: d["files"].update({path: {"sha256": "0" * 64, "size": 0}}))
    with pytest.raises(IntegrityError, match="files"):
        Bundle.open(bundle.root)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(schema=5), "schema 5.*later"),
        (lambda d: d.update(schema=True), "schema"),
        (lambda d: d.pop("schema"), "schema"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.pop("rules"), "rules"),
        (lambda d: d.update(files=[]), "files"),
        (lambda d: d["files"][GRAPH].update(size=-1), "size"),
        (lambda d: d["files"][GRAPH].update(size=1.0), "size"),
        (lambda d: d["files"][GRAPH].update(sha256="x" * 64), "sha256"),
        (lambda d: d["files"].pop(GRAPH), "components.vision.graphs.fp32"),
        (lambda d: d["model"].update(logit_scale="1"), "model.logit_scale"),
        (lambda d: d["model"].update(parameters=True), "model.parameters"),
        (lambda d: d["model"].update(name="\x1b[2Jm"), "model.name"),
        (lambda d: d["calibration"].update(synthetic=1), "calibration.synthetic"),
        (lambda d: d["engines"][0].update(component="x"), r"engines\[0\].component"),
        (lambda d: d["engines"].append(d["engines"][0]), r"engines\[1\]"),
        (lambda d: d["engines"][0].update(file="../up"), r"engines\[0\].file"),
        (lambda d: d["receipts"].append("../../x"), r"receipts\[1\]"),
        (lambda d: d["receipts"].append("accuracy"), "receipts"),
        (lambda d: d["components"]["vision"]["spec"].update(name="x"), r"spec\.name"),
        (lambda d: d["components"]["vision"]["spec"]["axes"][0].update(min=9), "components.vision.spec"),
        (lambda d: d["components"]["vision"]["spec"]["inputs"][0].update(shape=["b"]), r"shape\[0\]"),
        (lambda d: d.update(engines={}), "engines"),
        (lambda d: d.update(components=None), "components"),
    ],
)
def test_wrong_manifests_name_the_entry(bundle: Bundle, change: Any, named: str) -> None:
    rewrite(bundle, change)
    with pytest.raises(IntegrityError, match=named):
        Bundle.open(bundle.root)


@pytest.mark.parametrize(
    ("change", "command"),
    [
        ({}, "ivl-export build --model folder --precision fp8 --calib IMAGES --out {out}"),
        ({"model": {"source": "internvl-nano (shipped)"}, "calibration": None},
         "ivl-export build --model internvl-nano --precision fp8 --out {out}"),
        ({"model": {"source": "it's; rm -rf /"}}, """ --model 'it'"'"'s; rm -rf /' """),
        ({"model": {"source": "\x1b[2J"}}, "ivl-export build --precision fp8"),
        ({"model": 3, "precision": ["x"], "calibration": "?"}, "ivl-export build --out {out}"),
    ],
)  # fmt: skip
def test_an_older_bundle_is_refused_with_the_line_that_rebuilds_it(
    bundle: Bundle, change: dict[str, Any], command: str
) -> None:
    old = {
        "schema": 2,
        "precision": "fp8",
        "model": {"source": "folder"},
        "calibration": {"synthetic": False},
    }
    (bundle.root / "manifest.json").write_text(json.dumps({**old, **change}))
    with pytest.raises(IntegrityError, match=r"schema 2.*reads schema 4") as caught:
        Bundle.open(bundle.root)
    assert command.format(out=bundle.root) in caught.value.fix
    assert caught.value.fix.isprintable()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"schema": 1, "schema": 1}',
        b'{"schema": NaN}',
        b'{"schema": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b" " * (MAX_JSON_BYTES + 1),
    ],
    ids=["empty", "list", "cut", "utf16", "duplicate", "nan", "digits", "deep", "huge"],
)
def test_garbage_manifests_are_refused(bundle: Bundle, raw: bytes) -> None:
    (bundle.root / "manifest.json").write_bytes(raw)
    with pytest.raises(IntegrityError):
        Bundle.open(bundle.root)


@given(path=st.lists(st.integers(0, 30), min_size=1, max_size=6), value=JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_replaced_entry_is_read_or_refused(path: list[int], value: Any) -> None:
    data = make_manifest().with_files({GRAPH: FileEntry("0" * 64, 1)}).to_json()
    node: Any = data
    for step in path:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = keys[step % len(keys)]
        if not isinstance(node[key], dict | list):
            node[key] = value
            break
        node = node[key]
    with contextlib.suppress(IntegrityError):  # any other exception fails
        manifest_from_json(data)


def test_damage_is_found(bundle: Bundle) -> None:
    graph = bundle.root / GRAPH
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + b"!")
    Bundle.open(bundle.root, verify="size")
    with pytest.raises(IntegrityError, match="sha256"):
        Bundle.open(bundle.root, verify="hash")
    graph.write_bytes(content + b" ")
    with pytest.raises(IntegrityError, match=r"vision\.fp32\.onnx"):
        Bundle.open(bundle.root)
    graph.unlink()
    with pytest.raises(IntegrityError, match=r"vision\.fp32\.onnx"):
        Bundle.open(bundle.root)
    Bundle.open(bundle.root, verify=None)


def test_unlisted_files_are_found_and_never_handed_out(bundle: Bundle) -> None:
    (bundle.root / "onnx/stray.bin").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="stray"):
        bundle.path("onnx/stray.bin")
    with pytest.raises(IntegrityError, match="stray"):
        Bundle.open(bundle.root, verify="hash")


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_links_out_of_the_bundle_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((bundle.root / GRAPH).read_bytes())
    (bundle.root / GRAPH).unlink()
    (bundle.root / GRAPH).symlink_to(outside)
    with pytest.raises(IntegrityError, match="outside"):
        Bundle.open(bundle.root)
    staging = stage(tmp_path / "again")
    (staging / "link").symlink_to(outside)
    with pytest.raises(BuildError, match="link"):
        seal(staging, make_manifest(), tmp_path / "out2")


def test_seal_refuses_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    with pytest.raises(BuildError, match="not a bundle"):
        seal(stage(tmp_path / "s"), make_manifest(), tmp_path / "home")
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


def test_seal_refuses_missing_files_and_odd_recipes(tmp_path: Path) -> None:
    staging = stage(tmp_path / "s")
    (staging / "receipts/accuracy.json").unlink()
    with pytest.raises(BuildError, match="accuracy"):
        seal(staging, make_manifest(), tmp_path / "out")
    with pytest.raises(BuildError, match="manifest"):
        seal(stage(tmp_path / "t"), make_manifest(rules={"x": float("nan")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_disk_full_is_a_build_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = stage(tmp_path / "s")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildError, match="disk is full") as error:
        seal(staging, make_manifest(), tmp_path / "out")
    assert "Free some space" in error.value.fix
    assert not (tmp_path / "out").exists()


KILLED = """
import os, sys
from pathlib import Path
from ivl_export import bundle
sys.path.insert(0, {tests!r})
from test_bundle import make_manifest, stage
work, point = Path({work!r}), {point!r}
calls = 0
real = getattr(os, {name!r})
def hook(*args, **kwargs):
    global calls
    calls += 1
    if calls == point:
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)
setattr(os, {name!r}, hook)
bundle.seal(stage(work / "staging", "two"), make_manifest(), work / "out")
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize(
    ("name", "point", "wins"),
    [
        ("fsync", 2, "one"),  # while files are hashed
        ("fsync", 4, "one"),  # when the manifest is written
        ("rename", 1, "one"),  # before the first rename
        ("rename", 2, "one"),  # between the two: the old bundle is put back
        ("unlink", 1, "two"),  # after the second: only the old one's removal is missing
    ],
)
@pytest.mark.slow
def test_a_killed_seal_leaves_the_old_or_the_new(
    bundle: Bundle, tmp_path: Path, name: str, point: int, wins: str
) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), work=str(tmp_path), point=point, name=name)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
    opened = Bundle.open(tmp_path / "out", verify="hash")
    assert opened.receipt("accuracy") == {"mark": wins}

    # and sealing again succeeds and leaves no other files
    again = seal(stage(tmp_path / "staging", "three"), make_manifest(), tmp_path / "out")
    assert Bundle.open(again.root, verify="hash").receipt("accuracy") == {"mark": "three"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
