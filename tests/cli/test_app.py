"""The command line's frame: fast start, exit codes, errors without tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ivl_export import __version__, cli
from ivl_export.cli import app as app_module
from ivl_export.cli import document, inputs, output
from ivl_export.cli.app import GROUPS, JOINED, RENAMED, VERBS
from ivl_export.errors import InputError, IvlError
from ivl_export.inputs.preprocess import ImageSettings, read_images

HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tensorrt_rtx",
    "transformers",
    "modelopt",
    "matplotlib",
)

READ = partial(read_images, settings=ImageSettings(16))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_lists_every_verb_and_starts_fast() -> None:
    # processor time, since other tests may run at the same time; 0.2 s on the development machine
    code = """
import sys, time
from ivl_export.cli import main
code = main(['--help'])
print(time.process_time(), file=sys.stderr)
sys.exit(code)
"""
    runs = [run_python(code) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert all(f" {verb} " in runs[0].stdout for verb in VERBS)
    assert min(float(run.stderr) for run in runs) < 0.5


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["verify", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
from ivl_export.cli import main
assert main({args!r}) == 0
heavy = sorted(set({HEAVY!r}) & set(sys.modules))
assert not heavy, heavy
"""
    process = run_python(code)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_loads_and_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"ivl-export {verb}" in out
    assert "--install-completion" not in out


@pytest.mark.parametrize("columns", ["80", "100"])
def test_help_fits_one_screen(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line in GROUPS] == list(GROUPS)


@pytest.mark.parametrize("old", list(RENAMED))
def test_a_renamed_verb_works_and_says_its_new_name(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([old, "--help"]) == 0
    former = capsys.readouterr()
    assert former.err == f"note: '{old}' is '{' '.join(RENAMED[old])}' now.\n"
    assert cli.main([*RENAMED[old], "--help"]) == 0
    assert former.out == capsys.readouterr().out


@pytest.mark.parametrize("old", list(JOINED))
def test_an_earlier_name_says_what_to_type_now(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*old.split(), "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["fix"] == f"Type {JOINED[old]}."
    new = JOINED[old].split(",")[0].split()[1:]
    assert new[0] in VERBS


def test_the_page_of_all_commands_is_fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert document.main(["--check"]) == 0
    page = document.PAGE.read_text(encoding="utf-8")
    assert all(f"### ivl-export {verb}" in page for verb in VERBS)
    monkeypatch.setattr(document, "PAGE", tmp_path / "cli.md")
    assert document.main(["--check"]) == 1
    assert document.main([]) == 0
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == page


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"ivl-export {__version__}"
    assert cli.main([]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["verifi", "x"], "Did you mean 'verify'"),
        (["verify"], "Missing argument"),
        (["verify", "--nope", "x"], "--nope"),
        (["run", "classify", "b", "i", "--top", "0", "--labels", "a"], "--top"),
        (["run", "classify", "b", "i", "--mode", "X", "--labels", "a"], "--mode"),
        (["run", "classify", "b", "i"], "--labels"),
        (["run", "retrieve", "b", "i"], "--query"),
        (["run", "embed", "b"], "--text"),
    ],
)
def test_wrong_usage_exits_2(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert cli.main([*args, "--json"]) == 2
    error = json.loads(capsys.readouterr().err)
    assert error["exit_code"] == 2
    assert error["error"] == "UsageError"


def test_errors_say_what_why_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 8
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {tmp_path} is not a bundle.\n  why: ")
    assert "\n  fix: " in captured.err
    assert cli.main(["verify", str(tmp_path), "--json"]) == 8
    captured = capsys.readouterr()
    assert not captured.out
    assert json.loads(captured.err)["error"] == "IntegrityError"
    with pytest.raises(IvlError):
        cli.main(["verify", str(tmp_path), "--debug"])


def test_file_names_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["verify", str(tmp_path / "\x1b[2Jx")])
    assert "\x1b" not in capsys.readouterr().err


def test_unexpected_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("ivl_export.bundle.Bundle.open", broken)
    assert cli.main(["verify", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "Unexpected ZeroDivisionError: first" in err
    assert "--debug" in err
    assert "Traceback" not in err
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "verify", str(tmp_path)])


@pytest.mark.parametrize(
    "args", [["build", "--list-recipes"], ["build", "--list-recipes", "--json"], ["--help"]]
)
@pytest.mark.slow
def test_a_closed_pipe_ends_a_command_quietly(args: list[str]) -> None:
    code = f"import sys; from ivl_export.cli import main; sys.stdin.read(1); sys.exit(main({args!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()  # as head does, before anything was written
    assert process.communicate(b"x", timeout=60)[1] == b""
    assert process.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.slow
def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")  # opening it waits for a writer that never comes
    # The test run itself may be in the background, where shells ignore Ctrl-C for all children.
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
         f"import sys; from ivl_export.cli import main; print('up', flush=True); "
         f"sys.exit(main(['verify', {str(tmp_path)!r}]))"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip() == "Interrupted."  # there is nothing to go on with


@pytest.mark.slow
def test_completion_offers_verbs_and_their_commands() -> None:
    code = "import sys; from ivl_export.cli import main; sys.exit(main([]))"
    for typed, offered in (("ivl-export ", "verify"), ("ivl-export run ", "retrieve")):
        env = {**os.environ, "_IVL_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": typed}
        env["COMP_CWORD"] = str(len(typed.split()))
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert offered in process.stdout.split(), process.stderr


def test_json_survives_file_names_that_are_no_utf8(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    output.print_json({"file": os.fsdecode(b"\xff.png"), "text": "圆形"})
    out = capsysbinary.readouterr().out
    assert "圆形".encode() in out
    assert os.fsencode(json.loads(out)["file"]) == b"\xff.png"


def write_image(path: Path) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_folders_are_searched_and_broken_files_skipped(tmp_path: Path) -> None:
    good = [write_image(tmp_path / name) for name in ("a.png", "deep/b.JPG")]
    (tmp_path / "c.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("x")
    files = inputs.ImageFiles.find([tmp_path])
    readable = [file for piece, images in files.read(READ) for file, _ in zip(piece, images, strict=True)]
    assert readable == good
    assert [Path(s["file"]).name for s in files.skipped] == ["c.png"]


def test_broken_files_that_were_named_are_errors(tmp_path: Path) -> None:
    (tmp_path / "c.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"c\.png"):
        list(inputs.ImageFiles.find([tmp_path / "c.png"]).read(READ))
    with pytest.raises(InputError, match="No image could be read"):
        list(inputs.ImageFiles.find([tmp_path]).read(READ))
    (tmp_path / "empty").mkdir()
    for paths in ([tmp_path / "empty"], [tmp_path / "missing.png"], []):
        with pytest.raises(InputError):
            inputs.ImageFiles.find(paths)


@pytest.mark.parametrize(
    ("verb", "absent", "extra"),
    [("train", "torch", "train"), ("build", "torch", "quant"), ("sensitivity", "onnxscript.ir", "quant")],
)
def test_a_package_of_an_extra_that_is_not_installed(
    verb: str, absent: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {absent!r}", name=absent)

    monkeypatch.setattr(app_module, "load", lacking)
    assert cli.main([verb, "--json"]) == 5
    error = json.loads(capsys.readouterr().err)
    module = absent.partition(".")[0]
    assert error["what"] == f"'ivl-export {verb}' needs {module}, which is not installed."
    assert error["fix"] == f"pip install 'ivl-export[{extra}]'"


def test_a_module_that_no_extra_has_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'ivl_export.gone'", name="ivl_export.gone")

    monkeypatch.setattr(app_module, "load", lacking)
    assert cli.main(["doctor"]) == 1
    assert "bug in ivl-export" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["doctor"], ["build", "--list-recipes"]])
@pytest.mark.slow
def test_a_full_disk_is_no_bug(command: list[str]) -> None:
    code = "import sys; from ivl_export.cli import main; sys.exit(main(sys.argv[1:]))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode != 0
    assert "No space left" in done.stderr
    assert "bug" not in done.stderr
