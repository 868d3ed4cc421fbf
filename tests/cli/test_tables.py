"""What commands print at 80 and at 100 columns, with long paths: no word is broken, no line is too wide."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivl_export import cli
from ivl_export.cli import output
from ivl_export.cli.build_tables import by_cause
from ivl_export.profiles.measure.receipt import write
from ivl_export.tests.profiles.made_profiles import made_case, made_profile

CLI = Path(cli.__file__).parent
LINES = [
    "verify BUNDLE --contents",
    "verify BUNDLE --layers --component vision",
    "verify BUNDLE --component vision --backend torch",
    "compare BUNDLE BUNDLE",
    "compare RECEIPT RECEIPT",
    "profile RECEIPT",
    "profile BUNDLE --layers --no-latency --calls 1 --component vision",
    "profile BUNDLE --table19 --no-baseline --no-ceilings --batch 1 --seconds 0.01",
    "estimate --gpu l40s --layers --evidence --cost-per-hour 1.5",
    "estimate --gpu l40s --model nano-chat --layers",
    "doctor --model nano --precision int8",
    "doctor cache ls",
    "build --list-recipes",
    "build --model MODEL --precision bf16 --backend onnxruntime --dry-run --out FOLDER/out",
    "train scenes FOLDER/scenes --count 2 --lang zh",
    "run embed BUNDLE PHOTOS --text text",
    "run classify BUNDLE PHOTOS --labels cat,dog",
    "run retrieve BUNDLE PHOTOS --query text",
    "run caption BUNDLE PHOTOS --max-new-tokens 3",
    "run features BUNDLE PHOTOS --out FOLDER/features.safetensors",
]


@pytest.fixture
def folder(tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a path of more than 100 characters, and what the lines name in it."""
    folder = (
        tmp_path / "models-of-a-team-which-likes-long-names" / "InternVL-14B-224px" / "int8-smoothquant-kept"
    )
    (folder / "photos").mkdir(parents=True)
    (folder / "bundle").symlink_to(tiny_bundle)
    (folder / "model").symlink_to(tiny_model)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photos" / "photograph-of-two-dogs.png")
    cases = [made_case("vision"), made_case("encode_image InternVL-C", kind="chained")]
    write(made_profile(cases).to_json(), folder / "receipt.json")
    entry = folder / "cache" / "engines" / ("vision-" + 40 * "f")
    entry.mkdir(parents=True)
    (entry / "engine").write_bytes(b"x")
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(folder / "cache"))
    return folder


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize(
    "line",
    [pytest.param(x, marks=pytest.mark.slow) if x.startswith("profile BUNDLE") else x for x in LINES],
)
def test_no_word_of_a_table_is_broken(
    line: str,
    columns: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    expected: Counter[str] = Counter()
    lines: list[str] = []
    plain = output.layout

    def recorded(title: str, heads: Any, rows: Any, width: int) -> tuple[list[str], list[str]]:
        cells = [[output.show(cell) for cell in row] for row in rows]
        expected.update(" ".join([title, *(cell for row in cells for cell in row)]).split())
        head, body = plain(title, heads, rows, width)
        lines.extend([*head, *body])
        return head, body

    monkeypatch.setattr(output, "layout", recorded)
    names = {"BUNDLE": "bundle", "MODEL": "model", "PHOTOS": "photos", "RECEIPT": "receipt.json"}
    words = [names.get(word, word).replace("FOLDER", str(folder)) for word in line.split()]
    words = [str(folder / word) if word in names.values() else word for word in words]
    assert cli.main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert lines
    assert set(lines) <= set(printed.splitlines())
    shown = Counter(printed.split())
    east = {word for word in expected if any(c >= "\u2e80" for c in word)}  # these may break anywhere
    assert not {word for word in expected if expected[word] > shown[word]} - east
    assert not [text for text in lines if len(text) > columns and len(text.split()) > 1]


def test_all_tables_are_laid_out_in_one_place() -> None:
    others = [path.name for path in CLI.glob("*.py") if "rich.table" in path.read_text(encoding="utf-8")]
    assert others == []


def test_a_cause_that_components_share_is_printed_once() -> None:
    lines = [
        "ort, vision: no FP8: none",
        "ort, text: no FP8: none",
        "rtx-sm89, text: no FP8: none",
        "ort, vision: odd",
    ]
    assert by_cause(lines) == {"no FP8: none": "ort: vision, text; rtx-sm89: text", "odd": "ort: vision"}
