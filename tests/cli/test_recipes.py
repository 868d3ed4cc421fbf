"""``build --list-recipes`` and ``--show-recipe``: what it prints is what ``--precision`` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ivl_export import cli
from ivl_export.quantization.recipe import Recipe, load_recipe, shipped_recipes


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["build", *arguments]) == 0
    return capsys.readouterr().out


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return run(capsys, "--show-recipe", *arguments)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_that_is_printed_can_be_edited(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "my.yaml"
    own.write_text(show(capsys, name))
    assert load_recipe(own) == load_recipe(name)
    own.write_text(own.read_text().replace(f"name: {name}", "name: my"))
    assert yaml.safe_load(show(capsys, str(own)))["name"] == "my"
    assert Recipe.from_json(json.loads(show(capsys, name, "--json"))) == load_recipe(name)


def test_the_list_says_what_each_does_and_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {entry["name"]: entry for entry in json.loads(run(capsys, "--list-recipes", "--json"))}
    assert tuple(listed) == shipped_recipes()
    assert all(entry["summary"] for entry in listed.values())
    assert listed["fp8"]["targets"] == ["sm89", "sm120", "sm121"]
    assert listed["fp16"]["targets"][0] == "sm75"
    assert "sm75" not in listed["int8"]["targets"]  # its base is bf16
    table = run(capsys, "--list-recipes")
    assert all(name in table for name in shipped_recipes())
    assert "*encoder.layers.*.attn.qkv" in table


def test_errors_name_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--show-recipe", "fp4"]) == 2
    assert "Unknown precision 'fp4'" in capsys.readouterr().err
