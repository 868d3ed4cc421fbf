"""The HTML report in a real browser: it loads silently and draws its charts, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ivl_export import cli
from ivl_export.cli.layers_page import page as layers_page
from ivl_export.profiles.measure.receipt import read, write
from ivl_export.profiles.report.page import layer_page, page
from ivl_export.tests.profiles.made_profiles import made_case, made_layers, made_profile
from ivl_export.tests.profiles.report.test_charts import NAMES, full

RECEIPT = Path(__file__).parents[3] / "profiles" / "receipts" / "nano-fp8.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt install chromium)")
PROBE = """
<script>
addEventListener("load", () => {
  const found = {errors: [], charts: {}, scheme: matchMedia("(prefers-color-scheme: dark)").matches,
                 scroll: document.documentElement.scrollWidth - innerWidth,
                 page: getComputedStyle(document.body).backgroundColor};
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.viewBox.baseVal, texts = [...svg.querySelectorAll("text")];
    const places = texts.map(t => [t.textContent, t.getBBox()]);
    const shown = svg.getBoundingClientRect();
    found.charts[svg.id] = {
      marks: svg.querySelectorAll("rect,circle,polyline").length, width: shown.width, height: shown.height,
      fill: getComputedStyle(texts[0]).fill,
      outside: places.filter(([_, b]) => b.x < -1 || b.y < -1 || b.x + b.width > box.width + 1 ||
                                         b.y + b.height > box.height + 1).map(([t]) => t),
      touching: places.flatMap(([t, a], i) => places.slice(0, i).filter(([_, b]) =>
        Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x) > 1.5 &&
        Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y) > 4.5).map(([u]) => t + " / " + u)),
    };
  }
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1000",
        "--disable-dev-shm-usage", "--disable-extensions", "--no-first-run",
        f"--user-data-dir={path.parent}/u",
    )  # fmt: skip
    line = [BROWSER, *flags, *options, path.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)


def probed(text: str, folder: Path, *options: str) -> dict[str, Any]:
    """A browser's findings on the page; the probe needs the page's policy lifted."""
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    path = folder / "probed.html"
    path.write_text(copy.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    dom = browse(path, "--dump-dom", *options).stdout
    (actual,) = re.findall(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    result: dict[str, Any] = json.loads(html.unescape(actual))
    return result


@pytest.fixture(scope="module", params=["made up", "real"])
def text(request: pytest.FixtureRequest) -> str:
    return page(full() if request.param == "made up" else read(RECEIPT))


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_charts_are_drawn_and_labels_readable(text: str, dark: bool, tmp_path: Path) -> None:
    result = probed(text, tmp_path, f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    assert result["scheme"] is dark
    assert result["page"] == ("rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)")
    assert result["scroll"] <= 0
    assert set(result["charts"]) <= set(NAMES)
    assert {"table19", "roofline", "histograms", "layers"} <= set(result["charts"])
    for name, chart in result["charts"].items():
        assert chart["marks"] > 5, name
        assert chart["width"] > 800, name
        assert chart["height"] > 100, name
        assert chart["outside"] == [], name
        assert chart["touching"] == [], name
        assert chart["fill"] != result["page"], name


@needs_browser
def test_the_page_loads_silently_and_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    shot = tmp_path / "shot.png"
    process = browse(path, "--enable-logging=stderr", f"--screenshot={shot}")
    assert "CONSOLE" not in process.stderr
    from PIL import Image

    with Image.open(shot) as image:
        assert len(image.convert("RGB").getcolors(1 << 22) or ()) > 20


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_pages_of_layers_are_readable(dark: bool, tmp_path: Path) -> None:
    """The times of layers, and what layers really are (``verify --layers``): one style as_csv."""
    option = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    text = layer_page("Layers", [made_layers(name) for name in ("vision", "qllama_text")])
    result = probed(text, tmp_path, option)
    chart = result["charts"]["layer-times"]
    assert chart["marks"] > 5
    assert chart["outside"] == chart["touching"] == []
    inspected = layers_page("nano", "fp8", {})
    assert probed(inspected, tmp_path, option)["page"] == result["page"]
    for page_text in (text, inspected):
        path = tmp_path / "page.html"
        path.write_text(page_text, encoding="utf-8")
        assert "CONSOLE" not in browse(path, option, "--enable-logging=stderr", "--dump-dom").stderr


@needs_browser
def test_a_fault_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(full()).replace("</body>", "<script>fail()</script></body>"), encoding="utf-8")
    assert (
        "CONSOLE" in browse(path, "--enable-logging=stderr", "--dump-dom").stderr
    )  # its policy refuses scripts


def test_nothing_is_fetched_and_everything_escaped() -> None:
    case = made_case('<img src="http://example.org/x">')
    text = page(made_profile([case], notes=("<b>&",)))
    assert "<img" not in text
    assert "&lt;b&gt;&amp;" in text
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["']?(?!data:)[a-z/]""", page(full()))
    assert "<script" not in page(full())


def test_units_are_everywhere() -> None:
    text = page(full())
    for unit in (
        "ms a pair",
        "GFLOP/s",
        "FLOP/byte",
        "GB/s",
        "items per second",
        "median ms of a call",
        "GMAC",
    ):
        assert unit in text, unit
    heads = re.findall(r"<th[^>]*>(.*?)</th>", text)
    assert {"p50 ms", "p99 ms", "floor ms", "ViT ms", "pairs/s"} <= set(heads)


@pytest.mark.slow
def test_the_verb_writes_page_and_charts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    receipt, out = tmp_path / "r.json", tmp_path / "page.html"
    write(full().to_json(), receipt)
    line = ["profile", str(receipt), "--html", str(out), "--png", str(tmp_path / "png")]
    assert cli.main(line) == 0
    captured = capsys.readouterr().out
    assert f"Written: {out}" in captured
    assert out.read_text(encoding="utf-8") == page(full())
    assert sorted(p.stem for p in (tmp_path / "png").iterdir()) == sorted(NAMES)
