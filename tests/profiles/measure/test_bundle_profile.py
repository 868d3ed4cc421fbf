"""Real profiles of a real (tiny) bundle: timed cases, the receipt, the verb's output."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ivl_export import __version__, cli
from ivl_export.bundle import Bundle
from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.errors import BuildError, UsageError
from ivl_export.models.config import InternVLConfig
from ivl_export.profiles.measure.bundle_profile import Options, profile
from ivl_export.profiles.measure.inputs import random_inputs
from ivl_export.profiles.measure.latency import plan
from ivl_export.profiles.measure.machine import commit, machine, versions
from ivl_export.profiles.measure.receipt import SCHEMA, Profile, read, write
from ivl_export.profiles.measure.recording import RecordingComponents
from ivl_export.profiles.measure.timing import StopRule
from ivl_export.runtime import InternVL
from ivl_export.runtime.components import Components
from ivl_export.tests.conftest import TINY

COMPONENTS = ["vision", "qllama_query", "qllama_text", "qllama_step", "qllama_itm"]
CALLS = ["encode_image InternVL-C", "encode_image InternVL-G", "classify", "caption", "encode_text"]
HOST = ["preprocess", "postprocess classify", "tokenize", "postprocess caption"]
SHORT = StopRule(seconds=0.05)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def profiled(tiny_bundle: Path) -> Profile:
    return profile(tiny_bundle, Options(threads=1, batches=[2, 1], lengths=[8], rule=SHORT))


def config_of(bundle: Bundle) -> InternVLConfig:
    return InternVLConfig.from_published(bundle.manifest.model.config)


def without(bundle: Bundle, *names: str) -> InternVL:
    """The bundle as it would be if some components had not been built."""
    left = {k: v for k, v in bundle.manifest.components.items() if k not in names}
    smaller = Bundle(bundle.root, replace(bundle.manifest, components=left))
    return InternVL(smaller, Components(smaller, "onnxruntime"))


def test_every_component_and_call_is_timed_at_every_batch(profiled: Profile) -> None:
    got = [(case.kind, case.name, case.batch) for case in profiled.cases]
    assert [case for case in got if case[0] != "component"] == [
        (kind, name, batch)
        for kind, names in (("chained", CALLS), ("host", HOST))
        for batch in (2, 1)
        for name in names
    ]
    assert list(dict.fromkeys(got))[: 2 * len(COMPONENTS)] == [
        ("component", name, batch) for name in COMPONENTS for batch in (2, 1)
    ]
    for case in profiled.cases:
        assert case.measurement.samples_ns
        assert case.per_second == pytest.approx(case.items * 1e3 / case.measurement.summary.mean_ms)
        assert case.boundary
        assert (case.backend, case.precision) == (
            ("host", "") if case.kind == "host" else ("onnxruntime", "fp32")
        )
    start = profiled.startup
    assert set(start.load_seconds) == set(start.first_call_ms) == set(COMPONENTS)
    assert start.first_request_ms > 1e3 * start.load_seconds["vision"]
    assert "JPEG" in start.boundary
    assert profiled.settings.batches == (2, 1)
    assert profiled.notes == ()


def test_a_chain_spends_its_time_in_its_components(profiled: Profile) -> None:
    stages = {
        "encode_image InternVL-C": {"vision"},
        "encode_image InternVL-G": {"vision", "qllama_query"},
        "classify": {"vision", "preprocess"},
        "caption": {"vision", "qllama_query", "qllama_step", "tokenize"},
        "encode_text": {"qllama_text", "tokenize"},
    }
    for case in profiled.cases:
        if case.kind != "chained":
            assert case.stages_ms == {}
            continue
        assert set(case.stages_ms) == stages[case.name]
        assert 0 < case.components_ms < case.mean_ms
        assert case.components_ms == pytest.approx(
            sum(ms for stage, ms in case.stages_ms.items() if stage in COMPONENTS)
        )


def test_a_caption_is_as_long_as_promised(tiny_bundle: Path) -> None:
    with InternVL.load(tiny_bundle) as model:
        tasks = plan(model, config_of(model.bundle), [3])
        task = next(task for task in tasks if task.name == "caption")
        assert task.items == 3 * task.sizes["new_tokens"]
        before = model.timings.get("qllama_step")
        task.prepare()()
        assert before is None
        # the prompt's pass gives the first token, the last one is never fed back
        assert model.timings["qllama_step"].calls == task.sizes["new_tokens"]


def test_costs_are_shown_with_the_times(profiled: Profile) -> None:
    for case in profiled.cases:
        cost = profiled.cost(case)
        if case.kind != "component":
            assert cost is None
        else:
            assert cost is not None
            assert (cost.component, cost.sizes, cost.dtype) == (case.name, case.sizes, "fp32")
            assert cost.macs > 0


def test_the_receipt_says_what_when_where(profiled: Profile, tiny_bundle: Path) -> None:
    data = json.loads(json.dumps(profiled.to_json(), allow_nan=False))
    assert data["schema"] == SCHEMA
    manifest = (tiny_bundle / "manifest.json").read_bytes()
    assert data["bundle"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert data["bundle"]["recipe"] == "fp32"
    assert data["versions"]["ivl-export"] == __version__
    assert data["versions"]["onnxruntime"]
    assert data["machine"]["cores"] >= 1
    assert data["settings"]["stop"]["seconds"] == SHORT.seconds
    assert data["table19"] is None
    first = data["cases"][0]
    assert len(first["measurement"]["samples_ns"]) == len(profiled.cases[0].measurement.samples_ns)
    assert first["boundary"].startswith("one engine call")
    assert data["costs"][0]["flops"] == 2 * data["costs"][0]["macs"]
    assert str(tiny_bundle.parent) not in json.dumps(data)
    assert data["clocks"]["gpus"] == []
    assert Profile.from_json(data) == profiled


def test_lengths_are_swept_as_far_as_they_go(profiled: Profile) -> None:
    texts = {c.sizes["text"] for c in profiled.of_kind("component") if c.name == "qllama_text"}
    pasts = {c.sizes["past"] for c in profiled.of_kind("component") if c.name == "qllama_step"}
    assert {8, 16} == texts
    assert len(pasts) == 2


def test_every_engine_call_has_a_floor(profiled: Profile) -> None:
    assert profiled.ceilings is not None
    for case in profiled.cases:
        if case.kind == "host":
            assert case.floor is None
            continue
        assert case.floor is not None, case.name
        assert case.floor.ms > 0
        assert case.of_floor == case.floor.ms / case.measurement.summary.p50_ms
    by_name = {(c.name, c.batch): c for c in profiled.of_kind("chained")}
    alone = {(c.name, c.batch): c for c in reversed(profiled.of_kind("component"))}
    for batch in (1, 2):  # a chain's floor is that of its parts, one after another
        g = by_name["encode_image InternVL-G", batch].floor
        parts = [alone[name, batch].floor for name in ("vision", "qllama_query")]
        assert g is not None
        assert g.ms == pytest.approx(sum(part.ms for part in parts if part is not None))


def test_calls_of_a_caption_are_recorded(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    components = RecordingComponents(bundle, "onnxruntime", threads=1)
    with InternVL(bundle, components) as model:
        task = next(t for t in plan(model, config_of(bundle), [2]) if t.name == "caption")
        calls = components.calls(task.prepare())
        assert {call.component: call.sizes["batch"] for call in calls} == {
            "vision": 2, "qllama_query": 2, "qllama_step": 2,
        }  # fmt: skip
        steps = [call for call in calls if call.component == "qllama_step"]
        assert {call.sizes["text"]: call.count for call in steps} == {
            task.sizes["prompt"]: 1, 1: task.sizes["new_tokens"] - 1,
        }  # fmt: skip
        before = model.timings["vision"].calls
        model.encode_image(np.zeros((1, *components.spec("vision").shape(
            components.spec("vision").inputs[0], "opt")[1:]), np.float32))  # fmt: skip
        assert model.timings["vision"].calls == before + 1
        assert components.calls(lambda: None) == ()


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("which", ["min", "opt"])
def test_random_inputs_are_valid_and_repeatable(tiny_bundle: Path, component: str, which: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec, vocabulary = bundle.spec(component), config_of(bundle).qllama.vocab_size
    sizes = {axis.name: getattr(axis, which) for axis in spec.axes}
    inputs = random_inputs(spec, sizes, vocabulary)
    again = random_inputs(spec, sizes, vocabulary)
    assert all(np.array_equal(inputs[name], again[name]) for name in inputs)
    if "input_ids" in inputs:
        assert inputs["input_ids"].min() >= 3
        assert inputs["input_ids"].max() < vocabulary
    if "positions" in inputs:
        assert inputs["positions"][-1].tolist() == [sizes["past"] + i for i in range(sizes["text"])]
    with InternVL.load(tiny_bundle) as model:
        outputs = model.components.run(component, inputs)
    assert all(np.isfinite(value).all() for value in outputs.values())


def test_an_unknown_input_is_not_guessed() -> None:
    spec = ComponentSpec("new", (TensorSpec("mystery", "int64", ("batch",)),), (), (Axis("batch", 1, 1, 2),))
    with pytest.raises(UsageError, match="mystery"):
        random_inputs(spec, {"batch": 1}, 100)


def test_a_partial_bundle_is_profiled_as_far_as_it_goes(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    config = config_of(bundle)

    def names(*missing: str) -> list[str]:
        return [t.name for t in plan(without(bundle, "qllama_itm", *missing), config, [1])]

    assert names("qllama_query", "qllama_step") == [
        "vision", "qllama_text", "encode_image InternVL-C", "classify", "encode_text", *HOST[:3],
    ]  # fmt: skip
    assert names("vision") == ["qllama_query", "qllama_text", "qllama_step", "encode_text", *HOST[2:]]
    assert names("qllama_step", "qllama_text")[2:] == [*CALLS[:3], *HOST[:2]]


def test_batches_and_lengths_stay_within_what_was_built(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    config = config_of(bundle)
    with InternVL.load(tiny_bundle) as model:
        assert {task.batch for task in plan(model, config)} == {1, 8}
        assert [t.batch for t in plan(model, config, [4, 4, 2]) if t.name == "vision"] == [4, 2]
        for bad in (0, 10_000):
            with pytest.raises(UsageError, match=f"Batch {bad}"):
                plan(model, config, [1, bad])
        lengths = [t.sizes["text"] for t in plan(model, config, [1], [80]) if t.name == "qllama_text"]
        assert lengths == [16, 80]
        too_long = [t for t in plan(model, config, [1], [5000]) if t.name == "qllama_text"]
        assert len(too_long) == 1


def test_without_onnx_there_are_times_and_a_note(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = profile(tiny_bundle, Options(threads=1, batches=[1], rule=StopRule(seconds=0.01)))
    assert result.costs == ()
    assert len(result.cases) == len(COMPONENTS) + len(CALLS) + len(HOST)
    assert all(case.floor is None for case in result.cases)
    assert result.ceilings is not None
    assert {product.kind for product in result.ceilings.products} == {"bf16"}  # ONNX Runtime's need onnx
    assert any("pip install onnx" in note for note in result.notes)
    assert result.cost(result.cases[0]) is None


def test_the_baseline_is_of_the_same_weights(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TINY.parent.parent.parent)  # the bundle names its source from there
    options = Options(threads=1, batches=[1], rule=StopRule(seconds=0.01), table19=True, ceilings=False)
    result = profile(tiny_bundle, options)
    assert [(c.name, c.backend, c.precision) for c in result.of_kind("baseline")] == [
        (name, "PyTorch", "bf16") for name in ("vision", "qllama_query", "qllama_text")
    ]
    table = result.table19
    assert table is not None
    own = [line for line in table.lines if line.paper is None]
    assert [line.method for line in own] == ["InternVL-C", "InternVL-G"]
    for line in own:
        baseline, engine = line.measured
        assert baseline is not None
        assert engine is not None
        assert line.ratios == (1.0, (baseline.total_ms or 0) / (engine.total_ms or 1))
    monkeypatch.chdir(tmp_path)
    gone = profile(tiny_bundle, options)
    assert not gone.of_kind("baseline")
    assert any("give -O checkpoint" in note for note in gone.notes)
    actual = profile(tiny_bundle, replace(options, checkpoint=TINY))
    assert len(actual.of_kind("baseline")) == 3
    with pytest.raises(UsageError, match="not the one that the bundle was built from"):
        profile(tiny_bundle, replace(options, checkpoint=TINY.parent.parent.parent / "models" / "nano"))


def test_the_machine_is_described_and_the_commit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    assert here.cpu
    assert here.cores >= 1
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for args in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *args], check=True)
    (tmp_path / "__init__.py").touch()
    assert commit(tmp_path) is None  # a package in that folder is not of that repository
    subprocess.run(["git", "add", "__init__.py"], check=True)
    subprocess.run(["git", *identity, "commit", "-q", "-m", "second"], check=True)
    clean = commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("x")
    subprocess.run(["git", "add", "file"], check=True)
    assert commit(tmp_path) == f"{clean}+"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


def test_the_verb_prints_tables_and_writes_a_receipt(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "receipt.json"
    args = ["profile", str(tiny_bundle), "--batch", "1", "--seconds", "0.02", "--threads", "1"]
    as_csv = tmp_path / "cases.csv"
    assert cli.main([*args, "--table19", "--no-baseline", "--out", str(out), "--csv", str(as_csv)]) == 0
    captured = capsys.readouterr()
    for text in (
        "Components alone, times in ms",
        "p99",
        "images",
        "caption",
        "Work of one call",
        "attn.qkv",
        "InternVL-G",
        "84.6",
        "arXiv 2312.14238, Table 19",
        "Work outside the engines",
        "Ceilings of the CPU",
        "first request",
        "Table 11",
        "The paper's lines are empty: they are about InternVL-14B",
    ):
        assert text in captured.out, text
    ended = [line.rpartition(" ")[0].rpartition(" ")[0] for line in captured.err.splitlines()]
    assert ended == ["done measure", "done measure ceilings"], "lines, and no bar where there is no terminal"
    data = json.loads(out.read_text())
    assert data["schema"] == SCHEMA
    assert all(not any(line["measured"]) for line in data["table19"]["lines"] if line["paper"])
    assert {c["sizes"]["text"] for c in data["cases"] if c["name"] == "qllama_text"} == {16, 80}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cases.csv", "receipt.json"]
    rows = list(csv.DictReader(as_csv.open(newline="")))
    assert len(rows) == len(data["cases"])
    for row, case in zip(rows, data["cases"], strict=True):
        assert (row["name"], float(row["p99_ms"])) == (case["name"], case["measurement"]["summary"]["p99_ms"])
    assert cli.main(["profile", str(out), "--beside", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == captured.out.splitlines()[:-2]  # the files written
    assert json.loads(json.dumps(read(out).to_json())) == data
    assert cli.main(["profile", str(out), "--batch", "1"]) == 2
    assert "--batch is for measuring" in capsys.readouterr().err


def test_the_verb_prints_json_alone(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", str(tiny_bundle), "--batch", "2", "--seconds", "0.02", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {case["batch"] for case in data["cases"]} == {2}


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["-O", "lengths=1,x"], 2, "-O lengths does not take '1,x'"),
        (["--lengths", "8,9000"], 2, "Texts of 9000 tokens"),
        (["-O", "checkpoint=."], 2, "--table19"),
        (["--join", "nothing.json"], 3, "nothing.json"),
        (["--html", "nowhere/at/all.html"], 2, "--html nowhere/at/all.html"),
        (["--batch", "1,x"], 2, "--batch '1,x'"),
        (["--batch", ""], 2, "--batch"),
        (["--batch", "0"], 2, "--batch '0'"),
        (["--batch", "100000"], 2, "Batch 100000"),
        (["--seconds", "0"], 2, "--seconds"),
        (["--backend", "abacus"], 2, "Unknown backend 'abacus'"),
        (["--target", "sm89"], 5, "sm89"),
        (["--out", "nowhere/at/all.json"], 2, "--out nowhere/at/all.json"),
        (["--out", "."], 2, "--out ."),
    ],
)
def test_what_cannot_be_done_is_said(
    tiny_bundle: Path, args: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["profile", str(tiny_bundle), *args]) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_a_receipt_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "receipt.json"
    folder.mkdir()
    with pytest.raises(BuildError, match="Cannot write"):
        write({"schema": SCHEMA}, folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["receipt.json"]


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from ivl_export.cli import main
assert main(["profile", "--help"]) == 0
import ivl_export.profiles.measure.bundle_profile
heavy = sorted({"torch", "onnx", "onnxruntime", "tensorrt_rtx", "matplotlib"} & set(sys.modules))
assert not heavy, heavy
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "--table19" in process.stdout
