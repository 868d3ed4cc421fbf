"""``ivl-export verify --layers``: tables, JSON, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest

from ivl_export import cli
from ivl_export.bundle import Bundle, seal
from ivl_export.bundle.manifest import Component, Manifest, Model
from ivl_export.bundle.spec import Axis, ComponentSpec, TensorSpec
from ivl_export.verify.report import VerificationReport, VerifiedAttention, VerifiedProduct

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const shown=()=>[...document.querySelectorAll("tbody tr")].filter(r=>!r.hidden)
  .map(r=>r.cells[3].textContent);
const out={all:shown().length,count:count.textContent};
search.value="blocks.1 FP8";search.dispatchEvent(new Event("input"));out.found=shown();
search.value="";search.dispatchEvent(new Event("input"));
picks[2].value="attention";picks[2].dispatchEvent(new Event("change"));out.attention=shown();
picks[2].value="";picks[2].dispatchEvent(new Event("change"));
const sort=i=>document.querySelectorAll("th button")[i].click();
sort(8);out.smallest=rows[0].cells[8].textContent;sort(8);out.largest=rows[0].cells[8].textContent;
out.sorted=document.querySelectorAll("th")[8].getAttribute("aria-sort");
out.wide=document.documentElement.scrollWidth<=innerWidth;
const level=c=>{const v=c.match(/[0-9.]+/g).map(Number);return (v[0]+v[1]+v[2])/3};
out.light=level(getComputedStyle(document.body).backgroundColor);
out.ink=level(getComputedStyle(document.body).color);
document.body.innerHTML="<pre id=probe>"+JSON.stringify(out)+"</pre>";
</script>"""


def product(name: str, precision: str, weight_bytes: int, **more: object) -> VerifiedProduct:
    shape = (96, 32)
    fields = {"weight": f"{name}.weight", "scheme": "fp8", "kernel": f"{name}_k", "shape": shape, **more}
    return VerifiedProduct(node=name, precision=precision, weight_bytes=weight_bytes, **fields)  # type: ignore[arg-type]


def graph() -> bytes:
    """One product of an FP8 input and an FP8 weight."""
    helper, tensor, fp8 = onnx.helper, onnx.helper.make_tensor, onnx.TensorProto.FLOAT8E4M3FN
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "blocks.1.q/q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "blocks.1.q/dq"),
        helper.make_node("DequantizeLinear", ["blocks.1.q.weight", "s", "z"], ["w"], "blocks.1.q/wdq"),
        helper.make_node("MatMul", ["d", "w"], ["y"], "blocks.1.q"),
    ]
    values = [
        tensor("s", onnx.TensorProto.FLOAT, [], [0.5]), tensor("z", fp8, [], bytes(1), raw=True),
        tensor("blocks.1.q.weight", fp8, [8, 8], bytes(64), raw=True),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 8]) for name in "xy"]
    model: bytes = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], values)
    ).SerializeToString()
    return model


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    merged = ("blocks.0.k", "blocks.0.q")
    report = VerificationReport(
        backend="tensorrt-rtx", profiles=1, kernels=9,
        gemms=(
            product("blocks.0.q", "fp8xfp8", 3072, merged=merged),
            product("blocks.0.k", "fp8xfp8", 3072, merged=merged),
            product("blocks.1.q", "fp8xfp8", 3072),
            product("blocks.1.fc", "fp8xfp8", 3072, fused=("blocks.1.gelu",)),
            product("<head>", "bf16xbf16", 6144, scheme="", cause="the graph quantises neither factor"),
        ),
        attention=(
            VerifiedAttention(("blocks.0.sdpa",), True, "_gemm_mha_v2", ("bf16",) * 3, 32),
            VerifiedAttention(("blocks.1.sdpa",), False, "", ("bf16",) * 3, 8, "head size 8: too small"),
        ),
        casts=("seen",),
        convolutions=(product("patch", "bf16xbf16", 8192, scheme="", op="Conv", cause="not quantised"),),
        constant_bytes=40_000, file_bytes=3 << 20,
    )  # fmt: skip
    promised = {"blocks.0.q": "fp8", "blocks.0.k.weight": "fp8", "blocks.1.q": "fp8", "blocks.1.fc": "fp8"}
    proof = {"promised": promised, **report.to_json()}
    receipt = json.dumps({"tensorrt-rtx-sm89": {"vision": proof}})
    files = {"onnx/vision.bf16.onnx": graph(), "receipts/verification.json": receipt.encode()}
    for rel, data in files.items():
        path = tmp_path / "staging" / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    tensor = TensorSpec("x", "float", ("batch", 8))
    spec = ComponentSpec("vision", (tensor,), (tensor,), (Axis("batch", 1, 2, 4),))
    manifest = Manifest(
        model=Model("nano & co", "models/nano", {}, {}, 2.5, 1234567), recipe="fp8", compute_dtype="bf16",
        rules={}, calibration=None,
        components={"vision": Component(spec, {"bf16": "onnx/vision.bf16.onnx"})}, receipts=("verification",),
    )  # fmt: skip
    return seal(tmp_path / "staging", manifest, tmp_path / "bundle")


def test_tables_fold_equal_blocks(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle.root), "--layers"]) == 0
    out = capsys.readouterr().out
    assert "4 fp8xfp8, 1 bf16xbf16" in out
    assert "1 of 2 fused" in out
    assert "26.0 KiB in 39.1 KiB of constants, a file of 3.0 MiB" in out
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert ["blocks.*.q", "1", "fp8", "fp8xfp8", "merged with k", "96x32", "3.0 KiB", "8", "-"] in rows
    assert next(row for row in rows if row[0] == "seen")[-1] == "a separate cast between float types"
    assert next(r for r in rows if r[:2] == ["blocks.*.sdpa", "1"] and "not fused" in r)[-1].startswith(
        "head size"
    )


def test_without_layers_their_proof_is_a_line(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle.root)]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.strip().startswith("tensorrt-rtx-sm89"))
    cells = re.split(r"\s{2,}", line.strip())
    assert cells == ["tensorrt-rtx-sm89", "vision", "4", "4 fp8xfp8, 1 bf16xbf16", "1 of 2", "none"]
    assert "blocks.0.q" not in out


def test_json_is_the_receipt(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle.root), "--layers", "--component", "vision", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == bundle.receipt("verification")


def test_a_bundle_without_a_receipt_is_read_here(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(tiny_bundle), "--layers", "--component", "vision", "--json"]
    assert cli.main(command) == 0
    report = VerificationReport.from_json(json.loads(capsys.readouterr().out)["onnxruntime-cpu"]["vision"])
    assert set(report.precisions) == {"fp32xfp32"}
    assert {p.weight_bits for p in report.gemms} == {32}


def test_what_is_not_there_is_said(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(bundle.root)
    assert cli.main(["verify", root, "--layers", "--component", "qllama"]) == 2
    assert "There are reports of vision." in capsys.readouterr().err
    assert cli.main(["verify", root, "--layers", "--engine", "tensorrt-sm90"]) == 2
    assert cli.main(["verify", root, "--layers", "--html", str(bundle.root / "no" / "x.html")]) == 2
    assert cli.main(["verify", root, "--layers", "--layer-info", "x.json"]) == 2
    receipt = bundle.root / "receipts" / "verification.json"
    receipt.write_text(json.dumps([{"gemms": 1}]).ljust(receipt.stat().st_size))
    assert cli.main(["verify", root, "--layers"]) == 8


def test_layer_information_of_tensorrt(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = {
        "Name": "blocks_1_q_myl0_1", "LayerType": "gemm", "Metadata": "[ONNX Layer: blocks.1.q]",
        "Inputs": [{"Name": "q", "Dimensions": [-1, 8], "Format/Datatype": "FP8"}],
        "Outputs": [{"Name": "y", "Dimensions": [-1, 8], "Format/Datatype": "Float"}],
        "TacticName": "sm89_xmma_gemm_e4m3f32_e4m3f32_f32_tn_n_tilesize64x64x64",
    }  # fmt: skip
    info = tmp_path / "info.json"
    info.write_text(json.dumps({"Layers": [kernel], "Bindings": ["x", "y"]}))
    command = ["verify", str(bundle.root), "--layers", "--component", "vision", "--layer-info", str(info)]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["tensorrt (info.json)"]["vision"]
    assert (report["precisions"], report["fallbacks"]) == ({"fp8xfp8": 1}, [])
    assert report["promised"]["blocks.1.q"] == "fp8"
    info.write_text("{}")
    assert cli.main(command) == 8


def test_the_page_needs_nothing_and_escapes(bundle: Bundle, tmp_path: Path) -> None:
    page = tmp_path / "layers.html"
    assert cli.main(["verify", str(bundle.root), "--layers", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert '<td class="mono name">&lt;head&gt;</td>' in text
    assert "nano &amp; co" in text
    assert not re.search(r"https?:|//[a-z]|src=", text)
    assert [p.name for p in tmp_path.glob(".layers*")] == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(bundle: Bundle, tmp_path: Path, scheme: str) -> None:
    page = tmp_path / "layers.html"
    assert cli.main(["verify", str(bundle.root), "--layers", "--html", str(page)]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    process = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,900",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
         f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in process.stderr, process.stderr
    match = re.search(r"<pre id=\"probe\">(.*?)</pre>", process.stdout)
    assert match is not None, process.stdout[-2000:]
    data = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert (data["all"], data["count"]) == (9, "9 of 9 layers")
    assert data["found"] == ["blocks.1.q", "blocks.1.fc"]
    assert data["attention"] == ["blocks.0.sdpa", "blocks.1.sdpa"]
    assert (data["smallest"], data["largest"], data["sorted"]) == ("", "8.0 KiB", "descending")
    assert data["wide"] is True
    assert (data["light"] > 200, data["ink"] < 60) == ((scheme == "light"),) * 2
