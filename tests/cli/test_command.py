"""Settings (``-O KEY=VALUE``): their table, their earlier spellings as options, and help pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ivl_export import cli
from ivl_export.cli.app import VERBS, load
from ivl_export.settings import SWITCH, Setting, keyword, number, read_settings, switch, text, whole


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """``command`` and the commands of a group, with the words that call them."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
    for word, part in (inner or {}).items():
        yield from commands(f"{name} {word}", part)


COMMANDS = {name: command for verb in VERBS for name, command in commands(verb, load(verb))}
WITH_SETTINGS = [name for name, command in COMMANDS.items() if command.settings]
TABLE = {
    "threads": Setting("1, 2 or more", "CPU threads", whole(1)),
    "share": Setting("0.5 or another", "a share", number(), name="part", default=0.25),
    "trace": Setting(SWITCH, "write a trace", switch, default=False),
}


def current(name: str, *words: str) -> list[str]:
    return list(COMMANDS[name]._current(words))


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_a_setting_may_be_typed_as_an_option(name: str) -> None:
    for key, setting in COMMANDS[name].settings.items():
        if setting.is_switch:
            assert current(name, f"--{key}") == ["-O", key]
            assert current(name, f"--no-{key}") == ["-O", f"{key}=false"]
        else:
            assert current(name, f"--{key}", "3") == current(name, f"--{key}=3") == ["-O", f"{key}=3"]


def test_earlier_names_of_options() -> None:
    assert current("train qat", "--freeze-scales") == ["-O", "learn-scales=false"]
    assert current("profile", "r.json", "--beside", "s.json") == ["r.json", "--join", "s.json"]
    assert current("run classify", "--prompts", "imagenet") == ["--template", "imagenet"]
    assert current("build", "--engine-option", "refit") == ["--setting", "refit"]


def test_values_that_look_like_settings_are_values() -> None:
    typed = ["B", "--text", "--threads", "--out=--device", "--", "--device", "cpu"]
    assert current("run embed", *typed) == typed
    assert current("run embed", "--text") == ["--text"]  # click says what lacks


def test_every_key_has_one_keyword() -> None:
    for command in COMMANDS.values():
        names = [keyword(command.settings, key) for key in command.settings]
        assert len(set(names)) == len(names)
        assert all(key == key.lower() and "_" not in key for key in command.settings)
        assert not {*command.settings} & {name.lstrip("-") for p in command.params for name in p.opts}


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_help_on_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*name.split(), "-O", "help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {key} (" in printed for key in COMMANDS[name].settings)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_is_short(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*name.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= (45 if name == "build" else 32)


def test_values_and_defaults() -> None:
    assert read_settings(TABLE, ()) == {"part": 0.25, "trace": False}
    assert read_settings(TABLE, ["threads=4", "share = 0.5", "trace"]) == {
        "threads": 4,
        "part": 0.5,
        "trace": True,
    }
    assert read_settings(TABLE, {"threads": 4, "trace": False}) == {
        "threads": 4,
        "part": 0.25,
        "trace": False,
    }


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            ["thread=4"],
            r"no setting 'thread'.*threads \(1, 2 or more\): CPU threads.*Did you mean -O threads\?",
        ),
        (["threads=0"], r"does not take '0'.*It takes 1, 2 or more \(CPU threads\)\. Give -O threads=1,"),
        (["threads"], "does not take True"),
        (["threads=two"], "does not take 'two'"),
        (["share=nan"], "does not take 'nan'"),
        (["share=inf"], "does not take 'inf'"),
        (["trace=maybe"], "Give -O trace,"),
        (["threads=1", "threads=2"], "given twice"),
    ],
)
def test_errors_name_the_key_and_its_values(typed: list[str], message: str) -> None:
    with pytest.raises(Exception, match=f"(?s){message}"):
        read_settings(TABLE, typed)


def test_examples_in_errors_are_accepted() -> None:
    """What a message offers as a value is one that the setting takes."""
    from ivl_export.settings import refused

    for command in COMMANDS.values():
        for key in command.settings:
            words = refused(command.settings, key, "x").fix.removeprefix("Give -O ").split(", or leave")[0]
            assert keyword(command.settings, key) in read_settings(command.settings, [words])


def test_a_wrong_setting_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-O", "threads=none"], ["--threads", "none"], ["-Othreads=none"]):
        assert cli.main(["run", "embed", str(tmp_path), "--text", "a", *words, "--json"]) == 2
        assert "-O threads does not take 'none'" in json.loads(capsys.readouterr().err)["what"]


def test_text_is_not_empty() -> None:
    with pytest.raises(ValueError, match=r"^$"):
        text("")


@pytest.mark.parametrize(
    "words", [["verify"], ["run", "embed"], ["eval", "--task", "questions"], ["profile"]]
)
def test_a_shipped_model_is_not_a_bundle(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "nano-chat"]) == 8
    error = capsys.readouterr().err
    assert "nano-chat is a shipped model, not a bundle" in error
    assert "ivl-export build --model nano-chat" in error


def test_stage_3_is_that_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    """``--stage 3`` is accepted, as before, but ``--model`` says it already."""
    assert cli.main(["train", "--stage", "3"]) == 2
    assert "--model CHAT" in capsys.readouterr().err
    for words in ([], ["--stage", "3"]):
        assert cli.main(["train", "--model", "nano-chat", *words, "--processes", "2"]) == 2
        assert "one process" in capsys.readouterr().err
