"""Published templates by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivl_export import cli
from ivl_export.errors import UsageError
from ivl_export.runtime import InternVL
from ivl_export.runtime.templates import PLAIN, names, templates
from ivl_export.runtime.zero_shot import fill

pytestmark = pytest.mark.numeric

SIZES = {
    "imagenet": 80,
    "imagenet-zh": 80,
    "imagenet-it": 49,
    "imagenet-ja": 37,
    "imagenet-ar": 55,
    "photo": 7,
}


def test_the_published_lists_are_whole() -> None:
    assert {name: len(templates(name)) for name in SIZES} == SIZES
    assert set(templates("photo")) < set(templates("imagenet"))
    assert templates("plain") == PLAIN


@pytest.mark.parametrize("name", names())
def test_every_template_has_one_place_for_the_label(name: str) -> None:
    assert templates(name)
    for text in templates(name):
        assert text.count("{}") == 1
        assert "zebra" in fill(text, "zebra")
        assert not set("{}") & set(fill(text, "zebra"))


def test_an_unknown_name_is_an_error_that_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        templates("?")
    assert all(name in caught.value.why for name in names())


def test_the_command_line_averages_over_them(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "a.png")
    line = ["run", "classify", str(tiny_bundle), str(tmp_path), "--labels", "ring,star", "--json"]
    assert cli.main([*line, "--prompts", "eurosat"]) == 0
    top = json.loads(capsys.readouterr().out)["items"][0]["top"]
    with InternVL.load(tiny_bundle, threads=1) as model:
        want = model.classify([tmp_path / "a.png"], ["ring", "star"], templates("eurosat"))[0]
    got = {pair["label"]: pair["probability"] for pair in top}
    assert [got["ring"], got["star"]] == pytest.approx(want.tolist(), abs=1e-5)
    assert cli.main([*line, "--prompts", "?"]) == 2
    assert "imagenet-zh" in capsys.readouterr().err
