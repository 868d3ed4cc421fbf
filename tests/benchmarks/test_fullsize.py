"""The checkpoint maker and the full-size report, at small widths."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ivl_export.benchmarks.fullsize import build, document, report, tool
from ivl_export.benchmarks.fullsize.make_checkpoint import LAYOUTS, MASSIVE, SCENES, main, make_checkpoint
from ivl_export.benchmarks.fullsize.measured import StepFailed, run
from ivl_export.benchmarks.runtime.models import CONFIGS
from ivl_export.export.unquantized import weight_keys
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.tokenizer import SentencePieceTokenizer
from ivl_export.models import InternVLConfig, QLlamaConfig, VisionConfig, load_model
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.qllama import Visible
from ivl_export.models.registry import expected_shapes, sliced
from ivl_export.pipeline.config import ORT, BuildConfig
from ivl_export.pipeline.graph_steps import BASE_STORE, LOW_STORE
from ivl_export.pipeline.plan import plan_build
from ivl_export.quantization.quantize import quantise, stored_names

NARROW = InternVLConfig(
    VisionConfig(320, 6, 5, 640, 56, 14),
    QLlamaConfig(256, 4, 4, 384, 1500),
    clip_embed_dim=24,
    attn_pool_num_heads=4,
    num_query_token=5,
)


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("seeded")
    shards = make_checkpoint(out, NARROW, depth=48, shard_bytes=4_000_000)
    assert len(shards) > 2
    return out


def test_it_is_a_published_checkpoint_that_runs(checkpoint_dir: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_dir)
    assert checkpoint.config == NARROW
    assert {ref.dtype for ref in checkpoint.tensors.values()} == {"bfloat16"}
    total = json.loads((checkpoint_dir / "model.safetensors.index.json").read_text())["metadata"][
        "total_size"
    ]
    assert total == sum(ref.nbytes for ref in checkpoint.tensors.values())
    model = load_model(checkpoint)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pixels = torch.randn(2, 3, 56, 56, generator=generator)
        tokens = model.vision_model(pixels)
        positions = torch.arange(5)[None]
        hidden, _ = model.qllama(model.query_tokens.expand(2, -1, -1), positions, Visible(), tokens, 5)
    for values in (tokens, hidden):
        assert torch.isfinite(values).all()
        assert 1e-3 < float(values.std()) < 1e3


def test_activations_have_massive_channels(checkpoint_dir: Path) -> None:
    model = load_model(checkpoint_dir)
    with torch.no_grad():
        tokens = model.vision_model(torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1)))
    assert torch.isfinite(tokens).all()
    rms = tokens.square().mean((0, 1)).sqrt()
    largest = rms.sort(descending=True).values
    assert largest[MASSIVE - 1] > 5 * rms.median(), "as many outlier channels as configured"


def test_weights_have_heavy_tails(checkpoint_dir: Path) -> None:
    weight = open_checkpoint(checkpoint_dir).load(
        "vision_model.encoder.layers.1.mlp.fc1.weight", torch.float32
    )
    kurtosis = float(weight.pow(4).mean() / weight.square().mean().square())
    assert 4 < kurtosis < 40, "a normal distribution has 3"
    assert 0.7 < float(weight.std()) * weight.shape[1] ** 0.5 < 1.8


def test_a_slice_has_the_layers_of_the_whole(checkpoint_dir: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, sliced(NARROW, 2, 1), depth=48)
    part, whole = open_checkpoint(tmp_path), open_checkpoint(checkpoint_dir)
    assert part.config.vision.num_hidden_layers == 2
    assert set(part.tensors) < set(whole.tensors)
    assert all(torch.equal(part.load(key), whole.load(key)) for key in part.tensors)


def test_seeds_differ_and_repeat(checkpoint_dir: Path, tmp_path: Path) -> None:
    small = sliced(NARROW, 1, 1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint(tmp_path / name, small, seed=seed)
    a, b, c = (open_checkpoint(tmp_path / name).revision for name in "abc")
    assert a == b != c


def test_holes_have_the_sizes_of_the_whole_model(tmp_path: Path) -> None:
    shards = make_checkpoint(tmp_path, InternVLConfig(), holes=True)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == InternVLConfig()
    assert len(checkpoint.tensors) == 1048, "as published"
    assert 27e9 < sum(path.stat().st_size for path in shards) < 29e9
    assert sum(path.stat().st_blocks for path in shards) * 512 < 1e6


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "narrow.json").write_text(json.dumps(NARROW.to_published()))
    out = tmp_path / "out"
    args = [str(out), "--config", str(tmp_path / "narrow.json"), "--blocks", "2", "--qllama-blocks", "1"]
    assert main(args) == 0
    assert "2 + 1 blocks, 1 shards" in capsys.readouterr().out
    config = open_checkpoint(out).config
    assert (config.vision.num_hidden_layers, config.qllama.num_hidden_layers) == (2, 1)
    # Files that 'build' needs besides the weights.
    assert len(SentencePieceTokenizer(out / "tokenizer.model")) <= config.qllama.vocab_size
    assert ImageSettings.load(out / "preprocessor_config.json").size == 56
    plan = plan_build(BuildConfig(out=tmp_path / "bundle", model=out, backend=(ORT,)))
    assert len(plan.calibration) + len(plan.held_out) == SCENES


@pytest.mark.slow
def test_memory_that_no_file_backs_is_what_is_measured(tmp_path: Path) -> None:
    mapped = tmp_path / "mapped"
    mapped.write_bytes(bytes(64 << 20))
    touch = (
        "import mmap, sys, time; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ);"
        "print(sum(m[::4096])); time.sleep(0.3)"
    )
    script = "import time; held = bytearray(200 << 20); time.sleep(0.3); print(len(held))"
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    plain = run([sys.executable, "-c", script])
    assert plain.stdout == f"{200 << 20}\n"
    assert plain.seconds > 0.3
    for result in (plain, run([sys.executable, "-c", nested, script])):
        assert 200 << 20 <= result.peak_anonymous < 260 << 20
    assert run([sys.executable, "-c", touch, str(mapped)]).peak_anonymous < 40 << 20
    with pytest.raises(StepFailed, match=r"exit code 3: no such thing"):
        run([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_one_pass_over_the_shards_quantises_as_memory_does(
    checkpoint_dir: Path, tmp_path: Path, recipe: str
) -> None:
    summary = tool.quantise(checkpoint_dir, tmp_path, ["vision"], recipe)
    assert summary["layers"] == 6 * 4
    low, stored = (load_file(tmp_path / store) for store in (LOW_STORE, BASE_STORE))
    assert len(stored) == summary["kept"]
    checkpoint = open_checkpoint(checkpoint_dir)
    for i in range(6):
        layer = f"vision_model.encoder.layers.{i}.mlp.fc2"
        values, scale = quantise(checkpoint.load(f"{layer}.weight"), recipe)
        names = stored_names(layer, recipe, "bf16")
        assert torch.equal(low[names[0]].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(low[names[2]], scale)
    assert not {name for name in low if not name.startswith("vision_model")}


@pytest.mark.slow
def test_the_report_measures_and_cleans_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "narrow.json").write_text(json.dumps(NARROW.to_published()))
    work, out = tmp_path / "work", tmp_path / "receipts" / "narrow.json"
    args = ["--work", str(work), "--out", str(out), "--config", str(tmp_path / "narrow.json")]
    assert report.main([*args, "--blocks", "3", "--qllama-blocks", "1", "--steps", "cp,quantise"]) == 0
    assert not work.exists()
    receipt = json.loads(out.read_text())
    rows = {row["step"]: row for row in receipt["rows"]}
    assert list(rows) == ["make", "cp", "quantise", "quantise-int8"]
    assert receipt["config"]["vision_config"]["num_hidden_layers"] == 3
    assert rows["cp"]["bytes_written"] == rows["cp"]["bytes_read"] < rows["make"]["bytes_written"]
    assert 0 < rows["quantise"]["bytes_written"] < rows["quantise"]["bytes_read"] < rows["cp"]["bytes_read"]
    assert rows["quantise"]["peak_anonymous"] > 50e6, "torch alone takes more"
    assert rows["quantise"]["details"]["layers"] == 3 * 4
    assert rows["cp"]["ratio"] == pytest.approx(1)
    assert receipt["versions"]["torch"] == torch.__version__
    assert "quantise" in capsys.readouterr().out
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(SystemExit):
        report.main(["--work", str(tmp_path / "full"), "--out", str(out)])
    assert (tmp_path / "full" / "mine").exists()


def test_a_step_that_fails_is_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = report.Report(tmp_path)
    result.step("broken", [sys.executable, "-c", "raise SystemExit('the reason')"], lambda: 0)
    report.print_report(result.rows, "title")
    assert "broken: exit code 1: the reason" in capsys.readouterr().out
    assert result.rows[0].seconds is None


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "receipt.json"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from ivl_export.benchmarks.fullsize.report import Report, write\n"
        "out = Path(sys.argv[1])\n"
        "keep = lambda rows: write({'rows': [row.step for row in rows]}, out)\n"
        "found = Report(out.parent, keep)\n"
        "found.step('first', [sys.executable, '-c', ''], lambda: 0)\n"
        "found.step('second', ['kill', '-9', str(os.getpid())], lambda: 0)\n"
        "found.step('third', ['sleep', '60'], lambda: 0)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(out)], stderr=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads(out.read_text())["rows"][0] == "first"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_calibration_is_timed_by_block_and_its_scales_make_the_graphs(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    summary = tool.calibrate(checkpoint_dir, tmp_path, ["vision"])
    assert set(summary["seconds_per_sample_and_block"]) == {"vision"}
    per_block = summary["seconds_per_sample_and_block"]["vision"]
    assert summary["estimate"]["seconds"] == pytest.approx(per_block * 48 * -(-512 // 20)), "at full depth"
    assert tool.graphs(checkpoint_dir, tmp_path, ["vision"]) == {"promised": {"vision": 6 * 4}}
    assert (tmp_path / "onnx" / "vision.bf16.onnx").is_file()


@pytest.mark.slow
def test_the_plain_route_writes_the_same_weights(tmp_path: Path) -> None:
    """Holds every weight that ours refers to, or its cost would compare with nothing."""
    import onnx

    model, out = tmp_path / "model", tmp_path / "plain"
    make_checkpoint(model, sliced(NARROW, 1, 1))
    tool.plain(model, out, ["qllama_text"])
    graph = out / "qllama_text.onnx"
    assert (out / "qllama_text.onnx.data").stat().st_size > 20 * graph.stat().st_size > 0
    loaded = onnx.load(graph)
    assert [value.name for value in loaded.graph.input] == ["input_ids", "lengths"]
    checkpoint = open_checkpoint(model)
    needed = sum(checkpoint.tensors[key].nbytes for key in weight_keys(checkpoint, ["qllama_text"]))
    stored = sum(len(tensor.raw_data) for tensor in loaded.graph.initializer)
    assert stored == pytest.approx(needed, rel=0.01), "all weights, each once"


def test_the_disk_that_a_run_needs() -> None:
    size = 2 * sum(math.prod(shape) for shape in expected_shapes(NARROW).values())
    assert report._needed(NARROW, ["zero-copy"], ["vision"]) == size
    assert report._needed(NARROW, ["cp", "plain"], ["vision"]) == 2 * size
    everything = ["vision", "qllama_query", "qllama_text", "qllama_step"]
    assert 2.5 * size < report._needed(NARROW, ["plain"], everything) < 4 * size, "QLLaMA three times"


def test_the_document_is_written_from_the_receipts(tmp_path: Path) -> None:
    text = f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n"
    row = {"step": "plain", "seconds": 12.34, "peak_anonymous": 5 * 10**9, "bytes_read": 10**9, "ratio": 3.21}
    row |= {
        "bytes_written": 0,
        "error": None,
        "details": {"times_seconds_of_copy": 4, "times_memory_of_copy": 9},
    }
    failed = {**row, "seconds": None, "error": "exit code 1: a | b\nc", "details": None}
    receipt = {
        "config": NARROW.to_published(),
        "components": ["vision"],
        "holes": False,
        "rows": [row, failed],
    }
    path = tmp_path / "fullsize-x.json"
    path.write_text(json.dumps(receipt))
    new = document.render(text, document.table([path]))
    figures = "| 6 + 4 | vision | plain | 12.3 | 5.00 | 1.00 | 0.00 | 3.21 |"
    assert f"{figures} 4.0x the seconds of copy; 9.0x its memory |" in new.splitlines()
    assert "| failed: exit code 1: a / b c |" in new
    assert "old" not in new
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert document.render(new, document.table([path])) == new
    engine = {
        "promised": 24,
        "products": {"fp8xfp8": 24, "bf16xbf16": 4},
        "record": {"predicted_bytes": 21 * 10**8},
        "anonymous_before": 10**9,
    }
    path.write_text(json.dumps({**receipt, "rows": [{**row, "details": {"vision": engine}}]}))
    new = document.render(text, document.table([path]))
    assert "24 quantised products promised; found 4 bf16xbf16, 24 fp8xfp8; build predicted to take" in new
    assert "predicted to take 2.10 GB; took 4.00 GB |" in new
    with pytest.raises(ValueError, match="must occur once"):
        document.render("no marks", [])


def test_the_document_is_not_stale() -> None:
    assert document.main(["--check"]) == 0, "run python -m ivl_export.benchmarks.fullsize.document"


@pytest.mark.parametrize("text", ["internvl3-1b", "internvl3-38b:45+4", "internvit-6b"])
def test_layouts_are_whole_or_cut(text: str) -> None:
    layout = build.Layout.of(text)
    assert str(layout) == text
    assert layout.whole == (":" not in text)


@pytest.mark.parametrize("text", ["internvl9", "internvl3-1b:4", "internvl3-1b:0+1", "internvl3-1b:24+25"])
def test_unknown_layouts_are_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build.main(["--work", str(tmp_path), "--layouts", text])
    assert repr(text.partition(":")[0] if ":" not in text else text) in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_build_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small layout under a published name, twice: the second run replaces the row of the first."""
    small = CONFIGS["tiny-tiles"]
    monkeypatch.setitem(LAYOUTS, "tiny", small)
    monkeypatch.setattr(build, "run", lambda command: run(maker(command)))

    def maker(command: list[str]) -> list[str]:
        """The maker in another process does not know the layout: it reads the config."""
        if "--layout" in command:
            config = tmp_path / "config.json"
            config.write_text(json.dumps(small.to_published()))
            where = command.index("--layout")
            command[where : where + 2] = ["--config", str(config)]
        return command

    out = tmp_path / "receipt.json"
    args = ["--work", str(tmp_path / "work"), "--layouts", "tiny:2+1", "--out", str(out)]
    for _ in range(2):
        assert build.main([*args, "--", "--backend", "onnxruntime"]) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert row["layout"] == "tiny:2+1"
    assert row["peak_anonymous"] > 1e8
    assert row["verification"]["onnxruntime-cpu"]["decoder"]["promised"] == 7
    assert list((tmp_path / "work").iterdir()) == []
    header, rule, cells = document.builds(out)
    assert len(header) == len(rule) == len(cells)
    assert cells[:3] == ("tiny", "2 + 1", "fp8")
