"""Layer information of TensorRT 10 and 11, written by hand from the vendor's documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ivl_export.errors import BuildError, CapabilityError, IntegrityError
from ivl_export.verify.expectations import check_expectations
from ivl_export.verify.inspector import inspector_programs, read_inspector

if TYPE_CHECKING:
    from .conftest import Make

FP8 = "sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x64_stage4_warpsize2x2x1_tensor16x8x32"
BF16 = "sm80_xmma_gemm_bf16bf16_bf16f32_f32_nn_n_tilesize64x64x64_stage4_warpsize2x2x1_tensor16x8x16"
PRODUCTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
TEN = {
    "FP8": {"Format/Datatype": "FP8"},
    "BFloat16": {"Format/Datatype": "Row major linear BFloat16 format"},
    "Float": {"Format/Datatype": "Row major linear FP32"},
}
ELEVEN = {
    "FP8": {"DataType": "FP8", "Format": "Row major linear format (kLINEAR)"},
    "BFloat16": {"DataType": "BFloat16", "Format": "Row major linear format (kLINEAR)"},
    "Float": {"DataType": "Float", "Format": "Row major linear format (kLINEAR)"},
}


def layer(
    style: dict[str, Any],
    kind: str,
    nodes: list[str],
    inputs: list[str],
    output: str,
    tactic: str,
    **more: Any,
) -> dict[str, Any]:
    def tensor(i: int, dtype: str) -> dict[str, Any]:
        return {"Name": f"__mye{i}", "Location": "Device", "Dimensions": [-1, 17, 128], **style[dtype]}

    return {
        "Name": f"{'+'.join(n.replace('.', '_') for n in nodes)}_myl0_7",
        "LayerType": kind,
        "Inputs": [tensor(i, dtype) for i, dtype in enumerate(inputs)],
        "Outputs": [tensor(99, output)],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {n}]" for n in nodes),
        **more,
    }


def vit_layers(style: dict[str, Any]) -> list[dict[str, Any]]:
    """One block as an Ada engine has it."""
    products = [
        layer(style, "gemm", [name, f"{name}/dq", f"{name}/wdq", f"{name}/t"], ["FP8"], "BFloat16", FP8)
        for name in PRODUCTS
    ]
    mha = layer(style, "kgen", ["attn/sdpa"], ["BFloat16"] * 3, "BFloat16", "_gemm_mha_v2_0xda1b288befb83aef")
    cast = layer(style, "kgen", ["ONNXTRT_cast"], ["Float"], "BFloat16", "__myl_Cast_0x12ab")
    cast["Name"] = "__myl_Cast_myl0_3"
    wait = {"Name": "wait_1", "LayerType": "wait", "Inputs": [], "Outputs": [], "Metadata": ""}
    return [cast, *products, mha, wait]


def write(path: Path, layers: list[Any], release: int) -> Path:
    tensors: dict[str, Any] = {"Bindings": ["x", "y"]}
    if release == 11:
        names = (("x", "Input"), ("y", "Output"))
        tensors = {
            "I/O Tensors": [
                {"Name": n, "IOMode": m, "DataType": "BFloat16", "Dimensions": [-1, 17, 128],
                 "Location": "Device", "IsShapeInferenceIO": False} for n, m in names
            ]
        }  # fmt: skip
    path.write_text(json.dumps({"Layers": layers, **tensors}))
    return path


@pytest.mark.parametrize(("release", "style"), [(10, TEN), (11, ELEVEN)])
def test_both_releases_are_read(make: Make, tmp_path: Path, release: int, style: dict[str, Any]) -> None:
    sample = make("vit", dtype="bf16", scheme="fp8")
    report = read_inspector(write(tmp_path / "info.json", vit_layers(style), release), sample.path)
    assert (report.backend, report.profiles, report.kernels) == ("tensorrt", 1, 6)
    assert report.precisions == {"fp8xfp8": 4}
    assert report.fallbacks == ()
    (attention,) = report.attention
    assert (attention.fused, attention.kernel, attention.types) == (True, "_gemm_mha_v2", ("bf16",) * 3)
    assert report.casts == ("ONNXTRT_cast",)
    assert report.weight_bytes == 0  # matrix kernels do not report it
    check_expectations(report, {**sample.promised, "attn/sdpa": "bf16"})


@pytest.mark.parametrize(
    ("tactic", "inputs", "precision"),
    [
        (BF16, ["BFloat16"], "bf16xbf16"),
        (BF16, [], "bf16xbf16"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_nn", ["BFloat16"], "bf16xunknown"),
    ],
)
def test_a_promise_is_kept_by_known_types_only(
    make: Make, tmp_path: Path, tactic: str, inputs: list[str], precision: str
) -> None:
    sample = make("vit", dtype="bf16", scheme="fp8")
    layers = vit_layers(TEN)
    layers[1] = layer(TEN, "gemm", ["attn.qkv"], inputs, "BFloat16", tactic)
    report = read_inspector(write(tmp_path / "info.json", layers, 10), sample.path)
    assert report.gemms[0].precision == precision
    with pytest.raises(BuildError, match=rf"attn\.qkv: promised fp8, runs {precision} \(its result is split"):
        check_expectations(report, sample.promised)
    with pytest.raises(BuildError, match="promised fp8"):  # what is told contradicts
        check_expectations(report, sample.promised, require_proof=False)


@pytest.mark.parametrize(
    ("tactic", "inputs", "precision"),
    [
        ("cutlass3x_sm90_tensorop_s64x128x32gemm_e4m3_e4m3_f32_bf16", ["FP8"], "fp8xunknown"),
        ("nvjet_qqtst_128x256_64x6_1x2_h_bz_coopB_TNT", ["FP8"], "fp8xunknown"),
        ("", [], "unknownxunknown"),
    ],
)
def test_a_kernel_of_an_unknown_name_is_not_told(
    make: Make, tmp_path: Path, tactic: str, inputs: list[str], precision: str
) -> None:
    sample = make("vit", dtype="bf16", scheme="fp8")
    layers = vit_layers(TEN)
    layers[1] = layer(TEN, "gemm", ["attn.qkv"], inputs, "BFloat16", tactic)
    report = read_inspector(write(tmp_path / "info.json", layers, 10), sample.path)
    assert report.gemms[0].precision == precision
    assert ([g.node for g in report.not_told], report.fallbacks) == (["attn.qkv"], ())
    assert report.to_json()["not_told"] == ["attn.qkv"]
    rest = check_expectations(report, sample.promised, require_proof=False)
    assert rest == (f"attn.qkv: {precision}",)
    with pytest.raises(BuildError, match=rf"attn\.qkv: promised fp8, runs {precision}"):
        check_expectations(report, sample.promised)


def test_convolutions_tell_their_weights(make: Make, tmp_path: Path) -> None:
    sample = make("patches", dtype="bf16", scheme="fp8")
    style = {**TEN, "BFloat16": {"Format/Datatype": "N/A due to dynamic shapes"}}
    patch = layer(
        style, "CaskConvolution", ["patch"], ["BFloat16"], "BFloat16",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64",
        Weights={"Type": "BFloat16", "Count": 128 * 3 * 14 * 14}, ParameterType="Convolution",
    )  # fmt: skip
    del patch["Metadata"]  # as older releases: the name alone
    patch["Name"] = "patch + flat/reshape"
    proj = layer(TEN, "gemm", ["proj"], ["FP8"], "BFloat16", FP8)
    report = read_inspector(write(tmp_path / "info.json", [patch, proj], 10), sample.path)
    (result,) = report.convolutions
    assert (result.precision, result.weight_bits) == ("bf16xbf16", 16)
    check_expectations(report, {**sample.promised, "patch": "bf16"})


def test_single_kernels_and_profiles(make: Make, tmp_path: Path) -> None:
    sample = make("vit", dtype="bf16", scheme="fp8", decomposed=True)
    layers = vit_layers(TEN)[:-2]
    layers += [
        layer(TEN, "gemm", [node], ["BFloat16", "BFloat16"], "BFloat16", BF16) for node in ("qk", "pv")
    ]
    second = json.loads(json.dumps(layers))
    for item in second:
        item["Name"] += " [profile 1]"
        item["Metadata"] = item["Metadata"].replace("]", " [profile 1]]", 1)
    report = read_inspector(write(tmp_path / "info.json", layers + second, 10), sample.path)
    assert report.profiles == 2
    assert report.precisions == {"fp8xfp8": 4}
    names = [{n for k in p.kernels for n in k.layers} for p in inspector_programs(tmp_path / "info.json")]
    assert names[0] == names[1]
    (attention,) = report.attention
    assert (attention.fused, attention.types) == (False, ("bf16",) * 3)
    assert attention.cause == "this release chose single kernels (head size 32)"


def test_what_is_no_layer_information_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    with pytest.raises(CapabilityError, match="names only"):
        inspector_programs(write(path, ["a", "b"], 10))
    for text in ("", "[]", "{}", '{"Layers": []}', '{"Layers": [{}], "Bindings": []}', "[" * 100000):
        path.write_text(text)
        with pytest.raises(IntegrityError, match="not layer information"):
            inspector_programs(path)
    with pytest.raises(IntegrityError):
        inspector_programs(write(path, [], 11))
    with pytest.raises(IntegrityError):
        inspector_programs(tmp_path / "absent.json")
