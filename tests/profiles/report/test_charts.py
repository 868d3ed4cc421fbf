"""Charts as marks, SVG and PNG: everything inside its picture, in proportion, and named."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.errors import BuildError, CapabilityError
from ivl_export.profiles.cost.table19 import Column, Row, Table19, merged
from ivl_export.profiles.cost.table19 import Line as TableLine
from ivl_export.profiles.measure.layer_profile import LayerProfile, LayerTime
from ivl_export.profiles.measure.receipt import Profile
from ivl_export.profiles.report.charts import charts
from ivl_export.profiles.report.drawing import (
    PALETTE,
    Dot,
    Drawing,
    Line,
    Rect,
    Scale,
    Text,
    decades,
    fitted,
    number,
    squarified,
    text_width,
    ticks,
)
from ivl_export.profiles.report.html import style, svg
from ivl_export.profiles.report.png import write_drawings
from ivl_export.profiles.report.treemap import layer_time_map
from ivl_export.tests.profiles.made_profiles import made_case, made_cost, made_layers, made_profile

NAMES = ["table19", "roofline", "histograms", "batches", "layers", "layer-times"]


def full(batches: tuple[int, ...] = (1, 8, 128)) -> Profile:
    """A profile with something for every chart."""
    row = Row("InternVL-C", 224, 3.0, None, 1.0, 4.0, 250.0)
    line = TableLine("InternVL-14B", "InternVL-C", 224, None, (row,), (None,))
    table = merged([Table19((Column("tensorrt", "fp8", "L40S", 128),), (line,), (), (), ())])
    cases = [
        made_case(name, [batch * scale * (1 + i % 7 / 10) for i in range(40)], batch)
        for name, scale in (("vision", 2.0), ("qllama_query", 0.5))
        for batch in batches
    ]
    costs = [made_cost(name, batch) for name in ("vision", "qllama_query") for batch in batches]
    return made_profile(cases, costs, table, layers=(made_layers(),))


def boxes(drawing: Drawing) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of every mark."""
    results = []
    for mark in drawing.marks:
        if isinstance(mark, Rect):
            results.append((mark.x, mark.y, mark.x + mark.width, mark.y + mark.height))
        elif isinstance(mark, Dot):
            r = mark.radius
            results.append((mark.x - r, mark.y - r, mark.x + r, mark.y + r))
        elif isinstance(mark, Line):
            xs, ys = [x for x, _ in mark.points], [y for _, y in mark.points]
            results.append((min(xs), min(ys), max(xs), max(ys)))
        else:
            wide = text_width(mark.text, mark.size)
            left = mark.x - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[mark.anchor]
            results.append((left, mark.y - mark.size, left + wide, mark.y))
    return results


def test_every_chart_is_inside_its_picture() -> None:
    drawings = charts(full())
    assert [drawing.name for drawing in drawings] == NAMES
    for drawing in drawings:
        for left, top, right, bottom in boxes(drawing):
            assert left >= -1, drawing.name
            assert top >= -1, drawing.name
            assert right <= drawing.width + 1, drawing.name
            assert bottom <= drawing.height + 1, drawing.name


def test_what_was_not_measured_is_not_drawn() -> None:
    nothing = made_profile()
    assert charts(nothing) == []
    without = made_profile([made_case()], [made_cost()], ceilings=None)
    assert [drawing.name for drawing in charts(without)] == ["histograms", "layers"]
    few = made_profile([made_case(samples_ms=[1.0] * 9)])
    assert charts(few) == []  # nine calls make no histogram, one batch no sweep
    empty = [mark.text for mark in charts(full())[0].marks if isinstance(mark, Text)]
    assert empty.count("not measured") == 5  # the paper's other lines


def test_bars_are_as_long_as_their_times() -> None:
    bars = {
        mark.title: mark.width for mark in charts(full())[0].marks if isinstance(mark, Rect) and mark.title
    }
    scale = bars["paper: A100, bf16, ViT: 66.9 ms"] / 66.9
    assert bars["tensorrt fp8, ViT: 3 ms"] == pytest.approx(3 * scale)
    assert bars["tensorrt fp8, QLLaMA text: 1 ms"] == pytest.approx(scale)


def test_areas_of_the_treemap_are_the_work() -> None:
    (drawing,) = [d for d in charts(full((1, 8))) if d.name == "layers"]
    areas = [
        (mark.width + 2) * (mark.height + 2)
        for mark in drawing.marks
        if isinstance(mark, Rect) and "vision_model" in mark.title
    ][:3]
    assert areas[0] / areas[2] == pytest.approx(40 / 30, rel=1e-6)


def test_areas_of_the_other_treemap_are_the_times() -> None:
    (drawing,) = [d for d in charts(full()) if d.name == "layer-times"]
    text = {m.title: (m.width + 2) * (m.height + 2) for m in drawing.marks if isinstance(m, Rect)}
    two = next(area for title, area in text.items() if "mlp.fc1 (2): 2 ms, 50.0%" in title)
    one = next(area for title, area in text.items() if "attn.qkv (1): 1 ms, 25.0%" in title)
    assert two / one == pytest.approx(2.0)
    counted = next(d for d in charts(full()) if d.name == "layers")
    assert "not timed" in counted.caption
    assert drawing.title.endswith("measured")


def test_the_treemaps_colours_and_labels_say_what_they_are() -> None:
    layers = (
        LayerTime("b.layers.0.self_attn/MatMulFusion/", "FusedMatMul", 1.0),
        LayerTime("norm", "Norm", 0.5),
        *(LayerTime(f"mm_projector.{i}", "MatMul", 0.05) for i in range(4)),
    )
    drawing = layer_time_map([LayerProfile("decoder", "onnxruntime", {"batch": 1}, 10, 2.0, layers)])
    assert drawing is not None
    words = [mark.text for mark in drawing.marks if isinstance(mark, Text)]
    assert words[:2] == ["attention", "other"]
    assert {"self_attn/MatMulFusion (1)", "norm (1)"} <= set(words)
    assert words.count("mm_p…") == 4, "a number alone says nothing"


@given(
    st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=25).map(lambda v: sorted(v, reverse=True)),
    st.floats(20.0, 2000.0),
    st.floats(20.0, 2000.0),
)
def test_squares_fill_their_rectangle(values: list[float], width: float, height: float) -> None:
    result = squarified(values, 5.0, 7.0, width, height)
    assert len(result) == len(values)
    for value, (x, y, w, h) in zip(values, result, strict=True):
        assert w * h == pytest.approx(width * height * value / sum(values), rel=1e-6)
        assert x >= 5 - 1e-6
        assert y >= 7 - 1e-6
        assert x + w <= 5 + width * (1 + 1e-9) + 1e-6
        assert y + h <= 7 + height * (1 + 1e-9) + 1e-6
    for i, (ax, ay, aw, ah) in enumerate(result):
        for bx, by, bw, bh in result[:i]:
            over_x = min(ax + aw, bx + bw) - max(ax, bx)
            over_y = min(ay + ah, by + bh) - max(ay, by)
            assert over_x < 1e-4 or over_y < 1e-4


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, length: float) -> None:
    result = ticks(low, low + length)
    assert 1 <= len(result) <= 7
    assert all(low - 1e-6 * length <= value <= low + length * (1 + 1e-6) for value in result)
    assert ticks(3.0, 3.0) == [3.0]


@given(st.floats(1e-6, 1e6), st.floats(1.5, 1e6))
def test_decades_are_inside(low: float, factor: float) -> None:
    for value in decades(low, low * factor):
        assert low * 0.99 <= value <= low * factor * 1.01


def test_texts_and_numbers() -> None:
    assert fitted("short", 100) == "short"
    assert fitted("a rather long label", 60).endswith("…")
    assert text_width(fitted("a rather long label", 60)) <= 60
    assert fitted("anything", 3) == ""
    assert [number(v) for v in (0, 0.12345, 12.3456, 1234.5, 7.0, 1e-5, 2e7)] == [
        "0", "0.123", "12.3", "1,234", "7", "1e-05", "2e+07",
    ]  # fmt: skip
    log = Scale(1.0, 100.0, 0.0, 200.0, log=True)
    assert [log(1.0), log(10.0), log(100.0)] == [0.0, 100.0, 200.0]
    assert Scale(2.0, 2.0, 0.0, 10.0)(2.0) == 5.0


def test_svg_is_well_formed_and_escaped() -> None:
    drawing = Drawing("x", 'A "title" & <more>', "caption", 100, 50)
    drawing.add(
        Rect(1, 2, 3, 4, "s0", "a < b", 0.5), Dot(1, 1, 2, "s1"), Line(((0, 0), (1, 1)), "axis", 2, True),
        Text(3, 4, "<script>", "middle", bold=True),
    )  # fmt: skip
    root = ElementTree.fromstring(svg(drawing))
    assert root.attrib["viewBox"] == "0 0 100 50"
    assert [child.tag for child in root] == ["rect", "circle", "polyline", "text"]
    assert root[3].text == "<script>"
    assert root[0][0].text == "a < b"
    for drawn in charts(full()):
        ElementTree.fromstring(svg(drawn))
    for role in PALETTE:
        assert f"--{role}:" in style()


def contrast(a: str, b: str) -> float:
    """Contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("which", [0, 1])
def test_colours_are_visible_on_the_page(which: int) -> None:
    page = PALETTE["page"][which]
    for role in ("text", "muted"):
        assert contrast(PALETTE[role][which], page) >= 4.5, role  # WCAG AA for text
    for role in ("s0", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(PALETTE[role][which], page) >= 3.0, role  # and for graphics


@pytest.mark.slow
def test_png_of_every_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    pytest.importorskip("matplotlib")
    written = write_drawings(charts(full()), tmp_path / "new")
    assert [path.name for path in written] == [f"{name}.png" for name in NAMES]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(path.name for path in written)
    for path, drawing in zip(written, charts(full()), strict=True):
        with Image.open(path) as image:
            assert image.width == 2 * drawing.width
            assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 10
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="Cannot write into"):
        write_drawings(charts(full()), tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CapabilityError, match="plots"):
        write_drawings(charts(full()), tmp_path)
